"""Scorers on held-out batches: what `zr demo` and the benchmarks evaluate, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zr.data import Batch
from zr.metrics import Choices, evaluate
from zr.models import RewardModel, Scorer, load
from zr.scores import ScoreDistribution

__all__ = ["HeldOut", "chosen", "loaded", "predict", "score_split"]


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

    @property
    def choices(self) -> dict[str, Choices]:
        """By dimension, the images that annotators compared directly, as positions among the N."""
        start = np.cumsum([0, *(len(batch.keys) for batch in self.batches)])
        chosen = [
            (batch.pairs[batch.chosen] + int(first), batch.pair_dimension[batch.chosen], batch.preference[batch.chosen])
            for batch, first in zip(self.batches, start[:-1], strict=True)
            if batch.preference is not None
        ]
        if not chosen:
            return {}
        pairs, dimension, share = (torch.cat(part) for part in zip(*chosen, strict=True))
        found = {}
        for d, name in enumerate(self.dimensions):
            first, second = pairs[dimension == d].T.numpy()
            found[name] = Choices(first, second, share[dimension == d].double().numpy())
        return found

    def table(self, mu: Tensor) -> dict[str, Any]:
        """The measures of expected scores ``(N, D)``; see :func:`zr.metrics.evaluate`."""
        scores = self.scores
        known = ~scores.isnan().numpy()
        return evaluate(
            mu.double().numpy(), scores.double().numpy(), known, self.records, self.dimensions, choices=self.choices
        )


def loaded(source: str | Path, device: str = "auto", dtype: str = "auto", **options: Any) -> RewardModel:
    """A model as ``--device`` and ``--dtype`` ask for it.

    Args:
        source: what :func:`zr.load` takes.
        device: such as cpu or cuda:1; auto is cuda where there is one.
        dtype: of the backbone's weights; auto is the one they were saved in.
        options: of :func:`zr.load`.
    """
    if dtype != "auto":
        options["dtype"] = dtype
    return load(source, **options).to(chosen(device))


def chosen(device: str) -> str:
    """The device that ``--device`` stands for."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


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


def score_split(scorer: Scorer, batches: Iterable[Batch]) -> tuple[HeldOut, ScoreDistribution]:
    """Score batches as they come and keep their annotation without the images, so that a split need not fit into memory.

    Args:
        scorer: any scorer.
        batches: N images in all.

    Returns:
        The annotation, and distributions of batch shape ``(N, D)``, on the CPU.
    """
    kept: list[Batch] = []

    def passing() -> Iterator[Batch]:
        for batch in batches:
            kept.append(replace(batch, images=[]))
            yield batch

    q = predict(scorer, passing())
    return HeldOut(kept, scorer.rubric.dimensions, scorer.rubric.bins), q
