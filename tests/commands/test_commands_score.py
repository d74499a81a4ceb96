"""`zr score`: every input and output gives the model's own scores, a rerun goes on where a run stopped, nothing is lost."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from plain import build

from zr.cli import main
from zr.commands import measuring
from zr.commands.score import fingerprint, score
from zr.data import Candidate, Record, shapes, write_shards
from zr.models import LinearHead, Policy, ReasoningReward, RewardModel, SamplingRule, ScoreTokenHead, compose, load, reward
from zr.models.aggregation import ScaleStatistics
from zr.report.text import cell

NAMES = list(shapes.DIMENSIONS)
EXACT = {"abs": 2e-5}  # six digits are written; a batch and a single image agree to 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models: `plain`, and `other`, which has scale statistics."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("plain", "other")):
        torch.manual_seed(seed)
        model = compose(build("qwen3_vl", seed=seed), LinearHead)
        if name == "other":
            model.statistics = ScaleStatistics(tuple(NAMES), (3.0, 3.5, 2.5, 3.0), (0.5, 1.0, 0.25, 2.0))
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def home(tmp_path, models, monkeypatch):
    """The working folder: `img` with four pictures of two sizes, one of them deeper, and something that is no picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img" / "deep").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "b.png", "c.webp", "deep/d.png")):
        pixels = random.integers(0, 256, (48, 48 + 16 * (i % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "img" / name, lossless=True)
    (tmp_path / "img" / "notes.txt").write_text("not a picture")
    (tmp_path / "model").symlink_to(models / "plain")
    return tmp_path


def expected(folder, path, prompt):
    """Means, standard deviations and probabilities by the loaded model alone, of Pillow's pixels."""
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)
    with torch.no_grad():
        probs = load(folder)(images=[pixels], prompts=[prompt]).probs[0].double()
    bins = torch.tensor(shapes.rubric().bins, dtype=torch.float64)
    mean = (probs * bins).sum(-1)
    return mean, (probs * (bins - mean[:, None]) ** 2).sum(-1).sqrt(), probs


def run(*args):
    return main(["score", *map(str, args)])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def check(line, folder, path, prompt):
    mean, deviation, probs = expected(folder, path, prompt)
    assert line["prompt"] == prompt
    assert list(line["scores"]) == NAMES
    for d, name in enumerate(NAMES):
        found = line["scores"][name]
        assert found["score"] == pytest.approx(mean[d].item(), **EXACT)
        assert found["stddev"] == pytest.approx(deviation[d].item(), **EXACT)
        assert found["probs"] == pytest.approx(probs[d].tolist(), **EXACT)


def test_files_and_folders(home, capsys):
    assert run("img/b.png", "img", "--model", "model", "--prompt", "red ring", "--on_error", "skip") == 0
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]  # standard output holds nothing else
    assert [line["key"] for line in found] == ["img/b.png", "img/a.png", "img/c.webp"]
    for line in found:
        assert line["image"] == line["key"]
        assert line["bins"] == list(shapes.rubric().bins)
        assert line["scale_id"] == shapes.rubric().scale_id
        check(line, "model", line["key"], "red ring")
    assert "3 images scored" in said.err
    assert "img/b.png is given twice with the same prompt" in said.err


def test_recursive(home):
    assert run("img", "--model", "model", "--prompt", "red ring", "--recursive", "true", "--output", "out.jsonl") == 0
    assert [line["key"] for line in lines(home / "out.jsonl")] == ["img/a.png", "img/b.png", "img/c.webp", "img/deep/d.png"]


def test_jsonl_with_prompts_ids_and_more(home):
    rows = [
        {"image": "a.png", "prompt": "red ring", "id": "first", "source": {"seed": 3}},
        {"image": "a.png", "prompt": "blue square"},
        {"image": "deep/d.png", "prompt": "red ring"},
    ]
    source = home / "img" / "list.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert run(source, "--model", "model", "--output", "out.jsonl", "--dimensions", *NAMES, "--batch_size", 2) == 0
    found = lines(home / "out.jsonl")
    assert [line["key"] for line in found] == ["first", "a.png", "deep/d.png"]
    assert [line.get("extra") for line in found] == [{"source": {"seed": 3}}, None, None]
    for line, row in zip(found, rows, strict=True):
        assert line["image"] == row["image"]
        check(line, "model", home / "img" / row["image"], row["prompt"])


def test_shards(home):
    scale = shapes.rubric().scale
    for split, names in (("test", "ab"), ("train", "bc")):
        paths = {name: home / "img" / ("c.webp" if name == "c" else f"{name}.png") for name in names}
        candidates = tuple(Candidate(name, path.read_bytes()) for name, path in paths.items())
        write_shards([Record("p1", "red ring", candidates)], home / "data", scale, split)
    assert run("data", "--model", "model", "--output", "all.jsonl") == 0
    found = lines(home / "all.jsonl")
    assert [line["key"] for line in found] == ["data/test/p1.a", "data/test/p1.b", "data/train/p1.b", "data/train/p1.c"]
    check(found[0], "model", "img/a.png", "red ring")
    check(found[3], "model", "img/c.webp", "red ring")
    assert run("data", "--model", "model", "--split", "train", "--output", "one.jsonl") == 0
    assert lines(home / "one.jsonl") == found[2:]


def test_dimensions_and_statistics(home, models):
    """Standardised by hand: (mu - m) / s of the dimensions that were asked for, in their order."""
    names = ["plausibility", "realism"]
    args = ("img/a.png", "--model", models / "other", "--prompt", "red ring", "--output", "out.jsonl", "--dimensions", *names)
    assert run(*args) == 0
    (line,) = lines(home / "out.jsonl")
    mean, _, _ = expected(models / "other", "img/a.png", "red ring")
    assert list(line["scores"]) == names
    by_hand = {"plausibility": None, "realism": None}
    for name, m, s in zip(NAMES, (3.0, 3.5, 2.5, 3.0), (0.5, 1.0, 0.25, 2.0), strict=True):
        by_hand[name] = (mean[NAMES.index(name)].item() - m) / s
    for name in names:
        assert line["scores"][name]["standardised"] == pytest.approx(by_hand[name], abs=1e-4)


def test_tables_hold_what_the_lines_hold(home, models):
    args = ("img", "--model", models / "other", "--prompt", "=red ring\n", "--batch_size", 2, "--budget", 400)
    for suffix in ("jsonl", "csv", "parquet"):
        assert run(*args, "--output", f"out.{suffix}") == 0
    entries = lines(home / "out.jsonl")
    with (home / "out.csv").open(newline="", encoding="utf-8") as file:
        from_csv = list(csv.DictReader(file))
    from_parquet = pq.read_table(home / "out.parquet").to_pylist()
    for entry, row, typed in zip(entries, from_csv, from_parquet, strict=True):
        assert list(row) == list(typed)
        assert row["prompt"] == r"'=red ring\u{a}"
        assert typed["prompt"] == "=red ring\n"
        assert {row["model"], typed["model"], entry["model"]} == {fingerprint(models / "other")}
        for name in NAMES:
            for part in ("score", "standardised", "stddev"):
                assert float(row[f"{name} {part}"]) == typed[f"{name} {part}"] == entry["scores"][name][part]
            probs = [float(row[f"{name} p({b:g})"]) for b in entry["bins"]]
            assert probs == [typed[f"{name} p({b:g})"] for b in entry["bins"]] == entry["scores"][name]["probs"]
    assert len((home / "out.csv").read_text().splitlines()) == 4  # one line for each image, whatever a prompt holds


class Interrupted(Exception):
    """What the machine does in the middle of a run."""


