"""Figures as inline SVG that takes the page's colours, so that it reads on light and dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from zr.metrics import ReliabilityCurve
from zr.report.tables import UNDEFINED, Estimate
from zr.report.text import plain

__all__ = ["Figure", "Panel", "Runs", "curves", "histograms", "hpa_bars", "reliability_panels", "run_dots", "scatter"]

SERIES = ("#3b74b8", "#d9822b", "#2a9183", "#a2559c", "#8a7a2f")
INK, MUTED, RULE = "#2b2f36", "#667080", "#c9cdd3"
THEME = {
    **{colour: f"var(--series-{i + 1}, {colour})" for i, colour in enumerate(SERIES)},
    INK: f"var(--ink, {INK})",
    MUTED: f"var(--muted, {MUTED})",
    RULE: f"var(--rule, {RULE})",
}
"""The colours that figures are drawn in, and the names under which a page may set others."""

SETTINGS: Any = {  # some versions of matplotlib list every key in the type of their settings
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and coloured
    "text.usetex": False,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
}
MANY = 1500  # points of a scatter from which they are drawn as pixels, to keep the file small
FEW = 3  # lines that leave room for their names among them; more have them below
LONGEST = 26  # letters of a name that fit into a figure; tables show all of them
CHANCE = 0.5  # HPA of a scorer that knows nothing
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
TAGS = {"svg", "title", "desc", "defs", "clipPath", "g", "use", "image", "text", "tspan"}
TAGS |= {"path", "rect", "circle", "ellipse", "line", "polyline", "polygon"}


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Args:
        svg: an SVG element. It stands in the page as it is, so it may hold shapes, text and embedded PNG only.
        title: stands above it.
        note: stands beside the title, such as the number that the picture shows.

    Raises:
        ValueError: no XML, or anything in it that runs or loads something.
    """

    svg: str
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        try:
            elements = list(ElementTree.fromstring(self.svg).iter())
        except ElementTree.ParseError as error:
            raise ValueError(f"panel {self.title!r} is no XML: {error}") from None
        for element in elements:
            name = element.tag.removeprefix(SVG)
            links = [v for k, v in element.items() if k.removeprefix(XLINK) in ("href", "src")]
            loaded = [v for v in links if not v.startswith(("#", "data:image/png;base64,"))]
            loaded += [v for _, v in element.items() if re.search(r"url\s*\(\s*['\"]?\s*[^#'\"\s]", v, re.IGNORECASE)]
            runs = [k for k, _ in element.items() if k.lower().startswith("on")]
            if name not in TAGS or loaded or runs:
                found = ", ".join([*runs, *loaded]) or f"<{name}>"
                raise ValueError(f"panel {self.title!r} may hold shapes, text and embedded PNG only, found {found[:80]}")


@dataclass(frozen=True)
class Figure:
    """Panels that stand side by side, or below each other where there is no room.

    Args:
        title: what they show.
        panels: the pictures.
        caption: how to read them.
    """

    title: str
    panels: Sequence[Panel]
    caption: str = ""


@dataclass(frozen=True)
class Runs:
    """One row of :func:`run_dots`.

    Args:
        values: one for each run, for example each seed.
        published: what somebody else reports of it, or None.
    """

    values: Sequence[float]
    published: float | None = None


def scatter(
    mu: ArrayLike,
    score: ArrayLike,
    known: ArrayLike,
    dimensions: Sequence[str],
    bins: Sequence[float] | None = None,
    names: tuple[str, str] | None = None,
) -> Figure:
    """Expected scores against the annotators', or another scorer's, one panel for each dimension.

    Args:
        mu: ``(N, D)`` expected scores.
        score: ``(N, D)`` annotators' scores; anything where not known.
        known: ``(N, D)`` bool.
        dimensions: D names.
        bins: the scale, for the ends of the axes; the data's own for None.
        names: of the two scorers that ``mu`` and ``score`` come from; None for a model and the annotators.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> figure = scatter([[4.0], [2.5]], [[4.5], [2.0]], [[True], [True]], ["realism"], bins=(1, 5))
        >>> [(panel.title, panel.note) for panel in figure.panels]
        [('realism', '2 images')]
    """
    x, y, taken = np.asarray(score, np.float64), np.asarray(mu, np.float64), np.asarray(known, bool)
    if not x.shape == y.shape == taken.shape == (len(x), len(dimensions)):
        raise ValueError(
            f"scatter needs mu, score and known of one shape (N, {len(dimensions)}), got {y.shape}, {x.shape}, {taken.shape}"
        )
    ends = np.asarray(bins, np.float64) if bins is not None else np.concatenate([x[taken], y[taken]])
    low, high = (float(ends.min()), float(ends.max())) if ends.size else (0.0, 1.0)
    margin = 0.06 * (high - low or 1.0)
    on_y, on_x = ("expected score", "annotators' score") if names is None else (f"{name}'s expected score" for name in names)

    def panel(d: int) -> Panel:
        of, on = x[taken[:, d], d], y[taken[:, d], d]

        def draw(axes: Axes) -> None:
            axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, dashes=(4, 3))
            dots: Any = {"markersize": 3.6, "markeredgewidth": 0, "alpha": _alpha(len(of)), "rasterized": len(of) > MANY}
            axes.plot(of, on, "o", color=SERIES[0], **dots)
            axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
            axes.set(xlabel=on_x, ylabel=on_y)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_locator(MaxNLocator(5))

        return Panel(_svg(draw, (2.5, 2.35)), dimensions[d], f"{len(of):,} images")

    caption = "One point per image. On the dashed line the two are equal."
    title = f"{on_y.capitalize()} against the {on_x}"
    return Figure(title, [panel(d) for d in range(len(dimensions))], caption)


