"""Shards to batches for a labeller: each shard belongs to one process, and no batch crosses from one to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import lightning as L
import torch
from torch import Tensor

from zr.data.labels import LabelledFolder
from zr.data.record import Candidate, Record, decode
from zr.data.shards import Fault, Shard, scan

__all__ = ["LabelBatch", "LabelData", "LabelLoader"]

READERS = 4
"""Threads that decode the next batch while the labeller works."""


@dataclass
class LabelBatch:
    """N images of one shard, in order; those of one record may go on in the next batch.

    Args:
        shard: which they come from.
        images: N uint8 tensors ``(3, H, W)`` in RGB.
        prompts: N prompts.
        keys: N names ``RECORD.CANDIDATE``.
        ended: the records whose last image is among them.
        last: the shard has no more.
    """

    shard: Shard
    images: list[Tensor]
    prompts: list[str]
    keys: list[str]
    ended: list[Record]
    last: bool

    def to(self, device: torch.device | str) -> LabelBatch:
        """The batch with its images on ``device``; Lightning calls this."""
        return replace(self, images=[image.to(device) for image in self.images])


class LabelLoader:
    """An iterable of :class:`LabelBatch`. Made by :class:`LabelData`.

    Args:
        shards: in order.
        target: where labels go; its scale is what records are checked against.
        batch_size: images in a batch; the last one of a shard may have fewer.
    """

    def __init__(self, shards: Sequence[Shard], target: LabelledFolder, batch_size: int) -> None:
        self.shards = shards
        self.target = target
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[LabelBatch]:
        waiting: _Part | None = None
        with ThreadPoolExecutor(READERS) as pool:
            for shard in self.shards:
                for images, last in self._images(shard):
                    part = _Part(shard, images, last, [pool.submit(decode, candidate, r.key) for r, candidate in images])
                    if waiting is not None:
                        yield waiting.batch()
                    waiting = part
            if waiting is not None:
                yield waiting.batch()

    def _images(self, shard: Shard) -> Iterator[tuple[list[tuple[Record, Candidate]], bool]]:
        """The images of a shard, ``batch_size`` at a time, and whether they are the last."""
        images: list[tuple[Record, Candidate]] = []
        for record in self._records(shard):
            for candidate in record.candidates:
                if len(images) == self.batch_size:
                    yield images, False
                    images = []
                images.append((record, candidate))
        yield images, True

    def _records(self, shard: Shard) -> Iterator[Record]:
        labeller = self.target.labeller
        for record in scan([shard], self.target.source.scale):
            if isinstance(record, Fault):
                raise record.error
            for dimension in self.target.dimensions:
                for name, by in record.distributions.get(dimension, {}).items():
                    if labeller in by:
                        raise ValueError(
                            f"shard {shard.path}: record {record.key!r}, candidate {name!r} has a distribution by {labeller!r} "
                            f"for {dimension} already: name another labeller"
                        )
            yield record


class LabelData(L.LightningDataModule):
    """What a labeller is to label, for ``Trainer.predict``.

    The shards that are not finished are dealt out: the i-th of them belongs to process i modulo their number. What is finished
    is looked up once, by the first process, so that all deal the same ones. Which process labels a shard, and in which order,
    has no influence on its labels: no batch crosses from one shard to another.

    Args:
        target: where labels go. The first process holds it (:meth:`LabelledFolder.begin`) around ``Trainer.predict``.
        batch_size: images that are labelled together; with many traces for each, fewer fit.

    Raises:
        ValueError: a batch size below one; while labelling, a bad record, a damaged shard or image, a record that the labeller
            has labelled already. Each names the shard.

    Example:
        >>> import tempfile
        >>> from zr.data import shapes, write_shards
        >>> scale, records = shapes.rubric().scale, shapes.records("unlabelled", count=3, candidates=2)
        >>> with tempfile.TemporaryDirectory() as home:
        ...     source = write_shards(records, f"{home}/in", scale, per_shard=2)
        ...     target = LabelledFolder(f"{home}/out", source, scale, "judge", ["realism"], {})
        ...     batches = list(LabelData(target, batch_size=3).predict_dataloader())
        >>> [(batch.shard.path.name, len(batch.keys), batch.last) for batch in batches]
        [('train-000000.tar', 3, False), ('train-000000.tar', 1, True), ('train-000001.tar', 2, True)]
    """

    def __init__(self, target: LabelledFolder, batch_size: int = 8) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.target = target
        self.batch_size = batch_size
        self._held = ExitStack()

    def setup(self, stage: str) -> None:
        """Hold the folder, in the processes that the first one does not hold it for."""
        if self.trainer is not None and not self.trainer.is_global_zero:
            self._held.enter_context(self.target.join())

    def teardown(self, stage: str) -> None:
        """Let the folder go."""
        self._held.close()

    def predict_dataloader(self) -> LabelLoader:
        """This process's share of the shards that are not finished."""
        left = self.target.todo()
        if self.trainer is not None:
            names = self.trainer.strategy.broadcast([shard.path.name for shard in left])
            shards = {shard.path.name: shard for shards in self.target.shards.values() for shard in shards}
            left = [shards[name] for name in names][self.trainer.global_rank :: self.trainer.world_size]
        return LabelLoader(left, self.target, self.batch_size)


@dataclass
class _Part:
    """Images on their way to a batch, while they are decoded."""

    shard: Shard
    images: list[tuple[Record, Candidate]]
    last: bool
    decoding: list[Future[Tensor]]

    def batch(self) -> LabelBatch:
        try:
            pixels = [future.result() for future in self.decoding]
        except ValueError as error:
            raise ValueError(f"shard {self.shard.path}: {error}") from None
        return LabelBatch(
            shard=self.shard,
            images=pixels,
            prompts=[record.prompt for record, _ in self.images],
            keys=[f"{record.key}.{candidate.id}" for record, candidate in self.images],
            ended=[record for record, candidate in self.images if candidate is record.candidates[-1]],
            last=self.last,
        )