@pytest.fixture
def scorings(monkeypatch):
    """How many images the model scored; after the number in `limit` it dies."""
    counted = {"images": 0, "limit": 10**9}
    forward = reward.RewardModel.forward

    def counting(self, images, prompts, dimensions=None):
        if counted["images"] + len(prompts) > counted["limit"]:
            raise Interrupted
        counted["images"] += len(prompts)
        return forward(self, images=images, prompts=prompts, dimensions=dimensions)

    monkeypatch.setattr(reward.RewardModel, "forward", counting)
    return counted


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_goes_on_where_it_stopped(home, scorings, suffix):
    args = ("img", "--model", "model", "--prompt", "red ring", "--recursive", "true", "--batch_size", 1)
    assert run(*args, "--output", f"whole.{suffix}") == 0
    scorings.update(images=0, limit=2)
    output = home / f"out.{suffix}"
    with pytest.raises(Interrupted):
        run(*args, "--output", output)
    journal = output if suffix == "jsonl" else home / f"out.{suffix}.journal"
    assert len(lines(journal)) == 2
    assert suffix == "jsonl" or not output.exists()  # a table appears whole or not at all
    with journal.open("a") as file:
        file.write('{"key": "img/c.webp", "image": "img/c.w')  # killed while it wrote
    scorings.update(images=0, limit=10**9)
    assert run(*args, "--output", output) == 0
    assert scorings["images"] == 2
    assert output.read_bytes() == (home / f"whole.{suffix}").read_bytes()
    assert run(*args, "--output", output) == 0
    assert scorings["images"] == 2
    assert output.read_bytes() == (home / f"whole.{suffix}").read_bytes()


def test_more_images_and_other_prompts_are_added(home, scorings):
    for prompt, inputs in (("red ring", ["img/a.png"]), ("red ring", ["img"]), ("blue square", ["img/a.png"])):
        assert run(*inputs, "--model", "model", "--prompt", prompt, "--output", "out.jsonl") == 0
    found = [(line["key"], line["prompt"]) for line in lines(home / "out.jsonl")]
    assert found == [(f"img/{name}", "red ring") for name in ("a.png", "b.png", "c.webp")] + [("img/a.png", "blue square")]
    assert scorings["images"] == 4


def test_an_output_of_something_else_is_not_touched(home, models, capsys):
    args = ("img/a.png", "--prompt", "red ring", "--output", "out.jsonl")
    assert run(*args, "--model", "model") == 0
    before = (home / "out.jsonl").read_bytes()
    capsys.readouterr()
    for options, words in (
        (["--model", models / "other"], ["line 1", fingerprint(home / "model"), fingerprint(models / "other"), "another file"]),
        (["--model", "model", "--dtype", "bfloat16"], [f"{fingerprint(home / 'model')}-bfloat16", "another file"]),
        (["--model", "model", "--dimensions", "realism"], ["alignment, realism", "now realism are wanted"]),
    ):
        assert run(*args, *options) == 1
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
        assert (home / "out.jsonl").read_bytes() == before
    for name, content in (("notes.jsonl", "my notes"), ("one.jsonl", '{"key": "mine"}'), ("two.jsonl", '{"key": "mine"}\n')):
        (home / name).write_text(content)
        assert run("img", "--prompt", "x", "--model", "model", "--output", name) == 1
        assert f"{name}, line 1 is no line of `zr score`" in capsys.readouterr().err
        assert (home / name).read_text() == content
    (home / "mine.csv").write_text("a,b\n")
    assert run("img", "--prompt", "x", "--model", "model", "--output", "mine.csv") == 1
    assert "mine.csv would be lost" in capsys.readouterr().err
    assert (home / "mine.csv").read_text() == "a,b\n"


def test_fingerprint_tells_models_apart(home, models, tmp_path):
    again = shutil.copytree(models / "plain", tmp_path / "again")
    assert fingerprint(again) == fingerprint(models / "plain") == fingerprint(home / "model")
    assert fingerprint(models / "other") != fingerprint(again)
    (again / "README.md").write_text("another card")
    assert fingerprint(again) == fingerprint(models / "plain")
    weights = again / "head.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # the last bit of the last weight
    weights.write_bytes(bytes(data))
    assert fingerprint(again) != fingerprint(models / "plain")


