"""On-policy distillation against a naive reference: one rollout at a time, the plain forward, equations (18), (19) by hand."""

import copy
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from plain import FAMILIES, build, chat, forward
from safetensors.torch import load_file, save_file

import zr
from zr.data import Batch, ScoreData, collate, shapes
from zr.losses import InterpolatedCrossEntropy, ReverseKL
from zr.models import Policy, ReasoningReward, SamplingRule, tiny_qwen3_vl
from zr.stages import KeepBestModel, OnPolicy, Term

BINS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
CONTROL = ["[PAD]", "[UNK]", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
CONTROL += ["<|image_pad|>", "<|video_pad|>", "<think>"]
FEW = tuple(range(16, 53))  # words left out, so that random weights end some traces and not others
RULE = SamplingRule(temperature=0.8, length=6, suppressed=FEW)
ASKED = {name: name for name in shapes.DIMENSIONS} | {"realism": "realism colour, shape"}
NAMES = list(shapes.DIMENSIONS)
LR = 0.002


def make(part=slice(None)) -> Batch:
    """Three images of three sizes, of which the first two are annotated."""
    generator = torch.Generator().manual_seed(3)
    sizes = ((48, 48), (64, 48), (48, 64))
    batch = collate(
        [*shapes.records("train", count=1, candidates=2), *shapes.records("unlabelled", 1, 1)], shapes.rubric().scale
    )
    pictures = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    return replace(
        batch,
        images=pictures[part],
        prompts=batch.prompts[part],
        keys=batch.keys[part],
        scores=batch.scores[part],
        known=batch.known[part],
        votes=batch.votes[part],
    )


def backbone(family="qwen3_vl", seed=0, **changed):
    rubric = shapes.rubric(reasoning=True)
    return build(family, replace(rubric, wording=replace(rubric.wording, instructions=ASKED, **changed)), seed=seed)


def reward(made, rule=RULE):
    return ReasoningReward(Policy(made), rule=rule)


class Recorded(torch.optim.SGD):
    """Plain SGD that remembers the gradients of its steps."""

    def step(self, closure=None):
        (group,) = self.param_groups
        self.seen = [*getattr(self, "seen", []), [None if p.grad is None else p.grad.clone() for p in group["params"]]]
        return super().step(closure)


def terms():
    return {"score": Term(ReverseKL(), weight=0.7), "near": Term(InterpolatedCrossEntropy(), weight=0.3)}


def stage_of(made, teacher, **parts):
    given = {"terms": terms(), "gradient_clip": None, "warmup": 0.0, "decay": 0.0, "seed": 4} | parts
    return OnPolicy(reward(made), teacher=reward(teacher), optimizer=lambda p: Recorded(p, lr=LR), **given)


class Given:
    """A loader of these batches."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def learn(stage, *batches, **options):
    kept = []
    stage._sample = lambda batch, sample=stage._sample: kept.append(sample(batch)) or kept[-1]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "limit_val_batches": 0}
    trainer = L.Trainer(**(quiet | settings | options))
    trainer.fit(stage, train_dataloaders=Given(*(batches or [make()])), val_dataloaders=Given(make()))
    stage.kept = kept
    return trainer


class Naive:
    """The loss of one sampled batch, in loops."""

    def __init__(self, student, teacher, batch, rollouts):
        self.student, self.teacher, self.batch = student, teacher, batch
        tokenizer = student.processor.tokenizer
        self.end = tokenizer.convert_tokens_to_ids("</think>")
        self.marker = tokenizer.convert_tokens_to_ids(["score"])
        self.labels = tokenizer.convert_tokens_to_ids(list("ABCDEFGHI"))
        never = {*tokenizer.convert_tokens_to_ids(CONTROL), *FEW}
        self.kept = [i for i in range(len(tokenizer)) if i not in never]
        tokens, mask = rollouts.tokens.tolist(), rollouts.mask.tolist()
        self.traces = [[t for t, m in zip(*row, strict=True) if m] for row in zip(tokens, mask, strict=True)]
        self.places = [(image, dimension) for image in range(len(batch.images)) for dimension in range(4)]

    def look(self, made, m):
        """Log-probs of the tokens, log q, and the tokens' entropy, of one rollout."""
        (image, dimension), trace = self.places[m], self.traces[m]
        closed = trace if trace[-1] == self.end else [*trace, self.end]
        text = chat(self.batch.prompts[image], ASKED[NAMES[dimension]], thinking=True)
        logits = forward(made, text, [self.batch.images[image] / 255], [*closed, *self.marker])[2]
        start = len(logits) - len(closed) - len(self.marker)
        logs = (logits[start - 1 : start - 1 + len(trace), self.kept] / RULE.temperature).log_softmax(-1)
        log_probs = torch.stack([logs[t, self.kept.index(token)] for t, token in enumerate(trace)])
        return log_probs, logits[-1, self.labels].log_softmax(-1), -(logs.exp() * logs).sum(-1).mean().detach()

    def loss(self):
        policy, score, near = 0.0, [], []
        self.rows = []
        for m, (image, dimension) in enumerate(self.places):
            log_probs, q, entropy = self.look(self.student, m)
            with torch.no_grad():
                wanted, p, _ = self.look(self.teacher, m)
            advantage = [float(w) - float(o) for w, o in zip(wanted, log_probs.detach(), strict=True)]
            one = sum(a * log_prob for a, log_prob in zip(advantage, log_probs, strict=True)) / len(log_probs)
            policy = policy - one / len(self.places)
            score.append((q.exp() * (q - p)).sum())
            annotated = float(self.batch.scores[image, dimension])
            if not math.isnan(annotated):
                low = min(math.floor((annotated - 1) * 2), 7)
                share = (annotated - 1) * 2 - low
                near.append(-(1 - share) * q[low] - share * q[low + 1])
            self.rows.append(
                {"reverse_kl": -sum(advantage) / len(advantage), "length": len(advantage), "entropy": float(entropy)}
            )
            self.rows[-1]["forced"] = float(self.traces[m][-1] != self.end)
        self.means = {"score": sum(score) / len(score), "near": sum(near) / len(near)}
        return policy + 0.7 * self.means["score"] + 0.3 * self.means["near"]


def near(found, expected, share):
    """All parameters together, and each within that share of the whole where its own gradient is small."""
    whole = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values() if g is not None))
    assert whole > 0
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
            continue
        assert (found[name] - gradient).norm() <= share * gradient.norm() + share / 100 * whole, name


