"""Text to image with gradients: what every generator here is made of, and the one loop over its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Generator"]


class Generator(nn.Module, ABC):
    """A model that denoises latents step by step, under the condition of a prompt.

    Args:
        steps: how many from noise to image.

    Raises:
        ValueError: fewer than one step.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"a generator needs at least one step, got {steps}")
        self.steps = steps

    @abstractmethod
    def condition(self, prompts: Sequence[str]) -> Any:
        """What the steps need of B prompts; without gradient."""

    @abstractmethod
    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """``(B, ...)`` latents to start from; drawn on the CPU, so that a seed means the same on every device."""

    @abstractmethod
    def velocity(self, latents: Tensor, step: int, conditions: Any) -> Tensor:
        """``(B, ...)`` direction of change at a step, guidance included: d latents / d time from noise to image."""

    @abstractmethod
    def advance(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """The latents after a step."""

    @abstractmethod
    def clean(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """The latents of the finished image, as this step predicts them."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images in [0, 1], with gradients, also where a pixel is clamped."""

    def sample(
        self,
        prompts: Sequence[str],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        gradient_steps: int = 0,
        stop: int | None = None,
        watch: Callable[[Tensor, Tensor, int, Any], None] | None = None,
    ) -> Tensor:
        """Images of prompts, with a gradient through the last steps that are run.

        Args:
            prompts: B of them.
            generator: of the noise, on the CPU; one for each prompt, so that its image does not depend on the batch, or one for
                all; None for torch's global one.
            gradient_steps: K; the last K of the steps that are run carry gradient, so that the memory does not grow with the
                number of the others. 0 for none.
            stop: the number of steps to run; the image is then the clean one that the last of them predicts. None for all.
            watch: called with latents, velocity, step and conditions at each step that carries gradient.

        Returns:
            ``(B, 3, H, W)`` in [0, 1].

        Raises:
            ValueError: no prompt, not one generator for each, ``stop`` or ``gradient_steps`` beyond the steps that there are.

        Reference: ReFL (arXiv 2304.05977) is ``gradient_steps=1`` with a drawn ``stop``, DRaFT (arXiv 2309.17400) the last K
        steps, AlignProp (arXiv 2310.03739) a drawn K.
        """
        run = self.steps if stop is None else stop
        if not prompts:
            raise ValueError("sample needs at least one prompt")
        if not 1 <= run <= self.steps:
            raise ValueError(f"stop={stop}: the generator has {self.steps} steps, give 1 to {self.steps}")
        if not 0 <= gradient_steps <= run:
            raise ValueError(f"gradient_steps={gradient_steps}: {run} steps are run, give 0 to {run}")
        if isinstance(generator, Sequence) and len(generator) != len(prompts):
            raise ValueError(f"{len(generator)} generators for {len(prompts)} prompts: give one for each, or one for all")
        with torch.no_grad():
            conditions = self.condition(prompts)
            if isinstance(generator, Sequence):
                latents = torch.cat([self.noise(1, one) for one in generator])
            else:
                latents = self.noise(len(prompts), generator)
        for step in range(run):
            learns = step >= run - gradient_steps
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                velocity = self.velocity(latents, step, conditions)
                if learns and watch is not None:
                    watch(latents, velocity, step, conditions)
                finish = step + 1 == run < self.steps
                latents = (self.clean if finish else self.advance)(latents, velocity, step)
        with torch.set_grad_enabled(gradient_steps > 0 and torch.is_grad_enabled()):
            return self.decode(latents)
