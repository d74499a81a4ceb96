"""A Hugging Face vision-language model as a backbone: images and prompts in, hidden states out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft import PeftConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, Qwen2VLImageProcessor
from transformers.cache_utils import Cache
from transformers.image_processing_backends import TorchvisionBackend
from transformers.modeling_layers import GradientCheckpointingLayer

from zr.models.adapters import restore_precision, save_model
from zr.models.branches import CachedBranches, WholeBranches
from zr.models.images import ImageInput, PatchGrid, as_image_lists, of_sample
from zr.models.prefix import BranchCache, CachedPrefix, Prefix, WholePrefix, pad_left, pad_right
from zr.models.prompts import PromptBuilder, read_tokenizer
from zr.models.sharding import in_order, inside, shard, sharded, through
from zr.rubric import Rubric

__all__ = ["VLMBackbone"]

CACHED = {"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"}
"""Families whose prefix is kept as states: their positions can be given, and their layers attend fully or linearly."""


class VLMBackbone(nn.Module):
    """An image-text-to-text model of transformers behind the doors ``encode``, ``extend`` and ``features``.

    Qwen3-VL (full attention), Qwen3.5 (three layers of linear attention to one of full attention) and Qwen2.5-VL keep the
    prefix as the states of their layers. Any other family runs whole sequences: as exact, and slower by the number of branches.

    Args:
        model: as ``AutoModelForImageTextToText`` loads it; adapters of peft are honoured where transformers has added them
            (``model.add_adapter``, ``model.load_adapter``).
        processor: the family's processor (fast tokenizer, chat template, torchvision-backed image processor).
        rubric: scale and wording; the wording is rendered by the processor's chat template.
        truncate: cut prompts that do not fit into the model's context, with a warning, rather than refuse them.

    Raises:
        ValueError: a wording that the tokenizer cannot take (see :class:`~zr.models.prompts.PromptBuilder`).
    """

    def __init__(self, model: Any, processor: Any, rubric: Rubric, truncate: bool = False) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.rubric = rubric
        length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.prompts = PromptBuilder(processor.tokenizer, rubric, processor.chat_template, length, truncate)
        images = processor.image_processor
        self._grid = PatchGrid.of(images) if isinstance(images, Qwen2VLImageProcessor) else None

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def output(self) -> nn.Module:
        """The language model's output layer, ``(..., H) -> (..., V)``."""
        module: nn.Module = self.model.get_output_embeddings()
        return module

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def logits(self, hidden: Tensor) -> Tensor:
        """What the output layer makes of hidden states, ``(..., H) -> (..., V)``."""
        return through(self.output, hidden)

    def shard(self, mesh: DeviceMesh) -> None:
        """Share the weights with other processes; see :mod:`zr.models.sharding`.

        Args:
            mesh: of one dimension.

        Raises:
            ValueError: a family that runs whole sequences, in as many passes as there are forms of images.
        """
        if self.model.config.model_type not in CACHED:
            raise ValueError(
                f"{self.model.config.model_type} runs whole sequences, whose number of passes depends on the images, so "
                f"it cannot be sharded: train it by strategy ddp, or take one of {', '.join(sorted(CACHED))}"
            )
        shard(self.model, self.output, mesh)

    def reworded(self, rubric: Rubric) -> VLMBackbone:
        """The same model, shared and not copied, asked in another wording of the same scale.

        Raises:
            ValueError: a rubric of another scale.
        """
        if rubric.scale_id != self.rubric.scale_id:
            raise ValueError(f"another wording must keep the scale {self.rubric.scale_id}, got {rubric.scale_id}")
        return VLMBackbone(self.model, self.processor, rubric, self.prompts.truncate)

    def encode(self, images: ImageInput, prompts: Sequence[str]) -> Prefix:
        """Encode what all questions about each sample share.

        Args:
            images: B images, lists of images, or None; see :func:`~zr.models.images.as_image_lists`.
            prompts: B prompts.

        Returns:
            A prefix of B rows.

        Raises:
            ValueError: one text instead of a list of prompts, no prompt, images that do not fit, more tokens than the model
                reads.
        """
        whole = self._read(images, prompts)
        return self._cached(whole) if self.model.config.model_type in CACHED else whole

    def extend(self, prefix: Prefix, suffix_ids: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states of suffixes.

        Args:
            prefix: M rows, usually ``prefix.fork(index)``.
            suffix_ids: M lists of ids, of any lengths.

        Returns:
            ``(M, T, H)`` hidden states (after the last norm) of the suffix tokens, padded on the right to the longest T;
            what stands behind a row's own length is meaningless.
        """
        if len(prefix) != len(suffix_ids):
            raise ValueError(f"{len(suffix_ids)} suffixes for {len(prefix)} rows of the prefix: fork it first")
        if isinstance(prefix, CachedPrefix):
            return self._step(prefix, suffix_ids)[0]
        return self._whole(prefix, suffix_ids)

    def advance(self, prefix: Prefix, suffix_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Prefix]:
        """Extend a prefix and keep going from there, with gradients; see :meth:`grow` for many steps without.

        Args:
            prefix: M rows.
            suffix_ids: M lists of ids of ONE length: nothing may be appended to a row that has stepped through padding.

        Returns:
            ``(M, T, H)`` hidden states, and the prefix that now includes the suffixes.

        Raises:
            ValueError: another number of suffixes than rows, suffixes of different lengths.
        """
        if len(prefix) != len(suffix_ids):
            raise ValueError(f"{len(suffix_ids)} suffixes for {len(prefix)} rows of the prefix: fork it first")
        if len({len(suffix) for suffix in suffix_ids}) != 1:
            raise ValueError(f"advance takes suffixes of one length, got lengths {sorted({len(s) for s in suffix_ids})}")
        if isinstance(prefix, CachedPrefix):
            return self._step(prefix, suffix_ids)
        grown = [[*ids, *suffix] for ids, suffix in zip(prefix.ids, suffix_ids, strict=True)]
        return self._whole(prefix, suffix_ids), WholePrefix(grown, prefix.media)

    @torch.no_grad()
    def grow(self, branches: WholeBranches | CachedBranches, suffix_ids: Sequence[Sequence[int]]) -> Tensor:
        """Write on in place, token after token, as sampling does.

        Args:
            branches: n rows that go on.
            suffix_ids: n lists of ids; of ONE length until the branches are gathered for the last time, since nothing may be
                appended to a row that has stepped through padding.

        Returns:
            ``(n, T, H)`` hidden states, without a gradient; as those of :meth:`extend`.

        Raises:
            ValueError: another number of suffixes than rows that go on, suffixes of different lengths.
        """
        if len(branches) != len(suffix_ids):
            raise ValueError(f"{len(suffix_ids)} suffixes for {len(branches)} branches that go on: one each")
        if not branches.gathered and len({len(suffix) for suffix in suffix_ids}) != 1:
            lengths = sorted({len(suffix) for suffix in suffix_ids})
            raise ValueError(f"grow takes suffixes of one length until the branches are gathered, got lengths {lengths}")
        if isinstance(branches, WholeBranches):
            hidden = self._whole(branches.rows, suffix_ids)
            branches.write(suffix_ids)
            return hidden
        ids, mask = pad_right(suffix_ids, self._pad, self.device)
        mask, position = branches.write(mask)
        return self._through(ids, mask, position, branches.cache)[0]

    def features(self, images: ImageInput, prompts: Sequence[str], dimensions: Sequence[str]) -> Tensor:
        """Hidden states at the score position of every dimension.

        Args:
            images: B images, lists of images, or None.
            prompts: B prompts.
            dimensions: D names.

        Returns:
            ``(B, D, H)`` float features.
        """
        prefix = self.encode(images, prompts)
        rows = torch.arange(len(prompts)).repeat_interleave(len(dimensions))
        questions = [self.prompts.question_ids(name) for name in dimensions]
        suffixes = questions * len(prompts)
        hidden = self.extend(prefix.fork(rows), suffixes)
        last = torch.tensor([len(q) - 1 for q in suffixes], device=hidden.device)
        picked = hidden[torch.arange(len(suffixes), device=hidden.device), last]
        return picked.reshape(len(prompts), len(dimensions), -1)

    def tokens(self, images: ImageInput, prompts: Sequence[str], dimensions: Sequence[str]) -> list[int]:
        """Tokens of each sample in :meth:`features`.

        The prefix and one question per dimension; where whole sequences are run, the prefix once for each dimension. The Qwen
        families' images are told from their sizes; those of others go through the processor.

        Raises:
            ValueError: as :meth:`encode`, so that samples are numbered in the whole call and not in a part of it.
        """
        questions = sum(len(self.prompts.question_ids(name)) for name in dimensions)
        copies = 1 if self.model.config.model_type in CACHED else len(dimensions)
        heads = [self._head_tokens(sample, index) for index, sample in enumerate(as_image_lists(images, len(prompts)))]
        texts = self.prompts.fit(prompts, heads)
        return [copies * (head + len(text)) + questions for head, text in zip(heads, texts, strict=True)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, active adapter and processor in Hugging Face's layout; plain transformers loads them too."""
        save_model(self.model, folder)
        self.processor.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        rubric: Rubric,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        adapter: str | Path | None = None,
        lora: PeftConfig | None = None,
        truncate: bool = False,
        trust_remote_code: bool = False,
        checkpointing: bool = False,
        **model_options: Any,
    ) -> VLMBackbone:
        """Load model, processor and tokenizer; safetensors only, and no remote code unless the caller says so.

        Args:
            source: hub name or directory.
            rubric: scale and wording.
            revision: branch, tag or commit on the hub, of all three.
            dtype: of the weights, for example ``"bfloat16"``; ``"auto"`` for that of the file.
            adapter: hub name or directory of a saved peft adapter to put on the model.
            lora: for example ``peft.LoraConfig(r=16, target_modules="all-linear")``: a new adapter, which alone is trained, in
                float32 whatever the model's precision.
            truncate: see the class.
            trust_remote_code: run code that comes with the model.
            checkpointing: compute activations again in the backward pass rather than keep them; also through a prefix.
            model_options: passed to ``AutoModelForImageTextToText.from_pretrained``: ``attn_implementation``, ``device_map``,
                ``quantization_config``, ...

        Raises:
            ValueError: weights that are missing, which transformers would draw at random; an adapter and a new one.
        """
        if adapter is not None and lora is not None:
            raise ValueError("adapter loads one, lora makes a new one: give one of them")
        where = {"revision": revision, "trust_remote_code": trust_remote_code}
        own = all((Path(source) / name).is_file() for name in ("config.json", "adapter_config.json"))
        own = own and Version(transformers.__version__) >= Version("5.23")  # 5.17 looks for an adapter there all the same
        if own:  # loaded afterwards, since transformers would tell what the adapter's file lacks, and not the model's
            model_options["adapter_kwargs"] = {"subfolder": "not now"}
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, dtype=dtype, **where, **model_options
        )
        if loaded["missing_keys"]:
            missing = sorted(loaded["missing_keys"])
            raise ValueError(f"{source} lacks {len(missing)} weights ({missing[0]}, ...): copy or save the model again")
        if checkpointing:  # transformers 5.17 knows the older name only, and 5.23 warns of it
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if getattr(model, "_hf_peft_config_loaded", False):
            model.set_adapter(model.active_adapters())  # of an adapter's name on the hub: transformers loads it frozen
        for put in ([source] if own else []) + ([adapter] if adapter is not None else []):
            model.load_adapter(str(put), is_trainable=True)
        if getattr(model, "_hf_peft_config_loaded", False):
            restore_precision(model, *((source, revision) if adapter is None else (adapter,)))
        if lora is not None:
            model.add_adapter(lora)
            for parameter in model.parameters():
                if parameter.requires_grad:  # a step of training is lost in the rounding of half precision
                    parameter.data = parameter.data.float()
        processor = AutoProcessor.from_pretrained(source, **where)
        # some families' default is PIL's, through which no gradient passes
        processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="torchvision", **where)
        processor.tokenizer = read_tokenizer(source, **where)
        return cls(model, processor, rubric, truncate)

    @property
    def _pad(self) -> int:
        tokenizer = self.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def _read(self, images: ImageInput, prompts: Sequence[str]) -> WholePrefix:
        """Ids and images of each row."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
        heads = [self._head(sample, index) for index, sample in enumerate(as_image_lists(images, len(prompts)))]
        texts = self.prompts.fit(prompts, [len(ids) for ids, _ in heads])
        return WholePrefix([[*ids, *text] for (ids, _), text in zip(heads, texts, strict=True)], [media for _, media in heads])

    def _head(self, images: list[Tensor], index: int) -> tuple[list[int], dict[str, Tensor]]:
        """Ids before a prompt, image placeholders expanded, and what the processor made of the images."""
        if not images:
            return self.prompts.head_ids(images=0), {}
        differentiable = isinstance(self.processor.image_processor, TorchvisionBackend)
        if not differentiable and any(image.requires_grad for image in images):
            kind = type(self.processor.image_processor).__name__
            raise ValueError(f"{kind} loses the gradient of the pixels: load the image processor with backend='torchvision'")
        images = [image.to(self.device) for image in images]
        if self._grid is not None:
            with of_sample(index):
                images = [self._grid(image) for image in images]
        try:
            made = self.processor(
                text=[self.prompts.head(len(images))],
                images=[images],
                add_special_tokens=False,  # the template wrote them
                do_rescale=False,  # the pixels are in [0, 1] already
                return_tensors="pt",
            )
        except ValueError as error:
            sizes = ", ".join(f"{image.shape[-1]} x {image.shape[-2]}" for image in images)
            raise ValueError(f"sample {index}: the model does not take an image of {sizes}: {error}") from None
        ids = made.pop("input_ids")[0].tolist()
        del made["attention_mask"]
        return ids, dict(made)

    @torch.no_grad()
    def _head_tokens(self, images: list[Tensor], index: int) -> int:
        """How many ids stand before a prompt."""
        if self._grid is None:
            return len(self._head([image.detach() for image in images], index)[0])
        with of_sample(index):
            fitted = [self._grid.fit(*image.shape[-2:]) for image in images]
        found = sum(height * width // self._grid.factor**2 for height, width in fitted)
        return len(self.prompts.head_ids(len(images))) - len(images) + found

    def _inputs(self, ids: Tensor, mask: Tensor, media: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Arguments of the inner model for padded rows."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
        for name in dict.fromkeys(name for row in media for name in row):
            if name.endswith("token_type_ids"):  # one for each id; zero for those of text
                inputs[name] = torch.zeros_like(ids)
                for index, row in enumerate(media):
                    if name in row:
                        start = int(mask[index].long().argmax())
                        inputs[name][index, start : start + row[name].shape[-1]] = row[name][0]
            else:
                joined = torch.cat([row[name] for row in media if name in row]).to(self.device)
                inputs[name] = joined.to(self.model.dtype) if joined.is_floating_point() else joined
        if hasattr(self.model.model, "get_rope_index"):  # else left to what the model remembers of its last call
            types = inputs.get("mm_token_type_ids", torch.zeros_like(ids))
            grid = inputs.get("image_grid_thw")
            inputs["position_ids"], _ = self.model.model.get_rope_index(
                ids, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=inputs["attention_mask"]
            )
        return inputs

    def _whole(self, prefix: WholePrefix, suffix_ids: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states of suffixes by whole sequences; rows whose images have the same form go together."""
        forms: dict[Any, list[int]] = {}
        for index, row in enumerate(prefix.media):
            form = tuple((name, tensor.shape[1:]) for name, tensor in row.items() if not name.endswith("token_type_ids"))
            forms.setdefault(form, []).append(index)
        length = max(map(len, suffix_ids))
        parts, order = [], []
        for members in forms.values():
            ids, mask = pad_right([[*prefix.ids[i], *suffix_ids[i]] for i in members], self._pad, self.device)
            inputs = self._inputs(ids, mask, [prefix.media[i] for i in members])
            hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
            starts = torch.tensor([len(prefix.ids[i]) for i in members], device=hidden.device)
            where = (starts[:, None] + torch.arange(length, device=hidden.device)).clamp(max=hidden.shape[1] - 1)
            parts.append(hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1])))
            order.extend(members)
        return torch.cat(parts)[torch.tensor(order, device=parts[0].device).argsort()]

    def _cached(self, whole: WholePrefix) -> CachedPrefix:
        ids, mask = pad_left(whole.ids, self._pad, self.device)
        inputs = self._inputs(ids, mask, whole.media)
        kinds = getattr(self.model.config.get_text_config(), "layer_types", None)
        layers = self.model.config.get_text_config().num_hidden_layers
        linear = tuple(kind == "linear_attention" for kind in kinds or ["full_attention"] * layers)
        _, states = self._run(inputs, BranchCache(linear))
        following = inputs["position_ids"].masked_fill(~mask, 0).amax((0, 2)) + 1
        return CachedPrefix(states, linear, mask, following)

    def _step(self, prefix: CachedPrefix, suffix_ids: Sequence[Sequence[int]]) -> tuple[Tensor, CachedPrefix]:
        """Hidden states of suffixes padded on the right, and the prefix grown by them."""
        ids, mask = pad_right(suffix_ids, self._pad, self.device)
        cache = BranchCache(prefix.linear, prefix.layers)
        mask = torch.cat([prefix.mask, mask], dim=1)
        hidden, states = self._through(ids, mask, prefix.position, cache)
        return hidden, CachedPrefix(states, prefix.linear, mask, prefix.position + ids.shape[1])

    def _through(self, ids: Tensor, mask: Tensor, position: Tensor, cache: Cache) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """What :meth:`_run` gives for ids ``(M, T)`` after a cache; ``mask (M, P + T)``, ``position (M,)`` of the first."""
        position = position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position.expand(3, -1, -1)}
        return self._run(inputs, cache)

    def _run(self, inputs: dict[str, Any], cache: Cache) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Hidden states of one pass, and what it wrote into a cache that can tell."""
        dealt = sharded(self.model)

        def run() -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
            with _checkpointed_with_cache(self.model):
                hidden: Tensor = self.model.model(**inputs, past_key_values=cache, use_cache=False).last_hidden_state
            states = cache.written() if isinstance(cache, BranchCache) else []
            return hidden, in_order(hidden, states) if dealt else states

        return inside(self.model, run)


@contextmanager
def _checkpointed_with_cache(model: nn.Module) -> Iterator[None]:
    """Let layers that recompute their activations keep the cache, which transformers would silently take from them.

    Right with :class:`~zr.models.prefix.BranchCache`, which a second forward pass finds as the first one did.

    Raises:
        ValueError: reentrant checkpointing, whose forward pass has no graph, so that no gradient would pass through the cache.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        if layer.training and getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "reentrant checkpointing loses the gradient through the prefix: enable it with {'use_reentrant': False}"
            )
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache
