"""Copies of shards with labels: whole or not there, gone on with, held by one run, summed up as by hand."""

import io
import json
import math
import os
import signal
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from zr.data import Candidate, Index, LabelledDistribution, LabelledFolder, Reasoning, Record, read_shards, write_shards
from zr.data.labels import Tally, labelled
from zr.rubric import Rubric, Scale

SCALE = Rubric.load("zr:direct").scale
SETTINGS = {"model": "abc", "seed": 0, "rule": {"suppressed": (3, 4)}}


def picture(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def pictures(count):
    """Records of one to four images."""
    for i in range(count):
        yield Record(f"p{i:02d}", f"x{i}", tuple(Candidate(n, picture(10 * i + k)) for k, n in enumerate("abcd"[: 1 + i % 4])))


def label(probs=(1,) + (0,) * 8, **more):
    return LabelledDistribution(tuple(map(float, probs)), (), SCALE.scale_id, **more)


@pytest.fixture
def source(tmp_path):
    """Eight tars of 23 records for training, two for validation."""
    write_shards(pictures(23), tmp_path / "in", SCALE, per_shard=3)
    return write_shards(pictures(4), tmp_path / "in", SCALE, split="validation", per_shard=2)


@pytest.fixture
def make(tmp_path, source):
    def make(folder="out", **changes):
        given = {"labeller": "t", "dimensions": ["realism"], "settings": SETTINGS, "splits": ["train"]} | changes
        return LabelledFolder(tmp_path / folder, source, SCALE, **given)

    return make


def with_labels(record: Record) -> Record:
    """A label for each image that tells where it belongs."""
    peak = int(record.key[1:]) % 9
    own = {c.id: label([0.92 if k == peak else 0.01 for k in range(9)]) for c in record.candidates}
    return labelled(record, "t", {"realism": own})


def fill(target, shards=None):
    by_name = {}
    for split in target.shards:
        rest = list(read_shards(target.source.folder, split=split))
        for shard in target.shards[split]:
            by_name[shard.path.name] = [with_labels(rest.pop(0)) for _ in range(shard.records)]
    for shard in target.todo()[:shards]:
        target.write(shard, by_name[shard.path.name])


def contents(folder):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != "labelling/lock"}


def test_tallies_by_hand():
    half = Reasoning(traces=2, forced=1, tokens=7, spread=math.log(2))
    several = [
        label([0.5, 0, 0, 0, 0, 0, 0, 0, 0.5], off_scale=0.2, reasoning=half),
        label([0, 0, 0, 0, 1, 0, 0, 0, 0], reasoning=replace(half, forced=2, tokens=2, spread=0.0)),
        label([0, 0, 0, 0, 0, 0, 0, 0, 1], off_scale=0.1),
    ]
    whole, parts = Tally.of(several, SCALE.bins), Tally.of(several[:1], SCALE.bins) + Tally.of(several[1:], SCALE.bins)
    assert whole == parts
    expected = {
        "labels": 3,
        "score": (3 + 3 + 5) / 3,
        "entropy": math.log(2) / 3,
        "spread": math.log(2) / 2,
        "forced": 3 / 4,
        "off_scale": 0.15,
        "tokens": 9 / 4,
    }
    assert whole.summary() == pytest.approx(expected)
    assert Tally().summary() == {"labels": 0} | dict.fromkeys(list(expected)[1:])
    assert Tally.of([], SCALE.bins) == Tally()


def test_labels_are_added_and_nothing_else_changes(make):
    target = make(splits=None)
    with target.begin():
        fill(target)
        summaries = target.finish()
    for split in ("train", "validation"):
        before, after = (list(read_shards(folder, split=split)) for folder in (target.source.folder, target.folder))
        assert [replace(record, distributions={}) for record in after] == before
        assert [with_labels(record) for record in before] == after
        assert summaries[split]["records"] == len(before)
        images = sum(len(record.candidates) for record in before)
        assert summaries[split]["dimensions"]["realism"]["labels"] == images == summaries[split]["overall"]["labels"]
        told = json.loads((target.folder / "labelling" / f"{split}.summary.json").read_text())
        assert told["dimensions"] == summaries[split]["dimensions"]
        assert told["settings"]["rule"] == {"suppressed": [3, 4]}
    assert [s.path.name for s in Index.load(target.folder).splits["train"]] == [f"train-{i:06d}.tar" for i in range(8)]


