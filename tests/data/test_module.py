"""The data module: order, completeness, shares of ranks and workers, checks, and Lightning's view of it."""

import io
import pickle
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from PIL import Image

import zr
from zr.data import AllPairs, Annotation, Candidate, Record, ScoreData, write_shards

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


def test_pairs_labeller_and_seed_reach_the_batches(folder):
    batch = next(iter(ScoreData(folder, RUBRIC, pairs=AllPairs(ties=True), batch_size=13).train_dataloader()))
    assert len(batch.pairs) == 6
    assert (batch.preference == 0.5).all()
    data = ScoreData(folder, RUBRIC, labeller="teacher")
    with pytest.raises(ValueError, match=r"no distribution by labeller 'teacher'"):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_arrives_as_one_clear_error(folder, tmp_path, num_workers, monkeypatch):
    monkeypatch.setattr("zr.data.record.decode", lambda *args: None)  # a writer that did not look
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
