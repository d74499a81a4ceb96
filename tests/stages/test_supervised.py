"""Training by annotated scores: checkpoints of the shell and of a notebook, payloads refused, resuming."""

import os
import pickle
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from plain import FAMILIES

from zr.commands.training import TrainingCLI
from zr.data import Batch, collate, shapes
from zr.stages import Supervised, Term, objective

ADAM = partial(torch.optim.AdamW, lr=3e-3)

RECIPE = """
run: {run}
folder: {folder}
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  callbacks:
    - class_path: zr.stages.KeepBestModel
model:
  class_path: zr.stages.Supervised
  init_args:
    model:
      class_path: zr.models.compose
      init_args:
        backbone:
          class_path: zr.models.tiny_{family}
          init_args:
            rubric: {{class_path: zr.data.shapes.rubric}}
            vocabulary: zr.data.shapes.vocabulary
            hidden_size: 32
            vision_size: 16
        head: {{class_path: zr.models.LinearHead}}
    terms:
      votes:
        class_path: zr.stages.Term
        init_args: {{loss: {{class_path: zr.losses.SoftLabelCrossEntropy}}}}
      gap:
        class_path: zr.stages.Term
        init_args: {{loss: {{class_path: zr.losses.GapLoss}}, weight: 0.5}}
      label:
        class_path: zr.stages.Term
        init_args: {{loss: {{class_path: zr.losses.TiltedGaussianCrossEntropy}}}}
      order:
        class_path: zr.stages.Term
        init_args: {{loss: {{class_path: zr.losses.FidelityLoss, init_args: {{floor: 0.02}}}}, weight: 0.5}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.003}}}}
data:
  class_path: zr.data.ScoreData
  init_args:
    folder: "${{folder}}"
    rubric: {{class_path: zr.data.shapes.rubric}}
    batch_size: 2
    pairs: {{class_path: zr.data.AllPairs}}
"""


@pytest.fixture(scope="module")
def batch() -> Batch:
    return collate(list(shapes.records("test", count=2, candidates=2)), shapes.rubric().scale)


@torch.no_grad()
def answers(stage, batch):
    return stage.eval()(batch).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_of_the_shell(folder, batch, tmp_path, family):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(run=tmp_path / "run", folder=folder, family=family))
    cli = TrainingCLI("fit", ["--config", str(recipe), "--model.init_args.terms.gap.init_args.weight=0.25"])
    start = answers(cli.model, batch)
    cli.model.train()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    expected = answers(cli.model, batch)
    assert (expected - start).abs().max() > 1e-3
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    again = Supervised.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(answers(again, batch), expected)
    assert again.terms["gap"].weight == 0.25
    remembered = torch.load(path, weights_only=True)["hyper_parameters"]
    assert remembered["optimizer"]["init_args"]["lr"] == 0.003
    assert again.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.003


def test_checkpoint_of_a_notebook(data, parts, trainer, batch, tmp_path):
    stage = Supervised(**parts(), optimizer=ADAM, warmup=0.2)
    trainer(max_epochs=1).fit(stage, data())
    expected = answers(stage, batch)
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    again = Supervised.load_from_checkpoint(path, weights_only=True, **parts(seed=9))
    assert torch.equal(answers(again, batch), expected)
    assert dict(again.hparams) == {"warmup": 0.2, "decay": 0.5}
    assert dict(stage.hparams_initial) == {"warmup": 0.2, "decay": 0.5}  # no second copy of the model anywhere
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'model' and 'terms'"):
        Supervised.load_from_checkpoint(path, weights_only=True)


def test_subclass_with_parts_of_its_own(parts):
    class Mine(Supervised):
        def __init__(self, extra, note="plain", **others):
            super().__init__(**others)
            self.extra = extra

    stage = Mine(torch.nn.Linear(2, 2), **parts(), decay=0.25)
    assert dict(stage.hparams) == {"note": "plain", "warmup": 0.05, "decay": 0.25}


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "extra"])
def test_checkpoint_with_a_payload(data, parts, trainer, tmp_path, place):
    stage = Supervised(**parts())
    contents = {"state_dict": stage.state_dict(), "hyper_parameters": {}, "pytorch-lightning_version": L.__version__}
    contents[place] = Payload(str(tmp_path / "executed"))
    torch.save(contents, tmp_path / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Supervised.load_from_checkpoint(tmp_path / "evil.ckpt", weights_only=True, **parts())
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer().fit(stage, data(), ckpt_path=tmp_path / "evil.ckpt", weights_only=True)
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "executed").exists()  # the payload was a real one


class PowerCut(L.Callback):
    """The process dies at the beginning of an epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise OSError("the lights went out")


# Resuming goes on in the folder of the run, which Lightning takes for a mistake.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_resuming_is_the_uninterrupted_run(data, parts, trainer, tmp_path):
    def checkpoints(run):
        return ModelCheckpoint(dirpath=tmp_path / run, save_last=True, save_top_k=-1, filename="{epoch}")

    whole = Supervised(**parts(), optimizer=ADAM)
    trainer(checkpoints("whole"), run="whole").fit(whole, data())
    torch.manual_seed(123)  # another process has another state
    with pytest.raises(OSError, match="the lights went out"):
        trainer(checkpoints("cut"), PowerCut(), run="cut").fit(Supervised(**parts(), optimizer=ADAM), data())
    resumed = Supervised(**parts(seed=3), optimizer=ADAM)
    torch.manual_seed(321)
    trainer(checkpoints("cut"), run="cut").fit(resumed, data(), ckpt_path=tmp_path / "cut" / "last.ckpt", weights_only=True)
    first = torch.load(tmp_path / "cut" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    final = whole.state_dict()
    assert not all(torch.equal(first[name], tensor) for name, tensor in final.items())
    for name, tensor in final.items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_objective_of_a_batch(parts, data):
    stage = Supervised(**parts())
    logged = {}
    stage.log = lambda name, value, **_: logged.update({name: value})
    stage.log_dict = lambda values, **_: logged.update(values)
    batch = next(iter(data().train_dataloader()))
    loss = stage.training_step(batch)
    prediction = stage(batch)
    expected, values = objective(dict(stage.terms.items()), prediction, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, values["votes"] + 0.5 * values["gap"])
    assert set(logged) == {"train/loss", "train/votes", "train/gap"}


def test_a_loaded_model_trains(parts):
    given = parts()
    given["model"].eval()  # as zr.load gives it; Lightning would leave it so, and warn
    assert all(module.training for module in Supervised(**given).modules())


def test_it_learns(data, parts, trainer):
    stage = Supervised(**parts(), optimizer=ADAM)
    batches = list(data().train_dataloader())

    @torch.no_grad()
    def loss():
        return sum(objective(dict(stage.terms.items()), stage(batch), batch)[0] for batch in batches).item()

    before = loss()
    trainer(max_epochs=4, limit_val_batches=0, enable_checkpointing=False).fit(stage, data())
    assert loss() < 0.95 * before


def test_nothing_to_learn_is_refused(parts):
    given = parts()
    with pytest.raises(ValueError, match="terms has no loss with a positive weight"):
        Supervised(given["model"], terms={"votes": Term(given["terms"]["votes"].loss, weight=0.0)})
    with pytest.raises(ValueError, match="terms has no loss with a positive weight"):
        Supervised(given["model"], terms={})


def test_a_term_cannot_have_the_name_of_the_whole(parts):
    given = parts()
    with pytest.raises(ValueError, match="give the term 'loss' another name"):
        Supervised(given["model"], terms={"loss": given["terms"]["votes"]})
