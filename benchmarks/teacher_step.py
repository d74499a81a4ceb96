"""What a training step of a reasoning teacher costs: the shared prefix, whole sequences, and TRL's GRPOTrainer.

    python benchmarks/teacher_step.py                               CPU, one thread, float32, a model of 123 M parameters
    python benchmarks/teacher_step.py --size tiny --rounds 1        seconds, to see that it runs
    python benchmarks/teacher_step.py --family qwen3_5 --checkpointing
    python benchmarks/teacher_step.py --device cuda --dtype bfloat16 --size 8b --optimizer SGD --tokens 512

A step is: G traces for both images of each pair, rewards, gradient, clipping, the optimiser. The ways:

- ours: ``zr.stages.Teacher`` in a Lightning Trainer, GDSO with both direct losses, each image encoded once;
- dense: the same stage, where nothing is shared: a row per rollout is prefilled, stepped and evaluated as a whole sequence;
- trl: ``GRPOTrainer`` (extra ``bench``), as many sequences, a reward that costs nothing; it knows no score distribution.

All have the same weights, images of 256 x 256, prompts of the same ids, one update per batch, no reference, the same optimiser
and clipping, and traces that the length limit ends (the end is suppressed), so that they sample equally many tokens, which is
checked. Each way runs in a process of its own, in turn, round after round; its first step is not counted. A ratio is the median
of the rounds' ratios, with the smallest and the largest beside it. Time is that of the process on a CPU, of the clock on a GPU.
Memory is the peak beyond the level after loading; "without states" leaves out gradients and the optimiser's states, which all
have. Parts of a step: sampling (with its prefill), the scores of what was sampled (where a pass of their own reads them),
evaluation with gradient, backward, optimiser. Tokens are positions that pass through the language model, padding included, and
images those that pass through the vision tower.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from scoring import DIMENSIONS, FAMILIES, FILLER, PREFIX, SIDE, SIZES, _high_water, build
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image
from transformers import TrainerCallback

import zr
from zr.data import Batch
from zr.losses import BinCrossEntropy, GapLoss, PolicyGradient
from zr.models import Policy, PrefixSampler, ReasoningReward, SamplingRule, VLMBackbone, Written
from zr.models.prefix import Prefix
from zr.rubric import Rubric
from zr.stages import PolicyTerm, Teacher, Term

PARTS = ("sampling", "scores", "evaluation", "backward", "optimiser", "other")


class Whole(VLMBackbone):
    """Shares nothing: whatever is asked of a prefix runs the whole sequence."""

    def encode(self, images: Any, prompts: Sequence[str]) -> Prefix:
        """The inputs, as they are."""
        return self._read(images, prompts)


class RowByRow(PrefixSampler):
    """Samples as people do without a shared prefix: each rollout is a row from the start, with a cache of its own."""

    def __call__(
        self,
        backbone: VLMBackbone,
        prefix: Any,
        row: Sequence[int],
        openings: Sequence[Sequence[int]],
        rule: SamplingRule,
        forbidden: Tensor,
        seeds: Sequence[int],
    ) -> Written:
        """See :class:`zr.models.Sampler`."""
        rows = backbone._cached(prefix.fork(torch.tensor(row)))
        return super().__call__(backbone, rows, range(len(row)), openings, rule, forbidden, seeds)


class Meter:
    """Counts what a step costs: seconds by part, tokens and images that pass through the model."""

    def __init__(self, model: Any) -> None:
        self.on_gpu = model.device.type == "cuda"
        self.seconds: list[dict[str, float]] = []
        self.tokens: Counter[str] = Counter()
        self.sampled = 0
        self._open: list[str] = []
        self._last = 0.0
        model.model.language_model.register_forward_pre_hook(self._read, with_kwargs=True)
        model.model.visual.register_forward_pre_hook(self._saw, with_kwargs=True)

    def watch(self, owner: Any, name: str, part: str | Callable[[], str]) -> None:
        """Charge the time of a method, less that of methods watched inside it, to a part of the step."""
        method = getattr(owner, name)

        @wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._open:
                return method(*args, **kwargs)
            self._mark()
            self._open.append(part if isinstance(part, str) else part())
            try:
                return method(*args, **kwargs)
            finally:
                self._mark()
                self._open.pop()

        setattr(owner, name, watched)

    def begin(self) -> None:
        """A step begins."""
        self.seconds.append(dict.fromkeys(PARTS, 0.0))
        self.tokens.clear()
        self._open.append("other")
        self._last = self._now()

    def end(self) -> None:
        """A step ends."""
        self._mark()
        self._open.clear()

    def _mark(self) -> None:
        now = self._now()
        self.seconds[-1][self._open[-1]] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def _read(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        size = ids.numel() if embeddings is None else embeddings.shape[0] * embeddings.shape[1]
        self.tokens["with gradient" if torch.is_grad_enabled() else "without gradient"] += size

    def _saw(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens["images"] += len(kwargs["grid_thw"])


@dataclass(frozen=True)
class Job:
    """What all ways are given."""

    arguments: argparse.Namespace
    backbone: VLMBackbone
    batch: Batch
    meter: Meter

    @property
    def rollouts(self) -> int:
        """2PG."""
        return 2 * self.arguments.pairs * self.arguments.group

    @property
    def steps(self) -> int:
        """One that is not counted, and the others."""
        return 1 + self.arguments.steps


def job(arguments: argparse.Namespace) -> Job:
    """A model of random weights that asks for reasoning, and a batch of pairs."""
    words = [*FILLER, *(f"word{i}" for i in range(SIZES[arguments.size].text.get("vocab_size", 151_936) - 128))]
    backbone = build(arguments.family, arguments.size, arguments.device, getattr(torch, arguments.dtype), words)
    asked = backbone.rubric
    wording = replace(asked.wording, template={"enable_thinking": True})
    backbone = backbone.reworded(Rubric(asked.scale, wording))
    backbone.model.requires_grad_(True).train()
    if arguments.checkpointing:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    generator, images = torch.Generator().manual_seed(1), 2 * arguments.pairs
    around = len(backbone.prompts.prefix_ids("", images=1)) + SIDE * SIDE // 1024 - 1
    prompts = [" ".join((FILLER * 9)[i : PREFIX - around + i]) for i in range(arguments.pairs) for _ in range(2)]
    scores = torch.tensor([4.0, 2.0]).repeat(arguments.pairs)[:, None].expand(-1, len(DIMENSIONS))
    pairs = torch.arange(images).reshape(-1, 2)
    batch = Batch(
        images=list(torch.randint(0, 256, (images, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)),
        prompts=prompts,
        keys=[f"record{i // 2}.{i % 2}" for i in range(images)],
        prompt_index=torch.arange(images) // 2,
        scores=scores,
        known=torch.ones_like(scores, dtype=torch.bool),
        votes=torch.zeros(images, len(DIMENSIONS), len(asked.bins)),
        teacher=None,
        texts=None,
        pairs=pairs,
        pair_dimension=torch.arange(len(pairs)) % len(DIMENSIONS),
        preference=torch.ones(len(pairs)),
        chosen=torch.zeros(len(pairs), dtype=torch.bool),
    )
    return Job(arguments, backbone, batch, Meter(backbone.model))


def ours(job: Job) -> Callable[[], None]:
    """The stage as it is."""
    return _stage(job, Policy(job.backbone))


def dense(job: Job) -> Callable[[], None]:
    """The stage over a backbone and a sampler that share nothing."""
    return _stage(job, Policy(Whole(job.backbone.model, job.backbone.processor, job.backbone.rubric), RowByRow()))


def _stage(job: Job, policy: Policy) -> Callable[[], None]:
    arguments, meter = job.arguments, job.meter
    rule = SamplingRule(length=arguments.tokens, suppressed=(policy.backbone.prompts.end_id,))
    stage = Teacher(
        ReasoningReward(policy, rule=rule),
        {"score": Term(BinCrossEntropy(), weight=0.5), "gap": Term(GapLoss(), weight=0.5)},
        PolicyTerm(loss=PolicyGradient(length=arguments.tokens)),
        group_size=arguments.group,
        micro_batch=arguments.micro_batch,
        optimizer=partial(_optimizer, arguments),
        warmup=0.0,
        decay=0.0,
    )
    meter.watch(stage, "_sample", "sampling")
    meter.watch(policy.backbone, "extend", lambda: "evaluation" if torch.is_grad_enabled() else "scores")
    meter.watch(stage, "_update", "evaluation")
    meter.watch(stage, "manual_backward", "backward")
    meter.watch(stage, "step", "optimiser")
    trainer = L.Trainer(
        accelerator="gpu" if meter.on_gpu else "cpu",
        devices=1,
        max_steps=job.steps,
        precision="bf16-true" if arguments.dtype == "bfloat16" else "32-true",
        callbacks=[LightningSteps(meter)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return lambda: trainer.fit(stage, DataLoader([job.batch] * job.steps, batch_size=None, collate_fn=_as_it_is))


def _as_it_is(batch: Batch) -> Batch:
    return batch


class LightningSteps(L.Callback):
    """Tells the meter."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_start(self, *_: Any) -> None:
        """A step begins."""
        self.meter.begin()

    def on_train_batch_end(self, trainer: Any, stage: Teacher, *_: Any) -> None:
        """A step ends."""
        self.meter.end()
        self.meter.sampled = int(stage.sampled.rollouts.mask.sum())


