"""What a generator is taught whose paths from noise to picture are straight: where it is on the way, and the velocity there."""

from __future__ import annotations

import torch
from torch import Tensor

from zr.losses.base import check_shape

__all__ = ["flow_matching_loss", "on_the_way"]


def on_the_way(noise: Tensor, clean: Tensor, time: Tensor) -> Tensor:
    r"""Between noise and picture, :math:`z_t = (1 - t)\,\epsilon + t\,x`.

    Args:
        noise: ``(B, ...)``.
        clean: ``(B, ...)``.
        time: ``(B,)`` in [0, 1].

    Returns:
        ``(B, ...)``.

    Raises:
        ValueError: shapes that differ.

    Reference: rectified flow (Liu et al., arXiv 2209.03003), eq. (1); flow matching (Lipman et al., arXiv 2210.02747).

    Example:
        >>> on_the_way(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [4.0]]), torch.tensor([0.25, 0.5])).tolist()
        [[0.25], [3.0]]
    """
    check_shape("clean", clean, noise.shape)
    check_shape("time", time, noise.shape[:1])
    return torch.lerp(noise, clean, time.reshape(-1, *[1] * (noise.dim() - 1)))


def flow_matching_loss(velocity: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
    r"""Mean square of :math:`v - (x - \epsilon)` over a picture's values; the mean over noise has the flow as its minimum.

    Args:
        velocity: ``(B, ...)``, predicted at :func:`on_the_way`.
        noise: ``(B, ...)``.
        clean: ``(B, ...)``.

    Returns:
        ``(B,)``, not reduced, in squared units of the latents.

    Raises:
        ValueError: shapes that differ.

    Reference: as :func:`on_the_way`.

    Example:
        >>> velocity, noise, clean = torch.tensor([[1.0, 4.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 3.0]])
        >>> flow_matching_loss(velocity, noise, clean).tolist()                                    # (0 ** 2 + 2 ** 2) / 2
        [2.0]
    """
    check_shape("velocity", velocity, clean.shape)
    check_shape("noise", noise, clean.shape)
    return (velocity - (clean - noise)).square().flatten(1).mean(1)
