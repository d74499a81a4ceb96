"""A small folder of shards, and trainers that write into a folder of the test."""

import lightning as L
import pytest
import torch
from plain import build

from zr.data import AllPairs, ScoreData, shapes, write_shards
from zr.losses import GapLoss, SoftLabelCrossEntropy
from zr.models import LinearHead, compose
from zr.stages import Term


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 6), ("validation", 3), ("test", 2)):
        records = shapes.records(split, count=count, candidates=3)
        write_shards(records, folder, shapes.rubric().scale, split=split, per_shard=2)
    return folder


@pytest.fixture
def data(folder):
    return lambda: ScoreData(folder, shapes.rubric(), batch_size=2, pairs=AllPairs())


@pytest.fixture
def parts():
    """The injected objects of a stage, built anew at each call: what a notebook holds."""

    def make(family="qwen3_vl", seed=0):
        torch.manual_seed(seed)
        model = compose(build(family, seed=seed), LinearHead)
        return {"model": model, "terms": {"votes": Term(SoftLabelCrossEntropy()), "gap": Term(GapLoss(), weight=0.5)}}

    return make


@pytest.fixture
def trainer(tmp_path):
    def make(*callbacks, run="run", **options):
        settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False} | options
        return L.Trainer(
            default_root_dir=tmp_path / run,
            callbacks=list(callbacks),
            enable_model_summary=False,
            log_every_n_steps=1,
            **settings,
        )

    return make