def test_it_goes_on_with_what_is_not_finished(make):
    with make("whole").begin():
        fill(make("whole"))
        make("whole").finish()
    target = make()
    with target.begin():
        fill(target, 3)
    times = {path.name: path.stat().st_mtime_ns for path in target.folder.glob("*.tar")}
    assert len(times) == 3
    with pytest.raises(FileNotFoundError, match="holds no index"):
        next(read_shards(target.folder))
    with make().begin():
        assert [shard.path.name for shard in make().todo()] == [f"train-{i:06d}.tar" for i in range(3, 8)]
        with pytest.raises(ValueError, match=r"5 shards are not labelled, train-000003\.tar is the first: run the same"):
            make().finish()
        fill(make())
        make().finish()
    assert contents(target.folder) == contents(make("whole").folder)
    assert {name: (target.folder / name).stat().st_mtime_ns for name in times} == times
    with make().begin():  # once more, with nothing to do
        assert make().todo() == []
        make().finish()
    assert contents(target.folder) == contents(make("whole").folder)


@pytest.mark.parametrize("damage", ["tar cut", "tar gone", "not said to be finished"])
def test_what_is_not_whole_is_made_again(make, damage):
    target = make()
    with target.begin():
        fill(target, 2)
    path = target.folder / "train-000001.tar"
    whole = contents(target.folder)
    if damage == "tar cut":
        path.write_bytes(path.read_bytes()[:-512])
    elif damage == "tar gone":
        path.unlink()
    else:
        (target.folder / "labelling" / "train-000001.tar.json").unlink()
    assert next(shard.path.name for shard in target.todo()) == "train-000001.tar"
    with target.begin():
        fill(target, 1)
    assert contents(target.folder) == whole


def test_a_bad_label_leaves_nothing(make):
    target = make()
    [shard, *_] = target.todo()
    records = [with_labels(record) for record in list(read_shards(target.source.folder))[:3]]
    bad = labelled(records[2], "t", {"realism": {"a": label([math.nan] + [0] * 8)}})
    with (
        target.begin(),
        pytest.raises(ValueError, match=r"record 'p02', candidate 'a', distributions\.realism\.t: .* sum to one"),
    ):
        target.write(shard, [*records[:2], bad])
    assert not list(target.folder.glob("*.tar*")) + list(target.folder.glob(".*"))


def test_a_writer_that_fails_leaves_nothing_under_a_final_name(make, monkeypatch):
    target = make()
    monkeypatch.setattr("zr.data.labels.as_sample", lambda record: 1 / 0)
    with target.begin(), pytest.raises(ZeroDivisionError):
        fill(target, 1)
    assert not list(target.folder.glob("*.tar*")) + list(target.folder.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": SETTINGS | {"seed": 1}}, "was begun with seed=0, now it is seed=1: give what it was begun with"),
        ({"settings": SETTINGS | {"model": "x", "traces": 4}}, "with model='abc', traces=None, now it is model='x', traces=4"),
        ({"settings": {"seed": 0, "rule": {"suppressed": [3, 4]}}}, "with model='abc', now it is model=None"),
        ({"labeller": "u"}, "labeller='t', now it is labeller='u'"),
        ({"dimensions": ["realism", "aesthetics"]}, r"dimensions=\['realism'\], now it is dimensions=\['realism', 'aes"),
    ],
)
def test_what_was_begun_otherwise_is_named(make, changes, words):
    with make().begin():
        fill(make(), 1)
    before = contents(make().folder)
    with pytest.raises(ValueError, match=words), make(**changes).begin():
        pass
    assert contents(make().folder) == before