def gradients(stage, trainer, step=0):
    return dict(zip([n for n, p in stage.named_parameters()], trainer.optimizers[0].seen[step], strict=True))


@pytest.mark.parametrize(("family", "checkpointing"), [(f, c) for f in FAMILIES for c in (False, True)])
def test_the_gradient_is_that_of_a_naive_loop(family, checkpointing):
    made, teacher = backbone(family), backbone(family, seed=1)
    plain, judge = copy.deepcopy(made), copy.deepcopy(teacher)
    if checkpointing:
        kind = "activation" if hasattr(made.model, "activation_checkpointing_enable") else "gradient"
        getattr(made.model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    stage = stage_of(made, teacher, micro_batch=5)
    trainer = learn(stage)
    (rollouts,) = stage.kept
    assert 0 < rollouts.forced.sum() < 12
    assert len(rollouts.mask.sum(-1).unique()) > 2
    naive = Naive(plain, judge, make(), rollouts)
    parameters = dict(plain.named_parameters())
    wanted = torch.autograd.grad(naive.loss(), list(parameters.values()), allow_unused=True)
    found = {name.split("backbone.", 1)[1]: g for name, g in gradients(stage, trainer).items()}
    near(found, dict(zip(parameters, wanted, strict=True)), 1e-4)
    logged = trainer.callback_metrics
    for name in naive.rows[0]:
        values = [row[name] for row in naive.rows]
        for key, part in ((name, values), (f"{name}/realism", values[1::4])):
            assert float(logged[f"train/{key}"]) == pytest.approx(sum(part) / len(part), rel=1e-3, abs=1e-5), key
    for name, value in naive.means.items():
        assert float(logged[f"train/{name}"]) == pytest.approx(float(value.detach()), rel=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_split_into_micro_batches_does_not_matter(family):
    seen = []
    for size in (None, 5, 1):
        stage = stage_of(backbone(family), backbone(family, seed=1), micro_batch=size)
        seen.append(gradients(stage, learn(stage)))
    for other in seen[1:]:
        near(other, seen[0], 1e-5)


def test_the_teacher_stays_as_it_is():
    made, teacher = backbone(), backbone(seed=1)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    stage = stage_of(made, teacher)
    learn(stage)
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert len(list(stage.parameters())) == len(list(made.parameters()))
    assert set(stage.hparams) == {"micro_batch", "gradient_clip", "frozen", "warmup", "decay", "seed"}


def test_a_student_comes_nearer_to_its_teacher():
    made, teacher = backbone(), backbone(seed=1)
    stage = OnPolicy(
        reward(made),
        teacher=reward(teacher),
        terms={"score": Term(ReverseKL())},
        optimizer=lambda p: torch.optim.Adam(p, lr=3e-3),
        decay=0.0,
    )
    distance = []
    stage.log_each = lambda each, dimension: distance.append(float(each["reverse_kl"].mean()))
    learn(stage, *[make()] * 40)
    assert int(stage.batches) == 40
    assert not torch.equal(stage.kept[0].tokens[:, 0], stage.kept[1].tokens[:, 0])  # each batch of the run draws its own
    assert sum(distance[-10:]) < 0.6 * sum(distance[:10])  # ten batches: of one, a few traces decide


def shared(devices, rank, root):
    stage = stage_of(backbone(), backbone(seed=1), micro_batch=2)
    batch = make() if devices == 1 else make(slice(2 * rank, 2 * rank + 2))  # two images, and one
    places = {"devices": devices, "default_root_dir": root} | ({"strategy": "ddp"} if devices > 1 else {})
    trainer = learn(stage, batch, **places)
    found = {name: g for name, g in gradients(stage, trainer).items() if g is not None}
    return found | {name: value.float() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}


def test_two_processes_make_the_update_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    processes = []
    for rank in range(2):
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment = os.environ | place | {"PYTHONPATH": path}
        command = [sys.executable, __file__, str(tmp_path), str(rank)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    alone = shared(1, 0, tmp_path)
    for rank in range(2):
        found = load_file(tmp_path / f"found.{rank}")
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            scale = 1.0 if "train/" in name else max(value.abs().max().item(), 1e-2)
            torch.testing.assert_close(found[name], value, atol=1e-5 * scale, rtol=1e-5, msg=f"{rank} {name}")


def test_a_whole_run_and_what_it_leaves(folder, trainer, tmp_path):
    stage = stage_of(backbone(), backbone(seed=1))
    data = ScoreData(folder, shapes.rubric(), batch_size=2)
    run = trainer(KeepBestModel(), max_epochs=1, limit_train_batches=1)
    run.fit(stage, datamodule=data)
    assert 0 <= float(run.callback_metrics["val/hpa"]) <= 1
    found = zr.load(tmp_path / "run")
    assert isinstance(found, ReasoningReward)
    assert found.rule == RULE
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert list(saved) == list(stage.state_dict())
    again = OnPolicy.load_from_checkpoint(path, weights_only=True, model=reward(backbone(seed=2)), terms=terms())
    assert int(again.batches) == 1
    with pytest.raises(ValueError, match="on-policy distillation needs a teacher to train"):
        learn(again)


def test_what_is_refused():
    made = backbone()
    other = tiny_qwen3_vl(made.rubric, lambda: ["others", *shapes.vocabulary()], hidden_size=32, vision_size=16, layers=2)
    with pytest.raises(ValueError, match=r"one vocabulary: the student has \d+ tokens, the teacher \d+, and '.*' is number"):
        stage_of(made, other)
    with pytest.raises(ValueError, match="student and teacher end a trace with the tokens"):
        stage_of(made, backbone(seed=1, end="<|im_end|>"))
    with pytest.raises(ValueError, match="student and teacher share weights"):
        stage_of(made, made)
    direct = zr.models.compose(build("qwen3_vl", seed=1), zr.models.ScoreTokenHead)
    with pytest.raises(ValueError, match="the teacher of traces must reason, got RewardModel"):
        OnPolicy(reward(made), teacher=direct)
    with pytest.raises(ValueError, match="greedy traces have no log-probs to learn from"):
        OnPolicy(reward(made, replace(RULE, temperature=0.0)))
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        OnPolicy(reward(made), micro_batch=0)
    with pytest.raises(ValueError, match="frozen names 'visual', the model has no such module"):
        OnPolicy(reward(made), frozen=["visual"])
    with pytest.raises(ValueError, match="gradients of 16-mixed are scaled"):
        learn(stage_of(made, backbone(seed=1)), plugins=[MixedPrecision("16-mixed", "cpu")])


def test_nan_never_reaches_the_weights():
    made = backbone()
    stage = stage_of(made, backbone(seed=1))
    before = {name: p.clone() for name, p in stage.state_dict().items()}
    hook = made.model.get_input_embeddings().weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(ValueError, match=r"the gradient of the batch train-00000\.c0, \.\.\. is not finite \(nan\): the"):
        learn(stage)
    hook.remove()
    assert all(torch.equal(p, before[name]) for name, p in stage.state_dict().items())


if __name__ == "__main__":
    root = Path(sys.argv[1])
    found = shared(2, int(sys.argv[2]), root)
    save_file({name: value.contiguous() for name, value in found.items()}, root / f"found.{sys.argv[2]}")
