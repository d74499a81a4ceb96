"""The student against KLs in loops and the plain forward; teachers stored, online and of any kind; what a checkpoint holds."""

import copy
import math
from dataclasses import replace

import lightning as L
import pytest
import torch
from plain import build, chat, forward

import zr
from zr.commands.training import TrainingCLI
from zr.data import AllPairs, LabelledDistribution, collate, shapes, write_shards
from zr.losses import ForwardKL, GapLoss, InterpolatedCrossEntropy
from zr.models import LinearHead, SamplingRule, ScoreTokenHead, compose, reasoning, tiny_clip, tiny_qwen3_vl
from zr.stages import Student, Term

RUBRIC = shapes.rubric()
SCALE = RUBRIC.scale
NAMES = list(shapes.DIMENSIONS)
LR = 0.05
LETTERS = list("ABCDEFGHI")


def reasoner(family="qwen3_5", seed=1, traces=2):
    rule = SamplingRule(length=5, suppressed=tuple(range(16, 53)))
    worded = shapes.rubric(reasoning=True)
    return reasoning(compose(build(family, seed=seed), ScoreTokenHead), worded, rule=rule, traces=traces)


def other_words():
    return [*reversed(shapes.vocabulary()), "others"]


def vlm():
    backbone = tiny_qwen3_vl(RUBRIC, other_words, hidden_size=32, vision_size=16, layers=2)
    return compose(backbone, ScoreTokenHead)


def clip():
    torch.manual_seed(0)
    return compose(tiny_clip(RUBRIC, other_words, width=32, embedding=16), LinearHead)


def records(split="unlabelled", count=2):
    return list(shapes.records(split, count=count, candidates=2))


def labelled(record, teacher, *without):
    """A record with the distributions of a scorer, as the shards store them."""
    batch = collate([record], SCALE)
    probs = teacher(images=batch.images, prompts=batch.prompts).probs
    stored = {
        d: {
            c.id: {"teacher": LabelledDistribution(tuple(probs[i, j].tolist()), (), SCALE.scale_id)}
            for i, c in enumerate(record.candidates)
        }
        for j, d in enumerate(NAMES)
        if d not in without
    }
    return replace(record, distributions=stored)


def one_step(stage, batch):
    """What a step of plain SGD did: the loss, and how far each parameter went."""
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(stage, train_dataloaders=Loader([batch]), val_dataloaders=Loader([batch]))
    return trainer.callback_metrics, {name: before[name] - p.detach() for name, p in stage.named_parameters()}


class Loader:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def student(model, **others):
    return Student(model, optimizer=lambda p: torch.optim.SGD(p, lr=LR), warmup=0.0, decay=0.0, **others)


def log_q(model, batch):
    """``(N, D, 9)`` of a student; of a VLM, by the plain forward on each question alone."""
    if isinstance(model.backbone.model, torch.nn.Module) and not hasattr(model.backbone, "output"):
        return model(images=batch.images, prompts=batch.prompts).logits
    labels = model.backbone.processor.tokenizer.convert_tokens_to_ids(LETTERS)
    tail = model.backbone.processor.tokenizer.convert_tokens_to_ids(["score"])
    rows = [
        forward(model.backbone, chat(prompt, name), [image / 255], tail)[2][-1, labels].log_softmax(-1)
        for image, prompt in zip(batch.images, batch.prompts, strict=True)
        for name in NAMES
    ]
    return torch.stack(rows).reshape(len(batch.images), len(NAMES), -1)


@pytest.mark.parametrize("make", [vlm, clip])
def test_nine_numbers_are_all_that_is_needed(make):
    """A Qwen3.5 teacher that reasons; students of other families, with other tokenizers; one step on the naive KL."""
    teacher = reasoner()
    batch = collate([labelled(record, teacher) for record in records()], SCALE, labeller="teacher")
    model = make()
    if make is vlm:
        assert model.backbone.processor.tokenizer.get_vocab() != teacher.backbone.processor.tokenizer.get_vocab()
    logs, total = log_q(model, batch), 0.0
    for n in range(4):
        for d in range(4):
            wanted = batch.teacher[n, d].tolist()
            total = total + sum(t * (math.log(t) - logs[n, d, k]) for k, t in enumerate(wanted)) / 16
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    logged, moved = one_step(student(model), batch)
    assert float(logged["train/loss"]) == pytest.approx(total.item(), rel=1e-5)
    assert total > 0.05
    scale = max(float(g.abs().max()) for g in wanted if g is not None)
    for (name, p), gradient in zip(parameters.items(), wanted, strict=True):
        expected = torch.zeros_like(p) if gradient is None else LR * gradient
        torch.testing.assert_close(moved[f"model.{name}"], expected, atol=1e-4 * LR * scale + 1e-7, rtol=1e-3, msg=name)


