"""What commands write: a journal of JSON lines that a rerun goes on with, the tables made of it, and JSON."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from zr.data.record import parse_json
from zr.data.shards import atomic
from zr.report.text import cell

__all__ = ["Journal", "best_of_prompt", "digest", "entries", "write_json", "write_lines", "write_table"]

FIRST = '{"key": '
"""How a line of a journal begins."""


@dataclass
class Journal:
    """JSON lines, each of one image, added as they are made; none is made twice.

    Args:
        file: where lines go.
        head: what all lines share: ``scale_id``, ``model``, ``bins``, and ``dimensions``, the names under ``scores``.
        done: digests of the images that have a line.
    """

    file: TextIO
    head: Mapping[str, Any]
    done: set[bytes] = field(default_factory=set)

    @classmethod
    def resume(cls, path: Path, head: Mapping[str, Any]) -> Journal:
        """Open a file for appending, which is made or holds lines of the same model, scale and dimensions.

        A last line that a killed process left half written is cut off.

        Raises:
            ValueError: a line that ``zr score`` did not write, or that another model, scale or choice of dimensions made.
        """
        done: set[bytes] = set()
        end = 0
        with path.open("a+b") as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                whole = line.endswith(b"\n")
                if not whole and _begun(line):
                    break
                entry = _entry(line, head, f"{path}, line {number}")
                if not whole:
                    break
                done.add(digest(entry["key"], entry["prompt"]))
                end += len(line)
            file.truncate(end)
        return cls(path.open("a", encoding="ascii", newline="\n"), head, done)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write a line: ``key`` first, what all lines share last."""
        shared = {name: self.head[name] for name in ("bins", "scale_id", "model")}
        self.file.write(json.dumps({**entry, **shared}) + "\n")
        self.done.add(digest(entry["key"], entry["prompt"]))


def digest(*texts: str) -> bytes:
    """What an image is known by: sixteen bytes for its key and prompt."""
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal."""
    with path.open("rb") as file:
        yield from map(json.loads, file)


def best_of_prompt(path: Path, count: int, value: Callable[[Mapping[str, Any]], float]) -> Iterator[dict[str, Any]]:
    """Of the images of each prompt those with the highest value, with the fields ``rank`` and ``overall``.

    Lines are read twice and never held, but for a number and a place of each kept one. Prompts come in the order of their first
    line; of equal images the earlier one is the better.

    Args:
        path: a journal.
        count: how many of each prompt.
        value: of a line.
    """
    kept: dict[bytes, list[tuple[float, int]]] = {}
    with path.open("rb") as file:
        place = 0
        for line in file:
            entry = json.loads(line)
            rows = kept.setdefault(digest(entry["prompt"]), [])
            rows.append((-value(entry), place))
            rows.sort()
            del rows[count:]
            place += len(line)
        for rows in kept.values():
            for rank, (negative, place) in enumerate(rows, start=1):
                file.seek(place)
                yield {**json.loads(file.readline()), "rank": rank, "overall": round(-negative, 6)}


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all: that a file is there means that its part is done."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n")
    partial.replace(path)


def write_lines(lines: Iterable[Mapping[str, Any]], file: TextIO) -> None:
    """Write lines of a journal as JSON, in ASCII."""
    file.writelines(json.dumps(entry) + "\n" for entry in lines)


def write_table(lines: Iterable[dict[str, Any]], path: Path) -> None:
    """Write lines of a journal as the suffix of ``path`` says, which gets its name when all is written.

    CSV and Parquet have one row for each image, with the columns ``DIMENSION score``, ``DIMENSION standardised``, ``DIMENSION
    stddev`` and ``DIMENSION p(BIN)``. Texts in CSV are made harmless by :func:`~zr.report.text.cell`, those in Parquet are not
    changed.

    Raises:
        ValueError: no line.
    """
    rows = iter(lines)
    if (first := next(rows, None)) is None:
        raise ValueError(f"there is no score, so {path} was not written")
    rows = chain([first], rows)
    with atomic(path) as file:
        if path.suffix == ".parquet":
            _write_parquet(map(_flat, rows), file)
            return
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        if path.suffix == ".csv":
            _write_csv(map(_flat, rows), text)
        else:
            write_lines(rows, text)
        text.detach()  # flushed, and left open


def _write_csv(rows: Iterator[dict[str, Any]], file: TextIO) -> None:
    first = next(rows)
    table = csv.DictWriter(file, list(first), quoting=csv.QUOTE_NONNUMERIC)
    table.writeheader()
    for row in chain([first], rows):
        table.writerow({name: cell(value) if isinstance(value, str) else value for name, value in row.items()})


def _write_parquet(rows: Iterator[dict[str, Any]], file: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = next(rows)
    types = {str: pa.string(), int: pa.int64()}
    schema = pa.schema([(name, types.get(type(value), pa.float64())) for name, value in first.items()])
    rows = chain([first], rows)
    with pq.ParquetWriter(file, schema) as writer:
        while part := list(islice(rows, 4096)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a table."""
    row = {name: entry[name] or "" for name in ("key", "image", "prompt")}
    row["extra"] = json.dumps(entry["extra"]) if entry.get("extra") else ""
    row |= {name: entry[name] for name in ("rank", "overall") if name in entry}
    for name, values in entry["scores"].items():
        row |= {f"{name} {part}": values[part] for part in ("score", "standardised", "stddev") if part in values}
        row |= {f"{name} p({score:g})": p for score, p in zip(entry["bins"], values["probs"], strict=True)}
    return row | {name: entry[name] for name in ("scale_id", "model")}


def _begun(line: bytes) -> bool:
    """Whether a line without an end is one of ours, cut short."""
    try:
        parse_json(line)
    except ValueError:
        return line[: len(FIRST)] == FIRST.encode()[: len(line)]
    return False


def _entry(line: bytes, head: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A line, if it belongs to what is written now."""
    try:
        entry = parse_json(line)
        found = {name: entry[name] for name in ("scale_id", "model")}
        dimensions = list(entry["scores"])
        digest(entry["key"], entry["prompt"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{where} is no line of `zr score`: write to another file, so that nothing is lost") from None
    if "rank" in entry:
        raise ValueError(f"{where} is one of the best of its prompt: add --best, or write to another file")
    if any(found[name] != head[name] for name in found):
        raise ValueError(
            f"{where} was scored by model {found['model']} on scale {found['scale_id']}, this is model {head['model']} on "
            f"scale {head['scale_id']}: write to another file"
        )
    if dimensions != head["dimensions"]:
        raise ValueError(
            f"{where} has scores of {', '.join(dimensions)}, now {', '.join(head['dimensions'])} are wanted: "
            "write to another file, or choose the same --dimensions"
        )
    return dict(entry)
