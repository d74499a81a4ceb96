"""`zr calibrate`: the table is that of plain evaluations before and after, and nothing is kept unless asked."""

import json
import math
import re
from itertools import product

import pytest
import torch
from plain import build

from zr.cli import main
from zr.commands.score import fingerprint
from zr.data import ScoreData, shapes, write_shards
from zr.metrics import Coverage, ExpectedCalibrationError, RankedProbabilityScore, VotesNegativeLogLikelihood
from zr.models import LinearHead, compose, load
from zr.scores import ScoreDistribution

RUBRIC = shapes.rubric()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Shards with two annotated splits, one that nobody scored, and a model that is too sure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for split, count in (("validation", 8), ("test", 5)):
        write_shards(shapes.records(split, count=count, candidates=3), "data", RUBRIC.scale, split=split)
    bare = (type(r)(r.key, r.prompt, r.candidates) for r in shapes.records("train", count=2, candidates=2))
    write_shards(bare, "data", RUBRIC.scale, split="bare")
    torch.manual_seed(0)
    model = compose(build("qwen3_vl"), LinearHead)
    counts = sum(batch.votes.sum(0) for batch in ScoreData("data", RUBRIC, test="validation").test_dataloader())
    model.head.bias.data = 3 * (counts + 1).log()  # three times as sure as the votes of all images together allow
    model.save_pretrained("model")
    return tmp_path


def run(*args):
    return main(["calibrate", *map(str, args)])


def held_out(split):
    """Logits ``(N, D, K)``, votes and records, one image at a time."""
    model, logits, votes, records = load("model"), [], [], []
    for batch in ScoreData("data", RUBRIC, batch_size=1, test=split).test_dataloader():
        for image, prompt in zip(batch.images, batch.prompts, strict=True):
            with torch.no_grad():
                logits.append(model(images=[image], prompts=[prompt]).logits[0])
        votes.append(batch.votes)
        records += [key.split(".")[0] for key in batch.keys]
    return torch.stack(logits), torch.cat(votes), records


def measures(logits, votes):
    found = {}
    for d, name in enumerate(RUBRIC.dimensions):
        q = ScoreDistribution(logits[:, d], RUBRIC.bins)
        for key, metric in (
            ("nll", VotesNegativeLogLikelihood()),
            ("rps", RankedProbabilityScore()),
            ("ece", ExpectedCalibrationError()),
            *((f"coverage_{level}", Coverage(level / 100)) for level in (50, 80, 90)),
        ):
            metric.update(q, votes[:, d])
            found[f"{key}/{name}"] = metric.compute().item()
    return found


def test_before_and_after_on_a_second_split(home, capsys):
    before_files = sorted(p for p in (home / "model").rglob("*") if p.is_file())
    assert run("model", "data", "--test", "test", "--output", "out.json", "--batch_size", 3) == 0
    out = capsys.readouterr().out
    assert sorted(p for p in (home / "model").rglob("*") if p.is_file()) == before_files  # nothing is kept unasked
    numbers = json.loads((home / "out.json").read_text())
    logits, votes, _ = held_out("validation")
    temperature = numbers["calibration"]["temperature"]
    for d in range(4):  # no neighbour is better on the split it was fitted on
        nll = [-(votes[:, d] * (logits[:, d] / (temperature[d] * f)).log_softmax(-1)).sum().item() for f in (0.97, 1.0, 1.03)]
        assert nll[1] < min(nll[0], nll[2])
        assert temperature[d] > 1.5
    logits, votes, records = held_out("test")
    scaled = logits / torch.tensor(temperature)[:, None]
    for name, part in (("before", logits), ("after", scaled)):
        for key, value in measures(part, votes).items():
            assert numbers[name][key] == pytest.approx(value, abs=2e-4), key
    rows = [re.findall(r"\d\.\d+", line) for line in out.splitlines() if "│" in line]
    keys = ("nll", "rps", "ece", "coverage_50", "coverage_80", "coverage_90", "plcc", "hpa")
    for row, (suffix, name) in zip(
        rows, product([*(f"/{d}" for d in RUBRIC.dimensions), ""], ["before", "after"]), strict=True
    ):
        assert list(map(float, row)) == pytest.approx([numbers[name][key + suffix] for key in keys], abs=5.1e-4)
    assert set(numbers["before"]) == set(numbers["after"])
    pooled = [-(votes * part.log_softmax(-1)).sum() / votes.sum() for part in (logits, scaled)]
    assert numbers["nll_change"]["estimate"] == pytest.approx((pooled[1] - pooled[0]).item(), abs=1e-3)
    assert numbers["nll_change"]["low"] <= numbers["nll_change"]["estimate"] <= numbers["nll_change"]["high"] < 0
    assert f"over {len(set(records))} resampled prompts" in " ".join(out.split())
    assert "Measured on test" in out


