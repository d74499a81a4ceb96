"""Shards on disk: WebDataset tars of records, and the index that says what a folder holds.

A folder holds ``index.json`` and, per split, ``SPLIT-000000.tar``, ``SPLIT-000001.tar``, ... In a tar each record is one
WebDataset sample: ``KEY.json`` (:meth:`zr.data.Record.to_dict`) and ``KEY.CANDIDATE.png|jpg|webp``, the original bytes. The
index is written last, so that what it names is complete; a tar that it does not name is no part of the folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal

import webdataset as wds
from webdataset.tariterators import group_by_keys

from zr.data.record import NAME, SHORT, Record, decode, image_type, parse_json
from zr.data.remote import RemotePath, local, place
from zr.rubric import Scale

__all__ = ["Fault", "Index", "Shard", "read_shards", "scan", "warn_of", "write_shards"]

FORMAT = 1
INDEX = "index.json"
IMAGE = re.compile(r"(?P<candidate>[^.]+)\.(png|jpg|webp)")
MEMBER = re.compile(r"[\w/.-]{0,200}\.[\w.-]{1,200}")  # others would be lost in silence or spoil a message
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DAMAGE = (tarfile.TarError, EOFError, ValueError, RecursionError)  # what the bytes of a tar can make tarfile raise


@dataclass(frozen=True)
class Shard:
    """One tar of a folder.

    Args:
        path: where it lies.
        records: how many it holds.
        size: in bytes.
    """

    path: Path | RemotePath
    records: int
    size: int


@dataclass(frozen=True)
class Fault:
    """What could not be read: a record, or the rest of a shard.

    Args:
        name: of the record or the shard.
        records: how many are lost by it; 0 for records that the index does not count.
        error: says what is wrong.
    """

    name: str
    records: int
    error: ValueError | OSError


@dataclass(frozen=True)
class Index:
    """What a folder of shards holds.

    Args:
        folder: where the shards lie.
        scale: names and bins that the records were checked against; without anchors.
        splits: per split, its shards in order.
    """

    folder: Path | RemotePath
    scale: Scale
    splits: Mapping[str, tuple[Shard, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path | RemotePath) -> Index:
        """Read ``index.json`` of a folder.

        Args:
            folder: a local path, or an address such as ``s3://bucket/folder``; the schemes are ``zr.data.remote.SCHEMES``.

        Raises:
            FileNotFoundError: no such folder, or no index in it.
            OSError: a remote folder that cannot be read.
            ValueError: not an index, of another format version, or a folder of a scheme that is not known.
        """
        home = place(folder)
        path = home / INDEX
        if isinstance(path, Path) and not path.is_file():
            what = f"{home} holds no {INDEX}" if path.parent.is_dir() else f"there is no folder {home}"
            raise FileNotFoundError(f"{what}: write shards there first (zr shards write SOURCE {home})")
        text = path.read_text(encoding="utf-8")
        try:
            data = parse_json(text)
            if data["format"] != FORMAT:
                raise ValueError(f"it has format {data['format']!r}, this version reads format {FORMAT}")
            scale = Scale(tuple(data["scale"]["bins"]), {name: {} for name in data["scale"]["dimensions"]})
            splits = {
                split: tuple(Shard(home / _plain(s["name"]), _count(s["records"]), _count(s["bytes"])) for s in shards)
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
        with atomic(local(self.folder) / INDEX) as file:
            file.write((json.dumps(data, indent=1) + "\n").encode())

    def shards(self, split: str, scale: Scale, whole: bool = True) -> tuple[Shard, ...]:
        """The shards of a split, checked.

        Args:
            split: its name.
            scale: what the scale of the folder must be.
            whole: each file must be there with its size (of a remote file, where the store tells).

        Raises:
            FileNotFoundError: no such split, or a shard is gone.
            ValueError: another scale, a shard of another size than the index says.
        """
        check_scale(self, scale)
        if not self.splits.get(split):
            known = ", ".join(sorted(self.splits)) or "none"
            raise FileNotFoundError(f"{self.folder} has no shards for split {split!r}: its splits are {known}")
        shards = self.splits[split]
        for shard, size in zip(shards, _sizes(shards, split), strict=True) if whole else ():
            if size not in (None, shard.size):
                raise ValueError(
                    f"{shard.path} has {size} bytes, the index says {shard.size}: "
                    f"the copy is incomplete or the file was changed; copy it or write split {split!r} again"
                )
        return shards


def write_shards(
    records: Iterable[Record], folder: str | Path, scale: Scale, split: str = "train", per_shard: int = 256
) -> Index:
    """Write the records of one split into ``folder``.

    Every record is checked first, images included. A tar gets its name when it is complete and the index is written last, so
    whatever interrupts the writer, nothing incomplete is ever read. Equal records give equal bytes.

    After an interruption, call it again with the same arguments and the records from their beginning. What the finished tars
    hold is compared with them, and only the images that are not yet there are decoded; the result is that of an uninterrupted
    run. Tars of the split that no index names, such as ``train-000007.tar``, count as left by an interrupted writer: they are
    replaced, or removed at the end. One writer at a time for each split.

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
        OSError: a full disk; what is finished stays.
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
    home = local(folder)
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
        finished = _finished(path)
        count = 0
        with tar_writer(path) as tar:
            for record in chain([first], islice(source, per_shard - 1)):
                record.validate(scale, images=False)
                if record.key in keys:
                    raise ValueError(f"record {record.key!r}: its key is repeated in split {split!r}: give each record its own")
                keys.add(record.key)
                sample = as_sample(record)
                if sample != next(finished, None):
                    for candidate in record.candidates:
                        decode(candidate, record.key)
                tar.write(sample)
                count += 1
        shards.append(Shard(path, count, path.stat().st_size))
    if not shards:
        raise ValueError(f"split {split!r} has no record: nothing was written to {home}")
    _clear(home, split, shards)
    now = _index_or_new(home, scale)  # another split may have been written meanwhile
    index = Index(home, now.scale, {**now.splits, split: tuple(shards)})
    index.save()
    return index


