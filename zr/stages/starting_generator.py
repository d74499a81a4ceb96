"""A generator as it was when training began, and how far it has come since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zr.models.generators.base import Generator

__all__ = ["StartingGenerator"]


class StartingGenerator(nn.Module):
    """A generator as it is now, kept beside what it will become.

    Only the weights that are trained are kept twice: the whole network in full training, the adapters under LoRA (fresh ones
    change nothing, so this is the network without them; adapters that were trained before are kept as they are). They are a
    part of the checkpoint, so a resumed run has the same start.

    Args:
        generator: with ``requires_grad`` set by now.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self._beside = (generator,)  # in a tuple: no part of this module
        trained = {name: p for name, p in generator.named_parameters() if p.requires_grad}
        self.names = list(trained)
        self.weights = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in trained.values())

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let the generator be what it was. Graphs of what it is now are not touched."""
        (generator,) = self._beside
        now = dict(generator.named_parameters())
        then = {id(now[name]): weight for name, weight in zip(self.names, self.weights, strict=True)}
        places = [
            (module, name, parameter)
            for module in generator.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in then
        ]
        try:
            for module, name, parameter in places:
                module._parameters[name] = then[id(parameter)]
            yield
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter

    def distance(self, latents: Tensor, velocity: Tensor, step: int, conditions: Any) -> Tensor:
        """How far a velocity is from the one that the generator had at the start.

        Args:
            latents: ``(B, ...)`` before the step.
            velocity: ``(B, ...)`` there.
            step: its number.
            conditions: of the B prompts.

        Returns:
            ``(B,)`` mean square of the difference, with the gradient through both velocities. That of the start is computed
            again in the backward pass, so it keeps nothing.
        """
        start: Tensor = _AtStart.apply(latents, self, step, conditions)
        wide = torch.promote_types(velocity.dtype, torch.float32)
        return (velocity.to(wide) - start.to(wide)).square().flatten(1).mean(1)

    def velocity(self, latents: Tensor, step: int, conditions: Any) -> Tensor:
        """The velocity at the start."""
        (generator,) = self._beside
        with self.standing_in():
            return generator.velocity(latents, step, conditions)


class _AtStart(torch.autograd.Function):
    """See :meth:`StartingGenerator.distance`: whatever runs again in a backward pass must run with the weights of the start."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, start: StartingGenerator, step: int, conditions: Any) -> Tensor:
        ctx.save_for_backward(latents)
        ctx.given = (start, step, conditions)
        device = latents.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return start.velocity(latents, step, conditions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        start, step, conditions = ctx.given
        device, dtype, enabled = ctx.autocast
        latents = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(device, dtype, enabled), start.standing_in():
            velocity = start.velocity(latents, step, conditions)
            (found,) = torch.autograd.grad(velocity, latents, gradient)
        return found, None, None, None
