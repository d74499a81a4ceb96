"""Whether a model's scores depend on its reasoning: the same questions without their traces, and with other images' traces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from zr.data import Batch
from zr.metrics import Coupling
from zr.models import ReasoningReward
from zr.scores import ScoreDistribution

__all__ = ["coupled"]


@torch.inference_mode()
def coupled(model: ReasoningReward, batches: Iterable[Batch]) -> dict[str, float] | None:
    """Measure :class:`zr.metrics.Coupling` of single traces, in all dimensions.

    Each question, which is an image in a dimension, gets two traces. From the score after the first of them it is told how far
    the score moves without a trace (``removed``), after the second trace of the next image of the same prompt (``other``) and
    after the image's own second one (``floor``). The last two differ in the image that the trace was written for and in
    nothing else. Images alone with their prompt are left out.

    Args:
        model: writes the traces by its own rule; they are drawn from its seed.
        batches: images with their prompts.

    Returns:
        The six numbers of the measure, and ``images``: how many it was measured on. None where no prompt has two images.
    """
    metric, images = Coupling(), 0
    luck = torch.Generator().manual_seed(model.seed)
    names = model.rubric.dimensions
    for batch in batches:
        following = _following(batch.prompt_index)
        together = (following != torch.arange(len(following))).repeat_interleave(len(names))
        if together.any():
            metric.update(**{name: q[together] for name, q in _varied(model, batch, following, luck).items()})
            images += int(together.sum()) // len(names)
    return {name: float(value) for name, value in metric.compute().items()} | {"images": images} if images else None


def _varied(model: ReasoningReward, batch: Batch, following: Tensor, luck: torch.Generator) -> dict[str, ScoreDistribution]:
    """Of each image and dimension ``(N * D,)`` the four distributions that the measure compares."""
    policy, names = model.policy, model.rubric.dimensions
    asked = len(batch.images) * len(names)
    rows = torch.arange(len(batch.images)).repeat_interleave(len(names))
    prefix = policy.backbone.encode(batch.images, batch.prompts).fork(rows)
    seeds = torch.randint(2**62, (2 * asked,), generator=luck).tolist()
    rollouts = policy.sample(prefix, list(names) * len(batch.images), group_size=2, rule=model.rule, seeds=seeds)
    own, again = (rollouts.select(slice(number, None, 2)) for number in range(2))
    next_one = following[rows] * len(names) + torch.arange(asked) % len(names)
    removed = replace(own, mask=torch.zeros_like(own.mask))
    other = replace(again.select(next_one.to(own.row.device)), row=own.row)
    bins = model.rubric.bins
    return {
        "own": ScoreDistribution(own.logits, bins),
        "removed": policy.score(prefix, removed),
        "other": policy.score(prefix, other),
        "again": ScoreDistribution(again.logits, bins),
    }


def _following(prompt: Tensor) -> Tensor:
    """Of each image the position of the next one of its prompt, of the last one that of the first.

    Example:
        >>> _following(torch.tensor([0, 0, 0, 1, 2, 2])).tolist()
        [1, 2, 0, 3, 5, 4]
    """
    found = torch.arange(len(prompt))
    for value in set(prompt.tolist()):
        places = (prompt == value).nonzero().flatten()
        found[places] = places.roll(-1)
    return found
