"""The plain tables of :func:`zr.metrics.evaluate` and :func:`zr.metrics.compare`, for HTML, Markdown and the terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.text import Text

from zr.report.text import plain

__all__ = ["MEASURES", "Estimate", "Table", "dimension_table", "scorer_table"]

MEASURES: Mapping[str, str] = {"hpa": "HPA", "margin_hpa": "margin HPA", "plcc": "PLCC", "srcc": "SRCC"}
"""Measures of the tables, and how they are written."""

UNDEFINED = "–"  # noqa: RUF001 (a dash, as tables have it)
OVERALL = "mean"


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, as text.

    Args:
        value: three decimals, or a dash where the number is not defined.
        interval: ``[low, high]``, or nothing where it is not defined.

    Example:
        >>> str(Estimate.of({"estimate": 0.8123, "low": 0.789, "high": 0.8311}))
        '0.812 [0.79, 0.83]'
        >>> str(Estimate.of({"estimate": 0.041, "low": 0.0042, "high": 0.08}, signed=True))
        '+0.041 [+0.004, +0.080]'
        >>> str(Estimate.of({"estimate": None, "low": None, "high": None}))
        '–'
    """

    value: str
    interval: str = ""

    @classmethod
    def of(cls, interval: Mapping[str, Any], signed: bool = False) -> Estimate:
        """From the plain data of an interval; a difference shows its sign, and the third decimal of its ends too."""
        estimate, low, high = (_number(interval[key]) for key in ("estimate", "low", "high"))
        if estimate is None:
            return cls(UNDEFINED)
        wide, narrow = ("+.3f", "+.3f") if signed else (".3f", ".2f")
        ends = "" if low is None or high is None else f"[{low:{narrow}}, {high:{narrow}}]"
        return cls(format(estimate, wide), ends)

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


@dataclass(frozen=True)
class Table:
    r"""A table of texts and estimates; the first column names the row.

    Args:
        title: what it shows.
        columns: C headings.
        rows: rows of C cells.
        note: one line below it.

    Raises:
        ValueError: a row of another length.

    Example:
        >>> print(Table("", ("scorer", "HPA"), [("a|b", Estimate("0.812", "[0.79, 0.83]"))]).markdown())
        | scorer | HPA |
        |:--|--:|
        | a\|b | 0.812 [0.79, 0.83] |
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Estimate]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r} has {len(self.columns)} columns, a row has {len(row)} cells: {row}")

    def markdown(self) -> str:
        """The table as Markdown, without title and note."""
        lines = [self.columns, *self.rows]
        head, *body = ("| " + " | ".join(_markdown(cell) for cell in line) + " |" for line in lines)
        return "\n".join([head, "|:--" + "|--:" * (len(self.columns) - 1) + "|", *body])

    def terminal(self) -> rich.table.Table:
        """The table for a :class:`rich.console.Console`; nothing in it is read as markup."""
        table = rich.table.Table(
            title=Text(plain(self.title)) if self.title else None, caption=Text(plain(self.note)) if self.note else None
        )
        for index, name in enumerate(self.columns):
            table.add_column(Text(plain(name)), justify="right" if index else "left", overflow="fold", no_wrap=not index)
        for row in self.rows:
            table.add_row(*(Text(plain(str(cell))) for cell in row))
        return table


def dimension_table(table: Mapping[str, Any], title: str = "", *, difference: bool = False) -> Table:
    """One scorer, or the difference of two: a row for each dimension and their mean, a column for each measure.

    Args:
        table: by :func:`zr.metrics.evaluate`, or by :func:`zr.metrics.compare`.
        title: of the table.
        difference: show signs, for a table by ``compare``.

    Example:
        >>> from zr.metrics import evaluate
        >>> score = [[4], [3], [5], [2]]
        >>> table = evaluate(score, score, [[True]] * 4, ["a", "a", "b", "b"], ["realism"])
        >>> print(dimension_table(table).markdown())
        | dimension | HPA | margin HPA | PLCC | SRCC | pairs |
        |:--|--:|--:|--:|--:|--:|
        | realism | 1.000 [1.00, 1.00] | 1.000 [1.00, 1.00] | 1.000 [1.00, 1.00] | 1.000 [1.00, 1.00] | 2 |
    """
    rows: list[tuple[str | Estimate, ...]] = [
        (name, *(Estimate.of(line[key], difference) for key in MEASURES), f"{line['pairs']:,}")
        for name, line in _lines(table).items()
    ]
    return Table(title, ("dimension", *MEASURES.values(), "pairs"), rows, _note([table]))


def scorer_table(tables: Mapping[str, Mapping[str, Any]], measure: str = "hpa", title: str = "") -> Table:
    """Several scorers in one measure: a row for each scorer, a column for each dimension and their mean.

    Args:
        tables: by name of the scorer, tables by :func:`zr.metrics.evaluate` on the same items.
        measure: one of ``MEASURES``.
        title: of the table; the measure's name for none.

    Raises:
        ValueError: no table, or tables of different dimensions.
    """
    lines = {name: _lines(table) for name, table in tables.items()}
    columns = next((tuple(line) for line in lines.values()), ())
    if not columns or any(tuple(line) != columns for line in lines.values()):
        raise ValueError(f"scorer_table needs tables of the same dimensions, got {[list(line) for line in lines.values()]}")
    rows: list[tuple[str | Estimate, ...]] = [
        (name, *(Estimate.of(line[column][measure]) for column in columns)) for name, line in lines.items()
    ]
    return Table(title or MEASURES[measure], ("scorer", *columns), rows, _note(tables.values()))


def _lines(table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rows of an evaluation; the mean only where there is more than one dimension, or it would repeat the row."""
    lines = dict(table["dimensions"])
    return lines if len(lines) == 1 else {**lines, OVERALL: table["overall"]}


def _note(tables: Iterable[Mapping[str, Any]]) -> str:
    levels = {line[key]["level"] for table in tables for line in _lines(table).values() for key in MEASURES}
    shares = " and ".join(f"{level:.0%}" for level in sorted(levels))
    return f"In brackets: {shares} intervals over resampled prompts."


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _markdown(cell: str | Estimate) -> str:
    if isinstance(cell, Estimate):
        return str(cell)
    return "".join(f"\\{c}" if c in "\\|`*_[]" else c for c in html.escape(plain(cell), quote=False))