@pytest.mark.parametrize("to", ["stdout", "jsonl", "csv"])
def test_best_of_each_prompt(home, to, capsys):
    names = ["a.png", "b.png", "c.webp", "deep/d.png"]
    rows = [{"image": name, "prompt": prompt} for name in names for prompt in ("red ring", "blue square")]
    source = home / "img" / "list.jsonl"
    source.write_text("\n".join(map(json.dumps, rows[:-1])) + "\n")
    where = [] if to == "stdout" else ["--output", f"out.{to}"]
    assert run(source, "--model", "model", "--best", 2, *where) == 0
    if to == "csv":
        with (home / "out.csv").open(newline="") as file:
            found = [(r["key"], r["prompt"], int(r["rank"]), float(r["overall"])) for r in csv.DictReader(file)]
    else:
        text = capsys.readouterr().out if to == "stdout" else (home / "out.jsonl").read_text()
        read = map(json.loads, text.splitlines())
        found = [(line["key"], line["prompt"], line["rank"], line["overall"]) for line in read]
    by_hand = []
    for prompt in ("red ring", "blue square"):
        values = {
            row["image"]: expected("model", home / "img" / row["image"], prompt)[0].mean().item()
            for row in rows[:-1]
            if row["prompt"] == prompt
        }
        best = sorted(values, key=values.get, reverse=True)[:2]
        by_hand += [(name, prompt, rank, values[name]) for rank, name in enumerate(best, start=1)]
    assert [row[:3] for row in found] == [row[:3] for row in by_hand]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in by_hand], **EXACT)


def test_best_can_be_asked_again_without_scoring_again(home, scorings, capsys):
    args = ("img", "--model", "model", "--prompt", "red ring", "--output", "out.jsonl")
    assert run(*args, "--best", 1) == 0
    assert run(*args, "--best", 3) == 0
    assert scorings["images"] == 3
    assert [line["rank"] for line in lines(home / "out.jsonl")] == [1, 2, 3]
    assert run(*args) == 1
    assert "one of the best of its prompt: add --best" in capsys.readouterr().err


@pytest.mark.parametrize("output", [None, "out.jsonl", "out.csv"])
def test_skip_counts_and_lists(home, output, capsys):
    (home / "img" / "b.png").write_bytes((home / "img" / "b.png").read_bytes()[:200])
    rows = [{"image": "a.png", "prompt": "red ring"}, {"image": "a.png"}, {"image": "gone\x1b[31m.png", "prompt": "red ring"}]
    (home / "img" / "list.jsonl").write_text(
        "\n".join(map(json.dumps, rows)) + '\n{\n{"image": "a.png", "prompt": "red ring", "prompt": "blue ring"}\n'
    )
    args = ("img", "img/list.jsonl", "--model", "model", "--prompt", "red ring")
    where = ["--output", output] if output else []
    assert run(*args, *where, "--on_error", "skip") == 0
    said = capsys.readouterr()
    assert "3 images scored" in said.err
    assert "5 skipped:" in said.err
    for word in (
        "img/b.png cannot be decoded",
        "list.jsonl, line 5 is not JSON (the name 'prompt' stands twice in one object",
        "line 2: an object with",
        r"gone\u{1b}[31m.png",
        "list.jsonl, line 4 is not JSON",
    ):
        assert word in said.err
    assert "\x1b[31m" not in said.err
    if output is None:
        assert [json.loads(line)["key"] for line in said.out.splitlines()] == ["img/a.png", "img/c.webp", "a.png"]
    assert run("img", "--model", "model", "--prompt", "red ring", *where) == 1
    assert "img/b.png cannot be decoded" in capsys.readouterr().err


