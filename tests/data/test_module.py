"""The data module: order, completeness, shares of ranks and workers, checks, and Lightning's view of it."""

import io
import json
import pickle
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from PIL import Image

import zr
from zr.data import AllPairs, Annotation, Candidate, Record, ScoreData, read_shards, write_shards

RUBRIC = zr.Rubric.load("zr:direct")
SIZES = {"train": 13, "validation": 7, "test": 5}


def picture(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def records(split, count):
    for i in range(count):
        candidates = tuple(Candidate(c, picture(i)) for c in "ab"[: 1 + i % 2])
        yield Record(f"{split}{i:02d}", "x", candidates, scores={"realism": {c.id: {"n": Annotation(2.0)} for c in candidates}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("shards")
    for split, count in SIZES.items():
        write_shards(records(split, count), home, RUBRIC.scale, split=split, per_shard=3)
    return home


def prompts(loader):
    """Record keys of one pass, in order."""
    return [key.split(".")[0] for batch in loader for key in dict.fromkeys(k.split(".")[0] for k in batch.keys)]


def expected(split):
    return [f"{split}{i:02d}" for i in range(SIZES[split])]


def on_rank(data, rank, ranks):
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, current_epoch=0)
    return data


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_record_exactly_once(folder, num_workers):
    data = ScoreData(folder, RUBRIC, batch_size=4, num_workers=num_workers)
    for split, loader in (
        ("train", data.train_dataloader()),
        ("validation", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == len(loader) == -(-SIZES[split] // 4)
            assert sorted(prompts(batches)) == expected(split)
            sizes = [int(batch.prompt_index[-1]) + 1 for batch in batches]
            assert sizes == [4] * (SIZES[split] // 4) + ([SIZES[split] % 4] if SIZES[split] % 4 else [])


def test_evaluation_keeps_the_order_of_the_shards(folder):
    assert prompts(ScoreData(folder, RUBRIC).val_dataloader()) == expected("validation")
    assert prompts(ScoreData(folder, RUBRIC).predict_dataloader()) == expected("test")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_order_is_seeded(folder, num_workers):
    def epochs(seed, **options):
        loader = ScoreData(folder, RUBRIC, batch_size=4, seed=seed, num_workers=num_workers, **options).train_dataloader()
        return [prompts(loader) for _ in range(2)]

    first, second = epochs(0)
    assert first != second
    assert expected("train") not in (first, second)
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first
    neighbours = epochs(0, shuffle_buffer=1)[0]  # shards still change places, records within them do not
    assert neighbours != expected("train")
    if not num_workers:
        assert [neighbours.index(f"train{i:02d}") + 1 for i in (0, 3)] == [neighbours.index(f"train{i:02d}") for i in (1, 4)]


def test_loading_leaves_the_global_random_state_alone(folder):
    before = torch.random.get_rng_state()
    prompts(ScoreData(folder, RUBRIC).train_dataloader())
    assert torch.equal(before, torch.random.get_rng_state())


def test_ranks_share_evaluation_and_keep_step_in_training(folder):
    shares = [prompts(on_rank(ScoreData(folder, RUBRIC), rank, 3).val_dataloader()) for rank in range(3)]
    assert sorted(chain(*shares)) == expected("validation")
    loaders = [on_rank(ScoreData(folder, RUBRIC, batch_size=2), rank, 3).train_dataloader() for rank in range(3)]
    passes = [[int(batch.prompt_index[-1]) + 1 for batch in loader] for loader in loaders]
    assert passes == [[2, 2, 2]] * 3  # shards of 3, 3, 3, 3 and 1: the fullest rank has 6, one has 4, one 3
    counts = Counter(chain(*map(prompts, loaders)))
    assert sorted(counts) == expected("train")
    assert sum(counts.values()) == 18


def test_pairs_labeller_and_seed_reach_the_batches(folder, tmp_path):
    batch = next(iter(ScoreData(folder, RUBRIC, pairs=AllPairs(ties=True), batch_size=13).train_dataloader()))
    assert len(batch.pairs) == 6
    assert (batch.preference == 0.5).all()
    assert not next(iter(ScoreData(folder, RUBRIC, labeller="teacher").train_dataloader())).teacher.any()
    write_shards((replace(r, scores={}) for r in records("bare", 2)), tmp_path, RUBRIC.scale, split="train")
    with pytest.raises(ValueError, match=r"no distribution by labeller 'teacher' \(labellers: none\): label the split first"):
        next(iter(ScoreData(tmp_path, RUBRIC, labeller="teacher").train_dataloader()))


def test_several_splits_train_together(folder):
    data = ScoreData(folder, RUBRIC, train=["test", str(folder / "validation")], shuffle_buffer=4)
    loader = data.train_dataloader()
    assert len(loader) == 2
    assert sorted(prompts(loader)) == expected("test") + expected("validation")
    assert prompts(data.test_dataloader()) == expected("test")
    with pytest.raises(FileNotFoundError, match="'elsewhere'"):
        ScoreData(folder, RUBRIC, train=["test", "elsewhere"]).train_dataloader()
    with pytest.raises(ValueError, match="train names no split: give one, or a list of at least one"):
        ScoreData(folder, RUBRIC, train=[])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_arrives_as_one_clear_error(folder, tmp_path, num_workers, monkeypatch):
    monkeypatch.setattr("zr.data.shards.decode", lambda *args: None)  # a writer that did not look
    bad = Record("p0", "x", (Candidate("a", picture(0)[:60]),))
    write_shards([bad], tmp_path, RUBRIC.scale, split="test")
    with pytest.raises(ValueError, match=r"^record 'p0', candidate 'a': image cannot be decoded.*truncated") as error:
        list(ScoreData(tmp_path, RUBRIC, num_workers=num_workers).test_dataloader())
    assert "Traceback" not in str(error.value)


def test_splits_of_other_folders(folder, tmp_path):
    write_shards(records("far", 2), tmp_path, RUBRIC.scale, split="test")
    data = ScoreData(folder, RUBRIC, test=str(tmp_path / "test"), validation=f"../{folder.name}/test")
    assert prompts(data.test_dataloader()) == ["far00", "far01"]
    assert prompts(data.val_dataloader()) == expected("test")


def test_start_up_checks(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ScoreData(tmp_path / "nowhere", RUBRIC).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no shards for split 'unlabelled'.*test, train, validation"):
        ScoreData(folder, RUBRIC, train="unlabelled").setup("fit")
    ScoreData(folder, RUBRIC, train="unlabelled").setup("validate")
    with pytest.raises(FileNotFoundError, match="'dev'"):
        ScoreData(folder, RUBRIC, validation="dev").setup("fit")
    other = RUBRIC.select(["realism"])
    with pytest.raises(ValueError, match=rf"{RUBRIC.scale_id}.*{other.scale_id}.*use the rubric"):
        ScoreData(folder, other).setup("test")
    with pytest.raises(ValueError, match=r"5 shards for 1 ranks x 6 workers: write it with per_shard of 2 or less"):
        ScoreData(folder, RUBRIC, num_workers=6).setup("fit")
    with pytest.raises(ValueError, match=r"2 shards for 3 ranks"):
        on_rank(ScoreData(folder, RUBRIC), 0, 3).setup("predict")
    with pytest.raises(ValueError, match="batch_size"):
        ScoreData(folder, RUBRIC, batch_size=0)


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, *batch.keys))
        return self.weight * batch.votes.sum()

    def validation_step(self, batch, index):
        self.seen.append(("validation", *batch.keys))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}


def fit(folder, root, epochs, ckpt_path=None):
    model = Recorder()
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=root, log_every_n_steps=1, **QUIET)
    trainer.fit(model, datamodule=ScoreData(folder, RUBRIC, batch_size=4), ckpt_path=ckpt_path)
    return [seen for seen in model.seen if seen[0] != "validation"], trainer


def test_lightning_trains_and_a_resumed_run_sees_the_epochs_of_the_uninterrupted_one(folder, tmp_path):
    whole, _ = fit(folder, tmp_path, 3)
    for epoch in range(3):
        keys = [key.split(".")[0] for seen in whole if seen[0] == epoch for key in seen[1:]]
        assert sorted(set(keys)) == expected("train")
    assert [s[1:] for s in whole if s[0] == 0] != [s[1:] for s in whole if s[0] == 1]
    first, trainer = fit(folder, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    rest, _ = fit(folder, tmp_path, 3, ckpt_path=tmp_path / "one.ckpt")
    assert first + rest == whole


def test_no_validation_and_lightnings_own_loops(folder, tmp_path):
    trainer = L.Trainer(
        max_epochs=1, log_every_n_steps=1, limit_val_batches=0, accelerator="cpu", default_root_dir=tmp_path, **QUIET
    )
    model = Recorder()
    trainer.fit(model, datamodule=ScoreData(folder, RUBRIC, validation=None))
    assert not [seen for seen in model.seen if seen[0] == "validation"]
    model = Recorder()
    L.Trainer(accelerator="cpu", default_root_dir=tmp_path, **QUIET).validate(model, datamodule=ScoreData(folder, RUBRIC))
    assert sorted(k.split(".")[0] for seen in model.seen for k in seen[1:] if k.endswith("a")) == expected("validation")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse 4.53 renames what 4.40, the floor, has only
def test_every_argument_fits_in_yaml(folder):
    set_parsing_settings(subclasses_enabled=[zr.Rubric])  # lets a class method make it, as the command line does
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    text = f"""
data:
  class_path: zr.data.ScoreData
  init_args:
    folder: {folder}
    rubric: {{class_path: zr.Rubric.load, init_args: {{path: "zr:direct"}}}}
    batch_size: 2
    validation: null
    pairs: {{class_path: zr.data.AllPairs, init_args: {{minimum_gap: 0.5}}}}
    labeller: null
    seed: 3
"""
    data = parser.instantiate_classes(parser.parse_string(text)).data
    assert isinstance(data, ScoreData)
    assert (data.pairs.minimum_gap, data.validation, data.rubric.scale_id) == (0.5, None, RUBRIC.scale_id)


def test_loaders_can_be_sent_to_spawned_workers(folder):
    loader = ScoreData(folder, RUBRIC, pairs=AllPairs()).val_dataloader()
    assert prompts(pickle.loads(pickle.dumps(loader))) == expected("validation")  # noqa: S301 (our own)


def spoil(folder, split, *changes):
    """Write shards whose JSON or images are changed by ``changes``: a function of member name and bytes each."""
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                for change in changes:
                    data = change(name, data)
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index = json.loads((folder / "index.json").read_text())
    for shard in index["splits"][split]:
        shard["bytes"] = (folder / shard["name"]).stat().st_size
    (folder / "index.json").write_text(json.dumps(index))


BAD = {
    "p02.json": lambda data: data[:-5],
    "p05.a.png": lambda data: data[:60],
    "p09.json": lambda data: data.replace(b"2.0", b"2.2"),
}


@pytest.fixture
def bad(tmp_path):
    """Fourteen records, of which three are bad in three ways, and the third of the five shards ends in its second record."""
    write_shards((replace(r, key=f"p{i:02d}") for i, r in enumerate(records("x", 14))), tmp_path, RUBRIC.scale, per_shard=3)
    spoil(tmp_path, "train", lambda name, data: BAD.get(name, lambda data: data)(data))
    path = tmp_path / "train-000002.tar"
    with tarfile.open(path) as tar:
        path.write_bytes(path.read_bytes()[: tar.getmember("p07.b.png").offset_data + 10])
    return tmp_path


GOOD = ["p00", "p01", "p03", "p04", "p06", "p10", "p11", "p12", "p13"]  # p07 and p08 are lost with their shard


def test_bad_records_are_skipped_counted_and_listed(bad):
    with pytest.warns(UserWarning, match=r"split 'train': 4 of 14 records were skipped, in 3 places: .*'p02'.*000002.*'p09'"):
        assert [r.key for r in read_shards(bad, on_error="skip")] == sorted([*GOOD, "p05"])  # images are not looked at
    words = (
        r"rank 0, .*: 5 of 14 records were skipped, in 4 places: record 'p02', record 'p05', shard train-000002\.tar, .*'p09'"
    )
    loader = ScoreData(bad, RUBRIC, batch_size=2, test="train", on_error="skip").test_dataloader()
    for _ in range(2):
        with pytest.warns(UserWarning, match=words) as caught:
            assert prompts(loader) == GOOD
        assert len(caught) == 1
        assert [(fault.name, fault.records) for fault in loader.skipped] == [
            ("record 'p02'", 1),
            ("record 'p05'", 1),
            ("shard train-000002.tar", 2),
            ("record 'p09'", 1),
        ]
    assert "scores.realism.n" in str(loader.skipped[3].error)
    with pytest.raises(ValueError, match=r"train-000002\.tar has \d+ bytes"):
        ScoreData(bad, RUBRIC, test="train").test_dataloader()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_that_skips_keeps_its_length_and_can_be_resumed(bad, num_workers):
    def loader():
        options = {"batch_size": 4, "shuffle_buffer": 4, "on_error": "skip", "num_workers": num_workers}
        return ScoreData(bad, RUBRIC, **options).train_dataloader()

    whole = loader()
    with pytest.warns(UserWarning, match="5 of 14 records were skipped") as caught:
        batches, states = zip(*((prompts([batch]), whole.state_dict()) for batch in whole), strict=True)
    assert len(caught) == 1
    assert [len(batch) for batch in batches] == [4, 4, 4, 2]
    seen = list(chain(*batches))
    assert sorted(seen[: len(GOOD)]) == GOOD
    assert seen[len(GOOD) :] == seen[: 14 - len(GOOD)]  # begun again
    for done in (1, 2, 3):
        again = loader()
        again.load_state_dict(states[done - 1])
        with pytest.warns(UserWarning, match="5 of 14 records were skipped"):
            assert [prompts([batch]) for batch in again] == list(batches[done:])


def test_nothing_left_is_an_error_not_an_endless_search(tmp_path):
    write_shards(records("x", 14), tmp_path, RUBRIC.scale)
    spoil(tmp_path, "train", lambda name, data: b"{}" if name.endswith("json") else data)
    loader = ScoreData(tmp_path, RUBRIC, on_error="skip").train_dataloader()
    with (
        pytest.warns(UserWarning, match="14 of 14 records"),
        pytest.raises(ValueError, match=r"rank 0 \(14 records\) give no record that can be read"),
    ):
        next(iter(loader))


def test_the_first_bad_record_stops_by_default(bad):
    (bad / "train-000002.tar").unlink()
    index = json.loads((bad / "index.json").read_text())
    del index["splits"]["train"][2]
    (bad / "index.json").write_text(json.dumps(index))
    stream = iter(ScoreData(bad, RUBRIC, test="train", batch_size=1).test_dataloader())
    assert [next(stream).keys[0] for _ in range(2)] == ["p00.a", "p01.a"]
    with pytest.raises(ValueError, match=r"train-000000\.tar: .*"):
        next(stream)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_a_number_of_pairs(tmp_path, num_workers):
    def three(i):
        images = tuple(Candidate(c, picture(10 * i + n)) for n, c in enumerate("abc"[: 1 if i % 3 == 0 else 3]))
        return Record(
            f"p{i}", "x", images, scores={"realism": {c.id: {"n": Annotation(1.0 + n)} for n, c in enumerate(images)}}
        )

    write_shards(
        map(three, range(8)), tmp_path, RUBRIC.scale, per_shard=2
    )  # five prompts with three pairs each, three with none
    options = {"pairs": AllPairs(), "shuffle_buffer": 2, "num_workers": num_workers}
    batches = list(ScoreData(tmp_path, RUBRIC, batch_size=2, pairs_per_batch=4, **options).train_dataloader())
    assert [len(batch.pairs) for batch in batches] == [4] * 4
    one_by_one = ScoreData(tmp_path, RUBRIC, batch_size=1, **options).train_dataloader()
    want = [pair for batch in one_by_one for pair in compared(batch)]
    assert len(want) == 15
    assert [pair for batch in batches for pair in compared(batch)] == [*want, want[0]]  # the sixteenth begins again
    for batch in batches:
        assert len(set(batch.keys)) == len(batch.keys) == len({int(i) for i in batch.pairs.flatten()})
        assert batch.prompt_index.tolist() == sorted(batch.prompt_index.tolist())
        assert len({key.split(".")[0] for key in batch.keys}) == int(batch.prompt_index[-1]) + 1
    (batch,) = ScoreData(tmp_path, RUBRIC, batch_size=8, pairs_per_batch=40, **options).train_dataloader()
    assert len(batch.pairs) == 40  # more than there are: some stand there several times, their images once
    assert len(batch.keys) == len(set(batch.keys)) == 15


def compared(batch):
    """Pairs by name, with what decides on the loss."""
    return [
        (batch.keys[a], batch.keys[b], int(d), float(share), batch.scores[a].nan_to_num().tolist(), int(batch.images[a].sum()))
        for (a, b), d, share in zip(batch.pairs.tolist(), batch.pair_dimension, batch.preference, strict=True)
    ]


def test_options_that_do_not_fit(folder):
    with pytest.raises(ValueError, match="pairs_per_batch needs a pair policy"):
        ScoreData(folder, RUBRIC, pairs_per_batch=2)
    with pytest.raises(ValueError, match="pairs_per_batch must be at least 1, got 0"):
        ScoreData(folder, RUBRIC, pairs=AllPairs(), pairs_per_batch=0)
    with pytest.raises(ValueError, match="on_error must be stop or skip, got 'ignore'"):
        ScoreData(folder, RUBRIC, on_error="ignore")