def trl(job: Job) -> Callable[[], None]:
    """TRL's trainer on the same model."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    try:
        from datasets import Dataset
        from datasets.table import InMemoryTable
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise SystemExit(f"{error}: install zreward[bench], or leave the way out: --ways ours dense") from None
    arguments, meter, backbone = job.arguments, job.meter, job.backbone
    wording, processor, micro = backbone.rubric.wording, backbone.processor, arguments.micro_batch or job.rollouts
    if job.rollouts % micro:
        raise SystemExit(f"TRL wants a micro-batch that divides the {job.rollouts} rollouts, got {micro}")
    rows = []
    for index, prompt in enumerate(job.batch.prompts):
        asked = wording.instructions[DIMENSIONS[int(job.batch.pair_dimension[index // 2])]]
        chat = [{"role": "system", "content": wording.system}, {"role": "user", "content": f"{prompt}\n{asked}"}]
        rows.append({"prompt": chat, "image": to_pil_image(job.batch.images[index])})
    control = set(backbone.prompts.control_ids) | {processor.tokenizer.eos_token_id}
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=job.rollouts // micro,
        num_generations=arguments.group,
        max_completion_length=arguments.tokens,
        generation_kwargs={"suppress_tokens": sorted(control)},
        chat_template_kwargs=dict(wording.template),
        beta=0.0,
        max_steps=job.steps,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        gradient_checkpointing=arguments.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=False,
        use_cpu=not meter.on_gpu,
        shuffle_dataset=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )

    class Rows(Dataset):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            """A name is given: one would be made by pickling the table, which not every version of pyarrow can be."""
            super().__init__(InMemoryTable.from_pydict({"row": list(range(len(rows)))}), fingerprint="rows")

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: Any) -> Any:
            return rows[index]

        def __getitems__(self, indices: Sequence[int]) -> list[Any]:
            return [rows[index] for index in indices]

        def __iter__(self) -> Any:
            return iter(rows)

    class Measured(GRPOTrainer):  # type: ignore[misc, valid-type]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            made = super()._generate_and_score_completions(inputs)
            meter.sampled = int(made["completion_mask"].sum())
            width = made["prompt_ids"].shape[1]
            expected = backbone.prompts.prefix_ids(job.batch.prompts[0], images=1)
            expected = len(expected) + SIDE * SIDE // 1024 - 1 + len(backbone.prompts.suffix_ids(DIMENSIONS[0]))
            if width != expected:
                raise ValueError(f"TRL's prompts have {width} tokens, ours {expected}: nothing would be comparable")
            return made

    trainer = Measured(
        model=backbone.model,
        reward_funcs=_some_reward,
        args=config,
        train_dataset=Rows(),
        processing_class=processor,
        optimizers=(_optimizer(arguments, backbone.model.parameters()), None),
        callbacks=[TransformersSteps(meter)],
    )
    meter.watch(trainer, "_generate_and_score_completions", "sampling")
    meter.watch(trainer, "compute_loss", "evaluation")
    meter.watch(trainer.accelerator, "backward", "backward")
    meter.watch(trainer.accelerator, "clip_grad_norm_", "optimiser")
    meter.watch(trainer.optimizer, "step", "optimiser")
    return lambda: trainer.train()


def _some_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """Rewards that differ within a group and cost nothing."""
    return [float(index % 5) for index in range(len(completions))]


class TransformersSteps(TrainerCallback):
    """Tells the meter."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self.meter.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step ends."""
        self.meter.end()


