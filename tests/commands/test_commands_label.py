"""`zr label`: labels in copies of shards, the same whatever interrupts the run and however many processes share it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain import build

from zr.cli import main
from zr.data import Index, read_shards, shapes, write_shards
from zr.data.record import decode
from zr.models import LinearHead, Policy, ReasoningReward, SamplingRule, compose, load

NAMES = list(shapes.DIMENSIONS)
RULE = SamplingRule(length=6, suppressed=tuple(range(16, 53)))
SHARDS, IMAGES = 24, 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models `teacher` and `direct`, shards `in` of two splits."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    policy = Policy(build("qwen3_vl", shapes.rubric(reasoning=True)), off_scale=True)
    ReasoningReward(policy, traces=2, rule=RULE).save_pretrained(folder / "teacher")
    compose(build("qwen3_vl"), LinearHead).save_pretrained(folder / "direct")
    for split, count in (("unlabelled", SHARDS), ("validation", 3)):
        records = shapes.records(split, count=count, candidates=IMAGES)
        write_shards(records, folder / "in", shapes.rubric().scale, split=split, per_shard=1)
    return folder


@pytest.fixture(scope="module")
def whole(home):
    """A folder that one run filled, without interruption."""
    assert main(arguments(home, home / "whole")) == 0
    return home / "whole"


def arguments(home, out, *more, model="teacher", split="unlabelled"):
    options = ["--split", split, "--batch_size", "2", "--keep_traces", "true", "--accelerator", "cpu"]
    return ["label", *map(str, (home / model, home / "in", out)), *options, *map(str, more)]


def contents(folder):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != "labelling/lock"}


def test_labels_and_their_summary(home, whole, capsys):
    expected = list(read_shards(home / "in", split="unlabelled"))
    found = list(read_shards(whole, split="unlabelled"))
    assert [replace(record, distributions={}) for record in found] == expected
    labels = {name: [by["teacher"] for r in found for by in r.distributions[name].values()] for name in NAMES}
    assert main(arguments(home, whole)) == 0  # again: it finds all done, and says what it is
    said = capsys.readouterr().out
    summary = json.loads((whole / "labelling" / "unlabelled.summary.json").read_text())
    assert (summary["records"], summary["settings"]["traces"], summary["settings"]["seed"]) == (SHARDS, 2, 0)
    bins = torch.tensor(shapes.rubric().bins, dtype=torch.float64)
    end = load(home / "teacher").backbone.prompts.end_id
    for name in NAMES:
        q = torch.tensor([label.probs for label in labels[name]], dtype=torch.float64)
        forced = [ids[-1] != end for label in labels[name] for ids in label.reasoning.ids]
        row = {
            "labels": SHARDS * IMAGES,
            "score": (q @ bins).mean().item(),
            "entropy": -(q * q.log()).sum(-1).mean().item(),
            "spread": sum(label.reasoning.spread for label in labels[name]) / len(q),
            "forced": sum(forced) / len(forced),
            "off_scale": sum(label.off_scale for label in labels[name]) / len(q),
            "tokens": sum(len(ids) for label in labels[name] for ids in label.reasoning.ids) / len(forced),
        }
        assert summary["dimensions"][name] == pytest.approx(row)
        assert row["off_scale"] > 0.1
        assert f"{row['entropy']:.3f}" in said
    assert summary["overall"]["labels"] == 4 * SHARDS * IMAGES
    assert f"unlabelled: {SHARDS} prompts" in said


def test_a_direct_model_all_splits_and_a_name(home, tmp_path, capsys):
    command = ["label", *map(str, (home / "direct", home / "in", tmp_path / "out"))]
    assert main([*command, "--labeller", "small", "--dimensions", "realism", "alignment", "--accelerator", "cpu"]) == 0
    model = load(home / "direct")
    assert set(Index.load(tmp_path / "out").splits) == {"unlabelled", "validation"}
    for split in ("unlabelled", "validation"):
        for record in read_shards(tmp_path / "out", split=split):
            assert set(record.distributions) == {"realism", "alignment"}
    for candidate in record.candidates:
        with torch.no_grad():
            q = model(images=[decode(candidate, record.key)], prompts=[record.prompt]).probs[0]
        for name in ("realism", "alignment"):
            label = record.distributions[name][candidate.id]["small"]
            assert label.probs == pytest.approx(q[NAMES.index(name)].tolist(), abs=1e-5)
            assert label.reasoning is None
    assert record.scores  # what annotators said stays
    assert "forced" in capsys.readouterr().out


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from zr.cli import main
import lightning, transformers, zr.commands.label, zr.commands.score, zr.data.labels, zr.models.loading, zr.stages, zr.report

out, kills, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
r, made = random.Random(0), []

def start():
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            code = main(command)
        finally:
            os._exit(code)
    return child

def finished():
    return {path.name: path.stat().st_mtime_ns for path in (out / "labelling").glob("*.tar.json")}

for kill in range(kills):
    child, before = start(), finished()
    enough = len(before) + r.randrange(2)
    while not (out / "labelling" / "lock").exists() or len(finished()) < enough:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.002)
    until = time.monotonic() + r.random() * 0.3  # in the middle of a shard, or while a name is given
    while time.monotonic() < until and len(finished()) <= enough:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended by itself"
    assert before.items() <= finished().items(), "a finished shard was made again"
    made.append(len(finished()))
print(*made)
before = finished()
_, status = os.waitpid(start(), 0)
assert status == 0
assert before.items() <= finished().items()
"""


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_and_resumed(home, whole, tmp_path, kills):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLS, str(out), str(kills), *arguments(home, out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    made = [int(count) for count in done.stdout.split()]
    assert made == sorted(made)
    assert 0 < made[-1] < SHARDS  # it was not done before the last run, which did not begin anew
    assert contents(out) == contents(whole)
    keys = [record.key for record in read_shards(out, split="unlabelled")]
    assert keys == [record.key for record in read_shards(home / "in", split="unlabelled")]


def run(*command, **options):
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "zr.cli", *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | path,
        **options,
    )


