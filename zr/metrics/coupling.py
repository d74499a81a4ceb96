"""Whether a reasoning score depends on its reasoning: the limit that direct losses may run into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zr.metrics.plotting import Plotted
from zr.scores import ScoreDistribution, kl_divergence

__all__ = ["Coupling", "coupling_distances"]

NAMES = ("removed", "other", "floor")  # of what moves the score


class Coupling(Plotted):
    r"""How far the score moves when its trace is taken away or exchanged, beside how far it moves between two own traces.

    Each of N images has four distributions: ``own`` trace, trace ``removed``, the trace of an ``other`` image of the same
    dimension, and a second trace of the same image (``again``). Measured from ``own`` to each of the others are
    :math:`\mathrm{KL}(q \| q')` and :math:`|\mu - \mu'|`, by :func:`coupling_distances`; averaged over the images. Values of
    ``removed`` and ``other`` near those of ``again``, the noise floor, mean that the reasoning has no say in the score.

    ``compute`` returns ``removed_kl``, ``removed_gap``, ``other_kl``, ``other_gap``, ``floor_kl``, ``floor_gap``: the KL in
    nats, the gap in score units. NaN without images. Sums are reduced over processes: the values are those of one process.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Reference: Z-Reward (arXiv 2606.09076), on its limits: reasoning-score coupling.

    Example:
        >>> sure, unsure = (ScoreDistribution(torch.tensor([p]).log(), (1.0, 5.0)) for p in ([1.0, 0.0], [0.5, 0.5]))
        >>> coupling = Coupling()
        >>> coupling.update(own=sure, removed=unsure, other=sure, again=sure)
        >>> {name: round(value.item(), 4) for name, value in coupling.compute().items() if name.startswith("removed")}
        {'removed_kl': 0.6931, 'removed_gap': 2.0}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    items: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(3, 2), dist_reduce_fx="sum")
        self.add_state("items", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, own: ScoreDistribution, removed: ScoreDistribution, other: ScoreDistribution, again: ScoreDistribution
    ) -> None:
        """Add a batch of images, all in one batch shape ``(...)``.

        Args:
            own: with the image's own trace.
            removed: with no trace.
            other: with the trace of another image of the same dimension.
            again: with a second trace of the same image.

        Raises:
            ValueError: batch shapes or bins that differ.
        """
        varied = {"removed": removed, "other": other, "again": again}
        shapes = {name: tuple(q.batch_shape) for name, q in {"own": own, **varied}.items()}
        if len(set(shapes.values())) != 1:
            found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"Coupling needs four distributions of one batch shape, got {found}")
        distances = [coupling_distances(own.detach(), q.detach()) for q in varied.values()]
        self.total = self.total + torch.stack([torch.stack([part.sum() for part in pair]) for pair in distances])
        self.items = self.items + own.batch_shape.numel()

    def compute(self) -> dict[str, Tensor]:
        """Six means by name; NaN without images."""
        mean = self.total / self.items
        return {f"{name}_{kind}": mean[i, j] for i, name in enumerate(NAMES) for j, kind in enumerate(("kl", "gap"))}


def coupling_distances(own: ScoreDistribution, varied: ScoreDistribution) -> tuple[Tensor, Tensor]:
    r"""How far a distribution moved: :math:`\mathrm{KL}(q \| q')` in nats, :math:`|\mu - \mu'|` in score units.

    Args:
        own: batch shape ``(...)``.
        varied: batch shape ``(...)``, after the change.

    Returns:
        Two tensors ``(...)``. The KL is infinite where ``varied`` excludes a score that ``own`` allows.

    Raises:
        ValueError: different bins.

    Example:
        >>> q, r = (ScoreDistribution(torch.tensor(p).log(), (1.0, 5.0)) for p in ([0.5, 0.5], [0.25, 0.75]))
        >>> [round(part.item(), 4) for part in coupling_distances(q, r)]      # (log 2 + log 2/3) / 2 and 4 - 3
        [0.1438, 1.0]
    """
    return kl_divergence(own, varied), (own.mean - varied.mean).abs()