WAYS = {"ours": ours, "dense": dense, "trl": trl}


def _optimizer(arguments: argparse.Namespace, parameters: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = getattr(torch.optim, arguments.optimizer)(parameters, lr=1e-6, weight_decay=0.0)
    return made


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """The steps of one way in this process."""
    work = job(arguments)
    model = work.backbone.model
    run = WAYS[arguments.child](work)
    before = _reset(work.meter.on_gpu)
    run()
    peak = (torch.cuda.max_memory_allocated() if work.meter.on_gpu else _high_water()) - before
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    counted = work.meter.seconds[1:]
    return {
        "seconds": [sum(parts.values()) for parts in counted],
        "parts": {part: median(parts[part] for parts in counted) for part in PARTS},
        "tokens": dict(work.meter.tokens),
        "sampled": work.meter.sampled,
        "peak": peak,
        "states": held * (3 if arguments.optimizer == "AdamW" else 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _reset(on_gpu: bool) -> int:
    """The level of memory now, from which the high-water mark rises; on Linux, or on a GPU."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _high_water()


def measured(way: str) -> dict[str, Any]:
    """What a fresh process found."""
    alone = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    command = [sys.executable, *sys.argv, "--child", way]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """Markdown: time and its parts, then memory and tokens."""
    lines = [f"| way | seconds | / ours | {' | '.join(PARTS)} |", "|---" * (3 + len(PARTS)) + "|"]
    for way in rounds[0]:
        seconds = [median(one[way]["seconds"]) for one in rounds]
        ratios = [a / median(one["ours"]["seconds"]) for a, one in zip(seconds, rounds, strict=True)]
        parts = [f"{median(one[way]['parts'][part] for one in rounds):.3f}" for part in PARTS]
        told = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {way} | {median(seconds):.3f} | {told} | {' | '.join(parts)} |")
    heads = (
        "way",
        "peak, MB",
        "/ ours",
        "without states, MB",
        "/ ours",
        "tokens without",
        "with gradient",
        "images",
        "sampled",
    )
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for way in rounds[0]:
        first, memory = rounds[0][way], []
        for states in (0, first["states"]):
            peak, own = (median(one[name]["peak"] - states for one in rounds) for name in (way, "ours"))
            memory.append(f"{peak / 1e6:.0f} | {peak / own:.2f}")
        tokens = [str(first["tokens"].get(name, 0)) for name in ("without gradient", "with gradient", "images")]
        lines.append(f"| {way} | {' | '.join([*memory, *tokens])} | {first['sampled']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_vl")
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pairs", type=int, default=1, help="P; twice as many images, and prompts for TRL")
    parser.add_argument("--group", type=int, default=8, help="G, traces for each image")
    parser.add_argument("--tokens", type=int, default=64, help="R, tokens of a trace")
    parser.add_argument("--micro-batch", type=int, help="rollouts in one pass with gradient; all by default")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--optimizer", choices=("AdamW", "SGD"), default="AdamW")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="counted steps of each process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    on_gpu = arguments.device.startswith("cuda")
    device = torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}, {arguments.threads} thread"
    ways = list(dict.fromkeys(["ours", *arguments.ways]))
    rounds = [{way: measured(way) for way in ways} for _ in range(arguments.rounds)]
    sampled = {way: found["sampled"] for way, found in rounds[0].items()}
    if set(sampled.values()) != {2 * arguments.pairs * arguments.group * arguments.tokens}:
        raise ValueError(f"the ways must sample 2PGR tokens each, they sampled {sampled}: nothing would be comparable")
    told = {name: getattr(arguments, name) for name in ("family", "size", "dtype", "pairs", "group", "tokens")}
    told |= {name: getattr(arguments, name) for name in ("micro_batch", "checkpointing", "optimizer", "rounds", "steps")}
    told |= {"parameters": rounds[0]["ours"]["parameters"], "device": device, "torch": torch.__version__, "zr": zr.__version__}
    print(", ".join(f"{name} {value}" for name, value in told.items()), table(rounds), sep="\n\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({**told, "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