def test_every_kind_of_item_in_one_batch():
    """Annotated and labelled, annotated alone, labelled alone, one dimension without label: each in its terms."""
    teacher = reasoner(traces=1)
    both, annotated = records("train")
    free = records("unlabelled", 1)[0]
    given = [labelled(both, teacher), annotated, labelled(free, teacher, "realism")]
    batch = collate(given, SCALE, pairs=AllPairs(), labeller="teacher")
    model = vlm()
    terms = {"kl": Term(ForwardKL()), "near": Term(InterpolatedCrossEntropy(), 0.5), "gap": Term(GapLoss(), 0.25)}
    with torch.no_grad():
        logs = log_q(model, batch)
    mu = (logs.exp() * torch.tensor(SCALE.bins)).sum(-1)
    kl, near, gap = [], [], []
    for n in range(6):
        for d, name in enumerate(NAMES):
            if n < 2 or (n > 3 and name != "realism"):
                kl.append(sum(t * (math.log(t) - float(logs[n, d, k])) for k, t in enumerate(batch.teacher[n, d].tolist())))
            if n < 4:
                position = (float(batch.scores[n, d]) - 1) * 2
                low = min(math.floor(position), 7)
                share = position - low
                near.append(-(1 - share) * float(logs[n, d, low]) - share * float(logs[n, d, low + 1]))
    for d in range(4):
        for a, b in ((0, 1), (2, 3)):
            gap.append(abs(float(mu[a, d] - mu[b, d] - batch.scores[a, d] + batch.scores[b, d])) / 4)
    logged, _ = one_step(student(model, terms=terms), batch)
    assert (len(kl), len(near), len(gap)) == (14, 16, 8)
    means = {name: sum(values) / len(values) for name, values in (("kl", kl), ("near", near), ("gap", gap))}
    for name, value in means.items():
        assert float(logged[f"train/{name}"]) == pytest.approx(value, rel=1e-4), name
    assert float(logged["train/loss"]) == pytest.approx(means["kl"] + 0.5 * means["near"] + 0.25 * means["gap"], rel=1e-4)


def test_an_online_teacher_is_the_stored_one():
    given = records()
    stored = collate([labelled(record, reasoner()) for record in given], SCALE, labeller="teacher")
    bare = collate(given, SCALE)
    first, second = student(vlm()), student(vlm(), teacher=reasoner())
    one, by_labels = one_step(first, stored)
    two, by_teacher = one_step(second, bare)
    assert float(one["train/kl"]) == pytest.approx(float(two["train/kl"]), rel=1e-5)
    for name, move in by_labels.items():
        torch.testing.assert_close(by_teacher[name], move, atol=1e-6, rtol=1e-4)


def test_an_online_teacher_is_no_part_of_the_stage(tmp_path):
    teacher = reasoner()
    before = copy.deepcopy(teacher.state_dict())
    stage = student(vlm(), teacher=teacher)
    plain = student(vlm())
    for what in ("state_dict", "named_parameters", "named_modules", "hparams"):
        one, two = (getattr(s, what) for s in (stage, plain))
        assert list(dict(one if what == "hparams" else one())) == list(dict(two if what == "hparams" else two())), what
    _, moved = one_step(stage, collate(records(), SCALE))
    assert any(bool(move.any()) for move in moved.values())
    assert not any(module.training for module in teacher.modules())
    assert all(module.training for module in stage.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    stage.to("meta")
    assert {p.device.type for p in teacher.parameters()} == {"meta"}


class Rule:
    """A scorer that is no module: what a person says."""

    rubric = RUBRIC

    def __call__(self, images, prompts, dimensions=None):
        logits = torch.tensor([[float(image.float().mean() / 255)] * 9 for image in images])
        return zr.ScoreDistribution(logits[:, None].expand(-1, 4, -1) * torch.arange(9), SCALE.bins)


def test_any_scorer_teaches():
    batch = collate(records(), SCALE)
    stage = student(vlm(), teacher=Rule())
    given = stage.taught(batch)
    torch.testing.assert_close(given.teacher, Rule()(batch.images, batch.prompts).probs)
    assert batch.teacher is None
    stage.to(torch.float64)  # nothing to move
    assert student(vlm()).taught(batch) is batch


RECIPE = """
run: {root}/run
folder: {folder}
trainer:
  max_epochs: 1
  limit_train_batches: 1
  limit_val_batches: 0
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
model:
  class_path: zr.stages.Student
  init_args:
    model: {{class_path: zr.load, init_args: {{source: {root}/student}}}}
    teacher: {{class_path: zr.load, init_args: {{source: {root}/teacher}}}}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.05}}}}
data:
  class_path: zr.data.ScoreData
  init_args:
    folder: "${{folder}}"
    rubric: {{class_path: zr.data.shapes.rubric}}
    batch_size: 3
"""


def test_a_teacher_of_yaml_is_not_in_the_checkpoint(folder, tmp_path):
    vlm().save_pretrained(tmp_path / "student")
    reasoner().save_pretrained(tmp_path / "teacher")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path, folder=folder))
    cli = TrainingCLI("fit", ["--config", str(recipe)])
    assert cli.model.teacher is not None
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert list(saved["state_dict"]) == list(student(vlm()).state_dict())
    assert "teacher" not in saved["hyper_parameters"]
    again = Student.load_from_checkpoint(path, weights_only=True)
    assert again.teacher is None
    batch = collate(records(), SCALE)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(batch).logits, cli.model.eval()(batch).logits, atol=0, rtol=0)


