"""Sharded weights (FSDP2, two gloo processes) against one process that holds them whole and sees both their batches."""

import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import run_both
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import zr
from stages.test_teacher import (
    MEANS,
    Recorded,
    backbone,
    gdso,
    learn,
    make,
    reward,
    runner,
    stage_of,
    weights,
    with_reference,
)
from zr.data import Batch, RandomPairs, ScoreData, shapes
from zr.losses import K2, BatchAdvantage, ClippedPolicyGradient, GapLoss, SoftLabelCrossEntropy
from zr.models import LinearHead, SamplingRule, ScoreTokenHead, compose
from zr.models.sharding import gathered, sharded, whole
from zr.stages import KeepBestModel, PolicyTerm, ReferenceTerm, Supervised, Term

STEPS = {
    "qwen3_vl": ("qwen3_vl", "full", 1, False),
    "qwen3_vl lora": ("qwen3_vl", "lora", 2, True),
    "qwen3_5 untied": ("qwen3_5", "untied", 1, True),
    "qwen3_5 lora": ("qwen3_5", "head", 1, False),
}
HEADS = {"linear": LinearHead, "tokens": ScoreTokenHead}


class Gathered(Recorded):
    """Remembers whole gradients."""

    def step(self, closure=None):
        (group,) = self.param_groups
        kept = [None if p.grad is None else whole(p.grad).clone() for p in group["params"]]
        self.whole = [*getattr(self, "whole", []), kept]
        return super().step(closure)


def prepared(family, kind, checkpointing):
    """A backbone; ``untied`` has an output layer of its own, ``head`` an adapter on it too."""
    made = backbone(family, "lora" if kind == "lora" else "full")
    model = made.model
    if kind == "untied":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).contiguous())
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    if kind == "head":
        torch.manual_seed(0)
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False  # peft would only warn
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["k_proj", "lm_head"], init_lora_weights=False))
    if checkpointing:
        way = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{way}_checkpointing_enable")({"use_reentrant": False})
    return made


def short(made):
    """A rule by which few words are left beside the end, so that the processes stop at different times."""
    words = set(range(made.model.config.text_config.vocab_size)) - {5, 6, 7, made.prompts.end_id}
    return SamplingRule(length=16, suppressed=tuple(sorted(words)))


def joined():
    """Both batches; the image that both have counts twice."""
    return Batch.join([make().select([rank]) for rank in range(2)])


def places(rank, root):
    """Options of a trainer: of one process, or of one of two."""
    if rank is None:
        return {"default_root_dir": root}
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"default_root_dir": root, "devices": 2, "strategy": strategy, "inference_mode": False}


def updates(rank, root):
    """Gradients, weights and what was logged after one sampled batch, of every case."""
    found = {}
    for case, (family, kind, count, checkpointing) in STEPS.items():
        policy = PolicyTerm(advantage=BatchAdvantage(), loss=ClippedPolicyGradient(length=2.0, low=0.01, high=0.02))
        parts = gdso(count, policy=policy, micro_batch=4, part_norms_every=count - 1, gradient_clip=0.5, seed=5)
        made = prepared(family, kind, checkpointing)
        stage = with_reference(stage_of(reward(made, rule=short(made)), **parts))
        stage.optimizer = lambda p: Gathered(p, lr=0.002)
        trainer = learn(stage, make() if rank is None else make().select([rank]), **places(rank, root))
        names = list(weights(stage.policy.backbone))
        for number, step in enumerate(trainer.optimizers[0].whole):
            found |= {f"{case} {number} {n}": g for n, g in zip(names, step, strict=True) if g is not None}
        found |= {f"{case} after {n}": whole(p) for n, p in weights(stage.policy.backbone).items()}
        logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        found |= {f"{case} {name}": value.float() for name, value in logged.items()}
        found[f"{case} tokens"] = stage.sampled.rollouts.tokens
    return found | supervised(rank, root)


