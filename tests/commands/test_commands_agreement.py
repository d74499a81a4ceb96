"""`zr agreement`: agreement by loops over pairs, divergences by hand, what each wrote, and a page that stands alone."""

import json
import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
import torch
from plain import build

from zr.cli import main
from zr.commands import agreeing
from zr.commands.agreeing import Contestant
from zr.data import LabelledDistribution, ScoreData, shapes, write_shards
from zr.models import LinearHead, Policy, ReasoningReward, SamplingRule, compose, load, tiny_clip

RUBRIC = shapes.rubric()
HOSTILE = "<script>alert(1)</script> \u202e red ring"


def teacher_policy():
    return Policy(build("qwen3_vl", shapes.rubric(reasoning=True), seed=1))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher that reasons, a direct student and one of CLIP features; the student has stored labels in the shards."""
    folder = tmp_path_factory.mktemp("models")
    ReasoningReward(teacher_policy(), traces=2, rule=SamplingRule(length=4)).save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    direct = compose(build("qwen3_vl"), LinearHead)
    direct.head.weight.data *= 10
    direct.save_pretrained(folder / "student")
    compose(tiny_clip(RUBRIC, shapes.vocabulary), LinearHead).save_pretrained(folder / "clip")
    records = list(shapes.records("test", count=3, candidates=3))
    records[1] = replace(records[1], prompt=HOSTILE)
    write_shards(records, folder / "data", RUBRIC.scale, split="test")
    write_shards([replace(r, scores={}) for r in records], folder / "data", RUBRIC.scale, split="bare")
    write_shards(map(labelled, records), folder / "data", RUBRIC.scale, split="labelled")
    return folder


def stored(record, candidate, dimension):
    """Some probabilities, different for each image and dimension, one of them zero."""
    place = 100 * sum(map(ord, record.key)) + 10 * ord(candidate[-1]) + RUBRIC.dimensions.index(dimension)
    generator = torch.Generator().manual_seed(place)
    p = torch.rand(9, generator=generator, dtype=torch.float64)
    p[0] = 0
    return (p / p.sum()).tolist()


def labelled(record):
    given = {
        name: {
            c.id: {"big one": LabelledDistribution(tuple(stored(record, c.id, name)), scale_id=RUBRIC.scale_id)}
            for c in record.candidates
        }
        for name in RUBRIC.dimensions
        if name != "realism"
    }
    return replace(record, distributions=given)


@pytest.fixture
def home(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(*args):
    return main(["agreement", *map(str, args)])


@cache  # the models are those of the whole file
def answers(name, split="test"):
    """``(N, D, K)`` probabilities of a model, one image at a time, and the images' keys."""
    model, probs, keys = load(name), [], []
    for batch in ScoreData("data", RUBRIC, batch_size=1, test=split).test_dataloader():
        for image, prompt in zip(batch.images, batch.prompts, strict=True):
            with torch.no_grad():
                probs.append(model(images=[image], prompts=[prompt]).probs[0].double())
        keys += batch.keys
    return torch.stack(probs), keys


def agreement(teacher, student, keys, margin=0.0):
    """Share of the pairs of one prompt that the teacher tells apart which the student orders alike, pair by pair."""
    bins = torch.tensor(RUBRIC.bins, dtype=torch.float64)
    mu = [(p * bins).sum(-1).tolist() for p in (teacher, student)]
    right = total = 0
    for a, b in combinations(range(len(keys)), 2):
        if keys[a].split(".")[0] == keys[b].split(".")[0] and abs(mu[0][a] - mu[0][b]) > margin + 1e-6:
            total += 1
            right += (mu[0][a] - mu[0][b]) * (mu[1][a] - mu[1][b]) > 0
    return right, total


