"""Shards on disk: WebDataset tars of records, and the index that says what a folder holds.

A folder holds ``index.json`` and, per split, ``SPLIT-000000.tar``, ``SPLIT-000001.tar``, ... In a tar each record is one
WebDataset sample: ``KEY.json`` (:meth:`zr.data.Record.to_dict`) and ``KEY.CANDIDATE.png|jpg|webp``, the original bytes. The
index is written last, so that what it names is complete; a tar that it does not name is no part of the folder.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from zr.data.record import NAME, Record, image_type
from zr.rubric import Scale

__all__ = ["Index", "Shard", "pipeline", "read_shards", "write_shards"]

FORMAT = 1
INDEX = "index.json"
IMAGE = re.compile(r"(?P<candidate>[^.]+)\.(png|jpg|webp)")


@dataclass(frozen=True)
class Shard:
    """One tar of a folder.

    Args:
        path: where it lies.
        records: how many it holds.
        size: in bytes.
    """

    path: Path
    records: int
    size: int


@dataclass(frozen=True)
class Index:
    """What a folder of shards holds.

    Args:
        folder: where the shards lie.
        scale: names and bins that the records were checked against; without anchors.
        splits: per split, its shards in order.
    """

    folder: Path
    scale: Scale
    splits: Mapping[str, tuple[Shard, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Read ``index.json`` of a folder.

        Raises:
            FileNotFoundError: no such folder, or no index in it.
            ValueError: not an index, or of another format version.
        """
        home = Path(folder)
        path = home / INDEX
        if not path.is_file():
            what = f"{home} holds no {INDEX}" if home.is_dir() else f"there is no folder {home}"
            raise FileNotFoundError(f"{what}: write shards there first (zr shards write SOURCE {home})")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"it has format {data['format']!r}, this version reads format {FORMAT}")
            scale = Scale(tuple(data["scale"]["bins"]), {name: {} for name in data["scale"]["dimensions"]})
            splits = {
                split: tuple(Shard(home / _plain(s["name"]), int(s["records"]), int(s["bytes"])) for s in shards)
                for split, shards in data["splits"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} is no index of shards: {reason}") from None
        return cls(home, scale, splits)

    def save(self) -> None:
        """Write ``index.json``, atomically."""
        data = {
            "format": FORMAT,
            "scale": {"scale_id": self.scale.scale_id, "dimensions": self.scale.dimensions, "bins": self.scale.bins},
            "splits": {
                split: [{"name": s.path.name, "records": s.records, "bytes": s.size} for s in shards]
                for split, shards in sorted(self.splits.items())
            },
        }
        with atomic(self.folder / INDEX) as file:
            file.write((json.dumps(data, indent=1) + "\n").encode())

    def shards(self, split: str, scale: Scale) -> tuple[Shard, ...]:
        """The shards of a split, checked: the scale is ``scale``, each file is there and whole.

        Raises:
            FileNotFoundError: no such split, or a shard is gone.
            ValueError: another scale, a shard of another size than the index says.
        """
        check_scale(self, scale)
        if not self.splits.get(split):
            known = ", ".join(sorted(self.splits)) or "none"
            raise FileNotFoundError(f"{self.folder} has no shards for split {split!r}: its splits are {known}")
        for shard in self.splits[split]:
            if not shard.path.is_file():
                raise FileNotFoundError(f"{shard.path} is gone, the index names it: write split {split!r} again")
            if shard.path.stat().st_size != shard.size:
                raise ValueError(
                    f"{shard.path} has {shard.path.stat().st_size} bytes, the index says {shard.size}: "
                    f"the copy is incomplete or the file was changed; copy it or write split {split!r} again"
                )
        return self.splits[split]


def write_shards(
    records: Iterable[Record], folder: str | Path, scale: Scale, split: str = "train", per_shard: int = 256
) -> Index:
    """Write the records of one split into ``folder``.

    Every record is checked first, images included. A tar gets its name when it is complete and the index is written last, so
    whatever interrupts the writer, nothing incomplete is ever read. Equal records give equal bytes.

    Args:
        records: consumed one at a time.
        folder: made if needed; other splits in it stay.
        scale: the scale of the annotation; all splits of a folder share it.
        split: name of the split.
        per_shard: records in a tar. Loading wants at least one tar for each worker of each rank.

    Returns:
        The folder's index.

    Raises:
        FileExistsError: the folder has this split already.
        ValueError: a bad record, a key that repeats, no record at all, or a folder of another scale.

    Example:
        >>> import io, tempfile, zr
        >>> from PIL import Image
        >>> from zr.data import Annotation, Candidate, Record
        >>> scale = zr.Rubric.load("zr:direct").scale
        >>> Image.new("RGB", (8, 8)).save(image := io.BytesIO(), "PNG")
        >>> night = Candidate("a", image.getvalue())
        >>> record = Record("p1", "night", (night,), scores={"realism": {"a": {"ann": Annotation(4.5)}}})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = write_shards([record], folder, scale, split="test")
        ...     [shard.path.name for shard in index.splits["test"]], list(read_shards(folder, split="test")) == [record]
        (['test-000000.tar'], True)
    """
    home = Path(folder)
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1, got {per_shard}")
    if not NAME.fullmatch(split):
        raise ValueError(f"split {split!r} is no safe file name: use letters, digits, '_' and '-'")
    home.mkdir(parents=True, exist_ok=True)
    before = _index_or_new(home, scale)
    if split in before.splits:
        raise FileExistsError(
            f"{home} has a split {split!r} already: choose another name, or remove the folder to write it anew"
        )
    keys: set[str] = set()
    shards: list[Shard] = []
    source = iter(records)
    while first := next(source, None):
        path = home / f"{split}-{len(shards):06d}.tar"
        count = 0
        with atomic(path) as file, wds.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for record in chain([first], islice(source, per_shard - 1)):
                record.validate(scale)
                if record.key in keys:
                    raise ValueError(f"record {record.key!r}: its key is repeated in split {split!r}: give each record its own")
                keys.add(record.key)
                tar.write(_sample(record))
                count += 1
        shards.append(Shard(path, count, path.stat().st_size))
    if not shards:
        raise ValueError(f"split {split!r} has no record: nothing was written to {home}")
    now = _index_or_new(home, scale)  # another split may have been written meanwhile
    index = Index(home, now.scale, {**now.splits, split: tuple(shards)})
    index.save()
    return index


def read_shards(folder: str | Path, split: str = "train", scale: Scale | None = None) -> Iterator[Record]:
    """Records of one split, in the order in which they were written.

    Images are not decoded here (:func:`zr.data.collate` does it); all else is checked.

    Args:
        folder: what :func:`write_shards` wrote.
        split: name of the split.
        scale: the scale that the folder must have; None takes the folder's own.

    Raises:
        FileNotFoundError: no such folder, split or shard.
        ValueError: another scale, a damaged shard, a member that does not belong there, a bad record.
    """
    index = Index.load(folder)
    wanted = scale or index.scale
    yield from pipeline(index.shards(split, wanted), wanted)


def pipeline(shards: Iterable[Shard], scale: Scale, *stages: Callable[[Iterator[Any]], Iterator[Any]]) -> Any:
    """The WebDataset pipeline from shards to checked records; what follows is given as further ``stages``.

    In a worker of a DataLoader it reads this worker's share of the shards.
    """
    to_record = partial(_record, scale=scale)
    return wds.DataPipeline(partial(iter, tuple(shards)), wds.split_by_worker, _samples, wds.map(to_record), *stages)


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name ``path`` only when all is written and on the disk; nothing is left of a failure."""
    hidden = path.with_name(f".{path.name}.partial")
    try:
        with hidden.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_scale(index: Index, scale: Scale) -> None:
    """Raise a ValueError that names both scales unless they are one."""
    if index.scale.scale_id != scale.scale_id:
        raise ValueError(
            f"{index.folder} holds shards of {_describe(index.scale)}, the rubric has {_describe(scale)}: "
            "use the rubric that they were written with, or write them to another folder"
        )


def _index_or_new(folder: Path, scale: Scale) -> Index:
    if not (folder / INDEX).exists():
        return Index(folder, scale)
    index = Index.load(folder)
    check_scale(index, scale)
    return index


def _sample(record: Record) -> dict[str, Any]:
    text = json.dumps(record.to_dict(), ensure_ascii=False, sort_keys=True, allow_nan=False)
    images = {f"{c.id}.{image_type(c.image)}": c.image for c in record.candidates}
    return {"__key__": record.key, "json": text.encode(), **images}


def _samples(shards: Iterable[Shard]) -> Iterator[dict[str, Any]]:
    """Raw WebDataset samples. Files are opened here and nowhere else: no ``pipe:``, no command, no remote scheme."""
    for shard in shards:
        count = 0
        try:
            with shard.path.open("rb") as stream:
                files = tar_file_expander([{"url": str(shard.path), "stream": stream}])
                for sample in group_by_keys(files, lcase=False):
                    yield sample
                    count += 1
        except (tarfile.TarError, EOFError, ValueError) as error:
            reason = str(error.args[0]).split(" @ ")[0]  # webdataset adds the stream's address
            raise ValueError(f"shard {shard.path} is damaged after {count} records ({reason}): write the split again") from None
        if count != shard.records:
            raise ValueError(f"shard {shard.path} has {count} records, the index says {shard.records}: write the split again")


def _record(sample: Mapping[str, Any], scale: Scale) -> Record:
    """The explicit decoder: JSON and images by the names of the members, an error for any other."""
    shard, key = sample["__url__"], sample["__key__"]
    images = {}
    for member, data in sample.items():
        if member in ("json", "__key__", "__url__"):
            continue
        found = IMAGE.fullmatch(member)
        if found is None:
            raise ValueError(
                f"shard {shard}: member {key}.{member} is neither JSON nor a PNG, JPEG or WebP image; it was not loaded. "
                "Shards hold nothing else: write them with zr shards write"
            )
        if found["candidate"] in images:
            raise ValueError(f"shard {shard}: record {key!r} has two images for candidate {found['candidate']!r}: keep one")
        images[found["candidate"]] = data
    try:
        if "json" not in sample:
            raise ValueError(f"record {key!r}: member {key}.json is missing")
        record = Record.from_dict(json.loads(sample["json"]), images)
        record.validate(scale, images=False)
        ids = {candidate.id for candidate in record.candidates}
        if record.key != key or set(images) != ids:
            raise ValueError(f"record {key!r} with images {sorted(images)}: its JSON says {record.key!r} and {sorted(ids)}")
    except ValueError as error:
        raise ValueError(f"shard {shard}: {error}") from None
    return record


def _plain(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*\.tar", name):
        raise ValueError(f"{name!r} is no plain name of a tar file (no folder, no command, no scheme)")
    return name


def _describe(scale: Scale) -> str:
    bins = ", ".join(f"{b:g}" for b in scale.bins)
    return f"scale {scale.scale_id} ({', '.join(scale.dimensions)}; bins {bins})"