def test_nothing_but_bad_images_is_a_failure(home, capsys):
    (home / "x.png").write_bytes(b"")
    assert run("x.png", "--model", "model", "--prompt", "red ring", "--on_error", "skip", "--output", "out.csv") == 1
    said = capsys.readouterr().err
    assert "x.png is no PNG" in said
    assert "nothing could be scored" in said
    assert not (home / "out.csv").exists()


def test_an_image_that_the_model_refuses_is_found_in_its_batch(home, monkeypatch, capsys):
    forward = reward.RewardModel.forward

    def picky(self, images, prompts, dimensions=None):
        if any(image.shape[2] == 64 for image in images):
            raise ValueError("too wide")
        return forward(self, images, prompts, dimensions)

    monkeypatch.setattr(reward.RewardModel, "forward", picky)
    assert run("img", "--model", "model", "--prompt", "red ring", "--on_error", "skip", "--output", "out.jsonl") == 0
    assert "img/b.png (64 x 48 pixels) cannot be scored: too wide" in capsys.readouterr().err
    assert [line["key"] for line in lines(home / "out.jsonl")] == ["img/a.png", "img/c.webp"]


def test_a_batch_beyond_memory_is_halved(home, monkeypatch):
    forward = reward.RewardModel.forward

    def small(self, images, prompts, dimensions=None):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("full")
        return forward(self, images, prompts, dimensions)

    monkeypatch.setattr(reward.RewardModel, "forward", small)
    assert run("img", "--model", "model", "--prompt", "red ring", "--output", "out.jsonl") == 0
    for line in lines(home / "out.jsonl"):
        check(line, "model", line["key"], "red ring")


def test_a_teacher_scores_too(home, tmp_path):
    policy = Policy(build("qwen3_vl", shapes.rubric(reasoning=True)))
    teacher = ReasoningReward(policy, traces=2, seed=5, rule=SamplingRule(length=4))
    teacher.save_pretrained(tmp_path / "teacher")
    assert run("img/a.png", "--model", tmp_path / "teacher", "--prompt", "red ring", "--output", "out.jsonl") == 0
    check(lines(home / "out.jsonl")[0], tmp_path / "teacher", "img/a.png", "red ring")


def test_a_plain_model_under_a_rubric(home, models, capsys):
    args = ("img/a.png", "--model", models / "plain" / "backbone", "--prompt", "red ring", "--output", "out.jsonl")
    shapes.rubric().save(home / "mine.yaml")
    assert run(*args) == 1
    assert "name the rubric" in capsys.readouterr().err
    assert run(*args, "--rubric", "mine.yaml") == 0
    (line,) = lines(home / "out.jsonl")
    model = RewardModel(backbone := load(models / "plain").backbone, ScoreTokenHead(backbone), backbone.rubric)
    pixels = torch.from_numpy(np.asarray(Image.open("img/a.png")).copy()).permute(2, 0, 1)
    by_hand = model(images=[pixels], prompts=["red ring"]).mean[0].tolist()
    assert [line["scores"][name]["score"] for name in NAMES] == pytest.approx(by_hand, **EXACT)


def test_reads_no_further_than_it_scores(home, monkeypatch):
    """Of an input of any length only some batches are held: here 2 x 2 are decoded ahead."""
    source = home / "img" / "list.jsonl"
    rows = [{"image": "a.png", "prompt": "red ring", "id": str(i)} for i in range(40)]
    source.write_text("\n".join(map(json.dumps, rows)))
    asked, found = [], []
    from zr.commands import inputs

    pixels = inputs.Item.pixels
    monkeypatch.setattr(inputs.Item, "pixels", lambda self: (asked.append(self.key), pixels(self))[1])
    forward = reward.RewardModel.forward

    def looking(self, images, prompts, dimensions=None):
        found.append(len(asked))
        return forward(self, images, prompts, dimensions)

    monkeypatch.setattr(reward.RewardModel, "forward", looking)
    score([source], home / "model", output=home / "out.jsonl", dimensions=["realism"], batch_size=2)
    assert len(found) == 20
    assert all(seen <= 2 * (i + 1) + 4 for i, seen in enumerate(found))
    assert len(lines(home / "out.jsonl")) == 40


