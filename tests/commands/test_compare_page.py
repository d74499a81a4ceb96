"""The report of a plan: what stands where, whose numbers are whose, and how it looks in a browser."""

import re
from xml.etree import ElementTree

import pytest
import torch
from chromium import FOUND, Chromium
from stored import BINS, NAMES, at, line

from zr.commands.comparing.page import leads, markdown, page
from zr.commands.comparing.plan import Plan
from zr.report import Card, Judgement, write_page
from zr.report.text import plain
from zr.scores import ScoreDistribution

HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\x1b[31m\x00",
    "\u202egnp.exe\u202c",
    "{{ 1 }} ${x}",
)
SIZES = {"zero-shot": 1000, "sft": 1100, "small-sft": 400, "small-risd": 410}
HPA = {"zero-shot": (0.5, 0.6), "sft": (0.7, 0.8), "small-sft": (0.6, 0.625), "small-risd": (0.75, 0.8)}


def plan(**entries) -> Plan:
    cell = {"fit": "zr:supervised", "model": "x", "measure": {}}
    cells = dict.fromkeys(SIZES, cell) | {"sft": cell | {"paper": ["27B", "SFT"]}}
    entries = {"baseline": "sft", "seeds": [0, 1]} | entries
    return Plan.of({"cells": cells, "data": {"test": {"prompts": 2, "candidates": 2}}} | entries, "mine")


def found(**changes) -> dict:
    """Results of four cells and two seeds."""
    cells = {
        name: {
            str(seed): {
                "dimensions": {NAMES[0]: line(value), NAMES[1]: line(0.55)},
                "overall": line(value),
                **{"ece": 0.125, "nll": 1.5, "rps": 0.25, "off_scale": None, "coupling": None, "tokens": 1.0},
                "parameters": SIZES[name] * 1000,
                "reliability": {"confidence": [0.5, 0.75], "share": [0.25, 0.75], "weight": [0.5, 0.5]},
                "fit": {},
                "time": {"seconds": 3.0, "ms_per_image": 2.0},
            }
            for seed, value in enumerate(values)
        }
        for name, values in HPA.items()
    }
    empty = {"differences": {}, "orderings": [], "pictures": None, "drawings": {}, "missing": []}
    return {"plan": "mine", "zr": "0", "split": "test", "seeds": [0, 1], "cells": cells, **empty} | changes


def told(panel) -> list[str]:
    return [" ".join(e.itertext()) for e in ElementTree.fromstring(panel.svg).iter() if e.tag.endswith("}text")]


def sections(results: dict, plan: Plan, cards=()) -> dict:
    return {section.title: section for section in page(plan, results, dict(cards)).sections}


def test_sizes_stand_apart_each_with_its_mean_and_the_papers_figure_marked() -> None:
    (figure,) = sections(found(), plan())["Quality by method and size"].figures
    assert [panel.title for panel in figure.panels] == ["1.10 M parameters", "0.41 M parameters"]
    large, small = (told(panel) for panel in figure.panels)
    assert {"zero-shot", "sft", "0.550", "0.750", "paper 0.814"} <= set(large)  # of its 0.8135
    assert {"small-sft", "small-risd", "0.613", "0.775"} <= set(small)  # 0.6125 rounds up
    assert not [text for text in small if "paper" in text]
    assert "The hollow mark is the paper's" in figure.caption
    (figure,) = sections(found(cells={"zero-shot": found()["cells"]["zero-shot"]}), plan())[
        "Quality by method and size"
    ].figures
    assert "paper" not in figure.caption


def test_a_figure_of_the_plan_is_drawn_from_the_cells_that_are_there() -> None:
    rows = {"GRPO": {"expectation": "sft", "parsed text": "zero-shot"}, "GDSO": {"expectation": "small-sft"}}
    results = found()
    del results["cells"]["small-sft"]
    _, figure = sections(results, plan(figures={"figure 4": rows, "none": {"GDSO": {"a": "small-sft"}}}))[
        "Quality by method and size"
    ].figures
    assert (figure.title, [panel.title for panel in figure.panels]) == ("figure 4", ["GRPO"])
    assert {"expectation", "parsed text", "0.750", "0.550"} <= set(told(figure.panels[0]))


def test_the_papers_rows_follow_ours_and_are_named_as_its() -> None:
    (table,) = sections(found(), plan())["Every cell, every seed"].tables
    names = [str(row[0]) for row in table.rows]
    assert names[2:5] == ["sft, seed 0", "sft, seed 1", "the paper's 27B SFT"]
    assert [str(cell) for cell in table.rows[3][1:]] == ["0.800 [0.40, 0.60]"] * 4
    assert list(table.rows[4][1:]) == ["0.8135", "0.9644", "0.6458", "0.5914"]
    assert "of its own models, sizes and test set" in table.note
    assert sum("paper" in name for name in names) == 1


def test_orderings_that_do_not_appear_come_first() -> None:
    above, below = ({"estimate": s * 0.1, "low": s * 0.1 - 0.05, "high": s * 0.1 + 0.05, "level": 0.95} for s in (1, -1))
    orderings = [
        {"lower": "a", "higher": "b", "seeds": {"0": above}, "appears": True},
        {"lower": "b", "higher": "c", "seeds": {"0": below}, "appears": False},
    ]
    lines = leads(found(orderings=orderings, missing=["d, seed 0"]))
    assert lines == [
        "b < c does not appear: seed 0 -0.100 [-0.150, -0.050], the other way round.",
        "Not run or failed: d, seed 0.",
        "a < b appears for every seed; HPA higher by +0.100 [+0.050, +0.150].",
    ]


