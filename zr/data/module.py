"""Shards to batches under Lightning: seeded order, a share for each rank and worker, checks before the first step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import webdataset as wds
from torch.utils.data import DataLoader, get_worker_info

from zr.data.batch import Batch, PairPolicy, collate
from zr.data.record import Record
from zr.data.shards import Index, Shard, pipeline
from zr.rubric import Rubric

__all__ = ["ScoreData", "ShardLoader"]


class ScoreData(L.LightningDataModule):
    """Batches of annotated images from shards.

    Training goes through the shards and through a buffer of records in an order drawn from (seed, epoch, rank). Every rank
    gives the same number of batches in every epoch: a rank with fewer prompts than the fullest one goes on from its
    beginning. Evaluation gives each record exactly once, in the order of the shards. The last batch may be smaller. Without a
    Trainer the loaders serve plain loops: one process, and each pass over the training loader is an epoch.

    Args:
        folder: what :func:`zr.data.write_shards` wrote.
        rubric: its scale must be that of the shards.
        batch_size: prompts in a batch; each comes with all its images.
        train: name of the split for training. For a split of another folder write ``OTHER_FOLDER/SPLIT``: an absolute path,
            or relative to ``folder``. So for the next three.
        validation: name of the split for validation; None for none (and ``limit_val_batches: 0`` for the Trainer).
        test: name of the split for testing.
        predict: name of the split for prediction.
        pairs: which images of a prompt are compared, for example :class:`zr.data.AllPairs`; None for no pairs.
        labeller: whose stored distributions become ``Batch.teacher``; None for none.
        shuffle_buffer: records that a worker holds to draw the next one from; 1 leaves the order within shards.
        num_workers: processes that read and decode for each rank; 0 does it in the training process.
        pin_memory: copy batches to page-locked memory, which a GPU reads faster.
        seed: of the order of training and within pairs.

    Raises:
        FileNotFoundError: no such folder or split; raised by ``setup``, before the first step.
        ValueError: a rubric of another scale, fewer shards than processes that read them.

    Example:
        >>> import io, tempfile, zr
        >>> from PIL import Image
        >>> from zr.data import Candidate, Record, ScoreData, write_shards
        >>> rubric = zr.Rubric.load("zr:direct")
        >>> Image.new("RGB", (8, 8)).save(image := io.BytesIO(), "PNG")
        >>> night = Candidate("a", image.getvalue())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     records = (Record(f"p{i}", "night", (night,)) for i in range(5))
        ...     index = write_shards(records, folder, rubric.scale, split="test", per_shard=2)
        ...     loader = ScoreData(folder, rubric, batch_size=3).test_dataloader()
        ...     len(loader), [batch.keys for batch in loader]
        (2, [['p0.a', 'p1.a', 'p2.a'], ['p3.a', 'p4.a']])
    """

    def __init__(
        self,
        folder: str | Path,
        rubric: Rubric,
        batch_size: int = 8,
        train: str = "train",
        validation: str | None = "validation",
        test: str = "test",
        predict: str = "test",
        pairs: PairPolicy | None = None,
        labeller: str | None = None,
        shuffle_buffer: int = 256,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("shuffle_buffer", shuffle_buffer, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.folder = Path(folder)
        self.rubric = rubric
        self.batch_size = batch_size
        self.train = train
        self.validation = validation
        self.test = test
        self.predict = predict
        self.pairs = pairs
        self.labeller = labeller
        self.shuffle_buffer = shuffle_buffer
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self._passes = itertools.count()

    def setup(self, stage: str) -> None:
        """Check the splits that ``stage`` (fit, validate, test or predict) needs, before anything expensive begins."""
        if stage == "fit":
            self.train_dataloader()
        if stage in ("fit", "validate"):
            self.val_dataloader()
        if stage == "test":
            self.test_dataloader()
        if stage == "predict":
            self.predict_dataloader()

    def train_dataloader(self) -> ShardLoader:
        """Batches of the training split, in an order of its own in each epoch."""
        return self._loader(self.train, training=True)

    def val_dataloader(self) -> ShardLoader | list[ShardLoader]:
        """Batches of the validation split, each record once; an empty list without one."""
        return [] if self.validation is None else self._loader(self.validation)

    def test_dataloader(self) -> ShardLoader:
        """Batches of the test split, each record once."""
        return self._loader(self.test)

    def predict_dataloader(self) -> ShardLoader:
        """Batches of the split to predict, each record once."""
        return self._loader(self.predict)

    def _loader(self, split: str, training: bool = False) -> ShardLoader:
        path = self.folder / split  # an absolute split takes the place of the folder
        shards = Index.load(path.parent).shards(path.name, self.rubric.scale)
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        workers = max(1, self.num_workers) if training else 1  # a worker without a shard is idle; a rank without one hangs
        if len(shards) < ranks * workers:
            fitting = max(1, sum(s.records for s in shards) // (ranks * workers))
            raise ValueError(
                f"split {path.name!r} of {path.parent} has {len(shards)} shards for {ranks} ranks x {workers} workers: "
                f"write it with per_shard of {fitting} or less, or use fewer workers or devices"
            )
        shares = [shards[r::ranks] for r in range(ranks)]
        most = max(sum(s.records for s in share) for share in shares)
        return ShardLoader(
            shards=shares[rank],
            records=most if training else sum(s.records for s in shares[rank]),
            rubric=self.rubric,
            batch_size=self.batch_size,
            pairs=self.pairs,
            labeller=self.labeller,
            order=Order(self.seed, rank, self.shuffle_buffer) if training else None,
            epoch=self._epoch if training else int,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            seed=self.seed,
        )

    def _epoch(self) -> int:
        return next(self._passes) if self.trainer is None else self.trainer.current_epoch


@dataclass(frozen=True)
class Order:
    """The random order of one rank: shards first, then records through a buffer."""

    seed: int
    rank: int
    buffer: int

    def shards(self, shards: Sequence[Shard], epoch: int) -> list[Shard]:
        """All shards of the rank, in the order of this epoch."""
        return random.Random(f"{self.seed} {epoch} {self.rank}").sample(shards, len(shards))

    def records(self, source: Iterator[Record], epoch: int) -> Iterator[Record]:
        """The records of one worker, drawn from a buffer."""
        info = get_worker_info()
        generator = random.Random(f"{self.seed} {epoch} {self.rank} {info.id if info else 0}")
        shuffled: Iterator[Record] = wds.shuffle(self.buffer, initial=self.buffer, rng=generator)(source)
        return shuffled


class ShardLoader:
    """What a DataModule's loaders are: an iterable of :class:`zr.data.Batch` with a length. Made by :class:`ScoreData`.

    Workers read, decode and aggregate single records; batches are put together here, so that their number does not depend on
    how shards fall to workers.

    Args:
        shards: those of this rank.
        records: how many to give in a pass; more than the shards hold begins them again.
        rubric: gives the scale.
        batch_size: records in a batch.
        pairs: see :func:`zr.data.collate`.
        labeller: see :func:`zr.data.collate`.
        order: None for the order of the shards.
        epoch: called at the beginning of each pass.
        num_workers: see :class:`torch.utils.data.DataLoader`.
        pin_memory: see :class:`torch.utils.data.DataLoader`.
        seed: see :func:`zr.data.collate`.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        records: int,
        rubric: Rubric,
        batch_size: int,
        pairs: PairPolicy | None,
        labeller: str | None,
        order: Order | None,
        epoch: Callable[[], int],
        num_workers: int,
        pin_memory: bool,
        seed: int,
    ) -> None:
        self.shards = shards
        self.records = records
        self.rubric = rubric
        self.batch_size = batch_size
        self.pairs = pairs
        self.labeller = labeller
        self.order = order
        self.epoch = epoch
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed

    def __len__(self) -> int:
        return -(-self.records // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch()
        passes = (one for _ in itertools.count() for one in self._records(epoch))
        given = itertools.islice(passes, self.records)
        while part := list(itertools.islice(given, self.batch_size)):
            yield Batch.join(part)

    def _records(self, epoch: int) -> Iterator[Batch]:
        """One pass over this rank's shards, each record a batch of its own."""
        scale = self.rubric.scale
        shards, stages = self.shards, []
        if self.order is not None:
            shards = self.order.shards(shards, epoch)
            stages = [partial(self.order.records, epoch=epoch)]
        to_batch = partial(_batch, scale=scale, pairs=self.pairs, labeller=self.labeller, seed=self.seed, epoch=epoch)
        loader: DataLoader[Any] = DataLoader(
            pipeline(shards, scale, *stages, wds.map(to_batch), _errors_as_items),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=2 * -(-self.batch_size // self.num_workers) if self.num_workers else None,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.seed),  # else each pass would draw from the global state
        )
        for one in loader:
            if isinstance(one, Exception):
                raise one
            yield one


def _batch(record: Record, **settings: Any) -> Batch:
    return collate([record], **settings)


def _errors_as_items(source: Iterator[Batch]) -> Iterator[Batch | Exception]:
    """Hand an error over as an item: raised in a worker it would arrive wrapped in a traceback."""
    try:
        yield from source
    except (ValueError, OSError) as error:
        yield error