def read_shards(
    folder: str | Path, split: str = "train", scale: Scale | None = None, on_error: Literal["stop", "skip"] = "stop"
) -> Iterator[Record]:
    """Records of one split, in the order in which they were written.

    Images are not decoded here (:func:`zr.data.collate` does it); all else is checked.

    Args:
        folder: what :func:`write_shards` wrote; see :meth:`Index.load` for addresses.
        split: name of the split.
        scale: the scale that the folder must have; None takes the folder's own.
        on_error: ``"stop"`` raises at the first bad record or damaged shard; ``"skip"`` passes over it, and one warning at the
            end counts and names what was passed over.

    Raises:
        FileNotFoundError: no such folder, split or shard.
        ValueError: another scale, a damaged shard, a member that does not belong there, a bad record.
    """
    index = Index.load(folder)
    wanted = scale or index.scale
    shards = index.shards(split, wanted, whole=on_error == "stop")
    faults = []
    for item in scan(shards, wanted):
        if isinstance(item, Record):
            yield item
        elif on_error == "stop":
            raise item.error
        else:
            faults.append(item)
    warn_of(faults, sum(shard.records for shard in shards), f"{index.folder}, split {split!r}")


def scan(shards: Iterable[Shard], scale: Scale) -> Iterator[Record | Fault]:
    """Records in order, checked; a fault for each that is bad and for what is damaged.

    A shard gives as many records, those of its faults included, as the index says.
    """
    for shard in shards:
        for item in _samples(shard):
            yield item if isinstance(item, Fault) else _checked(item, scale)


def warn_of(faults: Sequence[Fault], total: int, where: str) -> None:
    """One warning that counts the faults and names the first ten; none without any."""
    if faults:
        names = ", ".join(fault.name for fault in faults[:10]) + (", ..." if len(faults) > 10 else "")
        count = sum(fault.records for fault in faults)
        warnings.warn(
            f"{where}: {count} of {total} records were skipped, in {len(faults)} places: {names}. First: {faults[0].error}",
            stacklevel=3,
        )


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
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = f"{error.strerror}: the file was not written; make room and run the same command again, it goes on"
        raise OSError(error.errno, reason, str(path)) from None
    finally:
        hidden.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def tar_writer(path: Path) -> Iterator[Any]:
    """A tar to write samples into, whose bytes depend on them alone; see :func:`atomic`."""
    with atomic(path) as file, wds.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        yield tar


