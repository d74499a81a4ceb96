"""A scorer that labels images: its distributions, and what its traces say, on their way into shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zr.data.labelling import LabelBatch
from zr.data.labels import LabelledFolder, labelled
from zr.data.record import LabelledDistribution, Reasoning, Record
from zr.models import ReasoningReward, Scorer
from zr.scores import ScoreDistribution, kl_divergence

__all__ = ["Labelling", "WriteLabels", "trace_seed"]

Labels = dict[str, LabelledDistribution]
"""Dimension -> distribution, of one image."""


class Labelling(L.LightningModule):
    """Labels images; ``Trainer.predict`` with :class:`zr.data.LabelData` and :class:`WriteLabels` fills a folder.

    A reasoning teacher's label is the mean of its distributions over K traces (eq. 15 with the trace marginalised), each trace
    drawn from (seed, key of the image, dimension, trace number): what else is in the batch, the order of the shards and the
    number of processes have no influence on it. Where the teacher is calibrated, so is the mean; what is told of single traces,
    their spread too, is the model's own.

    Args:
        scorer: whatever scores images.
        dimensions: that get a label; all of its rubric for None.
        traces: K of a reasoning teacher; None for as many as it averages as a scorer. A scorer that writes no traces has none.
        seed: of the traces.
        keep_traces: keep each trace as text and as ids, and the distribution after it.

    Raises:
        ValueError: an unknown dimension, traces of a scorer that writes none, K below one; while labelling, an image that the
            scorer refuses, which is named.

    Reference: Z-Reward (arXiv 2606.09076), eq. (15).

    Example:
        >>> from zr.data import shapes
        >>> from zr.models import LinearHead, compose, tiny_qwen3_vl
        >>> model = compose(tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary), LinearHead).eval()
        >>> stage = Labelling(model, dimensions=["realism"])
        >>> with torch.no_grad():
        ...     [label] = stage([torch.rand(3, 48, 48)], ["red ring"], ["p1.a"])
        >>> label["realism"].scale_id == shapes.rubric().scale_id, round(sum(label["realism"].probs), 6)
        (True, 1.0)
    """

    def __init__(
        self,
        scorer: Scorer,
        dimensions: Sequence[str] | None = None,
        traces: int | None = None,
        seed: int = 0,
        keep_traces: bool = False,
    ) -> None:
        super().__init__()
        self.scorer = scorer
        self.dimensions = [scorer.rubric.dimensions[i] for i in scorer.rubric.index(dimensions)]
        if isinstance(scorer, ReasoningReward):
            traces = scorer.traces if traces is None else traces
            if traces < 1:
                raise ValueError(f"traces must be at least 1, got {traces}")
        elif traces is not None or keep_traces:
            raise ValueError(f"{type(scorer).__name__} answers without reasoning: leave traces and keep_traces out")
        self.traces = traces
        self.seed = seed
        self.keep_traces = keep_traces

    @property
    def settings(self) -> dict[str, Any]:
        """What besides the scorer's weights decides on its labels, as plain values."""
        calibration = getattr(self.scorer, "calibration", None)
        own: dict[str, Any] = {} if calibration is None else {"calibration": asdict(calibration)}
        if not isinstance(self.scorer, ReasoningReward):
            return own
        own |= {"traces": self.traces, "seed": self.seed, "keep_traces": self.keep_traces}
        return own | {"rule": asdict(self.scorer.rule)}

    def forward(self, images: Sequence[Tensor], prompts: Sequence[str], keys: Sequence[str]) -> list[Labels]:
        """Labels of N images.

        Args:
            images: N images, as a scorer takes them.
            prompts: N prompts.
            keys: N names, unique among all images that are labelled.

        Raises:
            ValueError: what the scorer refuses.
        """
        if isinstance(self.scorer, ReasoningReward):
            return self._reasoned(self.scorer, images, prompts, keys)
        q = self.scorer(images=list(images), prompts=prompts, dimensions=self.dimensions)
        probs, outside = _probs(q), _off_scale(q)
        return [
            {
                name: LabelledDistribution(
                    _plain(probs[n, d]),
                    scale_id=self.scorer.rubric.scale_id,
                    off_scale=None if outside is None else float(outside[n, d]),
                )
                for d, name in enumerate(self.dimensions)
            }
            for n in range(len(keys))
        ]

    def predict_step(self, batch: LabelBatch) -> list[Labels]:
        """Labels of the batch's images.

        Raises:
            ValueError: an image that the scorer refuses, or a batch that does not fit into memory.
        """
        try:
            labels: list[Labels] = self(batch.images, batch.prompts, batch.keys)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"a batch of {len(batch.keys)} images, {self.traces or 1} times {len(self.dimensions)} questions each, "
                "does not fit into memory: run the same command with a smaller batch_size, it goes on"
            ) from None
        except ValueError as error:
            raise self._named(batch, error) from None
        return labels

    def _reasoned(
        self, teacher: ReasoningReward, images: Sequence[Tensor], prompts: Sequence[str], keys: Sequence[str]
    ) -> list[Labels]:
        policy, names, count = teacher.policy, self.dimensions, self.traces or 1
        prefix = policy.backbone.encode(list(images), prompts).fork(torch.arange(len(keys)).repeat_interleave(len(names)))
        rollouts = policy.sample(
            prefix=prefix,
            dimensions=names * len(keys),
            group_size=count,
            rule=teacher.rule,
            seeds=[trace_seed(self.seed, key, name, k) for key in keys for name in names for k in range(count)],
        )
        bins, shape = teacher.rubric.bins, (len(keys), len(names), count)
        after = ScoreDistribution(rollouts.logits.double().reshape(*shape, -1), bins)
        mean = after.mixture(-1)
        spread = kl_divergence(after, mean[..., None]).mean(-1).clamp_min(0.0).tolist()
        # A trace's own mass outside the labels needs the whole vocabulary, which the sampler did not read: one more pass.
        outside = _off_scale(policy.score(prefix, rollouts)) if policy.head.with_off_scale else None
        tokens, mask = rollouts.tokens.cpu(), rollouts.mask.cpu()
        written, forced = mask.sum(-1).reshape(shape).sum(-1), rollouts.forced.reshape(shape).sum(-1)
        texts = policy.texts(rollouts) if self.keep_traces else []
        each, mixed = _probs(after), _probs(mean if teacher.calibration is None else teacher.calibration(mean, names))
        labels: list[Labels] = []
        for n in range(len(keys)):
            labels.append({})
            for d, name in enumerate(names):
                first = (n * len(names) + d) * count
                own = range(first, first + count) if self.keep_traces else range(0)
                labels[n][name] = LabelledDistribution(
                    _plain(mixed[n, d]),
                    tuple(texts[i] for i in own),
                    teacher.rubric.scale_id,
                    None if outside is None else float(outside.reshape(shape)[n, d].mean()),
                    Reasoning(
                        traces=count,
                        forced=int(forced[n, d]),
                        tokens=int(written[n, d]),
                        spread=spread[n][d],
                        probs=tuple(_plain(each[n, d, i - first]) for i in own),
                        ids=tuple(tuple(tokens[i][mask[i]].tolist()) for i in own),
                    ),
                )
        return labels

    def _named(self, batch: LabelBatch, error: ValueError) -> ValueError:
        """The error of the first image that is refused alone."""
        which = f"one of {batch.keys[0]} to {batch.keys[-1]}"
        for image, prompt, key in zip(batch.images, batch.prompts, batch.keys, strict=True):
            try:
                self([image], [prompt], [key])
            except ValueError as own:
                which, error = key, own
                break
        return ValueError(f"shard {batch.shard.path}, {which} cannot be labelled: {str(error).removeprefix('sample 0: ')}")