def test_other_shards_are_named(make, tmp_path):
    with make().begin():
        fill(make(), 1)
    other = write_shards(pictures(7), tmp_path / "other", SCALE, per_shard=3)
    target = LabelledFolder(tmp_path / "out", other, SCALE, "t", ["realism"], SETTINGS)
    with (
        pytest.raises(ValueError, match=r"split 'train', was begun with shards='\w{16}', now it is shards='\w{16}'"),
        target.begin(),
    ):
        pass


def test_folders_that_hold_something_else(make, source, tmp_path):
    with pytest.raises(ValueError, match="holds the shards that are to be labelled: labels go into copies"):
        make("in")
    write_shards(pictures(2), tmp_path / "foreign", SCALE)
    with (
        pytest.raises(FileExistsError, match=r"foreign has a split 'train' already: label into another"),
        make("foreign").begin(),
    ):
        pass
    assert not list((tmp_path / "foreign" / "labelling").glob("*.json"))
    with make("foreign", splits=["validation"]).begin():  # another split beside it
        fill(make("foreign", splits=["validation"]))
        make("foreign", splits=["validation"]).finish()
    assert set(Index.load(tmp_path / "foreign").splits) == {"train", "validation"}
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "train-000003.tar").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError, match="loose has a split 'train' already"), make("loose").begin():
        pass
    (tmp_path / "out" / "labelling").mkdir(parents=True)
    (tmp_path / "out" / "labelling" / "train.settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"train\.settings\.json is no file of zr label"), make().begin():
        pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"splits": ["test"]}, r"no shards for split 'test': its splits are train, validation"),
        ({"labeller": " "}, "need a labeller's name, got ' '"),
        ({"dimensions": []}, "got none"),
        ({"dimensions": ["beauty"]}, "dimensions of alignment, .*, got beauty"),
    ],
)
def test_wrong_arguments(make, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        make(**changes)


def test_another_scale(source, tmp_path):
    other = Scale(bins=(1.0, 2.0), anchors={"realism": {}})
    with pytest.raises(ValueError, match=f"scale {SCALE.scale_id} .* the rubric has scale {other.scale_id}"):
        LabelledFolder(tmp_path / "out", source, other, "t", ["realism"], SETTINGS)


def test_a_shard_of_the_source_cut_short(make, tmp_path):
    path = tmp_path / "in" / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(ValueError, match=r"train-000002\.tar has \d+ bytes, the index says"), make().begin():
        pass


def held_by_a_child(target, how):
    """A process that holds the folder until it is killed."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with how(target):
                os.write(told, b"x")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return child


def end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_one_run_at_a_time_and_none_after_it_died(make):
    first = held_by_a_child(make(), LabelledFolder.begin)
    try:
        with (
            pytest.raises(ValueError, match=rf"is being labelled by a run that began as process {first} on .*: wait until all"),
            make().begin(),
        ):
            pass
        other = held_by_a_child(make(), LabelledFolder.join)  # a second process of the first one's run
    finally:
        end(first)
    try:
        with pytest.raises(ValueError, match="is being labelled"), make().begin():  # it outlives the first
            pass
    finally:
        end(other)
    with make().begin(), make().join():
        fill(make(), 1)
    with make().begin():
        assert len(make().todo()) == 7


def test_a_writer_that_is_killed(make):
    """Whenever: between, before and after the names are given, what is there is whole."""
    with make("whole").begin():
        fill(make("whole"))
        make("whole").finish()
    whole = contents(make("whole").folder)
    done = []
    for count in range(5):  # 15 of 17 names are given
        child = os.fork()
        if child == 0:
            replaced, calls = os.replace, iter(range(count + 1, -1, -1))

            def die(*names, replaced=replaced, calls=calls):
                if next(calls) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                replaced(*names)

            os.replace = die
            with make().begin():
                fill(make())
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = contents(make().folder)
        for name in [name for name in found if name.endswith(".tar")]:
            assert found[name] == whole[name]
            with tarfile.open(make().folder / name) as tar:
                assert tar.getmembers()
        done.append(8 - len(make().todo()))
    assert done == sorted(done)
    assert 0 < done[-1] < 8
    with make().begin():
        fill(make())
        make().finish()
    assert contents(make().folder) == whole
