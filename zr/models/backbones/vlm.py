"""A Hugging Face vision-language model as a backbone: images and prompts in, hidden states out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from zr.models.images import ImageInput, as_image_lists
from zr.models.prefix import CachedPrefix, Prefix, WholePrefix, pad_left, pad_right
from zr.models.prompts import PromptBuilder
from zr.rubric import Rubric

__all__ = ["VLMBackbone"]


class VLMBackbone(nn.Module):
    """A Qwen-VL family model behind the doors ``encode``, ``extend`` and ``features``.

    Full attention (Qwen3-VL) keeps the prefix as keys and values; hybrid attention (Qwen3.5) runs whole sequences.

    Args:
        model: ``Qwen3VLForConditionalGeneration`` or ``Qwen3_5ForConditionalGeneration``.
        processor: the family's processor (tokenizer with chat template, torchvision-backed image processor).
        rubric: scale and wording; the wording is rendered by the processor's chat template.

    Raises:
        ValueError: a wording that the tokenizer cannot take (see :class:`~zr.models.prompts.PromptBuilder`).
    """

    def __init__(self, model: Any, processor: Any, rubric: Rubric) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.rubric = rubric
        self.prompts = PromptBuilder(processor.tokenizer, rubric, processor.image_token)

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

    def reworded(self, rubric: Rubric) -> VLMBackbone:
        """The same model, shared and not copied, asked in another wording of the same scale.

        Raises:
            ValueError: a rubric of another scale.
        """
        if rubric.scale_id != self.rubric.scale_id:
            raise ValueError(f"another wording must keep the scale {self.rubric.scale_id}, got {rubric.scale_id}")
        return VLMBackbone(self.model, self.processor, rubric)

    def encode(self, images: ImageInput, prompts: Sequence[str]) -> Prefix:
        """Encode what all questions about each sample share.

        Args:
            images: B images, lists of images, or None; see :func:`~zr.models.images.as_image_lists`.
            prompts: B prompts.

        Returns:
            A prefix of B rows.

        Raises:
            ValueError: one text instead of a list of prompts, no prompt, images that do not fit.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
        lists = as_image_lists(images, len(prompts))
        pixels, grids = self._patches(lists)
        ids = [self._prefix_ids(prompt, grid) for prompt, grid in zip(prompts, grids, strict=True)]
        whole = WholePrefix(ids, pixels, grids)
        return self._cached(whole) if self._cacheable else whole

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
        rows = [[*ids, *suffix] for ids, suffix in zip(prefix.ids, suffix_ids, strict=True)]
        ids, mask = pad_right(rows, self._pad, self.device)
        hidden = self._run(ids, mask, prefix.pixels, prefix.grids)
        length = max(map(len, suffix_ids))
        starts = torch.tensor([len(ids) for ids in prefix.ids], device=hidden.device)
        where = (starts[:, None] + torch.arange(length, device=hidden.device)).clamp(max=hidden.shape[1] - 1)
        return hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))

    def advance(self, prefix: Prefix, suffix_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Prefix]:
        """Extend a prefix and keep going from there, as sampling does.

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
        return self.extend(prefix, suffix_ids), WholePrefix(grown, prefix.pixels, prefix.grids)

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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and processor in Hugging Face's layout; plain transformers loads it too."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, source: str | Path, rubric: Rubric, **model_options: Any) -> VLMBackbone:
        """Load a model by name or directory; safetensors only, and no remote code unless ``model_options`` say so.

        Args:
            source: hub name or directory.
            rubric: scale and wording.
            model_options: passed to ``AutoModelForImageTextToText.from_pretrained`` (``dtype``, ``device_map``, ...).

        Raises:
            ValueError: weights that are missing, which transformers would draw at random.
        """
        remote = model_options.pop("trust_remote_code", False)  # None would ask on the terminal
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            source, use_safetensors=True, trust_remote_code=remote, output_loading_info=True, **model_options
        )
        if loaded["missing_keys"]:
            missing = sorted(loaded["missing_keys"])
            raise ValueError(f"{source} lacks {len(missing)} weights ({missing[0]}, ...): copy or save the model again")
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=remote)
        if get_tokenizer_config(source).get("tokenizer_class") == PreTrainedTokenizerFast.__name__:
            # transformers rebuilds some families' tokenizers by model type, which loses a word-level one: read what was saved
            processor.tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        return cls(model, processor, rubric)

    @property
    def _pad(self) -> int:
        tokenizer = self.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    @property
    def _cacheable(self) -> bool:
        kinds = getattr(self.model.config.get_text_config(), "layer_types", None)
        full = kinds is None or set(kinds) == {"full_attention"}
        # Layers that recompute their activations give no cache.
        return full and not any(m.training and getattr(m, "gradient_checkpointing", False) for m in self.model.modules())

    def _prefix_ids(self, prompt: str, grid: Tensor | None) -> list[int]:
        sizes = [] if grid is None else (grid.prod(-1) // self.processor.image_processor.merge_size**2).tolist()
        ids: list[int] = []
        for token in self.prompts.prefix_ids(prompt, images=len(sizes)):
            ids.extend([token] * (int(sizes.pop(0)) if token == self.model.config.image_token_id else 1))
        return ids

    def _patches(self, lists: list[list[Tensor]]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Per row, the patches ``(P, C)`` and grids ``(n, 3)`` of its images, by the family's own image processor."""
        flat = [image.to(self.device) for sample in lists for image in sample]
        if not flat:
            return [None] * len(lists), [None] * len(lists)
        made = self.processor.image_processor(images=flat, do_rescale=False, return_tensors="pt")
        patches = made["pixel_values"].split(made["image_grid_thw"].prod(-1).tolist())
        pixels: list[Tensor | None] = []
        grids: list[Tensor | None] = []
        start = 0
        for sample in lists:
            stop = start + len(sample)
            pixels.append(torch.cat(patches[start:stop]) if sample else None)
            grids.append(made["image_grid_thw"][start:stop] if sample else None)
            start = stop
        return pixels, grids

    def _inputs(
        self, ids: Tensor, mask: Tensor, pixels: list[Tensor | None], grids: list[Tensor | None]
    ) -> tuple[dict[str, Any], Tensor]:
        """Arguments of the inner model, and the ``(3, B, L)`` position ids that it would compute, which are part of them."""
        present = [p for p in pixels if p is not None]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
        grid = torch.cat([g for g in grids if g is not None]).to(self.device) if present else None
        types = (ids == self.model.config.image_token_id).long()
        if grid is not None:
            dtype = self.model.dtype
            inputs |= {"pixel_values": torch.cat(present).to(dtype), "image_grid_thw": grid, "mm_token_type_ids": types}
        position, _ = self.model.model.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=inputs["attention_mask"]
        )
        return inputs | {"position_ids": position}, position

    def _run(self, ids: Tensor, mask: Tensor, pixels: list[Tensor | None], grids: list[Tensor | None]) -> Tensor:
        inputs, _ = self._inputs(ids, mask, pixels, grids)
        hidden: Tensor = self.model.model(**inputs, use_cache=False).last_hidden_state
        return hidden

    def _cached(self, whole: WholePrefix) -> CachedPrefix:
        ids, mask = pad_left(whole.ids, self._pad, self.device)
        inputs, position = self._inputs(ids, mask, whole.pixels, whole.grids)
        cache = self.model.model(**inputs, use_cache=True).past_key_values
        following = position.masked_fill(~mask, 0).amax((0, 2)) + 1
        return CachedPrefix([(layer.keys, layer.values) for layer in cache.layers], mask, following)

    def _step(self, prefix: CachedPrefix, suffix_ids: Sequence[Sequence[int]]) -> tuple[Tensor, CachedPrefix]:
        """Hidden states of suffixes padded on the right, and the prefix grown by them."""
        ids, mask = pad_right(suffix_ids, self._pad, self.device)
        cache = DynamicCache()
        for index, (keys, values) in enumerate(prefix.layers):
            cache.update(keys, values, index)
        mask = torch.cat([prefix.mask, mask], dim=1)
        position = prefix.position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        hidden: Tensor = self.model.model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=position.expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        return hidden, CachedPrefix(layers, mask, prefix.position + ids.shape[1])
