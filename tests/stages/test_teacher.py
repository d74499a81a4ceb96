"""The teacher's updates against a naive reference: one rollout at a time, the plain forward, the equations by hand."""

import copy
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from plain import FAMILIES, build, chat, forward
from ranks import run_both
from safetensors.torch import load_file, save_file

import zr
from zr.data import Batch, RandomPairs, ScoreData, shapes
from zr.losses import (
    K2,
    K3,
    AbsoluteExpectationLoss,
    BatchAdvantage,
    BinCrossEntropy,
    ClippedPolicyGradient,
    GapLoss,
    InterpolatedCrossEntropy,
    LeaveOneOutAdvantage,
    PolicyGradient,
    ScoreReward,
    exact_gradient_loss,
)
from zr.models import Policy, PrefixSampler, ReasoningReward, SamplingRule, VLMBackbone
from zr.scores import ScoreDistribution
from zr.stages import KeepBestModel, PolicyTerm, ReferenceTerm, Teacher, Term

BINS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
CONTROL = ["[PAD]", "[UNK]", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
CONTROL += ["<|image_pad|>", "<|video_pad|>", "<think>"]
FEW = tuple(range(16, 53))  # words left out, so that random weights end some traces and not others
RULE = SamplingRule(temperature=0.8, length=6, suppressed=FEW)
ASKED = {name: name for name in shapes.DIMENSIONS} | {"realism": "realism colour, shape"}
NAMES = list(shapes.DIMENSIONS)
SCORES = {(0, 1): 4.0, (1, 1): 2.5, (2, 3): 1.5, (0, 3): 3.0}  # of image and dimension
LR = 0.002


def pictures():
    generator = torch.Generator().manual_seed(3)
    sizes = ((48, 48), (64, 48), (48, 64))
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def make(pairs=((0, 1, 1), (2, 0, 3)), scores=SCORES):
    """Three images of three sizes; the first stands in both pairs, which ask for two dimensions."""
    table = torch.full((3, 4), torch.nan)
    for place, score in scores.items():
        table[place] = score
    votes = torch.zeros(3, 4, 9)
    for (image, dimension), score in scores.items():
        votes[image, dimension, BINS.index(score)] = 1
    order = [[table[p[side], p[2]] for side in (0, 1)] for p in pairs]
    return Batch(
        images=pictures(),
        prompts=["red ring", "red ring", "blue square, green triangle; yellow ring"],
        keys=["p.a", "p.b", "q.a"],
        prompt_index=torch.tensor([0, 0, 1]),
        scores=table,
        known=~table.isnan(),
        votes=votes,
        teacher=None,
        texts=None,
        pairs=torch.tensor([p[:2] for p in pairs], dtype=torch.long).reshape(-1, 2),
        pair_dimension=torch.tensor([p[2] for p in pairs], dtype=torch.long),
        preference=torch.tensor([float(a > b) if a != b else 0.5 for a, b in order]),
        chosen=torch.zeros(len(pairs), dtype=torch.bool),
    )


def backbone(family="qwen3_vl", kind="full"):
    rubric = shapes.rubric(reasoning=True)
    made = build(family, replace(rubric, wording=replace(rubric.wording, instructions=ASKED)))
    if kind == "lora":
        torch.manual_seed(0)
        targets = ["q_proj", "v_proj", "in_proj_qkv", "gate_proj"]
        made.model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    return made


class Recorded(torch.optim.SGD):
    """Plain SGD that remembers the gradients and the rates of its steps."""

    def step(self, closure=None):
        (group,) = self.param_groups
        gradients = [None if p.grad is None else p.grad.clone() for p in group["params"]]
        self.seen = [*getattr(self, "seen", []), gradients]
        self.rates = [*getattr(self, "rates", []), group["lr"]]
        return super().step(closure)


def reward(made, off_scale=True, **options):
    return ReasoningReward(Policy(made, off_scale=off_scale), **({"rule": RULE} | options))


def gdso(updates=1, **parts):
    """Every part of the objective, each with a weight that is not one."""
    loss = PolicyGradient(length=2.0) if updates == 1 else ClippedPolicyGradient(length=2.0, low=0.01, high=0.02)
    return {
        "terms": {"pointwise": Term(BinCrossEntropy(), weight=0.5), "pairwise": Term(GapLoss(), weight=0.7)},
        "policy": PolicyTerm(reward=ScoreReward(0.9, 1.1), loss=loss, weight=1.3, length_penalty=0.05, forced_penalty=0.1),
        "reference": ReferenceTerm(K3(length=2.0), weight=0.3),
        "label_mass": 0.2,
        "updates": updates,
        "group_size": 3,
        "seed": 4,
        "gradient_clip": None,
        "warmup": 0.0,
        "decay": 0.0,
    } | parts


def stage_of(model, **parts):
    return Teacher(model, optimizer=lambda p: Recorded(p, lr=LR), **parts)


def runner(**options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "limit_val_batches": 0}
    return L.Trainer(**(quiet | settings | options))


class Given:
    """A loader of these batches."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def learn(stage, *batches, **options):
    trainer = runner(**options)
    trainer.fit(stage, train_dataloaders=Given(*(batches or [make()])), val_dataloaders=Given(make()))
    return trainer


def with_reference(stage, seed=5):
    """As if an outer iteration were under way: the reference is not what is trained now."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: p for name, p in stage.policy.named_parameters() if p.requires_grad}
    stage.reference_weights = {
        name: p.detach() + 0.02 * torch.randn(p.shape, generator=generator) for name, p in trained.items()
    }
    stage.batches += 1
    return stage


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


class Naive:
    """Algorithm 1's update of one sampled batch, in loops."""

    def __init__(self, made, batch, rollouts, group=3):
        self.backbone, self.batch, self.rollouts, self.group = made, batch, rollouts, group
        tokenizer = made.processor.tokenizer
        self.end = tokenizer.convert_tokens_to_ids("</think>")
        self.marker = tokenizer.convert_tokens_to_ids(["score"])
        self.labels = tokenizer.convert_tokens_to_ids(list("ABCDEFGHI"))
        self.never = {*tokenizer.convert_tokens_to_ids(CONTROL), *FEW}
        tokens, mask = rollouts.tokens.tolist(), rollouts.mask.tolist()
        self.traces = [[t for t, m in zip(*row, strict=True) if m] for row in zip(tokens, mask, strict=True)]
        self.places = [
            (image, dimension)
            for (a, b), dimension in zip(batch.pairs.tolist(), batch.pair_dimension.tolist(), strict=True)
            for image in (a, b)
            for _ in range(group)
        ]

    def look(self, m):
        """Log-probs of the tokens, log q, the mass of the labels, and the tokens' entropy, of one rollout."""
        (image, dimension), trace = self.places[m], self.traces[m]
        closed = trace if trace[-1] == self.end else [*trace, self.end]
        text = chat(self.batch.prompts[image], ASKED[NAMES[dimension]], thinking=True)
        logits = forward(self.backbone, text, [self.batch.images[image] / 255], [*closed, *self.marker])[2]
        start = len(logits) - len(closed) - len(self.marker)
        kept = [i for i in range(logits.shape[-1]) if i not in self.never]
        logs = (logits[start - 1 : start - 1 + len(trace), kept] / RULE.temperature).log_softmax(-1)
        log_probs = torch.stack([logs[t, kept.index(token)] for t, token in enumerate(trace)])
        entropy = -(logs.exp() * logs).sum(-1).detach()
        return log_probs, logits[-1, self.labels].log_softmax(-1), logits[-1].softmax(-1)[self.labels].sum(), entropy

    def everything(self):
        return [self.look(m) for m in range(len(self.traces))]

    def expected(self, found):
        """mu and s, both by pair, side and number, as nested lists of scalars."""
        bins, g = torch.tensor(BINS), self.group
        mu = [(q.exp() * bins).sum() for _, q, _, _ in found]
        mu = [[mu[(2 * p + j) * g : (2 * p + j + 1) * g] for j in (0, 1)] for p in range(len(self.batch.pairs))]
        s = [
            [float(self.batch.scores[i, d]) for i in pair]
            for pair, d in zip(self.batch.pairs.tolist(), self.batch.pair_dimension.tolist(), strict=True)
        ]
        return mu, s

    def advantages(self, found):
        """Equations (7), (10), (13), the penalties, and (3)."""
        mu, s = self.expected(found)
        g, out, rewards = self.group, [], []
        for p in range(len(mu)):
            for j in (0, 1):
                group = []
                for i in range(g):
                    trace = self.traces[(2 * p + j) * g + i]
                    r_pt = 1 - abs(mu[p][j][i].item() - s[p][j]) / 4
                    gaps = [mu[p][j][i].item() - mu[p][1 - j][k].item() - (s[p][j] - s[p][1 - j]) for k in range(g)]
                    r_pw = 1 - sum(map(abs, gaps)) / g / 4
                    group.append(0.9 * r_pt + 1.1 * r_pw - 0.05 * len(trace) / 6 - 0.1 * (trace[-1] != self.end))
                mean = sum(group) / g
                std = math.sqrt(sum((r - mean) ** 2 for r in group) / (g - 1))
                out += [(r - mean) / (std + 1e-3) for r in group]
                rewards += group
        return out, rewards

    def parts(self, found, advantages, old, reference, clipped):
        """The objective by its parts, each with its weight."""
        mu, s = self.expected(found)
        g, count = self.group, len(found)
        policy = kl = direct = mass = 0.0
        for m, (log_probs, q, on_labels, _) in enumerate(found):
            for t, log_prob in enumerate(log_probs):
                if clipped:
                    ratio = (log_prob - old[m][t]).exp()
                    low, high = ratio * advantages[m], ratio.clamp(0.99, 1.02) * advantages[m]
                    policy = policy - 1.3 * torch.minimum(low, high) / 2 / count  # L = 2
                else:
                    policy = policy - 1.3 * advantages[m] * log_prob / 2 / count
                kl = kl + 0.3 * ((reference[m][t] - log_prob).exp() - 1 + log_prob - reference[m][t]) / 2 / count
            image, dimension = self.places[m]
            direct = direct - 0.5 * q[BINS.index(float(self.batch.scores[image, dimension]))] / count
            mass = mass - 0.2 * on_labels.log() / count
        for p in range(len(mu)):
            for j in (0, 1):
                for i in range(g):
                    for k in range(g):
                        gap = (mu[p][j][i] - mu[p][1 - j][k]) - (s[p][j] - s[p][1 - j])
                        direct = direct + 0.7 * gap.abs() / (2 * g * g * 4) / len(mu)
        return {"policy": policy, "kl": kl, "direct": direct, "label_mass": mass}

    def loss(self, *given, **options):
        return sum(self.parts(*given, **options).values())

    def update(self, updates, reference):
        """Steps of SGD on the backbone; the gradients of each."""
        parameters = {name: p for name, p in self.backbone.named_parameters() if p.requires_grad}
        own = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(reference[f"backbone.{name}"])
            of_reference = [log_probs for log_probs, *_ in self.everything()]
            for name, p in parameters.items():
                p.copy_(own[name])
        gradients, old = [], None
        for _ in range(updates):
            found = self.everything()
            if old is None:
                old = [log_probs.detach() for log_probs, *_ in found]
                advantages, self.rewards = self.advantages(found)
            loss = self.loss(found, advantages, old, of_reference, clipped=updates > 1)
            got = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            gradients.append(dict(zip(parameters, got, strict=True)))
            with torch.no_grad():
                for p, gradient in zip(parameters.values(), got, strict=True):
                    if gradient is not None:
                        p -= LR * gradient
        return gradients


def near(found, expected, share):
    """All parameters together, and each within that share of the whole where its own gradient is small."""
    whole = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values() if g is not None))
    assert whole > 0
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
            continue
        assert (found[name] - gradient).norm() <= share * gradient.norm() + share / 100 * whole, name