def reliability_panels(curves: Mapping[str, ReliabilityCurve]) -> Figure:
    """Reliability plots, one panel for each dimension, with the expected calibration error in its head.

    Args:
        curves: by dimension; from :meth:`zr.metrics.ExpectedCalibrationError.curve` or :func:`zr.metrics.reliability`.

    Example:
        >>> import torch
        >>> from zr.metrics import reliability
        >>> curve = reliability(torch.tensor([0.5, 0.75]), torch.tensor([0.5, 0.25]), groups=2)
        >>> reliability_panels({"realism": curve}).panels[0].note
        'ECE 0.250'
    """

    def panel(name: str, curve: ReliabilityCurve) -> Panel:
        confidence, share, weight = (np.asarray(part.tolist(), np.float64) for part in curve)

        def draw(axes: Axes) -> None:
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, dashes=(4, 3))
            axes.vlines(confidence, confidence, share, color=SERIES[1], linewidth=1.2)
            axes.scatter(confidence, share, s=100 * weight + 4, color=SERIES[0], zorder=3, linewidths=0)
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
            axes.set(xlabel="probability of the top bin", ylabel="share of annotators")
            axes.set(xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))

        return Panel(_svg(draw, (2.5, 2.35)), name, f"ECE {_text(float(curve.error))}")

    caption = (
        "Images in groups of similar confidence; larger points hold more of them. Below the dashed line the model is surer "
        "than the annotators agree. ECE, the expected calibration error, is the weighted mean length of the vertical lines."
    )
    return Figure("Reliability", [panel(name, curve) for name, curve in curves.items()], caption)


