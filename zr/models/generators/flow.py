"""A rectified-flow transformer on pixels, small enough to train on a laptop: the built-in world's generator."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, pixel_shuffle, pixel_unshuffle, scaled_dot_product_attention, silu

from zr.models.adapters import WEIGHTS, base_state
from zr.models.folders import written_whole
from zr.models.generators.base import Generator
from zr.models.generators.guidance import Guidance
from zr.models.images import as_image_lists
from zr.version import __version__

__all__ = ["RUN_GENERATOR", "FlowGenerator", "FlowSize", "FlowTransformer", "tiny_flow"]

FORMAT = 1
ABOUT = "generator.json"
ADAPTER = "adapter"
RUN_GENERATOR = "generator"
"""Folder inside a run's folder in which the run keeps its generator."""

NEAR_END = 0.05
"""Least time left that the distance to the clean picture is divided by; beyond it a velocity would be mostly noise."""


@dataclass(frozen=True)
class FlowSize:
    """The size of a :class:`FlowTransformer`.

    Args:
        image: side of the square pictures, in pixels.
        patch: side of the part of a picture that is one token; divides ``image``.
        width: of a token, an even multiple of ``heads``.
        layers: depth.
        heads: of the attention.
        words: most words of a prompt, punctuation marks included.

    Raises:
        ValueError: a number below one, numbers that do not divide as said.
    """

    image: int = 48
    patch: int = 16
    width: int = 256
    layers: int = 5
    heads: int = 8
    words: int = 12

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1 or self.image % self.patch or self.width % (2 * self.heads):
            raise ValueError(f"patch must divide image, 2 * heads must divide width, and all be at least 1: got {self}")


class FlowTransformer(nn.Module):
    """Tells the velocity of a noisy picture on its way from noise, at time 0, to what a prompt asks for, at time 1.

    Patches attend to each other and to the words of the prompt; the time shifts, scales and gates every layer (adaLN, one
    modulation that all layers share and a table of each). What is predicted is the clean picture, which has far fewer degrees
    of freedom than noise; the velocity follows from it.

    Args:
        vocabulary: number of words; their ids are 1 to that, and 0 is no word.
        size: of everything else.

    Reference: DiT (arXiv 2212.09748); the shared modulation is that of PixArt (arXiv 2310.00426), the prediction of the clean
    picture that of Li and He (arXiv 2511.13720).
    """

    def __init__(self, vocabulary: int, size: FlowSize) -> None:
        super().__init__()
        self.patch, width = size.patch, size.width
        self.grid = size.image // size.patch
        self.words = nn.Embedding(vocabulary + 1, width)
        self.order = nn.Parameter(torch.randn(size.words, width) / math.sqrt(width))
        self.patches = nn.Linear(3 * size.patch**2, width)
        self.places = nn.Parameter(torch.randn(self.grid**2, width) / 2)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(_Block(width, size.heads) for _ in range(size.layers))
        self.output = nn.Linear(width, 3 * size.patch**2)
        nn.init.normal_(self.words.weight, std=1 / math.sqrt(width))
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, latents: Tensor, time: Tensor, words: Tensor) -> Tensor:
        """Velocities.

        Args:
            latents: ``(B, 3, S, S)``, between noise and picture.
            time: ``(B,)`` in [0, 1).
            words: ``(B, L)`` ids.

        Returns:
            ``(B, 3, S, S)``, d latents / d time.
        """
        hidden = self.patches(pixel_unshuffle(latents, self.patch).flatten(2).transpose(1, 2)) + self.places
        told = _norm(self.words(words) + self.order)
        waves = _waves(time, self.places.shape[-1])
        modulation = self.modulation(silu(self.time(waves))).unflatten(-1, (6, 1, -1))
        for block in self.blocks:
            hidden = block(hidden, told, modulation)
        tokens = self.output(_norm(hidden)).transpose(1, 2)
        clean = pixel_shuffle(tokens.unflatten(-1, (self.grid, self.grid)), self.patch)
        return (clean - latents) / (1 - time).clamp_min(NEAR_END)[:, None, None, None]


