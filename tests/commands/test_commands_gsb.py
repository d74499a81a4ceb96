"""`zr gsb`: by hand-worked numbers, by a judge that reads colours, and by answers given in a real browser."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from chromium import FOUND, Chromium
from PIL import Image

import zr.commands.parts as parts
from zr.cli import main
from zr.commands.pictures import Picture
from zr.data import shapes
from zr.scores import ScoreDistribution

HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\"> \u202egnp"
NEW = {"a": (255, 255, 0, 0), "b": (153, 51, 0, 0)}  # levels of red and green
OLD = {"a": (102, 255, 0, 0), "b": (141, 102, 0, 0)}


class Colours:
    """Alignment is the level of red, realism that of green, from 1 to 5."""

    rubric = shapes.rubric()

    def __call__(self, images, prompts, dimensions=None):
        score = torch.stack([1 + 4 * image.double().mean((1, 2)) / 255 for image in images])
        score = torch.cat([score, score[:, :1]], 1)[:, self.rubric.index(dimensions), None]
        bins = torch.tensor(self.rubric.bins, dtype=torch.float64)
        return ScoreDistribution((1 - (score - bins).abs() / 0.5).clamp_min(0).log(), self.rubric.bins)


def folder(path, colours, prompts=None, images=1, finished=True):
    """What `zr draw` leaves: plain pictures of one colour for each key."""
    (path / "images").mkdir(parents=True)
    lines = []
    for key, levels in colours.items():
        for number in range(images):
            picture = Picture(key, (prompts or {}).get(key, f"a {key}"), number)
            Image.new("RGB", (8, 8), levels[:3]).save(path / picture.file)
            lines.append({"file": picture.file, "key": key, "prompt": picture.prompt, "number": number, "seed": 0})
    (path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "settings.json").write_text(json.dumps({"pictures": len(lines) + (not finished)}))
    return path


@pytest.fixture
def two(tmp_path):
    return folder(tmp_path / "brandnew", NEW), folder(tmp_path / "ancient", OLD)


def compared(two, out, *more):
    return main(["gsb", *map(str, (*two, "--output", out, *more))])


def page(out):
    """The pairs of a page, as a browser is handed them."""
    text = (out / "pairs.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="pairs">(.*?)</script>', text, re.DOTALL).group(1))


def red(image):
    """The level of red in a data URI."""
    return int(np.asarray(Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))))[0, 0, 0])


def answered(out, path, outcome, person="ann", dimension="overall"):
    """Answers as a page saves them, of a person to whom the new picture, told by its colour, is better, as good or worse."""
    lines = []
    for pair in page(out)["pairs"]:
        key = pair["prompt"].removeprefix("a ")
        left = red(pair["left"]) == NEW[key][0]
        assert left != (red(pair["right"]) == NEW[key][0])
        answer = {1: ("right", "left"), 0: ("same", "same"), -1: ("left", "right")}[outcome[key]][left]
        lines.append({"page": "x", "pair": pair["id"], "dimension": dimension, "answer": answer, "person": person})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_judge_on_two_prompts(two, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts, "scorer", lambda name, device: Colours())
    options = ["--judge", "colours", "--dimensions", "alignment", "realism", "--numbers", tmp_path / "numbers.json"]
    assert compared(two, tmp_path / "out", *options) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert (found["pictures"], found["prompts"], found["judge"]["band"]) == (2, 2, 0.25)
    # Red: 5 and 3.4 against 2.6 and 1 + 4 * 141 / 255 = 3.212, inside the band. Green: 5 and 1.8 against 5 and 2.6.
    rows = {
        "alignment": (4.2, 2.90588, 1.29412, 0.18824, 2.4, (1, 1, 0), 0.5, 0, 1),
        "realism": (3.4, 3.8, -0.4, -0.8, 0, (0, 1, 1), -0.5, -1, 0),
        # means of both: 5 and 2.6 against 3.8 and 2.90588
        "mean": (3.8, 3.35294, 0.44706, -0.30588, 1.2, (1, 0, 1), 0, -1, 1),
    }
    for name, (new, old, difference, low, high, counts, gsb, gsb_low, gsb_high) in rows.items():
        row = found["judge"]["mean"] if name == "mean" else found["judge"]["dimensions"][name]
        assert (row["new"], row["old"]) == pytest.approx((new, old), abs=1e-4)
        told = [row["difference"][end] for end in ("estimate", "low", "high")]
        assert told == pytest.approx([difference, low, high], abs=1e-4)  # of two prompts a resample is one, the other, or both
        assert (row["good"], row["same"], row["bad"]) == counts
        assert [row["gsb"][end] for end in ("estimate", "low", "high")] == pytest.approx([gsb, gsb_low, gsb_high])
    assert re.search(r"alignment.*4\.200.*2\.906.*\+1\.294.*\b1\b.*\b1\b.*\b0\b", said)
    assert compared(two, tmp_path / "out", *options, "--band", 0.1) == 0
    assert json.loads((tmp_path / "numbers.json").read_text())["judge"]["dimensions"]["alignment"]["good"] == 2


def test_the_worlds_judge_by_name(tmp_path):
    drawn = []
    for name, follows in (("good", (1.0,)), ("bad", (0.0,))):
        path = tmp_path / name
        (path / "images").mkdir(parents=True)
        lines = []
        for key, prompt in enumerate(shapes.prompts("test")[:4]):
            picture = Picture(str(key), prompt, 0)
            Image.fromarray(shapes.draw(shapes.imagine(prompt, np.random.default_rng(key), follows))).save(path / picture.file)
            lines.append({"file": picture.file, "key": picture.key, "prompt": prompt, "number": 0, "seed": 0})
        (path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (path / "settings.json").write_text('{"pictures": 4}')
        drawn.append(path)
    assert compared(drawn, tmp_path / "out", "--judge", "shapes", "--numbers", tmp_path / "numbers.json") == 0
    found = json.loads((tmp_path / "numbers.json").read_text())["judge"]
    assert list(found["dimensions"]) == list(shapes.DIMENSIONS)
    assert found["dimensions"]["alignment"]["gsb"]["estimate"] == 1


def test_the_page_is_blind_and_its_key_tells(tmp_path):
    keys = [f"p{i}" for i in range(40)]
    two = [folder(tmp_path / name, dict.fromkeys(keys, (level, 0, 0))) for name, level in (("brandnew", 200), ("ancient", 9))]
    assert compared(two, tmp_path / "out") == 0
    text = (tmp_path / "out" / "pairs.html").read_text().lower()
    assert not [word for word in ("brandnew", "ancient", "generator", str(tmp_path), ">new", ">old") if word in text]
    pairs, key = page(tmp_path / "out")["pairs"], json.loads((tmp_path / "out" / "key.json").read_text())
    assert sum(red(pair["left"]) == 200 for pair in pairs) == 20
    for pair in pairs:
        hidden = key["hidden"][pair["id"]]
        assert hidden["new_left"] == (red(pair["left"]) == 200)
        assert pair["prompt"] == f"a {keys[hidden['index']]}"
        assert re.fullmatch("[0-9a-f]{16}", pair["id"])
    order = [key["hidden"][pair["id"]]["index"] for pair in pairs]
    assert sorted(order) == list(range(40))
    assert order != sorted(order)
    assert compared(two, tmp_path / "again") == 0
    assert page(tmp_path / "again") == page(tmp_path / "out")
    assert compared(two, tmp_path / "other", "--seed", 1, "--pairs", 12) == 0
    assert len(page(tmp_path / "other")["pairs"]) == 12


def test_people_on_two_prompts(two, tmp_path, capsys):
    out, numbers = tmp_path / "out", tmp_path / "numbers.json"
    assert compared(two, out) == 0
    before = (out / "pairs.html").read_bytes()
    ann = answered(out, tmp_path / "ann.jsonl", {"a": 1, "b": 1})
    bob = answered(out, tmp_path / "bob.jsonl", {"a": 0, "b": -1}, "bob")
    capsys.readouterr()
    assert compared(two, out, "--answers", ann, bob, "--numbers", numbers) == 0
    assert "people: 2, answers: 4" in capsys.readouterr().out
    found = json.loads(numbers.read_text())["people"]
    row = found["dimensions"]["overall"]
    assert (found["people"], found["answers"]) == (2, 4)
    assert (row["good"], row["same"], row["bad"]) == (2, 1, 1)
    assert [row["gsb"][end] for end in ("estimate", "low", "high")] == [0.25, 0, 0.5]  # prompt b alone 0, prompt a alone 0.5
    assert (out / "pairs.html").read_bytes() == before


def test_people_by_dimension(two, tmp_path):
    out, numbers = tmp_path / "out", tmp_path / "numbers.json"
    assert compared(two, out, "--dimensions", "charm", "light") == 0
    files = [
        answered(out, tmp_path / f"{name}.jsonl", outcome, dimension=name)
        for name, outcome in (("charm", {"a": 1, "b": 1}), ("light", {"a": -1, "b": 0}))
    ]
    assert compared(two, out, "--answers", *files, "--numbers", numbers) == 0
    found = json.loads(numbers.read_text())["people"]
    assert [found["dimensions"][name]["gsb"]["estimate"] for name in ("charm", "light")] == [1, -0.5]
    assert found["all answers"]["gsb"]["estimate"] == 0.25


def test_answers_that_are_refused(two, tmp_path, capsys):
    out = tmp_path / "out"
    assert compared(two, out) == 0
    good = answered(out, tmp_path / "good.jsonl", {"a": 1, "b": 1})
    lines = good.read_text().splitlines(keepends=True)
    for text, said in (
        (lines[0] + lines[1][:30], "bad.jsonl, line 2 is damaged"),
        (lines[0].replace('"left"', '"leftish"').replace('"right"', '"leftish"'), "with an answer of left, same, right"),
        ("[]\n", "bad.jsonl, line 1: texts pair, dimension"),
        (lines[0].replace('"pair": "', '"pair": "f'), "there is no pair 'f"),
        (lines[0].replace("overall", "charm"), "'charm' was not asked, only overall"),
        (lines[0] + lines[0], "bad.jsonl, line 2: 'ann' answers pair"),
        ("", "there is no answer"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        assert compared(two, out, "--answers", tmp_path / "bad.jsonl") == 1
        assert said in capsys.readouterr().err
    assert compared(two, out, "--answers", good, good) == 1
    assert "good.jsonl, line 1: 'ann' answers pair" in capsys.readouterr().err
    assert compared(two[::-1], out, "--answers", good) == 1  # else the sign would turn
    assert "give these, in this order" in capsys.readouterr().err
    assert compared(two, tmp_path / "nowhere", "--answers", good) == 1
    assert "the folder of the page that was answered" in capsys.readouterr().err


def test_a_key_is_not_overwritten_by_another(two, tmp_path, capsys):
    assert compared(two, tmp_path / "out") == 0
    before = (tmp_path / "out" / "key.json").read_bytes()
    for more in (["--seed", 1], ["--dimensions", "charm"], ["--pairs", 1]):
        assert compared(two, tmp_path / "out", *more) == 1
        assert "choose another --output" in capsys.readouterr().err
    assert compared(two, tmp_path / "out") == 0
    assert (tmp_path / "out" / "key.json").read_bytes() == before


def test_folders_that_do_not_fit(two, tmp_path, capsys):
    other = folder(tmp_path / "text", OLD, {"a": "a cat"})
    fewer = folder(tmp_path / "fewer", {"a": OLD["a"]})
    unfinished = folder(tmp_path / "unfinished", OLD, finished=False)
    (tmp_path / "empty").mkdir()
    for first, second, said in (
        (two[0], other, "the prompt 'a' has another text"),
        (two[0], fewer, "brandnew has picture 0 of the prompt 'b'"),
        (fewer, two[0], "brandnew has picture 0 of the prompt 'b'"),
        (two[0], unfinished, "holds 2 of its 3 pictures: run its `zr draw` again"),
        (tmp_path / "empty", two[0], "empty holds no pictures of `zr draw`"),
    ):
        assert compared((first, second), tmp_path / "out") == 1
        assert said in capsys.readouterr().err
    (two[1] / "prompts.jsonl").write_text('{"file": "/etc/passwd", "key": "a", "prompt": "x", "number": 0}\n')
    assert compared(two, tmp_path / "out") == 1
    assert "prompts.jsonl, line 1 is no line of `zr draw`" in capsys.readouterr().err


@pytest.mark.skipif(FOUND is None, reason="there is no Chromium here")
def test_answers_given_in_a_browser_come_back(tmp_path):
    texts = {"a": HOSTILE}
    two = folder(tmp_path / "brandnew", NEW, texts), folder(tmp_path / "ancient", OLD, texts)
    out, numbers = tmp_path / "out", tmp_path / "numbers.json"
    assert compared(two, out, "--dimensions", "charm", "light") == 0
    pairs = page(out)["pairs"]
    keys = ["a" if pair["prompt"].startswith("<") else "b" for pair in pairs]
    sides = [red(pair["left"]) == NEW[key][0] for pair, key in zip(pairs, keys, strict=True)]
    with Chromium(tmp_path) as browser:
        browser.open(out / "pairs.html")
        for pair in pairs:
            assert browser.tell("document.getElementById('prompt').textContent") == pair["prompt"]
            loaded = "[...document.images].map(i => i.decode().then(() => i.naturalWidth))"
            assert browser.tell(f"Promise.all({loaded})") == [8, 8]
            number = pairs.index(pair)
            browser.click("choose-left" if sides[number] else "choose-right")  # charm: the new one
            if number == 0:
                browser.press("0")  # light: same
                assert browser.tell("document.getElementById('count').textContent") == "2 of 4 answered"
                browser.reload()
                assert browser.tell("document.getElementById('count').textContent") == "2 of 4 answered"
                browser.tell("document.getElementById('person').value = 'Ann B.'")
                browser.tell("document.getElementById('person').dispatchEvent(new Event('input'))")
            else:
                browser.press("ArrowLeft")  # light, by mistake: left
                browser.press("ArrowUp")
                browser.press("2" if sides[number] else "1")  # the old one
        assert browser.tell("document.getElementById('done').hidden") is False
        assert browser.tell("document.title") == "Which picture is better?"
        assert browser.tell("document.querySelectorAll('img').length") == 2
        browser.click("save")
        name = browser.wait("Browser.downloadWillBegin")["suggestedFilename"]
        browser.wait("Browser.downloadProgress", state="completed")
    assert name == "answers-Ann_B_.jsonl"
    saved = tmp_path / "downloads" / name
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [line["person"] for line in lines] == ["Ann B."] * 4
    assert compared(two, out, "--answers", saved, "--numbers", numbers) == 0
    found = json.loads(numbers.read_text())["people"]["dimensions"]
    charm, light = ([found[name][count] for count in ("good", "same", "bad")] for name in ("charm", "light"))
    assert charm == [2, 0, 0]
    assert light == [0, 1, 1]