def test_on_one_split_it_says_so_and_keeps_on_request(home, capsys):
    unsaved = fingerprint("model")
    assert run("model", "data", "--method", "isotonic", "--save", "true") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "split validation, that it was fitted on" in said
    assert "these numbers flatter" in said
    assert "zr.load('model', calibrated=True)" in said
    model = load("model", calibrated=True)
    assert [len(line) >= 3 for line in model.calibration.knots] == [True] * 4
    assert "## Calibration" in (home / "model" / "README.md").read_text()
    assert fingerprint("model") == unsaved  # answers without it are those of before, and zr score goes on
    assert fingerprint("model", calibrated=True) != unsaved
    assert load("model").calibration is None
    assert main(["shards", "inspect", "data", "--split", "bare"]) == 0
    capsys.readouterr()


def test_score_applies_it_on_request(home, capsys):
    assert run("model", "data", "--save", "true") == 0
    temperature = json.loads((home / "model" / "calibration.json").read_text())["temperature"]
    logits, _, _ = held_out("test")
    for flag, divisor in (("false", torch.ones(4)), ("true", torch.tensor(temperature))):
        args = ["score", "data", "--split", "test", "--model", "model", "--calibrated", flag, "--output", f"{flag}.jsonl"]
        assert main(args) == 0
        probs = (logits / divisor[:, None]).softmax(-1)
        for line, expected in zip((home / f"{flag}.jsonl").read_text().splitlines(), probs, strict=True):
            for d, name in enumerate(RUBRIC.dimensions):
                assert json.loads(line)["scores"][name]["probs"] == pytest.approx(expected[d].tolist(), abs=5e-5)
    assert main([*args[:-1], "false.jsonl"]) == 1
    assert "was scored by model" in capsys.readouterr().err


def test_some_dimensions(home):
    assert run("model", "data", "--dimensions", "realism", "--output", "out.json") == 0
    numbers = json.loads((home / "out.json").read_text())
    assert [t == 1.0 for t in numbers["calibration"]["temperature"]] == [True, False, True, True]
    for key, value in numbers["before"].items():
        if not key.endswith("/realism") and "/" in key:
            assert numbers["after"][key] == pytest.approx(value, abs=1e-6)
    assert not math.isclose(numbers["after"]["nll/realism"], numbers["before"]["nll/realism"], rel_tol=0.01)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["model", "data", "--split", "bare"], "none of 4 images has votes in alignment: leave it out"),
        (["model", "data", "--test", "validation"], "--test validation is the split to fit on"),
        (["model", "data", "--output", "out.txt"], "--output out.txt must end in .json"),
        (["model", "data", "--split", "nothing"], "has no shards for split 'nothing'"),
        (["model", "nowhere"], "there is no folder nowhere"),
        (["nobody/nothing", "data", "--save", "true"], "nobody/nothing is none here: save the model first"),
        (["model", "data", "--dimensions", "beauty"], "got ['beauty']"),
        (["model/backbone", "data"], "is a plain model that zr did not save"),
    ],
)
def test_what_a_user_can_mend_is_one_line(home, args, said, capsys):
    assert run(*args) == 1
    err = capsys.readouterr().err
    assert said in " ".join(err.split())
    assert "Traceback" not in err
    assert not (home / "model" / "calibration.json").exists()
