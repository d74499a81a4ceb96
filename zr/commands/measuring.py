"""Scorers on held-out batches: what `zr demo` and the benchmarks evaluate, in one place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zr.data import Batch
from zr.metrics import evaluate
from zr.models import Scorer
from zr.scores import ScoreDistribution

__all__ = ["HeldOut", "predict"]


@dataclass(frozen=True)
class HeldOut:
    """Annotated images that no model was trained on.

    Args:
        batches: of the data module, in order.
        dimensions: D names.
        bins: K scores.
    """

    batches: list[Batch]
    dimensions: tuple[str, ...]
    bins: tuple[float, ...]

    @property
    def scores(self) -> Tensor:
        """``(N, D)`` annotators' scores; NaN where unknown."""
        return torch.cat([batch.scores for batch in self.batches])

    @property
    def votes(self) -> Tensor:
        """``(N, D, K)`` annotators per bin."""
        return torch.cat([batch.votes for batch in self.batches])

    @property
    def records(self) -> list[str]:
        """N names of the records that the images belong to."""
        return [key.rsplit(".", 1)[0] for batch in self.batches for key in batch.keys]

    def table(self, mu: Tensor) -> dict[str, Any]:
        """The measures of expected scores ``(N, D)``; see :func:`zr.metrics.evaluate`."""
        scores = self.scores
        return evaluate(mu.double().numpy(), scores.double().numpy(), ~scores.isnan().numpy(), self.records, self.dimensions)


@torch.inference_mode()
def predict(scorer: Scorer, batches: Iterable[Batch]) -> ScoreDistribution:
    """Score the images of batches.

    Args:
        scorer: any scorer.
        batches: N images in all.

    Returns:
        Distributions of batch shape ``(N, D)``, on the CPU.
    """
    found = [scorer(images=batch.images, prompts=batch.prompts) for batch in batches]
    return ScoreDistribution(torch.cat([q.logits.cpu() for q in found]), found[0].bins.cpu())
