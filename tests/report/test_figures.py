import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch

from zr.metrics import evaluate, reliability
from zr.report import Panel, Runs, curves, histograms, hpa_bars, reliability_panels, run_dots, scatter
from zr.report.figures import INK, MUTED, RULE, SERIES

RNG = np.random.default_rng(0)
SCORE = RNG.integers(2, 11, (60, 2)) / 2
MU = (SCORE + RNG.normal(0, 0.5, SCORE.shape)).clip(1, 5)
KNOWN = np.ones_like(SCORE, dtype=bool)
NAMES = ("alignment", "realism")
TABLE = evaluate(MU, SCORE, KNOWN, np.arange(60) // 4, NAMES, samples=20)
CURVE = reliability(torch.rand(60, generator=torch.Generator().manual_seed(0)), torch.rand(60), groups=5)

FIGURES = {
    "scatter": lambda: scatter(MU, SCORE, KNOWN, NAMES, bins=(1, 5)),
    "scatter of many": lambda: scatter(np.tile(MU, (50, 1)), np.tile(SCORE, (50, 1)), np.tile(KNOWN, (50, 1)), NAMES),
    "scatter of none": lambda: scatter(MU, SCORE, ~KNOWN, NAMES),
    "reliability": lambda: reliability_panels(dict.fromkeys(NAMES, CURVE)),
    "reliability of none": lambda: reliability_panels({"realism": reliability(torch.zeros(0), torch.zeros(0))}),
    "curves": lambda: curves({"loss": {"a": [(0, 2.0), (1, 1.0)], "b": [(0, 3.0), (1, float("nan"))]}, "HPA": {"val": []}}),
    "histograms": lambda: histograms({"realism": [1, 0, 3], "<b>": [0, 0, 0]}, bins=(1, 3, 5)),
    "histograms of many bins": lambda: histograms({"realism": range(100)}, bins=range(100)),
    "dots": lambda: run_dots({"large": {"a": Runs([0.5, 0.6], 0.7), "<b>": Runs([0.4])}}, axis="HPA", published="paper"),
    "hpa": lambda: hpa_bars({"zero-shot": TABLE, "supervised": TABLE}, ceiling={"realism": 0.95}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_valid_xml_in_the_colours_of_the_page_and_load_nothing(name):
    before = dict(matplotlib.rcParams)
    ids = set()
    for panel in FIGURES[name]().panels:
        root = ElementTree.fromstring(panel.svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "width" not in root.attrib  # the page scales it
        assert "style" not in {element.tag.split("}")[-1] for element in root.iter()}  # it would be the whole page's
        bare = re.sub(r"var\([^()]*\)", "", panel.svg)
        assert not [colour for colour in (INK, MUTED, RULE, *SERIES) if colour in bare]
        assert not re.search(r"\b(?:href|src)=[\"'](?!#|data:image/png)", panel.svg)
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert len(own) == len(set(own))
        targets = re.findall(r"url\(#([^)]+)\)", panel.svg) + re.findall(r"href=\"#([^\"]+)", panel.svg)
        assert set(targets) <= set(own)
        ids.add(own[0])
    assert dict(matplotlib.rcParams) == before


def texts(panel):
    return [" ".join(e.itertext()) for e in ElementTree.fromstring(panel.svg).iter() if e.tag.endswith("}text")]


def test_the_same_input_gives_the_same_figure_and_other_ids_for_another():
    first, again = FIGURES["scatter"]().panels, FIGURES["scatter"]().panels
    assert [panel.svg for panel in first] == [panel.svg for panel in again]
    ids = [set(re.findall(r" id=\"([^\"]+)", panel.svg)) for panel in first]
    assert not ids[0] & ids[1]


def test_a_scatter_has_one_point_for_each_known_image():
    known = KNOWN.copy()
    known[:50, 1] = False
    figure = scatter(MU, SCORE, known, NAMES)
    assert [panel.note for panel in figure.panels] == ["60 images", "10 images"]
    assert [panel.svg.count("<use") for panel in figure.panels] == [60, 10]


def test_many_points_are_drawn_as_pixels():
    assert {panel.svg.count("data:image/png") for panel in FIGURES["scatter of many"]().panels} == {1}


def test_a_reliability_panel_tells_the_error():
    figure = FIGURES["reliability"]()
    assert figure.panels[0].note == f"ECE {float(CURVE.error):.3f}"
    assert FIGURES["reliability of none"]().panels[0].note == "ECE –"


def test_bars_show_the_estimates_and_the_ceiling():
    figure = FIGURES["hpa"]()
    for panel, name in zip(figure.panels, NAMES, strict=True):
        shown = texts(panel)
        assert shown.count(f"{TABLE['dimensions'][name]['hpa']['estimate']:.3f}") == 2
        assert {"zero-shot", "supervised"} <= set(shown)
    assert [panel.note for panel in figure.panels] == ["", "ceiling 0.950"]
    assert "95% intervals" in figure.caption


@pytest.mark.parametrize("name", ["$\\frac{", "<script>alert(1)</script>", "a & b", "\x1b[31m\x00", "猫", "--><x>", "y" * 200])
def test_names_are_text(name):
    dots = run_dots({name: {name: Runs([0.5], published=0.6)}}, axis="HPA", published="paper")
    for figure in (hpa_bars({name: TABLE}), curves({"loss": {name: [(0, 1.0)], "other": [(0, 1.0)]}}), dots):
        elements = {e.tag.split("}")[-1] for panel in figure.panels for e in ElementTree.fromstring(panel.svg).iter()}
        assert not elements & {"script", "x"}
    assert any(text.startswith(name[0].replace("\x1b", "\\")) for text in texts(hpa_bars({name: TABLE}).panels[0]))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        scatter(MU, SCORE[:5], KNOWN, NAMES)
    with pytest.raises(ValueError, match="at least one scorer"):
        hpa_bars({})


@pytest.mark.parametrize(
    "inside",
    [
        "<script>1</script>",
        "<g onload='1'/>",
        "<image href='https://example.com/x.png'/>",
        "<use xlink:href='//example.com/x.svg#a'/>",
        "<foreignObject/>",
        "<style>@import 'x'</style>",
        "<path style='fill: url(https://example.com/x)'/>",
        "<path fill='URL( &quot;x.svg#a&quot; )'/>",
        "<image href='data:image/svg+xml;base64,AAAA'/>",
        "<a href='javascript:1'/>",
    ],
)
def test_a_panel_refuses_what_runs_or_loads(inside):
    with pytest.raises(ValueError, match="shapes, text and embedded PNG only"):
        Panel(f"<svg xmlns='http://www.w3.org/2000/svg' xmlns:xlink='http://www.w3.org/1999/xlink'>{inside}</svg>")


def test_a_panel_refuses_what_is_no_xml():
    with pytest.raises(ValueError, match="no XML"):
        Panel("<svg><g></svg>")


def test_histograms_need_a_count_per_bin():
    with pytest.raises(ValueError, match="one count per bin: realism has 2 for 3 bins"):
        histograms({"realism": [1, 2]}, bins=(1, 3, 5))


def test_a_scatter_of_two_scorers_names_them():
    figure = scatter(MU, SCORE, KNOWN, NAMES, names=("student", "teacher"))
    assert figure.title == "Student's expected score against the teacher's expected score"
    shown = texts(figure.panels[0])
    assert "student's expected score" in shown
    assert "teacher's expected score" in shown
    assert not [text for text in shown if "annotators" in text]


def values(panel, colour):
    """Values of the marks of a colour, and of the strokes of one, read by the axis' own ticks; with the rows' heights."""
    root = ElementTree.fromstring(panel.svg)
    ticks = sorted(
        (float(text), float(e.attrib["x"]))
        for e in root.iter()
        if e.tag.endswith("}text") and re.fullmatch(r"0\.\d+", text := "".join(e.itertext())) and "middle" in e.attrib["style"]
    )
    (first, left), (last, right) = ticks[0], ticks[-1]
    points = [
        (float(e.attrib["x"]), float(e.attrib["y"]))
        for e in root.iter()
        if e.tag.endswith("}use") and colour in e.attrib["style"]
    ]
    for path in (
        e for e in root.iter() if e.tag.endswith("}path") and f"stroke: var(--ink, {colour})" in e.attrib.get("style", "")
    ):
        x, top, _, bottom = map(float, re.findall(r"[\d.]+", path.attrib["d"]))
        points.append((x, (top + bottom) / 2))
    return [(first + (x - left) * (last - first) / (right - left), y) for x, y in points]


def test_every_run_is_a_dot_their_mean_a_stroke_and_a_published_value_hollow():
    panels = {"large": {"a": Runs([0.2, 0.4, 0.9]), "b": Runs([0.3], published=0.6)}, "small": {"c": Runs([0.55])}}
    figure = run_dots(panels, axis="HPA", published="paper")
    large, small = figure.panels
    dots, means, hollow = (values(large, colour) for colour in (SERIES[0], INK, MUTED))
    assert [value for value, _ in dots] == pytest.approx([0.2, 0.4, 0.9, 0.3], abs=1e-6)
    assert [value for value, _ in means] == pytest.approx([0.5, 0.3], abs=1e-6)
    assert [value for value, _ in hollow] == pytest.approx([0.6], abs=1e-6)
    upper, lower = means[0][1], means[1][1]
    assert [y for _, y in dots] == pytest.approx([upper] * 3 + [lower], abs=1e-3)
    assert hollow[0][1] == pytest.approx(lower, abs=1e-3)
    assert [value for value, _ in values(small, SERIES[0])] == pytest.approx([0.55], abs=1e-6)
    assert {"a", "b", "0.500", "0.300", "paper 0.600"} <= set(texts(large))
    assert re.findall(r">(0\.\d)<", large.svg) == re.findall(r">(0\.\d)<", small.svg)  # one range
    for wrong in ({}, {"large": {}}, {"large": {"a": Runs([])}}):
        with pytest.raises(ValueError, match="at least one"):
            run_dots(wrong, axis="HPA", published="paper")


def test_curves_that_are_alike_have_one_range():
    panels = {"a": {"": [(0, 0.1), (1, 0.2)]}, "b": {"": [(0, 0.6), (1, float("nan"))]}}

    def ticks(alike):
        roots = [ElementTree.fromstring(panel.svg) for panel in curves(panels, alike=alike).panels]
        return [sorted(e.text for e in root.iter() if "text-anchor: end" in e.attrib.get("style", "")) for root in roots]

    first, second = ticks(alike=True)
    assert first == second
    assert float(first[0]) <= 0.2
    assert float(first[-1]) >= 0.5
    first, second = ticks(alike=False)
    assert first != second