class _Block(nn.Module):
    """Attention and a multilayer perceptron; its own table is added to the modulation that all blocks share."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.zeros(6, 1, width))
        self.attention_in = nn.Linear(width, 3 * width)
        self.told_in = nn.Linear(width, 2 * width)
        self.attention_out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, told: Tensor, modulation: Tensor) -> Tensor:
        """``(B, T, width)`` to the same, given words ``(B, L, width)`` and a modulation ``(B, 6, 1, width)``."""
        shift, scale, gate, inner_shift, inner_scale, inner_gate = (modulation + self.table).unbind(1)
        seen = self.attention_in(_norm(hidden) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1))
        words = self.told_in(told).unflatten(-1, (2, self.heads, -1))
        key, value = torch.cat([seen[:, :, 1:], words], 1).permute(2, 0, 3, 1, 4)
        found = scaled_dot_product_attention(seen[:, :, 0].transpose(1, 2), key, value)
        hidden = hidden + gate * self.attention_out(found.transpose(1, 2).flatten(2))
        inner = self.up(_norm(hidden) * (1 + inner_scale) + inner_shift)
        return cast(Tensor, hidden + inner_gate * self.down(gelu(inner, approximate="tanh")))


def _norm(hidden: Tensor) -> Tensor:
    return layer_norm(hidden, hidden.shape[-1:])


def _waves(time: Tensor, width: int) -> Tensor:
    """``(B, width)`` cosines and sines of times ``(B,)``, at rates from 1 to 1000."""
    rates = 1000 ** torch.linspace(0, 1, width // 2, dtype=time.dtype, device=time.device)
    angles = time[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


class FlowGenerator(Generator):
    """Pictures by Euler steps of equal length along the velocities of a :class:`FlowTransformer`; its latents are pixels.

    Args:
        vocabulary: the words that it knows; another one in a prompt is an error.
        size: of the transformer.
        steps: from noise to picture.
        guidance: two passes of the transformer for each step; None for one, the prompt's own velocity.

    Example:
        >>> generator = FlowGenerator(["red", "blue", "ring"], FlowSize(image=16, patch=8, width=16, layers=1, heads=2))
        >>> generator.condition(["red ring"]).tolist()
        [[1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
        >>> images = generator.sample(["red ring", "blue ring"], torch.Generator().manual_seed(0), gradient_steps=1)
        >>> images.shape, images.requires_grad
        (torch.Size([2, 3, 16, 16]), True)
    """

    def __init__(
        self, vocabulary: Sequence[str], size: FlowSize | None = None, steps: int = 10, guidance: Guidance | None = None
    ) -> None:
        super().__init__(steps)
        self.vocabulary = tuple(vocabulary)
        self.size = size or FlowSize()
        self.guidance = guidance
        self.transformer: nn.Module = FlowTransformer(len(self.vocabulary), self.size)

    def condition(self, prompts: Sequence[str]) -> Tensor:
        """``(B, L)`` ids of the prompts' words and punctuation marks, 0 behind the last.

        Raises:
            ValueError: one text instead of a list, a word outside the vocabulary, too many words.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one text: give a list of prompts")
        ids = {word: i for i, word in enumerate(self.vocabulary, start=1)}
        rows = []
        for number, prompt in enumerate(prompts):
            words = re.findall(r"\w+|[^\w\s]", prompt)
            unknown = [word for word in words if word not in ids]
            if unknown:
                known = ", ".join(self.vocabulary[:8])
                raise ValueError(f"prompt {number}: {unknown[0]!r} is none of the generator's {len(ids)} words ({known}, ...)")
            if len(words) > self.size.words:
                raise ValueError(f"prompt {number} has {len(words)} words, the generator reads {self.size.words}: shorten it")
            rows.append([*map(ids.__getitem__, words), *[0] * (self.size.words - len(words))])
        return torch.tensor(rows, device=self._pixels.device)

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """``(B, 3, S, S)`` standard normal."""
        return torch.randn(count, 3, self.size.image, self.size.image, generator=generator).to(self._pixels)

    def velocity(self, latents: Tensor, step: int, conditions: Tensor) -> Tensor:
        """``(B, 3, S, S)`` at time ``step / steps``."""
        time = latents.new_full(latents.shape[:1], step / self.steps)
        if self.guidance is None:
            return cast(Tensor, self.transformer(latents, time, conditions))
        return self.guidance(lambda words: self.transformer(latents, time, words), conditions, torch.zeros_like(conditions))

    def advance(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """An Euler step."""
        return latents + velocity / self.steps

    def clean(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Straight on to time 1."""
        return latents + (1 - step / self.steps) * velocity

    def decode(self, latents: Tensor) -> Tensor:
        """``(B, 3, S, S)`` in [0, 1]; a pixel that is cut off keeps its gradient."""
        pixels = (latents + 1) / 2
        return pixels + (pixels.clamp(0, 1) - pixels).detach()

    def encode(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """``(B, 3, S, S)`` latents of pictures, in [-1, 1].

        Raises:
            ValueError: a picture of another size, or that cannot be read.
        """
        side = self.size.image
        pixels = [picture for (picture,) in as_image_lists(images, len(images))]
        for number, picture in enumerate(pixels):
            if picture.shape != (3, side, side):
                height, width = picture.shape[1:]
                raise ValueError(f"image {number} is {width} x {height}, the generator makes {side} x {side}: resize it")
        return torch.stack(pixels).to(self._pixels) * 2 - 1

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors), vocabulary, size and steps, and an adapter beside them; guidance is the caller's.

        The folder appears whole or not at all; a generator that was there is replaced.

        Raises:
            FileExistsError: a folder that holds something else, which would be lost.
        """
        about = {"format": FORMAT, "zr": __version__, "steps": self.steps}
        about |= {"size": asdict(self.size), "vocabulary": list(self.vocabulary)}
        with written_whole(folder, ABOUT) as new:
            plain = self.transformer.get_base_model() if isinstance(self.transformer, PeftModel) else self.transformer
            state = base_state(cast(nn.Module, plain))
            save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, new / "transformer.safetensors")
            if isinstance(self.transformer, PeftModel):
                adapter = get_peft_model_state_dict(self.transformer)
                (new / ADAPTER).mkdir()
                save_file({name: tensor.detach().contiguous() for name, tensor in adapter.items()}, new / ADAPTER / WEIGHTS)
                self.transformer.peft_config[self.transformer.active_adapter].save_pretrained(str(new / ADAPTER))
            (new / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        steps: int | None = None,
        guidance: Guidance | None = None,
        lora: LoraConfig | None = None,
        merge_adapters: bool = False,
    ) -> FlowGenerator:
        """Load what :meth:`save_pretrained` wrote.

        Args:
            source: a generator's folder, or a run's folder that holds one.
            steps: from noise to picture; None for as many as were saved.
            guidance: see :class:`FlowGenerator`.
            lora: for example ``peft.LoraConfig(r=8, target_modules="all-linear")``: a new adapter, which alone is trained. An
                adapter that was saved goes on being trained without it.
            merge_adapters: fold a saved adapter into the weights, all of which are then trained.

        Raises:
            FileNotFoundError: no generator there.
            ValueError: a damaged file, a newer format, weights that do not fit; ``lora`` beside a saved adapter.
        """
        folder = next((place for place in (Path(source), Path(source) / RUN_GENERATOR) if (place / ABOUT).is_file()), None)
        if folder is None:
            raise FileNotFoundError(f"{source} holds no generator: neither {ABOUT} nor {RUN_GENERATOR}/{ABOUT} is there")
        about = _about(folder)
        made = cls(about["vocabulary"], FlowSize(**about["size"]), steps or about["steps"], guidance)
        try:
            made.transformer.load_state_dict(load_file(folder / "transformer.safetensors"))
            saved = (folder / ADAPTER / WEIGHTS).is_file()
            if saved:
                adapted = PeftModel.from_pretrained(made.transformer, str(folder / ADAPTER), is_trainable=True)
                made.transformer = adapted.merge_and_unload().requires_grad_() if merge_adapters else adapted
        except (SafetensorError, RuntimeError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{folder} holds damaged weights, or some that do not fit ({reason}): save it again") from None
        if lora is not None:
            if saved and not merge_adapters:
                raise ValueError(
                    f"{folder} holds an adapter, and lora makes a new one: give merge_adapters=True too, or no lora"
                )
            made.transformer = get_peft_model(cast(Any, made.transformer), lora)
        return made

    @property
    def _pixels(self) -> Tensor:
        """Whatever has the weights' device and precision."""
        return next(self.parameters())


def _about(folder: Path) -> dict[str, Any]:
    """What a generator's folder says about itself, checked."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}/{ABOUT} is not JSON ({error}): copy or save the generator again") from None
    fields = {"format", "steps", "size", "vocabulary"}
    if not isinstance(about, dict) or not fields <= set(about):
        raise ValueError(f"{folder}/{ABOUT} must be an object with {', '.join(sorted(fields))}: save the generator again")
    if about["format"] != FORMAT:
        raise ValueError(f"{folder} has format {about['format']}; this zr {__version__} reads format {FORMAT}")
    return about


def tiny_flow(
    vocabulary: Callable[[], Sequence[str]],
    size: FlowSize | None = None,
    steps: int = 10,
    guidance: Guidance | None = None,
    seed: int = 0,
) -> FlowGenerator:
    """A generator with random weights; the form that YAML files use.

    Args:
        vocabulary: gives the words of the prompts, such as :func:`zr.data.shapes.vocabulary`.
        size: of the transformer; five million parameters for None.
        steps: from noise to picture.
        guidance: see :class:`FlowGenerator`.
        seed: of the initial weights.

    Example:
        >>> from zr.data import shapes
        >>> generator = tiny_flow(shapes.vocabulary)
        >>> sum(p.numel() for p in generator.parameters()) // 10**5
        55
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FlowGenerator(vocabulary(), size, steps, guidance)