@pytest.mark.xdist_group("distributed")
def test_two_processes_give_what_one_gives(home, whole, tmp_path):
    out = tmp_path / "out"
    done = run(*arguments(home, out, "--devices", 2), timeout=300)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(whole)
    assert done.stdout.count("unlabelled: ") == 1
    assert "Traceback" not in done.stderr
    assert f"{SHARDS // 2}/{SHARDS // 2}" in done.stderr  # the first process counts its own half


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("bad", [0, 1])
def test_one_of_two_processes_fails(home, tmp_path, bad):
    """A bad record in a shard of either process ends both, and what was finished is there."""
    records = shapes.records("unlabelled", count=2, candidates=1)
    write_shards(records, tmp_path / "in", shapes.rubric().scale, split="unlabelled", per_shard=1)
    path = tmp_path / "in" / f"unlabelled-{bad:06d}.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 40
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    places = map(str, (home / "teacher", tmp_path / "in", tmp_path / "out"))
    done = run("label", *places, "--devices", "2", "--accelerator", "cpu", timeout=300)
    assert done.returncode != 0
    assert f"zr label: shard {path}: record" in done.stderr
    assert not (tmp_path / "out" / path.name).exists()
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", 1], "was begun with seed=0, now it is seed=1: give what it was begun with, or label into another folder"),
        (["--traces", 3], "was begun with traces=2, now it is traces=3"),
        (["--dimensions", "realism"], "dimensions="),
        (["--dtype", "bfloat16"], "dtype='auto', now it is dtype='bfloat16'"),
        (["--batch_size", 0], "batch_size must be at least 1"),
        (["--devices", 2, "--num_nodes", 0], "num_nodes"),
        (["--traces", 0], "traces must be at least 1, got 0"),
        (["--dimensions", "beauty"], "dimensions must be a list of different names"),
        (["--split", "test"], "has no shards for split 'test': its splits are unlabelled, validation"),
    ],
)
def test_what_is_refused(home, whole, capsys, more, words):
    before = contents(whole)
    assert main(arguments(home, whole, *more)) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("zr label: ")
    assert contents(whole) == before


def test_another_model_is_refused(home, whole, capsys):
    assert main(arguments(home, whole, model="direct")[:-2]) == 1
    assert "answers without reasoning" in capsys.readouterr().err
    command = ["label", *map(str, (home / "direct", home / "in", whole)), "--split", "unlabelled", "--accelerator", "cpu"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "was begun with keep_traces=True, model=" in said
    assert "rule={" in said


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        main(["label", "--help"])
    said = capsys.readouterr().out
    for name in ("model", "shards", "out", "--traces", "--seed", "--batch_size", "--labeller", "--keep_traces", "--dimensions"):
        assert name in said
