"""The picture of a metric's value, as users of torchmetrics expect it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric

__all__ = ["Plotted"]


class Plotted(Metric):
    """A metric with the ``plot`` of torchmetrics.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.
    """

    def plot(
        self, val: Tensor | dict[str, Tensor] | Sequence[Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Any = None
    ) -> tuple[Any, Any]:
        """Plot one value, or several over time.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of such values; None computes the value now.
            ax: matplotlib axes to draw on; None makes a figure.

        Returns:
            The figure (None where ``ax`` was given) and the axes.
        """
        figure, axes = self._plot(val, ax)
        return figure, axes