def test_the_numbers(home, capsys):
    assert run("teacher", "student", "data", "--numbers", "out.json", "--batch_size", 2) == 0
    out = capsys.readouterr().out
    numbers = json.loads((home / "out.json").read_text())
    teacher, keys = answers("teacher")
    student, _ = answers("student")
    pooled = np.zeros(2)
    for d, name in enumerate(RUBRIC.dimensions):
        line = numbers["agreement"]["dimensions"][name]
        right, total = agreement(teacher[:, d], student[:, d], keys)
        pooled += right, total
        assert line["pairs"] == total
        assert line["hpa"]["estimate"] == pytest.approx(right / total, abs=0.1 / total)
        divergence = sum(
            p * (math.log(p) - math.log(q))
            for row, other in zip(teacher[:, d].tolist(), student[:, d].tolist(), strict=True)
            for p, q in zip(row, other, strict=True)
        )
        assert line["kl"]["estimate"] == pytest.approx(divergence / len(keys), rel=1e-3)
        assert line["kl"]["low"] <= line["kl"]["estimate"] <= line["kl"]["high"]
        bins = np.array(RUBRIC.bins)
        correlation = np.corrcoef(teacher[:, d].numpy() @ bins, student[:, d].numpy() @ bins)[0, 1]
        assert line["plcc"]["estimate"] == pytest.approx(correlation, abs=1e-3)
    assert numbers["agreement"]["overall"]["pooled_hpa"]["estimate"] == pytest.approx(pooled[0] / pooled[1], abs=1e-9)
    assert f"Of {int(pooled[1])} image pairs" in " ".join(out.split())
    gaps = numbers["annotated"]["student - teacher"]["overall"]["hpa"]["estimate"]
    both = [numbers["annotated"][role]["overall"]["hpa"]["estimate"] for role in ("student", "teacher")]
    assert gaps == pytest.approx(both[0] - both[1])


def test_cost_in_the_same_run(home, monkeypatch):
    """Tokens of a second, plain sampling of the same seeds; time by a clock that goes one second at each call of a model."""
    seconds = iter(range(10_000))
    order = []
    monkeypatch.setattr(agreeing.time, "perf_counter", lambda: float(next(seconds)))
    answer = Contestant.answer
    monkeypatch.setattr(
        Contestant, "answer", lambda self, *a, **k: (order.append((self.name, k.get("timed", True))), answer(self, *a, **k))[1]
    )
    assert run("teacher", "student", "data", "--numbers", "out.json", "--batch_size", 1) == 0
    cost = json.loads((home / "out.json").read_text())["cost"]
    teacher, written = load("teacher"), []
    sample = teacher.policy.sample

    def counting(**options):
        rollouts = sample(**options)
        written.extend((rollouts.mask.sum(-1) + 1).tolist())  # and the token that answers
        return rollouts

    teacher.policy.sample = counting
    for batch in ScoreData("data", RUBRIC, batch_size=1).test_dataloader():
        teacher(images=batch.images, prompts=batch.prompts)
    assert len(written) == 9 * 4 * 2
    assert cost["teacher"]["output_tokens_per_score"] == pytest.approx(sum(written) / (9 * 4))
    assert cost["student"]["output_tokens_per_score"] == 1
    assert cost["teacher"]["images"] == cost["student"]["images"] == 9
    for role in ("teacher", "student"):
        assert cost[role]["seconds_per_image"] == pytest.approx(1 / 3)  # three images in each batch, a second for each batch
        assert cost[role]["parameters"] == sum(p.numel() for p in load(role).parameters())
    assert cost["teacher / student"]["seconds_per_image"] == pytest.approx(1.0)
    assert order[:2] == [("teacher", False), ("student", False)]  # one image each, untimed
    assert [name for name, _ in order[2:]] == ["teacher", "student", "student", "teacher", "teacher", "student"]


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.loaded = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_shows_where_they_disagree_most(home):
    assert run("teacher", "student", "data", "--output", "out.html", "--pictures", 5) == 0
    text = (home / "out.html").read_text()
    reader = Reader(text)
    assert "script" not in reader.tags
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in reader.loaded)
    assert text.count('<article class="card">') == 5
    shown = "".join(reader.words)
    teacher, keys = answers("teacher")
    student, _ = answers("student")
    gap = ((teacher - student) @ torch.tensor(RUBRIC.bins, dtype=torch.float64)).abs()
    worst = gap.amax(-1).argsort(descending=True)[:5].tolist()
    places = [shown.index(f"{keys[i]}\n") for i in worst]
    assert places == sorted(places)  # the farthest first
    for i in worst:
        d = int(gap[i].argmax())
        assert f"{RUBRIC.dimensions[d]}: {gap[i, d]:.2f} apart" in shown
    if any(keys[i].startswith(keys[3].split(".")[0]) for i in worst):
        assert "<script>alert(1)</script> \\u{202e} red ring" in shown