def as_sample(record: Record) -> dict[str, Any]:
    """A record as WebDataset writes it."""
    text = json.dumps(record.to_dict(), ensure_ascii=False, sort_keys=True, allow_nan=False)
    images = {f"{c.id}.{image_type(c.image)}": c.image for c in record.candidates}
    return {"__key__": record.key, "json": text.encode(), **images}


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


def _finished(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a tar that an interrupted writer left; none without one, and none past a damage."""
    with suppress(FileNotFoundError, *DAMAGE), path.open("rb") as stream:
        for sample in group_by_keys(_members(stream, str(path)), lcase=False):
            del sample["__url__"]
            yield sample


def _clear(folder: Path, split: str, shards: Sequence[Shard]) -> None:
    """Remove what interrupted writers of the split left beside ``shards``."""
    left = re.compile(rf"{split}-\d{{6,}}\.tar|\.{split}-\d{{6,}}\.tar\.partial")
    for name in {path.name for path in folder.iterdir()} - {shard.path.name for shard in shards}:
        if left.fullmatch(name):
            (folder / name).unlink()


def _samples(shard: Shard) -> Iterator[dict[str, Any] | Fault]:
    """Raw WebDataset samples. Files are opened here and nowhere else, never by a command.

    The last sample waits for the end of the file, so that a fault never comes after all records were counted.
    """
    count, last = 0, None
    error: ValueError | OSError | None = None
    try:
        with shard.path.open("rb") as stream:
            for sample in group_by_keys(_members(stream, str(shard.path)), lcase=False):
                if count == shard.records:
                    error = ValueError(
                        f"shard {shard.path} has more records than the index says ({count}): write the split again"
                    )
                    break
                if last is not None:
                    yield last
                last, count = sample, count + 1
        if count < shard.records:
            error = ValueError(f"shard {shard.path} has {count} records, the index says {shard.records}: write the split again")
    except DAMAGE as damage:
        error = ValueError(f"shard {shard.path} is damaged after {count} records ({damage.args[0]}): write the split again")
    except OSError as failure:
        error = failure
    if error is not None:
        yield Fault(f"shard {shard.path.name}", shard.records - count, error)
    if last is not None:
        yield last


def _checked(sample: Mapping[str, Any], scale: Scale) -> Record | Fault:
    try:
        return _record(sample, scale)
    except ValueError as error:
        return Fault(f"record {SHORT.repr(sample['__key__'])}", 1, error)


def _members(stream: IO[bytes], url: str) -> Iterator[dict[str, Any]]:
    """The files in a tar, for WebDataset. A link, a device, a compressed or sparse file could stand for endless data."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if file is None or not MEMBER.fullmatch(member.name):
                raise ValueError(
                    f"member {SHORT.repr(member.name)} is no plain file KEY.json or KEY.CANDIDATE.png, .jpg or .webp"
                )
            yield {"fname": member.name, "data": file.read(), "__url__": url}
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all


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
        record = Record.from_dict(parse_json(sample["json"]), images)
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


def _count(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{SHORT.repr(number)} is no number of records or bytes")
    return number


def _sizes(shards: Sequence[Shard], split: str) -> Sequence[int | None]:
    remote = [shard.path for shard in shards if isinstance(shard.path, RemotePath)]
    if remote:
        return RemotePath.sizes(remote)
    sizes = []
    for shard in shards:
        path = Path(str(shard.path))
        if not path.is_file():
            raise FileNotFoundError(f"{path} is gone, the index names it: write split {split!r} again")
        sizes.append(path.stat().st_size)
    return sizes


def _describe(scale: Scale) -> str:
    bins = ", ".join(f"{b:g}" for b in scale.bins)
    return f"scale {scale.scale_id} ({', '.join(scale.dimensions)}; bins {bins})"
