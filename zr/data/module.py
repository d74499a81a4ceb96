"""Shards to batches under Lightning: seeded order, a share for each rank and worker, checks before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from zr.data.batch import ChosenPairs, PairPolicy
from zr.data.counting import CountedData
from zr.data.loader import Order, ShardLoader
from zr.data.remote import RemotePath, place
from zr.data.shards import Index
from zr.rubric import Rubric

__all__ = ["ScoreData"]


class ScoreData(CountedData):
    """Batches of annotated images from shards.

    Training goes through the shards and through a buffer of records in an order drawn from (seed, epoch, rank). Every rank
    gives the same number of batches in every epoch: a rank with fewer prompts than the fullest one goes on from its
    beginning. Evaluation gives each record exactly once, in the order of the shards. The last batch may be smaller. Without a
    Trainer the loaders serve plain loops: one process, and each pass over the training loader is an epoch.

    A checkpoint from the middle of an epoch goes on with the next batch; see :class:`zr.data.loader.ShardLoader`.

    Args:
        folder: what :func:`zr.data.write_shards` wrote: a local path, or an address such as ``s3://bucket/folder``
            (``zr.data.remote.SCHEMES``; some need a package of fsspec, which the error names).
        rubric: its scale must be that of the shards.
        batch_size: prompts in a batch; each comes with all its images. With ``pairs_per_batch`` it only says how long a
            training epoch is: the prompts of the fullest rank / ``batch_size`` batches.
        train: name of the split for training, or a list of names, whose shards are mixed. For a split of another folder write
            ``OTHER_FOLDER/SPLIT``: an absolute path or address, or relative to ``folder``. So for the next three.
        validation: name of the split for validation; None for none (and ``limit_val_batches: 0`` for the Trainer).
        test: name of the split for testing.
        predict: name of the split for prediction.
        pairs: which images of a prompt training compares, for example :class:`zr.data.AllPairs`; None for no pairs. Evaluation
            is given every annotated choice instead, whatever training does: see :class:`zr.stages.ScoreMetrics`.
        labeller: whose stored distributions become ``Batch.teacher``; None for none.
        shuffle_buffer: records that a worker holds to draw the next one from; 1 leaves the order within shards.
        num_workers: processes that read and decode for each rank; 0 does it in the training process.
        pin_memory: copy batches to page-locked memory, which a GPU reads faster.
        seed: of the order of training and within pairs.
        pairs_per_batch: training batches hold exactly so many pairs, on every rank at every step, and only the images that
            these compare; a prompt's pairs may go on in the next batch. None for whole prompts, whatever their pairs.
        on_error: ``"stop"`` raises at the first bad record or damaged shard. ``"skip"`` passes over it: at the end of a pass
            one warning on each rank counts and names what was skipped, and the loader's ``skipped`` lists all of it with
            reasons (``trainer.train_dataloader.skipped``). A damaged shard counts every record that it does not give.

    Raises:
        FileNotFoundError: no such folder or split; raised by ``setup``, before the first step.
        ValueError: a rubric of another scale, fewer shards than processes that read them; while training, a rank whose shards
            give no pair at all though ``pairs_per_batch`` asks for some.

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
        train: str | list[str] = "train",
        validation: str | None = "validation",
        test: str = "test",
        predict: str = "test",
        pairs: PairPolicy | None = None,
        labeller: str | None = None,
        shuffle_buffer: int = 256,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        pairs_per_batch: int | None = None,
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("shuffle_buffer", shuffle_buffer, 1),
            ("num_workers", num_workers, 0),
            ("pairs_per_batch", pairs_per_batch, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not train:
            raise ValueError("train names no split: give one, or a list of at least one")
        if pairs_per_batch is not None and pairs is None:
            raise ValueError("pairs_per_batch needs a pair policy: give pairs, for example AllPairs()")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be stop or skip, got {on_error!r}")
        self.folder = place(folder)
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
        self.pairs_per_batch = pairs_per_batch
        self.on_error = on_error

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

    def _loader(self, splits: str | list[str], training: bool = False) -> ShardLoader:
        paths = [self._path(split) for split in ([splits] if isinstance(splits, str) else splits)]
        found = [Index.load(p.parent).shards(p.name, self.rubric.scale, whole=self.on_error == "stop") for p in paths]
        shards = tuple(shard for of_split in found for shard in of_split)
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        workers = max(1, self.num_workers) if training else 1  # a worker without a shard is idle; a rank without one hangs
        if len(shards) < ranks * workers:
            fitting = max(1, sum(s.records for s in shards) // (ranks * workers))
            raise ValueError(
                f"split {', '.join(repr(path.name) for path in paths)} of {paths[0].parent} has {len(shards)} shards for "
                f"{ranks} ranks x {workers} workers: "
                f"write it with per_shard of {fitting} or less, or use fewer workers or devices"
            )
        return ShardLoader(
            shards=shards,
            scale=self.rubric.scale,
            batch_size=self.batch_size,
            pairs=self.pairs if training else ChosenPairs(),
            labeller=self.labeller,
            order=Order(self.seed, rank, self.shuffle_buffer) if training else None,
            **self.counting(training),
            rank=rank,
            ranks=ranks,
            pairs_per_batch=self.pairs_per_batch if training else None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            seed=self.seed,
            on_error=self.on_error,
        )

    def _path(self, split: str) -> Path | RemotePath:
        """Of a split: an absolute one, or an address, takes the place of the folder."""
        whole = place(split)
        return whole if isinstance(whole, RemotePath) or whole.is_absolute() else self.folder / split