def curves(
    panels: Mapping[str, Mapping[str, Iterable[tuple[float, float]]]],
    title: str = "",
    caption: str = "",
    *,
    alike: bool = False,
) -> Figure:
    """Values over steps, such as losses and validation measures.

    Args:
        panels: by title of the panel (values of one kind) and name of the series: pairs (step, value). A value that is NaN
            leaves a gap.
        title: of the figure.
        caption: of the figure.
        alike: the panels hold values of one kind, and get one vertical range, by which they can be compared.

    Example:
        >>> figure = curves({"loss": {"train": [(0, 2.2), (10, 1.4)]}, "HPA": {"validation": [(10, 0.71)]}})
        >>> [(panel.title, panel.note) for panel in figure.panels]
        [('loss', 'last 1.400'), ('HPA', 'last 0.710')]
    """
    drawn = {
        name: {key: np.asarray(list(values), np.float64).reshape(-1, 2) for key, values in series.items()}
        for name, series in panels.items()
    }
    heights = [value for points in drawn.values() for line in points.values() for value in line[:, 1] if np.isfinite(value)]

    def panel(name: str, points: Mapping[str, Any]) -> Panel:
        def draw(axes: Axes) -> None:
            for index, (key, line) in enumerate(points.items()):
                style = "o-" if len(line) <= 20 else "-"
                axes.plot(line[:, 0], line[:, 1], style, markersize=3, color=_colour(index), label=_short(plain(key)))
            axes.set(xlabel="step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if alike and heights:
                margin = 0.06 * (max(heights) - min(heights) or 1.0)
                axes.set(ylim=(min(heights) - margin, max(heights) + margin))
            if crowded:
                axes.legend(loc="upper left", bbox_to_anchor=(0, -0.24), ncols=2, borderaxespad=0)
            elif len(points) > 1:
                axes.legend(loc="best")

        crowded = len(points) > FEW
        last = [line[-1, 1] for line in points.values() if len(line)]
        return Panel(_svg(draw, (3.0, 2.4 if crowded else 2.0)), name, f"last {_text(last[0])}" if len(last) == 1 else "")

    return Figure(title, [panel(name, points) for name, points in drawn.items()], caption)


def histograms(votes: Mapping[str, Sequence[float]], bins: Sequence[float]) -> Figure:
    """How often each score was given, one panel for each dimension.

    Args:
        votes: by dimension, K counts.
        bins: K scores.

    Raises:
        ValueError: counts that do not fit the bins.

    Example:
        >>> figure = histograms({"realism": [1, 0, 3]}, bins=(1, 3, 5))
        >>> [(panel.title, panel.note) for panel in figure.panels]
        [('realism', '4 scores')]
    """
    for name, counts in votes.items():
        if len(counts) != len(bins):
            raise ValueError(f"histograms needs one count per bin: {name} has {len(counts)} for {len(bins)} bins")

    def panel(name: str, counts: Sequence[float]) -> Panel:
        def draw(axes: Axes) -> None:
            axes.bar(range(len(bins)), counts, width=0.8, color=SERIES[0], linewidth=0)
            axes.set(xlabel="score", ylabel="scores given")
            step = -(-len(bins) // 10)  # most labels that fit
            axes.set_xticks(range(0, len(bins), step), [f"{score:g}" for score in bins[::step]])
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(visible=False, axis="x")

        return Panel(_svg(draw, (2.6, 1.9)), name, f"{sum(counts):,g} scores")

    return Figure("Scores given", [panel(name, counts) for name, counts in votes.items()])


def hpa_bars(
    tables: Mapping[str, Mapping[str, Any]], ceiling: Mapping[str, float] | None = None, title: str = "Order of image pairs"
) -> Figure:
    """HPA of several scorers with their intervals, one panel for each dimension.

    Args:
        tables: by name of the scorer, tables by :func:`zr.metrics.evaluate` on the same items.
        ceiling: by dimension, the best that is possible against these annotators; drawn as a line.
        title: of the figure.

    Raises:
        ValueError: no table.
    """
    if not tables:
        raise ValueError("hpa_bars needs the table of at least one scorer")
    dimensions = list(next(iter(tables.values()))["dimensions"])
    rows = {name: [table["dimensions"][dimension]["hpa"] for dimension in dimensions] for name, table in tables.items()}
    ends = [row[key] for line in rows.values() for row in line for key in ("estimate", "low", "high") if row[key] is not None]
    left = min([CHANCE, *ends])

    def panel(d: int) -> Panel:
        best = (ceiling or {}).get(dimensions[d])

        def draw(axes: Axes) -> None:
            for index, (name, line) in enumerate(rows.items()):
                row, colour = line[d], _colour(index)
                axes.text(left, index - 0.36, _short(plain(name)), va="bottom")
                axes.text(1.0, index - 0.36, Estimate.of(row).value, va="bottom", ha="right", fontweight="bold")
                axes.plot([CHANCE, CHANCE], [index - 0.32, index + 0.32], color=MUTED, linewidth=0.8)
                if best is not None:
                    axes.plot([best, best], [index - 0.32, index + 0.32], color=INK, linewidth=1.0, dashes=(2, 1.5))
                if row["estimate"] is not None:
                    axes.barh(index, row["estimate"] - CHANCE, left=CHANCE, height=0.5, color=colour, linewidth=0)
                if row["low"] is not None:
                    axes.plot([row["low"], row["high"]], [index, index], color=INK, linewidth=1.2, solid_capstyle="butt")
                    for end in (row["low"], row["high"]):
                        axes.plot([end, end], [index - 0.12, index + 0.12], color=INK, linewidth=1.2)
            axes.set(xlim=(left - 0.005, 1.005), ylim=(len(rows) - 0.6, -0.8), yticks=[])
            axes.set_xticks(np.arange(np.ceil(left * 10), 11) / 10)
            axes.spines["left"].set_visible(False)
            axes.grid(visible=False)

        note = "" if best is None else f"ceiling {_text(best)}"
        return Panel(_svg(draw, (2.7, 0.4 + 0.44 * len(rows))), dimensions[d], note)

    levels = sorted({row["level"] for line in rows.values() for row in line})
    caption = (
        f"HPA: share of image pairs of one prompt that the scorer orders as the annotators do; {CHANCE} is chance. Whiskers: "
        f"{' and '.join(f'{level:.0%}' for level in levels)} intervals over resampled prompts."
    )
    if ceiling:
        caption += " Dotted: the ceiling, reached by the true scores against these annotators."
    return Figure(title, [panel(d) for d in range(len(dimensions))], caption)


def run_dots(
    panels: Mapping[str, Mapping[str, Runs]], title: str = "", caption: str = "", *, axis: str, published: str
) -> Figure:
    """What several runs of each of several things reach: every run a dot, their mean a stroke, a published value a hollow mark.

    Args:
        panels: by title of the panel and name of the row; all panels have one horizontal range.
        title: of the figure.
        caption: of the figure.
        axis: what the values are.
        published: whose the published values are; a word that stands beside each of them.

    Raises:
        ValueError: no row, or a row without a value.

    Example:
        >>> rows = {"SFT": Runs([0.75, 0.77], published=0.8135), "GDSO": Runs([0.90])}
        >>> figure = run_dots({"large": rows}, axis="mean HPA", published="paper")
        >>> [found for found in ("0.760", "0.900", "paper 0.814") if found in figure.panels[0].svg]
        ['0.760', '0.900', 'paper 0.814']
    """
    everything = [row for rows in panels.values() for row in rows.values()]
    if not everything or any(len(row.values) == 0 for row in everything):
        raise ValueError("run_dots needs at least one row, and in each row at least one value")
    ends = [value for row in everything for value in (*row.values, row.published) if value is not None]
    margin = 0.05 * (max(ends) - min(ends) or 1.0)
    left, right = min(ends) - margin, max(ends) + margin

    def panel(name: str, rows: Mapping[str, Runs]) -> Panel:
        def draw(axes: Axes) -> None:
            for place, (label, row) in enumerate(rows.items()):
                mean, above = float(np.mean(row.values)), place - 0.3
                axes.text(left, above, _short(plain(label)), va="bottom")
                axes.text(right, above, _text(mean), va="bottom", ha="right", fontweight="bold")
                axes.plot([left, right], [place, place], color=RULE, linewidth=0.6)
                axes.plot([mean, mean], [place - 0.24, place + 0.24], color=INK, linewidth=1.4, solid_capstyle="butt", zorder=3)
                dots: Any = {"markersize": 4.6, "markeredgewidth": 0, "alpha": 0.8, "zorder": 4}
                axes.plot(row.values, [place] * len(row.values), "o", color=SERIES[0], **dots)
                if row.published is not None:
                    axes.plot([row.published], [place], "D", color=MUTED, markerfacecolor="none", markersize=4.6, zorder=2)
                    beside: Any = {"textcoords": "offset points", "va": "bottom", "ha": "right", "color": MUTED}
                    axes.annotate(f"{published} {_text(row.published)}", (right, above), (-30, 0), **beside)
            axes.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.75), yticks=[], xlabel=axis)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.spines["left"].set_visible(False)
            axes.grid(visible=False, axis="y")

        return Panel(_svg(draw, (2.7, 0.45 + 0.36 * len(rows))), name)

    return Figure(title, [panel(name, rows) for name, rows in panels.items()], caption)