def test_coupling_is_told_of_cells_that_write_traces() -> None:
    assert "Coupling of score and reasoning" not in sections(found(), plan())
    results = found()
    six = {
        f"{what}_{kind}": 0.1 * i
        for i, (kind, what) in enumerate((k, w) for k in ("kl", "gap") for w in ("removed", "other", "floor"))
    }
    results["cells"]["sft"]["1"]["coupling"] = {**six, "floor_kl": None, "images": 1024}
    (table,) = sections(results, plan())["Coupling of score and reasoning"].tables
    assert [list(row) for row in table.rows] == [["sft, seed 1", "0.000", "0.100", "–", "0.300", "0.400", "0.500", "1,024"]]
    assert "sft, seed 1 | 0.000 | 0.100" in markdown(plan(), results)


def test_calibration_and_curves_of_what_has_them() -> None:
    results = found()
    results["cells"]["sft"]["1"]["fit"]["curve"] = [[9, 0.5], [19, 0.75]]
    results["cells"]["small-sft"]["0"]["fit"]["curve"] = []
    shown = sections(results, plan(ordering=[["zero-shot", "sft"], ["small-sft", "small-risd"]]))
    (figure,) = shown["Calibration"].figures
    assert [(panel.title, panel.note) for panel in figure.panels] == [("sft", "ECE 0.125"), ("small-risd", "ECE 0.125")]
    (figure,) = shown["Learning curves"].figures
    assert [(panel.title, panel.note) for panel in figure.panels] == [("sft", "last 0.750")]
    assert "Learning curves" not in sections(found(), plan())
    assert "Calibration" not in sections(found(), plan(baseline=None))


def moved(prompts) -> tuple[dict, dict]:
    """Results with a picture for each prompt, and its card."""
    q = ScoreDistribution(at([[3.25]])[0, 0].log(), BINS)
    judgements = [Judgement(f"realism, {name}", q, torch.ones(5), 4.0) for name in ("sft", "small-risd")]
    image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    made = [Card(prompt, judgements, image, title=f"p{i}.a", note="realism") for i, prompt in enumerate(prompts)]
    lines = [{"key": card.title, "dimension": "realism", "before": 2.5, "after": 0.5} for card in made]
    pictures = {"cell": "small-risd", "baseline": "sft", "seed": 0, "nearer": lines, "farther": []}
    return found(pictures=pictures), {"Largest improvements": made}


def test_pictures_have_a_section_and_a_table_in_markdown() -> None:
    results, cards = moved(["a cube"])
    shown = sections(results, plan(), cards)
    assert "small-risd lies nearer to the annotators' than that of sft" in shown["Largest improvements"].text
    assert shown["Largest improvements"].cards == cards["Largest improvements"]
    text = markdown(plan(), results)
    assert re.search(
        r"## Largest improvements\n\n\| image \| dimension \| sft \| small-risd \|\n.*\n\| p0\.a \| realism \| 2\.50 \| 0\.50",
        text,
    )
    assert "Largest failures" not in text


CONTRAST = """(() => {
  const light = c => {
    const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)/.test(c)) return c; }
  };
  let least = [99, ''];
  for (const e of document.querySelectorAll("main *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const s = getComputedStyle(e), both = [light(e.closest("svg") ? s.fill : s.color), light(behind(e))];
    const [a, b] = both.sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < least[0]) least = [(a + .05) / (b + .05), e.outerHTML.slice(0, 99)];
  }
  return least;
})()"""


class Watched(Chromium):
    """Keeps every event."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def _next(self):
        found = super()._next()
        self.seen.append(found)
        return found

    def of(self, *methods):
        return [event["params"] for event in self.seen if event.get("method") in methods]


@pytest.mark.skipif(FOUND is None, reason="there is no Chromium here")
def test_in_a_browser_it_fits_reads_well_runs_nothing_and_asks_for_nothing(tmp_path) -> None:
    results, cards = moved(HOSTILE)
    results["cells"]["sft"]["1"]["fit"]["curve"] = [[9, 0.5], [19, 0.75]]
    path = write_page(tmp_path / "report.html", page(plan(), results, cards))
    with Watched(tmp_path) as browser:
        browser.call("Runtime.enable")
        browser.call("Network.enable")
        for width in (1280, 380):
            for scheme in ("light", "dark"):
                browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
                browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                browser.open(path)
                assert browser.tell("document.documentElement.scrollWidth <= innerWidth")
                least, where = browser.tell(CONTRAST)
                assert least >= 4.5, where  # WCAG AA
        shown = browser.tell("[...document.querySelectorAll('.prompt')].map(e => e.textContent)")
        assert shown == [plain(text) for text in HOSTILE]
        assert browser.tell("document.scripts.length") == 0
        asked = {params["request"]["url"].partition(":")[0] for params in browser.of("Network.requestWillBeSent")}
        assert asked == {"file", "data"}
        assert browser.of("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
