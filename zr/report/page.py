"""A report: findings first, then tables, figures and cards, as one HTML file that needs nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from zr.report.cards import Card
from zr.report.changes import Change
from zr.report.figures import Figure
from zr.report.tables import Table
from zr.report.text import plain

__all__ = ["Page", "Section", "render", "write_page"]


@dataclass(frozen=True)
class Section:
    """A part of a page, shown in the order of its arguments.

    Args:
        title: heading.
        text: a paragraph below it.
        tables: tables.
        figures: figures.
        cards: images with their distributions.
        changes: images before and after.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    cards: Sequence[Card] = ()
    changes: Sequence[Change] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Args:
        title: heading.
        lead: findings, one sentence each, the most important first; it stands out.
        sections: the parts.
        facts: names and values of how it was made (versions, seed, data), shown at the end.
    """

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = field(default=())


def render(page: Page) -> str:
    """The page as HTML: one file, no script, no request to anywhere, light and dark, narrow and wide.

    Every text is data: it is escaped, and its invisible controls are written out (:func:`zr.report.text.plain`).

    Example:
        >>> "<script>" in render(Page("<script>alert(1)</script>", ["a finding"], []))
        False
    """
    return template("page.html").render(page=page)


def write_page(path: str | Path, page: Page) -> Path:
    """Write :func:`render` to a file, which appears whole or not at all; one that was there is replaced.

    Args:
        path: of the HTML file; its folder is made where it is missing.
        page: what to show.

    Returns:
        The path.
    """
    target = Path(path)
    text = render(page)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return target


@cache
def template(name: str) -> Template:
    """A template of this room, which escapes whatever it prints."""
    environment = Environment(
        loader=PackageLoader("zr", "report"),
        autoescape=True,
        finalize=_harmless,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _harmless(value: Any) -> Any:
    """Applied to whatever the template prints, before it is escaped."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value