MISTAKES = {
    "no prompt": (["img"], "img needs --prompt"),
    "nothing there": (["gone", "--prompt", "x"], "there is no file or folder gone"),
    "empty folder": (["img/deep/empty", "--prompt", "x"], "is a folder without images"),
    "suffix": (["img", "--prompt", "x", "--output", "out.txt"], "must end in .jsonl, .csv, .parquet"),
    "best": (["img", "--prompt", "x", "--best", "0"], "--best must be at least 1, got 0"),
    "batch": (["img", "--prompt", "x", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
    "dimension": (["img", "--prompt", "x", "--dimensions", "charm"], "charm"),
    "itself": (["list.jsonl", "--output", "list.jsonl"], "is read as input too"),
    "split": (["data", "--split", "gone"], "no shards for split 'gone'"),
    "id": (["id.jsonl"], "id.jsonl, line 1: id must be a text, got 3"),
    "surrogate": (["surrogate.jsonl"], "surrogate.jsonl, line 1: prompt has half a surrogate pair"),
    "path": (["nul.jsonl"], "nul.jsonl, line 1: image"),
    "twice": (["twice.jsonl"], "a.png is given twice with the same prompt"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_one_clear_error(home, case, capsys):
    (home / "img" / "deep" / "empty").mkdir()
    image = {"image": "img/a.png", "prompt": "x"}
    files = {"list": [image], "id": [{**image, "id": 3}], "surrogate": [{**image, "prompt": "\ud800"}], "twice": [image] * 2}
    for name, rows in (files | {"nul": [{**image, "image": "a\0.png"}]}).items():
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    record = Record("p1", "x", (Candidate("a", (home / "img" / "a.png").read_bytes()),))
    write_shards([record], home / "data", shapes.rubric().scale)
    args, words = MISTAKES[case]
    assert run(*args, "--model", "model") == 1
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""


def original(text):
    """As the documentation of ``cell`` says."""
    return re.sub(r"\\u\{([0-9a-f]+)\}", lambda found: chr(int(found[1], 16)), text.removeprefix("'"))


HOSTILE = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "  =1",
    "\t=1",
    "'=1",
    "a\nb\r\nc",
    'a "quoted", text;=1',
    "\u202egnp",
    "\x1b[31mred",
    "\0",
]
HOSTILE += [r"\u{a} as written", "\uff1d1+1", "'", "", "C:\\new", "\u200bzero", "\ufeff=1"]


def test_cells_of_a_table(home):
    """Harmless to a spreadsheet and a terminal, one line each, and nothing of the text is lost."""
    rows = [{"image": "img/a.png", "prompt": text, "id": text} for text in HOSTILE]
    (home / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("list.jsonl", "--model", "model", "--output", "out.csv", "--dimensions", "realism") == 0
    text = (home / "out.csv").read_bytes().decode()
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\u200b\u202a-\u202e\ufeff]", text)
    assert text.count("\n") == len(rows) + 1
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [original(row["prompt"]) for row in found] == [original(row["key"]) for row in found] == HOSTILE
    assert not any(re.match(r"\s*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]", row["prompt"]) for row in found)
    assert all(original(cell(text)) == text for text in ("\ud800", "\\", "\\\\u{5c}", "u{", "''"))


def test_names_that_are_no_unicode(home):
    """A file of a system that does not insist on UTF-8."""
    (home / "img" / "a.png").rename(home / "img" / "caf\udce9.png")
    assert run("img", "--model", "model", "--prompt", "red ring", "--output", "out.csv") == 0
    keys = [line["key"] for line in lines(home / "out.csv.journal")]
    assert keys == ["img/b.png", "img/c.webp", r"img/caf\udce9.png"]


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch):
    for there, chosen in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert measuring.chosen("auto") == chosen
        assert measuring.chosen("cuda:1") == "cuda:1"
