"""Copies of shards with a labeller's distributions: written shard by shard, gone on with after an interruption.

Beside the tars and their index lies the folder ``labelling``: for each split ``SPLIT.settings.json``, written first, and
``SPLIT.summary.json``, written last; for each tar ``TAR.json``, written after it, which says that it is finished; a lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from zr.data.record import LabelledDistribution, Record, parse_json
from zr.data.remote import local
from zr.data.shards import INDEX, Index, Shard, as_sample, atomic, check_scale, tar_writer
from zr.rubric import Scale
from zr.scores import ScoreDistribution

__all__ = ["LabelledFolder", "Tally"]

BESIDE = "labelling"
LOCK = "lock"


@dataclass(frozen=True)
class Tally:
    """Sums over labels of one dimension; tallies are added.

    Args:
        labels: how many.
        score: sum of their expected scores, in score units.
        entropy: sum of their entropies, in nats.
        told: labels whose labeller says what it put outside the scale.
        off_scale: sum of these probabilities.
        reasoned: labels that are means over traces.
        spread: sum of their disagreement between traces, in nats.
        traces: of all of them together.
        forced: traces that the limit of length cut.
        tokens: of all traces.

    Example:
        >>> sure, torn = LabelledDistribution((1.0, 0.0, 0.0)), LabelledDistribution((0.5, 0.0, 0.5))
        >>> both = Tally.of([sure], (1.0, 3.0, 5.0)) + Tally.of([torn], (1.0, 3.0, 5.0))
        >>> found = both.summary()
        >>> found["labels"], found["score"], round(found["entropy"], 4), found["spread"]        # (0 + log 2) / 2
        (2, 2.0, 0.3466, None)
    """

    labels: int = 0
    score: float = 0.0
    entropy: float = 0.0
    told: int = 0
    off_scale: float = 0.0
    reasoned: int = 0
    spread: float = 0.0
    traces: int = 0
    forced: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, labels: Sequence[LabelledDistribution], bins: Sequence[float]) -> Tally:
        """The tally of labels on a scale of these bins."""
        if not labels:
            return cls()
        q = ScoreDistribution(torch.tensor([label.probs for label in labels], dtype=torch.float64).log(), bins)
        outside = [label.off_scale for label in labels if label.off_scale is not None]
        reasoning = [label.reasoning for label in labels if label.reasoning is not None]
        return cls(
            labels=len(labels),
            score=float(q.mean.sum()),
            entropy=float(q.entropy().sum()),
            told=len(outside),
            off_scale=sum(outside),
            reasoned=len(reasoning),
            spread=sum(one.spread for one in reasoning),
            traces=sum(one.traces for one in reasoning),
            forced=sum(one.forced for one in reasoning),
            tokens=sum(one.tokens for one in reasoning),
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def summary(self) -> dict[str, float | None]:
        """Means: of score, entropy, off_scale and spread over labels, of forced and tokens over traces; None over nothing."""

        def mean(total: float, count: int) -> float | None:
            return total / count if count else None

        return {
            "labels": self.labels,
            "score": mean(self.score, self.labels),
            "entropy": mean(self.entropy, self.labels),
            "spread": mean(self.spread, self.reasoned),
            "forced": mean(self.forced, self.traces),
            "off_scale": mean(self.off_scale, self.told),
            "tokens": mean(self.tokens, self.traces),
        }


class LabelledFolder:
    """Where copies of shards go, each record with the distributions of one labeller.

    A tar gets its name when all of its records are labelled, and equal labels give equal bytes; so labelling that was
    interrupted goes on with the tars that are not finished. A finished tar is known by the file beside it and its size. The
    index comes last: until then nobody reads the split. One run at a time: its processes share a lock, which the system frees
    when they end, in whatever way.

    Args:
        folder: a local folder, for several machines one that all of them see; made if needed.
        source: of the shards to copy.
        scale: of the labeller, which must be theirs.
        labeller: name under which the distributions are kept.
        dimensions: that get one.
        settings: plain values that decide on the labels, such as the model's fingerprint and the seed.
        splits: of the source; None for all.

    Raises:
        FileNotFoundError: no such split.
        ValueError: another scale, a labeller without a name, no dimension or an unknown one, the folder of the source.

    Example:
        >>> import io, tempfile, zr
        >>> from PIL import Image
        >>> from zr.data import Candidate, write_shards
        >>> scale = zr.Rubric.load("zr:direct").scale
        >>> Image.new("RGB", (8, 8)).save(image := io.BytesIO(), "PNG")
        >>> record = Record("p1", "night", (Candidate("a", image.getvalue()),))
        >>> worst = LabelledDistribution((1.0, *[0.0] * 8), scale_id=scale.scale_id)
        >>> with tempfile.TemporaryDirectory() as home:
        ...     source = write_shards([record], f"{home}/in", scale)
        ...     target = LabelledFolder(f"{home}/out", source, scale, "judge", ["realism"], {"seed": 0})
        ...     with target.begin():
        ...         for shard in target.todo():
        ...             target.write(shard, [labelled(record, "judge", {"realism": {"a": worst}})])
        ...         found = target.finish()["train"]["overall"]
        >>> found["labels"], found["score"]
        (1, 1.0)
    """

    def __init__(
        self,
        folder: str | Path,
        source: Index,
        scale: Scale,
        labeller: str,
        dimensions: Sequence[str],
        settings: Mapping[str, Any],
        splits: Sequence[str] | None = None,
    ) -> None:
        self.folder = local(folder)
        self.source = source
        self.labeller = labeller
        self.dimensions = tuple(dimensions)
        check_scale(source, scale)
        if not labeller.strip() or not self.dimensions or not set(self.dimensions) <= set(scale.dimensions):
            raise ValueError(
                f"labels need a labeller's name, got {labeller!r}, and dimensions of {', '.join(scale.dimensions)}, "
                f"got {', '.join(self.dimensions) or 'none'}"
            )
        if isinstance(source.folder, Path) and source.folder.resolve() == self.folder.resolve():
            raise ValueError(f"{self.folder} holds the shards that are to be labelled: labels go into copies, in another")
        self.shards: dict[str, tuple[Shard, ...]] = {}
        for split in source.splits if splits is None else splits:
            shards = source.shards(split, scale, whole=False)
            self.shards[split] = tuple(shard for shard in shards if shard.records)
        given = {"labeller": labeller, "dimensions": self.dimensions, "scale_id": source.scale.scale_id, **settings}
        self.settings: dict[str, Any] = json.loads(json.dumps(given))

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Hold the folder for the first process of a run, which calls it before any other process joins.

        Raises:
            FileExistsError: the folder has one of the splits, and it was not labelled.
            FileNotFoundError: a shard of the source is gone.
            ValueError: another run holds the folder, or it was begun with other settings; shards of the source that are not
                whole.
        """
        for split in self.shards:
            self.source.shards(split, self.source.scale)
        (self.folder / BESIDE).mkdir(parents=True, exist_ok=True)
        with self._lock(fcntl.LOCK_EX, fcntl.LOCK_SH):
            new = [split for split in self.shards if not self._begun(split)]
            for split in new:
                _write(self._beside(f"{split}.settings.json"), self._settings(split))
            yield

    @contextmanager
    def join(self) -> Iterator[None]:
        """Hold the folder for another process of a run that has begun.

        Raises:
            ValueError: another run holds the folder.
        """
        with self._lock(fcntl.LOCK_SH):
            yield

    def todo(self) -> list[Shard]:
        """The shards of the source that are not finished, in order."""
        shards = {shard.path.name: shard for shards in self.shards.values() for shard in shards}
        return [shard for name, shard in shards.items() if self._finished(name) is None]

    def write(self, shard: Shard, records: Sequence[Record]) -> None:
        """Write the copy of a shard.

        Args:
            shard: of the source.
            records: all of its records, labelled, in order.

        Raises:
            OSError: a full disk; what is finished stays.
            ValueError: a record that is not valid.
        """
        for record in records:
            record.validate(self.source.scale, images=False)
        path = self.folder / shard.path.name
        with tar_writer(path) as tar:
            for record in records:
                tar.write(as_sample(record))
        tallies = {name: Tally.of(self._labels(records, name), self.source.scale.bins) for name in self.dimensions}
        about = {"records": len(records), "bytes": path.stat().st_size}
        _write(self._beside(f"{path.name}.json"), about | {"tallies": {name: asdict(t) for name, t in tallies.items()}})

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write index and summaries, once all shards are finished.

        Returns:
            For each split its summary: ``records``, and under ``dimensions`` and ``overall`` what :meth:`Tally.summary` gives.

        Raises:
            ValueError: a shard is not finished.
        """
        left = self.todo()
        if left:
            first = left[0].path.name
            raise ValueError(
                f"{self.folder}: {len(left)} shards are not labelled, {first} is the first: run the same command again"
            )
        summaries, splits = {}, {}
        for split, shards in self.shards.items():
            finished = [self._finished(shard.path.name) or {} for shard in shards]
            names = [self.folder / shard.path.name for shard in shards]
            splits[split] = tuple(Shard(p, one["records"], one["bytes"]) for p, one in zip(names, finished, strict=True))
            tallies = {name: sum((Tally(**f["tallies"][name]) for f in finished), Tally()) for name in self.dimensions}
            summaries[split] = {
                "records": sum(shard.records for shard in shards),
                "dimensions": {name: tally.summary() for name, tally in tallies.items()},
                "overall": sum(tallies.values(), Tally()).summary(),
            }
            _write(self._beside(f"{split}.summary.json"), summaries[split] | {"settings": self._settings(split)})
        Index(self.folder, self.source.scale, {**self._before(), **splits}).save()
        return summaries

    def _labels(self, records: Sequence[Record], dimension: str) -> list[LabelledDistribution]:
        found = [by for record in records for by in record.distributions.get(dimension, {}).values()]
        return [by[self.labeller] for by in found if self.labeller in by]

    def _settings(self, split: str) -> dict[str, Any]:
        shards = [(shard.path.name, shard.records, shard.size) for shard in self.shards[split]]
        return {**self.settings, "shards": sha256(repr(shards).encode()).hexdigest()[:16]}

    def _begun(self, split: str) -> bool:
        """Whether a run has begun to label the split, if that run was like this one."""
        path, now = self._beside(f"{split}.settings.json"), self._settings(split)
        if not path.is_file():
            if split in self._before() or any((self.folder / shard.path.name).exists() for shard in self.shards[split]):
                raise FileExistsError(f"{self.folder} has a split {split!r} already: label into another folder")
            return False
        then = _read(path)
        differing = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        if differing:
            was, are = (", ".join(f"{name}={one.get(name)!r}" for name in differing) for one in (then, now))
            raise ValueError(
                f"{self.folder}, split {split!r}, was begun with {was}, now it is {are}: "
                "give what it was begun with, or label into another folder"
            )
        return True

    def _before(self) -> Mapping[str, tuple[Shard, ...]]:
        """The splits that the folder's index names."""
        if not (self.folder / INDEX).exists():
            return {}
        index = Index.load(self.folder)
        check_scale(index, self.source.scale)
        return index.splits

    def _finished(self, name: str) -> dict[str, Any] | None:
        """What the file beside a finished tar says."""
        path, tar = self._beside(f"{name}.json"), self.folder / name
        if not (path.is_file() and tar.is_file()):
            return None
        found = _read(path)
        return found if found["bytes"] == tar.stat().st_size else None

    def _beside(self, name: str) -> Path:
        return self.folder / BESIDE / name

    @contextmanager
    def _lock(self, *kinds: int) -> Iterator[None]:
        """Take the lock of the folder, as one kind and then as the next; nobody can wait for it.

        All processes of a run share it. The first takes it alone to begin with, so that no process of another run is left.
        """
        path = self._beside(LOCK)
        with path.open("a+") as file:
            for kind in kinds:
                try:
                    fcntl.flock(file, kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(
                        f"{self.folder} is being labelled by a run that began as {path.read_text() or 'this one'}: "
                        "wait until all of its processes have ended, or end them"
                    ) from None
                except OSError as error:
                    reason = f"{error.strerror}: its file system cannot lock files: label into a folder on another one"
                    raise OSError(error.errno, reason, str(path)) from None
                if kind == fcntl.LOCK_EX:
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
                    file.flush()
            yield


def labelled(record: Record, labeller: str, labels: Mapping[str, Mapping[str, LabelledDistribution]]) -> Record:
    """A record with distributions added.

    Args:
        record: has none of the labeller for these.
        labeller: who made them.
        labels: dimension -> candidate id -> distribution.
    """
    merged = {dimension: {name: dict(by) for name, by in given.items()} for dimension, given in record.distributions.items()}
    for dimension, by_candidate in labels.items():
        for name, label in by_candidate.items():
            merged.setdefault(dimension, {}).setdefault(name, {})[labeller] = label
    return replace(record, distributions=merged)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    with atomic(path) as file:
        file.write((json.dumps(data, indent=1) + "\n").encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no file of zr label ({error}): label into another folder") from None