def _colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def _alpha(count: int) -> float:
    return float(np.clip(6 / np.sqrt(max(count, 1)), 0.25, 0.8))


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _text(number: float) -> str:
    return UNDEFINED if np.isnan(number) else f"{number:.3f}"


def _svg(draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    """An SVG element of what ``draw`` puts on its axes: no size of its own, the page's colours, ids that occur nowhere else.

    Args:
        draw: draws on one axes.
        size: width and height in inches; a page scales it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": "zr"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)  # the browser has other fonts
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas.add_subplot())
        FigureCanvasSVG(canvas)
        canvas.savefig(
            buffer, format="svg", transparent=True, dpi=160, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = buffer.getvalue()
    root = ElementTree.fromstring(text)
    prefix = "f" + blake2b(text.encode(), digest_size=5).hexdigest()
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        for key, value in list(element.items()):
            del element.attrib[key]
            if key == "id":
                value = f"{prefix}-{value}"
            element.set(key.removeprefix(XLINK), _themed(value, prefix))
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in ("style", "metadata")]:  # a style here would be the whole page's
            parent.remove(child)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"xmlns": SVG.strip("{}"), "stroke-linejoin": "round", "stroke-linecap": "butt"}
    return ElementTree.tostring(root, encoding="unicode")


def _themed(value: str, prefix: str) -> str:
    value = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", value)
    value = re.sub(r"^#(?![0-9a-f]{6}$)", f"#{prefix}-", value)
    value = re.sub(r"font-family: [^;]*;?\s*", "", value)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: THEME.get(found[0], found[0]), value)
