"""Released generators through diffusers' own modules, in steps that a gradient can take: Z-Image and Stable Diffusion 3."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zr.models.folders import written_whole
from zr.models.generators.base import Generator
from zr.models.generators.flow import ABOUT, RUN_GENERATOR
from zr.models.generators.guidance import Guidance
from zr.version import __version__

try:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, ZImagePipeline
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: released generators need the extra, pip install 'zreward[diffusion]'") from None

__all__ = ["DiffusionGenerator", "StableDiffusion3Generator", "ZImageGenerator"]

FORMAT = 1
ADAPTER = "pytorch_lora_weights.safetensors"
"""As diffusers calls the file."""


class DiffusionGenerator(Generator):
    """The modules of a diffusers pipeline, in the loop of :class:`~zr.models.generators.Generator`.

    The transformer learns where it takes a gradient; text encoders and autoencoder are frozen, and stay in evaluation mode.
    Latents and steps are in float32 or wider, whatever the precision of the weights. What is frozen is no part of
    ``state_dict()``, so a checkpoint holds what is trained alone, and is loaded into a generator of the same source.

    Args:
        pipeline: as diffusers loads it; its modules are used, its loop is not.
        steps: from noise to image; None for as many as the pipeline takes by itself.
        side: of the square images, in pixels; None for that at which the model was released.
        guidance: two passes of the transformer for each step; None for one, the prompt's own velocity.
        checkpointing: keep the input of each layer of the transformer and of each block of the decoder, and compute the rest
            again in the backward pass: one more forward pass.
        distilled: whether guidance was distilled into the weights.

    Raises:
        ValueError: another pipeline, a scheduler that is not the Euler one, a side that does not fit, guidance beside weights
            into which it was distilled.
    """

    pipeline_class: ClassVar[Any]
    default_steps: ClassVar[int]

    def __init__(
        self,
        pipeline: Any,
        steps: int | None = None,
        side: int | None = None,
        guidance: Guidance | None = None,
        checkpointing: bool = False,
        distilled: bool = False,
    ) -> None:
        super().__init__(self.default_steps if steps is None else steps)
        if not isinstance(pipeline, self.pipeline_class):
            raise ValueError(f"{type(self).__name__} takes a {self.pipeline_class.__name__}, got a {type(pipeline).__name__}")
        if distilled and guidance is not None:
            raise ValueError(
                f"guidance={guidance} was given, but guidance was distilled into these weights, which answer without a second "
                "pass: give none"
            )
        self.pipeline = pipeline
        self.guidance = guidance
        self.distilled = distilled
        self.transformer: Any = pipeline.transformer
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        frozen = nn.ModuleDict({name: part for name, part in parts.items() if name != "transformer"})
        self._beside = (frozen.eval().requires_grad_(False),)  # in a tuple: no part of this module
        self.transformer.train()
        self.side = self._default_side() if side is None else side
        token, most = pipeline.vae_scale_factor * self._patch(), self._most_tokens()
        if not 0 < self.side <= token * most or self.side % token:
            raise ValueError(
                f"side={self.side}: autoencoder and patches make a token of {token} pixels a side, and the transformer takes "
                f"up to {most} of them: give a multiple of {token}, at most {token * most}"
            )
        self.sigmas = self._sigmas((self.side // token) ** 2)
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()
            pipeline.vae.enable_gradient_checkpointing()
        self.register_state_dict_post_hook(_leave_frozen_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_keep_frozen)  # type: ignore[no-untyped-call]

    @abstractmethod
    def _encode(self, prompts: list[str]) -> tuple[Any, Any]:
        """Conditions of the prompts, and those of no prompt."""

    @abstractmethod
    def _predict(self, latents: Tensor, sigma: float, condition: Any) -> Tensor:
        """Velocity from noise to image, at a share of noise."""

    @abstractmethod
    def _readers(self) -> Mapping[str, tuple[int, bool]]:
        """Tokenizers by name: how many tokens are read of what it makes, and whether what is beyond may be cut off."""

    @abstractmethod
    def _patch(self) -> int:
        """Latents a side that are one token."""

    @abstractmethod
    def _most_tokens(self) -> int:
        """Tokens a side that the transformer has positions for."""

    @abstractmethod
    def _default_side(self) -> int: ...

    def _text(self, prompt: str) -> str:
        """What a tokenizer is given."""
        return prompt

    def _noise_shares(self) -> dict[str, Any]:
        """What the scheduler makes its sigmas of."""
        return {"num_inference_steps": self.steps}

    def condition(self, prompts: Sequence[str]) -> tuple[Any, Any]:
        """What the text encoders make of prompts, and of no prompt.

        Raises:
            ValueError: one text instead of a list, a text longer than what is read, or one that holds a special token.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one text: give a list of prompts")
        for name, (most, cut) in self._readers().items():
            tokenizer = getattr(self.pipeline, name)
            added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
            for number, prompt in enumerate(prompts):
                found = next((token for token in added if token in prompt), None)
                if found is not None:
                    raise ValueError(f"prompt {number} holds {found!r}, which the text encoder would obey: take it out")
                count = len(tokenizer(self._text(prompt)).input_ids)
                if count > most and not cut:
                    raise ValueError(f"prompt {number} has {count} tokens, the text encoder reads {most}: shorten it")
        return self._encode(list(prompts))

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """``(B, C, h, w)`` standard normal."""
        side = self.side // self.pipeline.vae_scale_factor
        shape = (count, self.transformer.config.in_channels, side, side)
        return torch.randn(shape, generator=generator).to(self._device, torch.promote_types(self._dtype, torch.float32))

    def velocity(self, latents: Tensor, step: int, conditions: tuple[Any, Any]) -> Tensor:
        """``(B, C, h, w)``, in the precision of the latents."""

        def told(condition: Any) -> Tensor:
            return self._predict(latents.to(self._dtype), self.sigmas[step], condition).to(latents.dtype)

        prompt, empty = conditions
        return told(prompt) if self.guidance is None else self.guidance(told, prompt, empty)

    def advance(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """An Euler step."""
        return latents + (self.sigmas[step] - self.sigmas[step + 1]) * velocity

    def clean(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Straight on to where there is no noise."""
        return latents + self.sigmas[step] * velocity

    def decode(self, latents: Tensor) -> Tensor:
        """``(B, 3, S, S)`` in [0, 1], by the autoencoder; a pixel that is cut off keeps its gradient."""
        vae = self.pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(scaled, return_dict=False)[0] / 2 + 0.5
        return cast(Tensor, pixels + (pixels.clamp(0, 1) - pixels).detach())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what diffusers reads: the whole pipeline; of a generator with LoRA the adapter alone, and the name of its base.

        The adapter is in diffusers' format (``pipeline.load_lora_weights(folder)``). The folder appears whole or not at all; a
        generator that was there is replaced. Guidance is the caller's.

        Raises:
            FileExistsError: a folder that holds something else, which would be lost.
            ValueError: an adapter on weights that were not loaded from anywhere.
        """
        base = str(self.pipeline.name_or_path or "") if self._adapted else None
        if base == "":
            raise ValueError("the adapter's base has no name: save the pipeline itself, and load the generator from there")
        if base is not None and Path(base).exists():
            base = str(Path(base).resolve())
        about = {"format": FORMAT, "zr": __version__, "class": type(self).__name__, "base": base}
        about |= {"steps": self.steps, "side": self.side, "distilled": self.distilled}
        with written_whole(folder, ABOUT) as new:
            if base is None:
                self.pipeline.save_pretrained(new, safe_serialization=True)
            else:
                state = get_peft_model_state_dict(self.transformer, save_embedding_layers=False)
                self.pipeline_class.save_lora_weights(
                    new,
                    transformer_lora_layers={name: tensor.detach().contiguous() for name, tensor in state.items()},
                    transformer_lora_adapter_metadata=self.transformer.peft_config["default"].to_dict(),
                )
            (new / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        steps: int | None = None,
        side: int | None = None,
        guidance: Guidance | None = None,
        dtype: str | None = None,
        checkpointing: bool = False,
        lora: LoraConfig | None = None,
        merge_adapters: bool = False,
        distilled: bool | None = None,
        revision: str | None = None,
    ) -> DiffusionGenerator:
        """Load a released model, or what :meth:`save_pretrained` wrote. Weights are safetensors; no remote code is run.

        Args:
            source: a name on the hub, a folder in diffusers' layout, a generator's folder, or a run's folder that holds one.
            steps: see :class:`DiffusionGenerator`; None for as many as were saved.
            side: likewise.
            guidance: likewise.
            dtype: precision of the weights, such as ``"bfloat16"``; float32 for None, as training all of them wants it.
            checkpointing: see :class:`DiffusionGenerator`.
            lora: for example ``peft.LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v"])``: a new adapter of the
                transformer, in float32, which alone is trained. An adapter that was saved goes on being trained without it.
            merge_adapters: fold a saved adapter into the weights, all of which are then trained.
            distilled: whether guidance was distilled into the weights. No released file says so; None goes by what was
                saved, or by a name that says turbo or distilled.
            revision: branch, tag or commit on the hub.

        Raises:
            OSError: no model there.
            ValueError: that of another pipeline, a damaged file, a newer format, ``lora`` beside a saved adapter.
        """
        folder = next((place for place in (Path(source), Path(source) / RUN_GENERATOR) if (place / ABOUT).is_file()), None)
        about = {} if folder is None else _about(folder, cls.__name__)
        adapted = about.get("base") is not None
        if lora is not None and adapted and not merge_adapters:
            raise ValueError(f"{folder} holds an adapter, and lora makes a new one: give merge_adapters=True too, or no lora")
        base = about["base"] if adapted else str(folder or source)
        named = cls.pipeline_class.load_config(base, revision=revision).get("_class_name")
        if named != cls.pipeline_class.__name__:
            raise ValueError(f"{base} is a {named}; {cls.__name__} loads a {cls.pipeline_class.__name__}")
        precision = torch.float32 if dtype is None else getattr(torch, dtype)
        pipeline = cls.pipeline_class.from_pretrained(base, dtype=precision, revision=revision, use_safetensors=True)
        if distilled is None:
            distilled = about.get("distilled", re.search("turbo|distill", Path(base).name, re.IGNORECASE) is not None)
        made = cls(pipeline, steps or about.get("steps"), side or about.get("side"), guidance, checkpointing, distilled)
        if adapted:
            made._read_adapter(cast(Path, folder))
            if merge_adapters:
                made.transformer.fuse_lora()
                made.transformer.unload_lora()
                made.transformer.requires_grad_()
        if lora is not None:
            made._adapt(lora)
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves the generator, called by ``to`` and its kin: text encoders and autoencoder come along."""
        (frozen,) = self._beside
        frozen._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _adapt(self, lora: LoraConfig) -> None:
        """Add adapters in float32 to the transformer, and freeze everything else."""
        self.transformer.add_adapter(lora)
        for parameter in self.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _read_adapter(self, folder: Path) -> None:
        try:
            with safe_open(folder / ADAPTER, "pt") as file:
                options = json.loads(file.metadata()["lora_adapter_metadata"])
                state = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._adapt(LoraConfig(**{name.removeprefix("transformer."): value for name, value in options.items()}))
            found = set_peft_model_state_dict(self.transformer, state)
            missing = [name for name in found.missing_keys if "lora_" in name]
            if found.unexpected_keys or missing:
                raise RuntimeError(f"{[*found.unexpected_keys, *missing][0]} is on one side only")
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{folder}/{ADAPTER} is damaged, or does not fit ({reason}): save it again") from None

    def _sigmas(self, tokens: int) -> list[float]:
        """Shares of noise before each step and after the last, as the scheduler shifts them for that many tokens."""
        given = self.pipeline.scheduler
        if (
            not isinstance(given, FlowMatchEulerDiscreteScheduler)
            or given.config.stochastic_sampling
            or given.config.invert_sigmas
        ):
            raise ValueError(f"steps are those of FlowMatchEulerDiscreteScheduler, deterministic; the pipeline has {given}")
        scheduler, config = FlowMatchEulerDiscreteScheduler.from_config(given.config), given.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        shift = config.base_shift + slope * (tokens - config.base_image_seq_len) if config.use_dynamic_shifting else None
        scheduler.set_timesteps(mu=shift, **self._noise_shares())
        return cast(list[float], scheduler.sigmas.tolist())

    @property
    def _adapted(self) -> bool:
        return bool(getattr(self.transformer, "peft_config", None))

    @property
    def _dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.transformer.dtype)

    @property
    def _device(self) -> torch.device:
        return cast(torch.device, next(self.transformer.parameters()).device)


class ZImageGenerator(DiffusionGenerator):
    """Z-Image. Its pipeline's ``guidance_scale`` is that of :class:`~zr.models.generators.Guidance` minus 1.

    Reference: Z-Image (arXiv 2511.22699).

    Example:
        A released one is ``ZImageGenerator.from_pretrained("Tongyi-MAI/Z-Image")``; this one has its classes, and random
        weights.

        >>> import diffusers, transformers
        >>> from zr.data import shapes
        >>> from zr.models.backbones.tiny import word_tokenizer
        >>> tokenizer = word_tokenizer(shapes.rubric(), shapes.vocabulary())
        >>> tokenizer.chat_template = "{{ messages[0].content }}"
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> text = transformers.Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, **sizes)
        >>> sizes = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16}
        >>> transformer = diffusers.ZImageTransformer2DModel(in_channels=4, axes_dims=[4, 6, 6], axes_lens=[99, 8, 8], **sizes)
        >>> generator = ZImageGenerator(
        ...     diffusers.ZImagePipeline(
        ...         diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        ...         diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, shift_factor=0.0),
        ...         transformers.Qwen3Model(text),
        ...         tokenizer,
        ...         transformer,
        ...     ),
        ...     steps=4,
        ...     side=8,
        ... )
        >>> [round(share, 3) for share in generator.sigmas]                        # of noise: 6 s / (1 + 5 s), s = 1, 3/4, ...
        [1.0, 0.947, 0.857, 0.667, 0.0]
        >>> images = generator.sample(["red ring", "blue square"], torch.Generator().manual_seed(0), gradient_steps=1)
        >>> images.shape, images.requires_grad
        (torch.Size([2, 3, 8, 8]), True)
    """

    pipeline_class = ZImagePipeline
    default_steps = 50

    def _encode(self, prompts: list[str]) -> tuple[Any, Any]:
        guided = self.guidance is not None
        told, empty = self.pipeline.encode_prompt(prompts, device=self._device, do_classifier_free_guidance=guided)
        return told, empty

    def _predict(self, latents: Tensor, sigma: float, condition: list[Tensor]) -> Tensor:
        time = latents.new_full((len(latents),), 1 - sigma, dtype=torch.float32)
        words = [one.to(latents.dtype) for one in condition]
        found = self.transformer(list(latents[:, :, None].unbind()), time, words, return_dict=False)[0]
        return torch.stack(found)[:, :, 0]

    def _text(self, prompt: str) -> str:
        said = [{"role": "user", "content": prompt}]
        render = self.pipeline.tokenizer.apply_chat_template
        return cast(str, render(said, tokenize=False, add_generation_prompt=True, enable_thinking=True))

    def _readers(self) -> Mapping[str, tuple[int, bool]]:
        return {"tokenizer": (512, False)}

    def _noise_shares(self) -> dict[str, Any]:
        return {"sigmas": torch.linspace(1, 1 / self.steps, self.steps).tolist()}

    def _patch(self) -> int:
        return 2

    def _most_tokens(self) -> int:
        return int(min(self.transformer.config.axes_lens[1:]))

    def _default_side(self) -> int:
        return 1024


class StableDiffusion3Generator(DiffusionGenerator):
    """Stable Diffusion 3 and 3.5. Without T5 (``text_encoder_3=None``) it reads what its two CLIP encoders read.

    Reference: Esser et al. (arXiv 2403.03206).

    Example:
        A released one is ``StableDiffusion3Generator.from_pretrained("stabilityai/stable-diffusion-3.5-medium")``; this one has
        its classes and random weights.

        >>> import diffusers, transformers
        >>> from zr.data import shapes
        >>> from zr.models.backbones.tiny import word_tokenizer
        >>> tokenizer = word_tokenizer(shapes.rubric(), shapes.vocabulary())
        >>> tokenizer.model_max_length = 16
        >>> sizes = {"hidden_size": 8, "projection_dim": 8, "intermediate_size": 8, "num_hidden_layers": 2}
        >>> text = transformers.CLIPTextConfig(
        ...     vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=16, eos_token_id=1, **sizes
        ... )
        >>> transformer = diffusers.SD3Transformer2DModel(
        ...     sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        ...     joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
        ... )
        >>> generator = StableDiffusion3Generator(
        ...     diffusers.StableDiffusion3Pipeline(
        ...         transformer,
        ...         diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        ...         diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, shift_factor=0.0),
        ...         text_encoder=transformers.CLIPTextModelWithProjection(text),
        ...         tokenizer=tokenizer,
        ...         text_encoder_2=transformers.CLIPTextModelWithProjection(text),
        ...         tokenizer_2=tokenizer,
        ...         text_encoder_3=None,
        ...         tokenizer_3=None,
        ...     ),
        ...     steps=3,
        ... )
        >>> images = generator.sample(["red ring", "blue square"], torch.Generator().manual_seed(0), gradient_steps=1)
        >>> images.shape, images.requires_grad
        (torch.Size([2, 3, 8, 8]), True)
    """

    pipeline_class = StableDiffusion3Pipeline
    default_steps = 28

    def _encode(self, prompts: list[str]) -> tuple[Any, Any]:
        guided = self.guidance is not None
        told, empty, told_pooled, empty_pooled = self.pipeline.encode_prompt(
            prompts, None, None, device=self._device, do_classifier_free_guidance=guided
        )
        return (told, told_pooled), (empty, empty_pooled)

    def _predict(self, latents: Tensor, sigma: float, condition: tuple[Tensor, Tensor]) -> Tensor:
        time = (
            latents.new_full((len(latents),), sigma, dtype=torch.float32) * self.pipeline.scheduler.config.num_train_timesteps
        )
        words, pooled = (one.to(latents.dtype) for one in condition)
        return cast(Tensor, -self.transformer(latents, words, pooled, time, return_dict=False)[0])

    def _readers(self) -> Mapping[str, tuple[int, bool]]:
        whole = self.pipeline.text_encoder_3 is not None
        clip = (int(self.pipeline.tokenizer_max_length), whole)
        return {"tokenizer": clip, "tokenizer_2": clip} | ({"tokenizer_3": (256, False)} if whole else {})

    def _patch(self) -> int:
        return int(self.transformer.config.patch_size)

    def _most_tokens(self) -> int:
        return int(self.transformer.config.pos_embed_max_size)

    def _default_side(self) -> int:
        return int(self.transformer.config.sample_size * self.pipeline.vae_scale_factor)


def _leave_frozen_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keep of a generator's state what is trained."""
    trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in [name for name in state if name.startswith(prefix) and name not in trained]:
        del state[name]


def _keep_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let what a state leaves out be what it is."""
    trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, part in module.named_children():
        for key, tensor in part.state_dict(prefix=f"{prefix}{name}.").items():
            if key not in trained:
                state.setdefault(key, tensor)


def _about(folder: Path, kind: str) -> dict[str, Any]:
    """What a generator's folder says about itself, checked."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}/{ABOUT} is not JSON ({error}): copy or save the generator again") from None
    if not isinstance(about, dict) or about.get("class") != kind:
        found = about.get("class", "another kind of generator") if isinstance(about, dict) else type(about).__name__
        raise ValueError(f"{folder} holds {found}: it cannot be loaded as {kind}")
    fields = {"base", "steps", "side", "distilled"}
    if about.get("format") != FORMAT or not fields <= set(about):
        raise ValueError(
            f"{folder}/{ABOUT} has format {about.get('format')}; this zr {__version__} reads format {FORMAT}, "
            f"with {', '.join(sorted(fields))}"
        )
    return about