def supervised(rank, root):
    """The same of a step in one pass."""
    found = {}
    for name, head in HEADS.items():
        torch.manual_seed(0)
        model = compose(backbone().reworded(shapes.rubric()), head)
        terms = {"votes": Term(SoftLabelCrossEntropy()), "gap": Term(GapLoss(), weight=0.5)}
        stage = Supervised(model, terms, optimizer=lambda p: Gathered(p, lr=0.1), warmup=0.0, decay=0.0)
        trainer = learn(stage, joined() if rank is None else make().select([rank]), gradient_clip_val=0.1, **places(rank, root))
        (step,) = trainer.optimizers[0].whole
        found |= {f"{name} 0 {n}": g for n, g in zip(weights(stage.model), step, strict=True) if g is not None}
        found |= {f"{name} after {n}": whole(p) for n, p in weights(stage.model).items()}
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two real processes found."""
    root = tmp_path_factory.mktemp("sharded")
    run_both(__file__, "updates", str(root))
    return [load_file(root / f"updates.{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return updates(None, tmp_path_factory.mktemp("alone"))


@pytest.mark.xdist_group("sharded")  # one pair of processes
@pytest.mark.parametrize("case", [*STEPS, *HEADS])
def test_two_processes_make_the_update_of_one(two, alone, case):
    mine = {name: value for name, value in alone.items() if case_of(name) == case}
    assert len(mine) > 20
    for rank, found in enumerate(two):
        assert {name for name in found if case_of(name) == case} == mine.keys()
        for name, value in mine.items():
            if name.endswith(" tokens"):
                own = value[6 * rank : 6 * rank + 6]
                assert torch.equal(found[name], own[:, : found[name].shape[1]])
            else:
                scale = 1.0 if "train/" in name else max(value.abs().max().item(), 1e-2)
                torch.testing.assert_close(found[name], value, atol=1e-5 * scale, rtol=1e-5, msg=f"{rank} {name}")
    if case in STEPS:  # the processes wrote for unequal lengths of time
        assert two[0][f"{case} tokens"].shape[1] != two[1][f"{case} tokens"].shape[1]


def teacher():
    """With an adapter; an outer iteration of three batches."""
    parts = gdso(terms=MEANS, coupling=3, reference=ReferenceTerm(K2(), weight=0.5, refresh=3), micro_batch=2)
    return stage_of(reward(prepared("qwen3_vl", "lora", False)), **parts)


def data(folder):
    """Two shards to validate, of two records and of one, each record a batch."""
    return ScoreData(folder, shapes.rubric(), batch_size=1, pairs=RandomPairs(1), pairs_per_batch=1)


def whole_run(rank, root, folder):
    """Validated, trained with checkpoints and the best model kept, and gone on from a checkpoint in the middle."""
    (measures,) = runner(**places(rank, root), limit_val_batches=None).validate(teacher(), data(folder), verbose=False)
    found = {name: torch.tensor(value) for name, value in measures.items()}

    def fit(callbacks, ckpt_path=None):
        stage = teacher()
        stage.optimizer = lambda p: torch.optim.AdamW(p, lr=1e-3)
        settings = {"limit_train_batches": 2, "enable_checkpointing": True, "callbacks": callbacks}
        trainer = runner(**places(rank, root / "run"), **settings)
        trainer.fit(stage, datamodule=data(folder), ckpt_path=ckpt_path, weights_only=True)
        with gathered(stage.model, keep=rank == 0):
            if rank == 0:
                stage.model.save_pretrained(root / "last")
        return {name: whole(p).detach() for name, p in stage.model.named_parameters()} | {
            f"reference {name}": whole(p) for name, p in stage.reference_weights.items()
        }

    checkpoints = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    found |= {f"run {name}": p for name, p in fit([KeepBestModel(), checkpoints]).items()}
    found |= {f"again {name}": p for name, p in fit([], root / "step=1.ckpt").items()}
    return found


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run_both(__file__, "whole_run", str(root), str(folder))
    return root, [load_file(root / f"whole_run.{rank}") for rank in range(2)]


@pytest.mark.xdist_group("sharded run")
def test_validation_of_unequal_numbers_of_batches(runs, folder, tmp_path):
    (alone,) = runner(**places(None, tmp_path), limit_val_batches=None).validate(teacher(), data(folder), verbose=False)
    assert len(alone) > 30
    for found in runs[1]:
        assert {name for name in found if name.startswith("val/")} == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], torch.tensor(value), atol=1e-5, rtol=1e-5, equal_nan=True, msg=name)


@pytest.mark.xdist_group("sharded run")
def test_resumed_in_the_middle_of_an_outer_iteration(runs):
    for found in runs[1]:
        run = {name.removeprefix("run "): value for name, value in found.items() if name.startswith("run ")}
        assert sum("reference" in name for name in run) > 10
        for name, value in run.items():
            assert torch.equal(value, found[f"again {name}"]), name
            assert torch.equal(value, runs[1][0][f"run {name}"]), name
            if "reference" in name:
                assert not torch.equal(value, run[f"{name.removeprefix('reference ')}"]), name


@pytest.mark.xdist_group("sharded run")
def test_models_are_saved_whole(runs):
    root, (found, _) = runs
    last, best = (dict(zr.load(root / name).named_parameters()) for name in ("last", "run"))
    start = dict(teacher().model.named_parameters())
    assert last.keys() == best.keys() == start.keys()
    for name, value in last.items():
        assert torch.equal(value, found[f"run {name}"]), name
    for after in (last, best):
        moved = {name for name, value in after.items() if not torch.equal(value, start[name])}
        assert moved == {name for name in start if "lora" in name}


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield lambda *names: torch.distributed.device_mesh.init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)
    torch.distributed.destroy_process_group()


def asked_to_share(model, mesh, inference_mode=False):
    stage = Supervised(model, {"votes": Term(SoftLabelCrossEntropy())})
    stage._device_mesh = mesh  # as ModelParallelStrategy hands it over
    stage._trainer = SimpleNamespace(validate_loop=SimpleNamespace(inference_mode=inference_mode))
    stage.configure_model()
    return stage


def test_what_cannot_be_shared(mesh):
    both = mesh("data_parallel", "tensor_parallel")
    model = compose(backbone().reworded(shapes.rubric()), LinearHead)
    with pytest.raises(ValueError, match="set inference_mode of the trainer to False"):
        asked_to_share(model, both, inference_mode=True)
    model.budget = 100
    with pytest.raises(ValueError, match="the same number of passes on all processes: leave out budget"):
        asked_to_share(model, both)
    model.budget = None
    model.backbone, kept = torch.nn.Linear(1, 1), model.backbone
    with pytest.raises(ValueError, match="Linear is small enough for each process and cannot be sharded: use strategy ddp"):
        asked_to_share(model, both)
    model.backbone = kept
    stage = asked_to_share(model, None)
    assert not sharded(stage.model)
    stage = asked_to_share(model, both)
    assert all(isinstance(p, DTensor) for p in stage.parameters())
    before = [id(p) for p in stage.parameters()]
    stage.configure_model()  # once more, as before a second run
    assert [id(p) for p in stage.parameters()] == before


def case_of(name):
    return max((case for case in [*STEPS, *HEADS] if name.startswith(f"{case} ")), key=len)


if __name__ == "__main__":
    job, root, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[-1])
    torch.manual_seed(rank)
    found = globals()[job](rank, root, *sys.argv[3:-1])
    save_file({name: value.contiguous() for name, value in found.items()}, root / f"{job}.{rank}")