def test_labels_in_shards_reach_the_student(tmp_path, trainer):
    """Two splits of which one is annotated; validation without labels."""
    teacher = reasoner(traces=1)
    write_shards([labelled(r, teacher) for r in records("unlabelled", 3)], tmp_path / "data", SCALE, split="unlabelled")
    for split in ("train", "validation"):
        write_shards(records(split, 3), tmp_path / "data", SCALE, split=split)
    data = zr.data.ScoreData(tmp_path / "data", RUBRIC, 2, train=["train", "unlabelled"], labeller="teacher")
    stage = student(vlm(), terms={"kl": Term(ForwardKL()), "near": Term(InterpolatedCrossEntropy())})
    run = trainer(max_epochs=1, enable_checkpointing=False)
    run.fit(stage, data)
    assert {"train/kl", "train/near", "val/hpa"} <= set(run.callback_metrics)
    assert "val/teacher_kl" not in run.callback_metrics


def test_what_is_refused():
    with pytest.raises(ValueError, match="no term compares with a teacher: add"):
        student(vlm(), terms={"near": Term(InterpolatedCrossEntropy()), "kl": Term(ForwardKL(), weight=0)})
    model = vlm()
    with pytest.raises(ValueError, match="student and teacher share weights, so the teacher would learn too: load it a second"):
        student(model, teacher=reasoning(model, shapes.rubric(reasoning=True)))
    few = compose(tiny_clip(shapes.rubric(["realism"]), shapes.vocabulary), LinearHead)
    with pytest.raises(ValueError, match=r"student and teacher need one scale: \['alignment', .*\['realism'\]"):
        student(vlm(), teacher=few)
    stored = collate([labelled(records()[0], reasoner(traces=1))], SCALE, labeller="teacher")
    with pytest.raises(ValueError, match="labels are stored and a teacher is given too"):
        one_step(student(vlm(), teacher=reasoner()), stored)


def test_a_teacher_that_says_nothing():
    annotated = collate(records("train"), SCALE, labeller="teacher")
    with pytest.raises(ValueError, match=r"a batch \(train-00000\.c0, \.\.\.\) has nothing to learn: label the split"):
        one_step(student(vlm()), annotated)
    mixed = {"kl": Term(ForwardKL()), "near": Term(InterpolatedCrossEntropy())}
    with pytest.raises(ValueError, match=r"no image since the start had a distribution by the teacher: label the split"):
        one_step(student(vlm(), terms=mixed), annotated)


def test_a_resumed_epoch_remembers_its_teacher():
    """The rest of an epoch holds annotated images only: that is no epoch without a teacher."""
    taught, annotated = records("train")
    first, rest = (collate([r], SCALE, labeller="teacher") for r in (labelled(taught, reasoner(traces=1)), annotated))
    terms = {"kl": Term(ForwardKL()), "near": Term(InterpolatedCrossEntropy())}
    stage, resumed, kept = student(vlm(), terms=terms), student(vlm(), terms=terms), {}
    one_step(stage, first)
    stage.on_save_checkpoint(kept)
    resumed.on_load_checkpoint(kept)
    logged, _ = one_step(resumed, rest)
    assert "train/kl" not in logged