CASES = [(f, k, c, 2) for f in FAMILIES for k in ("full", "lora") for c in (False, True)]
CASES += [(f, "full", False, 1) for f in FAMILIES]


@pytest.mark.parametrize(("family", "kind", "checkpointing", "updates"), CASES)
def test_gradient_of_all_terms_is_that_of_a_naive_loop(family, kind, checkpointing, updates):
    made = backbone(family, kind)
    plain = copy.deepcopy(made)
    if checkpointing:
        kind = "activation" if hasattr(made.model, "activation_checkpointing_enable") else "gradient"
        getattr(made.model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    stage = with_reference(stage_of(reward(made), **gdso(updates, micro_batch=5)))
    before = weights(made)
    reference = dict(stage.reference_weights)
    trainer = learn(stage)
    rollouts = stage.sampled.rollouts
    assert 0 < rollouts.forced.sum() < 12
    assert len(rollouts.mask.sum(-1).unique()) > 2
    naive = Naive(plain, make(), rollouts)
    expected = naive.update(updates, reference)
    (optimizer,) = trainer.optimizers
    assert len(optimizer.seen) == updates
    for seen, wanted in zip(optimizer.seen, expected, strict=True):
        near(dict(zip(wanted, seen, strict=True)), wanted, 1e-4)
    moved = {name: p.detach() - before[name] for name, p in made.named_parameters() if p.requires_grad}
    wanted = {name: p.detach() - before[name] for name, p in plain.named_parameters() if p.requires_grad}
    near(moved, wanted, 3e-4)  # of differences of weights, which float32 rounds
    if updates > 1:
        assert 0 < trainer.callback_metrics["train/clipped"] < 1
    torch.testing.assert_close(stage.sampled.credit.reward, torch.tensor(naive.rewards), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_split_into_micro_batches_does_not_matter(family):
    seen = []
    for size in (None, 4, 2, 1):
        stage = with_reference(stage_of(reward(backbone(family)), **gdso(2, micro_batch=size)))
        learned = learn(stage).optimizers[0].seen
        names = list(weights(stage.policy.backbone))
        seen.append([dict(zip(names, step, strict=True)) for step in learned])
    for other in seen[1:]:
        for step, whole in zip(other, seen[0], strict=True):
            near(step, whole, 1e-5)


def shared(devices, strategy, rank, root):
    """Both kinds of update, in one process or in one of two, each with a pair of its own."""
    found = {}
    for kind, updates in (("full", 1), ("lora", 2)):
        policy = PolicyTerm(advantage=BatchAdvantage(), loss=ClippedPolicyGradient(length=2.0, low=0.01, high=0.02))
        parts = {"policy": policy, "micro_batch": 2, "part_norms_every": 1}
        stage = with_reference(stage_of(reward(backbone(kind=kind)), **gdso(updates, **parts)))
        batch = make() if devices == 1 else make().select([rank])
        places = {"devices": devices, "default_root_dir": root} | ({"strategy": strategy} if devices > 1 else {})
        trainer = learn(stage, batch, **places)
        names = list(weights(stage.policy.backbone))
        for number, step in enumerate(trainer.optimizers[0].seen):
            found |= {f"{kind} {number} {name}": g for name, g in zip(names, step, strict=True) if g is not None}
        found |= {f"{kind} after {name}": p for name, p in weights(stage.policy.backbone).items()}
        logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        found |= {f"{kind} {name}": value.float() for name, value in logged.items()}
        found[f"{kind} tokens"] = stage.sampled.rollouts.tokens
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two real processes found, by the strategy."""
    root = tmp_path_factory.mktemp("two")
    run_both(__file__, str(root))
    return {strategy: [load_file(root / f"{strategy}.{rank}") for rank in range(2)] for strategy in STRATEGIES}


STRATEGIES = ("ddp", "ddp_find_unused_parameters_true")


@pytest.mark.xdist_group("teacher")  # one pair of processes
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_make_the_update_of_one(two, strategy, tmp_path):
    alone, both = shared(1, None, 0, tmp_path), two[strategy]
    assert len(alone) > 200
    for rank, found in enumerate(both):
        assert found.keys() == alone.keys()
        for kind in ("full", "lora"):
            mine = alone[f"{kind} tokens"][6 * rank : 6 * rank + 6]
            width = found[f"{kind} tokens"].shape[1]
            assert torch.equal(found[f"{kind} tokens"], mine[:, :width])
        for name, value in alone.items():
            if "tokens" not in name:
                scale = 1.0 if "train/" in name else max(value.abs().max().item(), 1e-2)
                torch.testing.assert_close(found[name], value, atol=1e-5 * scale, rtol=1e-5, msg=f"{rank} {name}")
    for name, value in both[0].items():
        assert "tokens" in name or torch.equal(value, both[1][name]), name


MEANS = {"near": Term(InterpolatedCrossEntropy()), "gap": Term(GapLoss())}  # annotators' means lie between the bins


def long_run(root, folder, *callbacks, ckpt_path=None, family="qwen3_vl"):
    """Two epochs of three batches; outer iterations of four; two updates a batch."""
    stage = Teacher(
        reward(backbone(family)),
        **gdso(2, terms=MEANS, micro_batch=3, reference=ReferenceTerm(K2(), weight=0.5, refresh=4), warmup=0.1, decay=0.5),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
    )
    data = ScoreData(folder, shapes.rubric(), batch_size=2, pairs=RandomPairs(2), pairs_per_batch=2)
    keep = ModelCheckpoint(root, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = runner(max_epochs=2, callbacks=[keep, *callbacks], enable_checkpointing=True, default_root_dir=root)
    trainer.fit(stage, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return stage, trainer


class Killed(L.Callback):
    """Ends the process, without goodbye, in the middle of a step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 11:
            os.kill(os.getpid(), signal.SIGKILL)


def resuming(test):
    # Resuming goes on in the folder of the run, which Lightning takes for a mistake.
    test = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")(test)
    # Lightning would rather keep the weights before the step, which could not be resumed.
    return pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")(test)


def same_run(folder, path, root, whole):
    stage, trainer = whole
    assert trainer.global_step == 12
    again, resumed = long_run(root, folder, ckpt_path=path)
    assert resumed.global_step == 12
    assert int(again.batches) == int(stage.batches) == 6
    for name, value in stage.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for name, value in stage.reference_weights.items():
        assert torch.equal(value, again.reference_weights[name]), name
    assert not torch.equal(value, dict(stage.policy.named_parameters())[name])


@resuming
def test_resumed_in_the_middle_of_an_outer_iteration(folder, tmp_path):
    whole = long_run(tmp_path, folder)
    assert len(list(tmp_path.glob("*.ckpt"))) == 6
    same_run(folder, tmp_path / "step=10.ckpt", tmp_path, whole)


@resuming
@pytest.mark.slow
def test_killed_and_resumed(folder, tmp_path):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, __file__, str(tmp_path / "killed"), str(folder), "kill"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (newest,) = (file for file in (tmp_path / "killed").glob("*.ckpt") if file.stem == "step=10")
    assert not list((tmp_path / "killed").glob("step=12*"))
    same_run(folder, newest, tmp_path / "killed", long_run(tmp_path / "whole", folder))


def test_exact_gradient_by_its_parts():
    """Of the reward's expectation: both halves, as PolicyTerm says they are put together."""
    made = backbone()
    plain = copy.deepcopy(made)
    parts = {
        "terms": {"near": Term(AbsoluteExpectationLoss(), weight=0.9), "gap": Term(GapLoss(), weight=0.6)},
        "policy": PolicyTerm(ScoreReward(0.9, 2 * 0.6), LeaveOneOutAdvantage(), PolicyGradient()),
        "reference": None,
        "label_mass": 0.0,
    }
    stage = stage_of(reward(made), **gdso(**parts))
    (optimizer,) = learn(stage).optimizers
    naive = Naive(plain, make(), stage.sampled.rollouts)
    found = naive.everything()
    mask = stage.sampled.rollouts.mask.reshape(2, 2, 3, -1)
    log_probs = torch.stack([torch.nn.functional.pad(p, (0, mask.shape[-1] - len(p))) for p, *_ in found]).reshape(mask.shape)
    scores = ScoreDistribution(torch.stack([q for _, q, *_ in found]).reshape(2, 2, 3, -1), BINS)
    wanted = exact_gradient_loss(scores, torch.tensor([[4.0, 2.5], [1.5, 3.0]]), log_probs, mask, 0.9, 0.6).mean()
    parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    gradients = dict(zip(parameters, torch.autograd.grad(wanted, list(parameters.values()), allow_unused=True), strict=True))
    near(dict(zip(parameters, optimizer.seen[0], strict=True)), gradients, 1e-4)


def test_what_is_logged():
    made = backbone()
    plain, reference = copy.deepcopy(made), copy.deepcopy(made)
    stage = with_reference(stage_of(reward(made), **gdso()))
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(stage.reference_weights[f"backbone.{name}"])
    logged = learn(stage).callback_metrics
    rollouts = stage.sampled.rollouts
    naive = Naive(plain, make(), rollouts)
    with torch.no_grad():
        found, far = naive.everything(), Naive(reference, make(), rollouts).everything()
    advantages, rewards = naive.advantages(found)
    mu, s = naive.expected(found)
    rows = []
    for m, (log_probs, q, mass, entropy) in enumerate(found):
        p, j, i = m // 6, m // 3 % 2, m % 3
        group = rewards[m - i : m - i + 3]
        middle = [sum(mu[p][side]) / 3 for side in (0, 1)]
        rows.append(
            {
                "length": len(log_probs),
                "forced": float(naive.traces[m][-1] != naive.end),
                "error": abs(mu[p][j][i] - s[p][j]),
                "gap_error": abs(middle[0] - middle[1] - s[p][0] + s[p][1]),
                "score_entropy": -(q.exp() * q).sum(),
                "entropy": entropy.mean(),
                "reward": rewards[m],
                "advantage": abs(advantages[m]),
                "spread": math.sqrt(sum((r - sum(group) / 3) ** 2 for r in group) / 2),
                "equal_groups": 0.0,
                "kl": (log_probs - far[m][0]).sum(),
                "off_scale": 1 - mass,
            }
        )
    for name in rows[0]:
        values = [float(row[name]) for row in rows]
        for key, part in ((name, values), (f"{name}/realism", values[:6]), (f"{name}/plausibility", values[6:])):
            assert float(logged[f"train/{key}"]) == pytest.approx(sum(part) / len(part), rel=1e-3, abs=1e-5), key
        assert f"train/{name}/alignment" not in logged
    assert float(logged["train/pointwise"]) == pytest.approx(
        -sum(float(q[BINS.index(s[m // 6][m // 3 % 2])]) for m, (_, q, *_) in enumerate(found)) / 12, rel=1e-4
    )
    gaps = [abs(float(a - b) - x + y) / 4 for sides, (x, y) in zip(mu, s, strict=True) for a in sides[0] for b in sides[1]]
    assert float(logged["train/pairwise"]) == pytest.approx(sum(gaps) / 18, rel=1e-4)
    assert float(logged["train/gradient_norm"]) > 0
    assert len([name for name in logged if name.count("/") == 1]) == len(rows[0]) + 3


@pytest.mark.parametrize("updates", [1, 2])
def test_the_gradient_of_each_part(updates):
    """A backward pass of its own for each part of the naive objective; what is learned stays the same."""
    made = backbone()
    plain, reference = copy.deepcopy(made), copy.deepcopy(made)
    stage = with_reference(stage_of(reward(made), **gdso(updates, micro_batch=5, part_norms_every=1)))
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(stage.reference_weights[f"backbone.{name}"])
    logged = learn(stage).callback_metrics
    naive = Naive(plain, make(), stage.sampled.rollouts)
    with torch.no_grad():
        far = [log_probs for log_probs, *_ in Naive(reference, make(), stage.sampled.rollouts).everything()]
    found = naive.everything()
    old = [log_probs.detach() for log_probs, *_ in found]
    parts = naive.parts(found, naive.advantages(found)[0], old, far, clipped=updates > 1)
    parameters = [p for p in plain.parameters() if p.requires_grad]
    for name, part in parts.items():
        gradients = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
        assert norm > 0
        assert float(logged[f"train/gradient_norm_{name}"]) == pytest.approx(norm, rel=1e-4), name
    other = with_reference(stage_of(reward(backbone()), **gdso(updates, micro_batch=5)))
    learn(other)
    for name, p in stage.state_dict().items():
        assert torch.equal(p, other.state_dict()[name]), name


def test_parts_that_are_not_there_have_no_norm():
    stage = stage_of(reward(backbone()), **gdso(terms={}, reference=None, label_mass=0.0, part_norms_every=2))
    logged = learn(stage).callback_metrics
    assert {name for name in logged if "gradient_norm" in name} == {"train/gradient_norm", "train/gradient_norm_policy"}
    assert float(logged["train/gradient_norm"]) == pytest.approx(float(logged["train/gradient_norm_policy"]), rel=1e-6)
    assert int(stage.batches) == 1  # not its turn
    assert not [name for name in learn(stage).callback_metrics if "gradient_norm_" in name]


class Watched(PrefixSampler):
    def __call__(self, *args, **kwargs):
        written = super().__call__(*args, **kwargs)
        self.traces = written.traces
        return written


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_coupling_by_whole_sequences(family):
    made, batch, seen = backbone(family), make(), {}
    policy = Policy(made, sampler=Watched())
    stage = stage_of(ReasoningReward(policy, rule=RULE), **gdso(label_mass=0.0))
    stage.coupling.update = lambda **given: seen.update(given)
    stage.eval().validation_step(batch, 1)
    assert not seen
    stage.validation_step(batch, 0)
    tokenizer = made.processor.tokenizer
    labels, tail = (tokenizer.convert_tokens_to_ids(words) for words in (list("ABCDEFGHI"), ["</think>", "score"]))
    traces = policy.sampler.traces
    for n in range(3):
        for d, name in enumerate(NAMES):
            place, other = 4 * n + d, 4 * ((n + 1) % 3) + d  # half a batch of three further: the next image
            used = {"own": traces[2 * place], "again": traces[2 * place + 1], "removed": [], "other": traces[2 * other]}
            text = chat(batch.prompts[n], ASKED[name], thinking=True)
            for kind, trace in used.items():
                extra = [*(t for t in trace if t != tail[0]), *tail]
                logits = forward(made, text, [batch.images[n] / 255], extra)[2][-1, labels].log_softmax(-1)
                torch.testing.assert_close(seen[kind].logits[place], logits, atol=1e-5, rtol=0)
    assert traces[0] != traces[1]


def test_validation_and_the_model_that_a_run_leaves(folder, trainer, tmp_path):
    stage = stage_of(reward(backbone(), traces=2, seed=3), **gdso(terms=MEANS))
    data = ScoreData(folder, shapes.rubric(), batch_size=2, pairs=RandomPairs(1), pairs_per_batch=2)
    run = trainer(KeepBestModel(), max_epochs=1, enable_checkpointing=False)
    run.fit(stage, datamodule=data)
    coupling = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/coupling_")}
    assert {name.removeprefix("val/coupling_") for name in coupling} == {
        f"{what}_{kind}" for what in ("removed", "other", "floor") for kind in ("kl", "gap")
    }
    assert all(value > 0 for value in coupling.values())
    found = zr.load(tmp_path / "run")
    assert isinstance(found, ReasoningReward)
    assert (found.rule, found.traces, found.seed) == (RULE, 2, 3)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        scores = found(images=batch.images, prompts=batch.prompts)
        torch.testing.assert_close(scores.logits, stage.eval()(batch).logits, atol=1e-6, rtol=0)
    assert scores.batch_shape == (6, 4)


def test_every_rollout_forced():
    end = backbone().prompts.end_id
    rule = replace(RULE, suppressed=(*FEW, end), length=3)
    stage = stage_of(reward(backbone(), rule=rule), **gdso())
    before = weights(stage.policy)
    logged = learn(stage).callback_metrics
    assert logged["train/forced"] == 1
    assert logged["train/length"] == 3
    assert any(not torch.equal(p, before[name]) for name, p in weights(stage.policy).items())
    assert all(bool(p.isfinite().all()) for p in stage.policy.parameters())


def test_one_image_on_both_sides():
    """Two groups of the same image, with traces of their own; its gap to itself is 0."""
    stage = stage_of(reward(backbone()), **gdso())
    logged = learn(stage, make(pairs=((0, 0, 1),))).callback_metrics
    tokens, mu = stage.sampled.rollouts.tokens, ScoreDistribution(stage.sampled.rollouts.logits, BINS).mean
    assert not torch.equal(tokens[:3], tokens[3:])
    gaps = [abs(float(a - b)) / 4 for a in mu[:3] for b in mu[3:]]
    assert float(logged["train/pairwise"]) == pytest.approx(sum(gaps) / 9, rel=1e-5)


def test_batches_that_teach_nothing():
    stage = stage_of(reward(backbone()), **gdso())
    before = weights(stage.policy)
    unscored = make(pairs=((0, 1, 1), (1, 2, 2)))
    without = make(pairs=())
    unpaired = replace(make(), preference=None)
    for batch, message in (
        (unscored, r"the pair p\.b, q\.a has no two scores in aesthetics: a teacher learns from scores"),
        (without, r"a batch \(p\.a, \.\.\.\) has no pair to compare: give the data module a pair policy"),
        (unpaired, "has no pair to compare"),
    ):
        with pytest.raises(ValueError, match=message):
            learn(stage, batch)
    assert all(torch.equal(p, before[name]) for name, p in weights(stage.policy).items())


@pytest.mark.parametrize("where", ["gradient", "logits"])
def test_nan_never_reaches_the_weights(where):
    made = backbone()
    stage = stage_of(reward(made), **gdso())
    head = made.model.get_input_embeddings().weight
    layer = made.model.model.language_model.layers[1].mlp.down_proj
    before = {name: p.clone() for name, p in stage.state_dict().items()}
    if where == "gradient":
        hook = head.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), torch.nan))
        message = r"the gradient of the batch p\.a, \.\.\. is not finite \(nan\): the weights are as they were"
    else:
        hook = layer.register_forward_hook(lambda m, x, y: y * torch.nan)
        message = "have NaN or infinite logits"
    with pytest.raises(ValueError, match=message):
        learn(stage)
    for name, p in stage.state_dict().items():
        assert torch.equal(p, before[name]), name
    hook.remove()
    learn(stage)  # and nothing is left of it
    fresh = stage_of(reward(backbone()), **gdso())
    learn(fresh)
    for name, p in stage.state_dict().items():
        assert torch.equal(p, fresh.state_dict()[name]), name


def test_a_step_broken_off_leaves_no_gradient(monkeypatch):
    """NaN in the last of three parts, when the others have their gradients already."""
    stage, fresh = (stage_of(reward(backbone()), **gdso(micro_batch=4)) for _ in range(2))
    evaluate, calls = stage.policy.evaluate, []

    def third(**given):
        calls.append(given)
        if len(calls) == 3:
            raise ValueError("the third part")
        return evaluate(**given)

    monkeypatch.setattr(stage.policy, "evaluate", third)
    with pytest.raises(ValueError, match="the third part"):
        learn(stage)
    learn(stage)
    learn(fresh)
    for name, p in stage.state_dict().items():
        assert torch.equal(p, fresh.state_dict()[name]), name


def test_frozen_modules_keep_their_weights():
    made = backbone()
    stage = stage_of(reward(made), **gdso(frozen=["model.visual"]))
    before = {name: p.clone() for name, p in made.named_parameters()}
    trainer = learn(stage)
    moved = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert not any("visual" in name for name in moved)
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == sum("visual" not in name for name in before)


def test_an_adapter_of_another_model(tmp_path):
    made, other = backbone(), build("qwen3_vl", seed=1)
    made.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    other.model.add_adapter(config)
    other.model.save_pretrained(tmp_path / "adapter")
    weights_file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = {name: torch.cat([p, p], dim=-1) for name, p in load_file(weights_file).items()}
    save_file(state, weights_file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|mismatched"):
        VLMBackbone.from_pretrained(tmp_path / "model", made.rubric, adapter=tmp_path / "adapter")


def test_updates_and_schedule_are_counted():
    stage = stage_of(reward(backbone()), **gdso(2, decay=1.0))
    trainer = learn(stage, max_epochs=-1, max_steps=6)
    assert (trainer.global_step, int(stage.batches)) == (6, 3)
    assert trainer.optimizers[0].rates == pytest.approx([LR * (1 - n / 6) for n in range(6)])
    trainer = learn(stage_of(reward(backbone()), **gdso(2, decay=1.0)), max_epochs=2)
    assert trainer.optimizers[0].rates == pytest.approx([LR * (1 - n / 4) for n in range(4)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2, got 1"),
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"coupling": -1}, "coupling must be at least 0, got -1"),
        ({"part_norms_every": -1}, "part_norms_every must be at least 0, got -1"),
        ({"label_mass": -0.1}, "label_mass must be at least 0, got -0.1"),
        ({"terms": {}, "policy": None}, "there is nothing to learn: give a policy term, or a direct loss"),
        ({"terms": {"gap": Term(GapLoss(), weight=0)}, "policy": PolicyTerm(weight=0)}, "there is nothing to learn"),
        (
            {"updates": 2, "policy": PolicyTerm()},
            "PolicyGradient is for one update of a sample, not for 2: use ClippedPolicyGradient",
        ),
        ({"frozen": ["visual"]}, r"frozen names 'visual', the model has no such module, but model, model\.visual"),
    ],
)
def test_options_that_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        stage_of(reward(backbone()), **gdso(**wrong))


def test_models_that_are_refused():
    with pytest.raises(ValueError, match="label_mass needs the probability outside the labels: build the policy with off_s"):
        stage_of(reward(backbone(), off_scale=False), **gdso())
    with pytest.raises(ValueError, match="greedy traces have no log-probs"):
        stage_of(reward(backbone(), rule=replace(RULE, temperature=0.0)), **gdso())
    made = backbone()
    made.model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    with pytest.raises(ValueError, match=r"set it \(lora_dropout\) to 0"):
        stage_of(reward(made), **gdso())
    stage = stage_of(reward(backbone()), **gdso())
    with pytest.raises(ValueError, match="gradients of 16-mixed are scaled"):
        learn(stage, plugins=[MixedPrecision("16-mixed", "cpu")])


if __name__ == "__main__":
    root = Path(sys.argv[1])
    if sys.argv[-1] == "kill":
        long_run(root, sys.argv[2], Killed())
    for strategy in STRATEGIES:
        saved = shared(2, strategy, int(sys.argv[2]), root)
        save_file({name: value.contiguous() for name, value in saved.items()}, root / f"{strategy}.{sys.argv[2]}")
