import ast
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import zr.report
from zr.metrics import evaluate, reliability
from zr.report import (
    Card,
    Judgement,
    Page,
    Section,
    Table,
    cards,
    curves,
    dimension_table,
    hpa_bars,
    reliability_panels,
    render,
    scatter,
    write_page,
)
from zr.report.text import plain
from zr.scores import ScoreDistribution

NAMES = ("alignment", "realism")
BINS = (1.0, 2.0, 3.5, 5.0)
GENERATOR = torch.Generator().manual_seed(0)
Q = ScoreDistribution(torch.randn(8, 2, 4, generator=GENERATOR), BINS)
VOTES = torch.randint(0, 4, (8, 2, 4), generator=GENERATOR)
SCORES = (VOTES + 1e-9).float() @ torch.tensor(BINS) / (VOTES + 1e-9).sum(-1)
TABLE = evaluate(Q.mean, SCORES, np.ones((8, 2)), np.arange(8) // 4, NAMES, samples=20)
HOSTILE = (
    "<script>alert(1)</script>",
    "</title></style></main><img src=http://example.com/x onerror=alert(1)>",
    "\"' onmouseover='alert(1)' style=\"background:url(https://example.com/x)\"",
    "{{ page.title }} {% include 'x' %} ${x} &lt;b&gt; <!-- ",
    "\u202egnp.exe\u202c \u2066isolated",
    "\x1b[31mred\x00\x07 \ud800 \ufffe",
    "]]> </svg><script>1</script>",
    "مكعب أحمر",
)


class Reader(HTMLParser):
    """Elements, attributes and text of a page; void and SVG elements need no closing tag here."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.text = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]


def page_of(text):
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    return Page(
        title=text,
        lead=[text],
        sections=[
            Section(
                title=text,
                text=text,
                tables=[Table(text, (text, text), [(text, text)], note=text)],
                figures=[hpa_bars({text: TABLE}, title=text), curves({text: {text: [(0, 1.0)], "b": [(0, 1.0)]}}, title=text)],
                cards=[Card(text, [Judgement(text, Q[0, 0], VOTES[0, 0], 3.0)], image, title=text, note=text)],
            )
        ],
        facts=[(text, text)],
    )


FULL = Page(
    "A run",
    ["The most important finding.", "Another."],
    [
        Section(
            "Numbers",
            tables=[dimension_table(TABLE)],
            figures=[
                hpa_bars({"model": TABLE}),
                scatter(Q.mean, SCORES, np.ones((8, 2)), NAMES),
                reliability_panels({"realism": reliability(torch.rand(8), torch.rand(8))}),
                curves({"loss": {"train": [(0, 2.0), (1, 1.0)]}}),
            ],
        ),
        Section(
            "Images",
            cards=cards(
                Q, ["a cube"] * 8, NAMES, images=[torch.zeros(3, 9, 9, dtype=torch.uint8)] * 8, votes=VOTES, scores=SCORES
            ),
        ),
    ],
    facts=[("seed", "0")],
)


@pytest.mark.parametrize("text", HOSTILE)
def test_users_text_is_text_and_nothing_else(text):
    shape = [(tag, sorted(attrs)) for tag, attrs in Reader(render(page_of("name"))).elements]
    reader = Reader(render(page_of(text)))
    assert [(tag, sorted(attrs)) for tag, attrs in reader.elements] == shape  # no element or attribute more, none less
    shown = "".join(reader.text)
    assert shown.count(plain(text)) >= 14  # every place but alternative texts, and figures, which may shorten it
    assert not set(shown) & {"\u202e", "\u202c", "\u2066", "\x1b", "\x00", "\x07", "\ud800", "\ufffe"}


def test_nothing_is_fetched_and_nothing_runs():
    text = render(FULL)
    reader = Reader(text)
    assert not {tag for tag, _ in reader.elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
    }
    loaded = [
        value for name in ("src", "href", "xlink:href", "srcset", "action", "poster") for value in reader.attributes(name)
    ]
    assert loaded
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loaded)
    assert not re.findall(r"url\(\s*['\"]?(?!#)", text)
    assert "@import" not in text
    assert not [name for _, attrs in reader.elements for name in attrs if name.startswith("on")]
    assert re.findall(r"https?://[^\"'<\s]+", text) == ["http://www.w3.org/2000/svg"] * text.count("<svg")
    policy = next(attrs["content"] for _, attrs in reader.elements if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_every_picture_has_words():
    reader = Reader(render(FULL))
    ids = reader.attributes("id")
    assert len(ids) == len(set(ids))
    assert all(attrs.get("aria-label") for _, attrs in reader.elements if attrs.get("role") == "img")
    assert all(attrs.get("alt") for tag, attrs in reader.elements if tag == "img")
    assert sum(tag == "svg" for tag, _ in reader.elements) == 2 + 2 + 1 + 1


def test_all_numbers_of_a_card_come_from_the_input():
    page = Page("t", [], [Section("s", cards=cards(Q[:1], ["a cube"], NAMES, votes=VOTES[:1], scores=SCORES[:1]))])
    text = "".join(Reader(render(page)).text)
    shown = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text[text.index("a cube") :])]
    needed = []
    for d in range(2):
        needed += [Q.mean[0, d].item(), Q.stddev[0, d].item(), SCORES[0, d].item(), *BINS]
    assert shown == pytest.approx(needed, abs=0.0051)


def test_all_numbers_of_a_table_come_from_the_input():
    page = Page("t", [], [Section("s", tables=[dimension_table(TABLE)])])
    text = "".join(Reader(render(page)).text)
    body = text[text.index("pairs") : text.index("In brackets")]
    shown = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", body)]
    needed = []
    for line in [*TABLE["dimensions"].values(), TABLE["overall"]]:
        for key in ("hpa", "margin_hpa", "plcc", "srcc"):
            needed += [line[key][end] for end in ("estimate", "low", "high")]
        needed.append(line["pairs"])
    assert shown == pytest.approx(needed, abs=0.0051)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    assert write_page(path, FULL) == path
    assert path.read_text(encoding="utf-8") == render(FULL)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_page(path, Page("other", [], []))
    assert path.read_text(encoding="utf-8") == render(FULL)
    assert list(path.parent.iterdir()) == [path]


def test_a_page_of_nothing_is_a_page():
    reader = Reader(render(Page("empty", [], [])))
    assert "empty" in "".join(reader.text)
    assert "section" not in {tag for tag, _ in reader.elements}


def test_the_room_imports_only_its_neighbours():
    for file in Path(zr.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                room = name.split(".")[1] if name.startswith("zr.") else None
                assert room in (None, "scores", "rubric", "metrics", "report"), f"{file.name} imports {name}"