class WriteLabels(L.Callback):
    """Writes the copy of a shard when all of its images are labelled; until then its records are held in memory.

    Args:
        target: where it goes.
    """

    def __init__(self, target: LabelledFolder) -> None:
        self.target = target
        self._labels: dict[str, Labels] = {}
        self._records: list[Record] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what an interrupted run left."""
        self._labels, self._records = {}, []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in a batch's labels."""
        self._labels |= dict(zip(batch.keys, outputs, strict=True))
        for record in batch.ended:
            own = {candidate.id: self._labels.pop(f"{record.key}.{candidate.id}") for candidate in record.candidates}
            by_dimension = {d: {name: labels[d] for name, labels in own.items()} for d in self.target.dimensions}
            self._records.append(labelled(record, self.target.labeller, by_dimension))
        if batch.last:
            self.target.write(batch.shard, self._records)
            self._records = []


def trace_seed(seed: int, key: str, dimension: str, trace: int) -> int:
    """What a trace is drawn from: the same in every batch and process, another for each image, dimension and trace.

    Example:
        >>> trace_seed(0, "p1.a", "realism", 1) == trace_seed(0, "p1.a", "realism", 1)
        True
    """
    text = json.dumps([seed, key, dimension, trace])
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")


def _probs(q: ScoreDistribution) -> Tensor:
    """``(..., K)`` in float64, so that small probabilities stay above zero."""
    return q.logits.double().softmax(-1).cpu()


def _off_scale(q: ScoreDistribution) -> Tensor | None:
    """``(...)`` in float64, None where the head did not compute it."""
    try:
        return q.off_scale.double().cpu()
    except ValueError:
        return None


def _plain(probs: Tensor) -> tuple[float, ...]:
    """Eight digits: more than float32 has."""
    return tuple(float(f"{p:.8g}") for p in probs.tolist())