def test_stored_labels_stand_for_a_teacher(home, capsys):
    names = [name for name in RUBRIC.dimensions if name != "realism"]
    args = ("labels:big one", "clip", "data", "--split", "labelled", "--numbers", "out.json")
    assert run(*args, "--dimensions", *names) == 0
    numbers = json.loads((home / "out.json").read_text())
    student, keys = answers("clip", "labelled")
    records = {r.key: r for r in shapes.records("test", count=3, candidates=3)}
    assert list(numbers["agreement"]["dimensions"]) == names
    for name in names:
        teacher = [stored(records[key.split(".")[0]], key.split(".")[1], name) for key in keys]
        own = student[:, RUBRIC.dimensions.index(name)]
        right, total = agreement(torch.tensor(teacher, dtype=torch.float64), own, keys)
        line = numbers["agreement"]["dimensions"][name]
        assert (line["pairs"], line["hpa"]["estimate"]) == (total, pytest.approx(right / total))
        divergence = sum(
            p * math.log(p / q)
            for row, other in zip(teacher, own.tolist(), strict=True)
            for p, q in zip(row, other, strict=True)
            if p > 0
        )
        assert line["kl"]["estimate"] == pytest.approx(divergence / len(keys), rel=1e-3)
    assert list(numbers["cost"]) == ["student"]
    capsys.readouterr()
    assert run(*args) == 1
    assert "has no distribution by labels:big one in realism: label it, or choose --dimensions" in " ".join(
        capsys.readouterr().err.split()
    )


def test_without_annotators_and_of_the_first_prompts(home, capsys):
    args = ("clip", "student", "data", "--split", "bare", "--prompts", 1, "--batch_size", 2)
    assert run(*args, "--numbers", "out.json", "--output", "out.html") == 0
    numbers = json.loads((home / "out.json").read_text())
    assert numbers["annotated"] is None
    assert numbers["cost"]["student"]["images"] == 6  # whole batches
    out = capsys.readouterr().out
    assert "annotators" not in out
    assert not re.search(r"\bnan\b", (home / "out.html").read_text())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["student", "student", "data", "--output", "out.txt"], "--output out.txt must end in .html"),
        (["student", "student", "data", "--numbers", "out.html"], "--numbers out.html must end in .json"),
        (["student", "student", "data", "--prompts", "0"], "--prompts must be at least 1, got 0"),
        (["student", "nothing", "data"], "nothing holds no model"),
        (["student", "student", "data", "--split", "train"], "has no shards for split 'train'"),
        (["student", "student", "data", "--dimensions", "beauty"], "got ['beauty']"),
        (["labels:nobody", "student", "data"], "test-00000.c0 has no distribution by labels:nobody in alignment: label it"),
        (["other", "student", "data"], "answer on different scales, other on realism in 9 bins and student on alignment"),
    ],
)
def test_what_a_user_can_mend_is_one_line(home, args, said, capsys):
    if args[0] == "other":
        compose(tiny_clip(RUBRIC.select(["realism"]), shapes.vocabulary), LinearHead).save_pretrained("other")
    assert run(*args) == 1
    assert said in " ".join(capsys.readouterr().err.split())
