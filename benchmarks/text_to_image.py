"""What a text-to-image step costs: sampling, reward, backward pass and optimiser, against sampling alone and one reward call.

    python benchmarks/text_to_image.py                              CPU, one thread, float32, the built-in world's sizes
    python benchmarks/text_to_image.py --generator z_image          tiny models of diffusers' own classes; or sd3
    python benchmarks/text_to_image.py --size mid --images 1 --rounds 3
    python benchmarks/text_to_image.py --device cuda --dtype bfloat16 --size mid --generator z_image --images 4

A random generator and a random student: of the built-in world's sizes with pictures of 48 x 48, or both of about a hundred
million parameters with pictures of 256 x 256 (mid). A step is ``zr.stages.TextToImage`` in a Lightning Trainer, one update of
all weights by AdamW. The ways:

- sampling: all denoising steps without gradient, and the picture;
- sampling and reward: the same, and one call of the student without gradient, all four dimensions;
- ReFL: one step with gradient, of the last two thirds; which one is spread evenly, which has the mean of drawing it;
- K: the last K steps with gradient, up to all;
- distance: the velocity's distance to the starting generator beside the reward, as it is by default;
- checkpointing: of the generator's layers (and the autoencoder's);
- one dimension, and four calls: what the reward asks; four calls are a reward each.

All ways are measured in turn, round after round, ``--counted`` steps each after one that is not counted; a ratio is the median
of the rounds' ratios, with the smallest and the largest beside it. Time is that of the process on a CPU, of the clock on a GPU.
Memory is the peak of an update beyond what weights and optimiser hold between updates, in another process; gradients of the
weights, whose size is printed, are a part of it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import transformers
from scoring import DIMENSIONS, FAMILIES, FILLER, PREFIX, SIDE, _high_water, build, ratios
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.utils.checkpoint import checkpoint

import zr
from zr.data import PromptBatch, shapes
from zr.models import RewardModel, RiskAverse, ScoreTokenHead, tiny_qwen3_5, tiny_qwen3_vl
from zr.models.generators import FlowGenerator, FlowSize, Generator
from zr.stages import GradientPath, LastSteps, ReFL, Reward, TextToImage

PARTS = ("sampling", "reward", "backward", "optimiser", "other")
SAMPLING, SCORED, REFL = "sampling", "sampling and reward", "ReFL"


@dataclass
class Evenly(GradientPath):
    """ReFL whose draws are evenly spread over its range instead of random: few steps have the mean of many."""

    earliest: int
    latest: int
    counted: int
    drawn: int = 0

    def check(self, steps: int) -> None:
        """See :class:`zr.stages.GradientPath`."""
        ReFL(self.earliest, self.latest).check(steps)

    def draw(self, steps: int, generator: torch.Generator) -> tuple[int, int]:
        """The first draw, which nobody counts, is the last step."""
        share = 1.0 if self.drawn == 0 else (self.drawn - 0.5) / self.counted
        self.drawn += 1
        return 1, min(self.latest, self.earliest + int((self.latest - self.earliest + 1) * share))


@dataclass(frozen=True)
class Way:
    """What is done; without steps nothing is learned."""

    steps: int | str = 0
    distance: bool = False
    checkpointing: bool = False
    dimensions: int = len(DIMENSIONS)
    calls: int = 1

    def path(self, arguments: argparse.Namespace) -> GradientPath:
        """Which steps carry gradient."""
        if self.steps == REFL:
            return Evenly(1 + arguments.steps // 3, arguments.steps, arguments.counted)
        return LastSteps(arguments.steps if self.steps == "all" else int(self.steps))


PATHS = {REFL: REFL, "K = 1": 1, "K = 2": 2, "K = 4": 4, "K = all": "all"}
WAYS = {
    SAMPLING: Way(calls=0),
    SCORED: Way(),
    **{name: Way(steps) for name, steps in PATHS.items()},
    **{f"{name}, distance": Way(steps, distance=True) for name, steps in PATHS.items()},
    **{f"{name}, checkpointing": Way(steps, checkpointing=True) for name, steps in PATHS.items()},
    **{f"{name}, one dimension": Way(PATHS[name], dimensions=1) for name in (REFL, "K = 1")},
    **{f"{name}, four calls": Way(PATHS[name], calls=len(DIMENSIONS)) for name in (REFL, "K = 1")},
}


def student(arguments: argparse.Namespace) -> tuple[RewardModel, list[str], list[str]]:
    """A random one, prompts that it reads, and the words that they are made of."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.size == "world":
        rubric, made = shapes.rubric(), {"qwen3_vl": tiny_qwen3_vl, "qwen3_5": tiny_qwen3_5}[arguments.family]
        backbone = made(rubric, shapes.vocabulary).to(arguments.device, dtype)
        prompts = list(shapes.prompts("train")[: arguments.images])
        words = list(shapes.vocabulary())
    else:
        backbone = build(arguments.family, arguments.size, arguments.device, dtype)
        around = len(backbone.prompts.prefix_ids("", images=1)) + SIDE * SIDE // 1024 - 1
        prompts = [" ".join((FILLER * 99)[i : PREFIX - around + i]) for i in range(arguments.images)]
        words = list(FILLER)
    return RewardModel(backbone.eval(), ScoreTokenHead(backbone), backbone.rubric), prompts, words


def flow(arguments: argparse.Namespace, words: Sequence[str]) -> Generator:
    """The built-in world's generator, or one of DiT-B's size."""
    mid = FlowSize(image=SIDE, patch=16, width=768, layers=12, heads=12, words=99)
    size = FlowSize(patch=16, width=256, heads=8) if arguments.size == "world" else mid
    return FlowGenerator(words, size, arguments.steps)


def z_image(arguments: argparse.Namespace, words: Sequence[str]) -> Generator:
    """Z-Image's classes."""
    import diffusers

    from zr.models.generators import ZImageGenerator

    tiny, reader = arguments.size == "world", tokenizer(words)
    text = transformers.Qwen3Config(
        vocab_size=len(reader), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=128 if tiny else 768, n_layers=4 if tiny else 12, n_refiner_layers=1, n_heads=4 if tiny else 12,
        n_kv_heads=4 if tiny else 12, cap_feat_dim=64, axes_dims=[8, 12, 12] if tiny else [16, 24, 24],
        axes_lens=[1024, 128, 128],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    parts = scheduler, autoencoder(diffusers, tiny), transformers.Qwen3Model(text), reader, transformer
    return ZImageGenerator(diffusers.ZImagePipeline(*parts), arguments.steps, 48 if tiny else SIDE)


def sd3(arguments: argparse.Namespace, words: Sequence[str]) -> Generator:
    """Stable Diffusion 3's classes, without T5."""
    import diffusers

    from zr.models.generators import StableDiffusion3Generator

    tiny, reader = arguments.size == "world", tokenizer(words)
    sizes = {"vocab_size": len(reader), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "projection_dim": 64, "max_position_embeddings": 128, "eos_token_id": 1}
    encoders = [transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes)) for _ in range(2)]
    side, heads = (48 // 2, 4) if tiny else (SIDE // 8, 12)
    width = heads * (32 if tiny else 64)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=side, patch_size=2, in_channels=16, out_channels=16, num_layers=4 if tiny else 12,
        attention_head_dim=width // heads, num_attention_heads=heads, joint_attention_dim=128, caption_projection_dim=width,
        pooled_projection_dim=128, pos_embed_max_size=side, qk_norm="rms_norm",
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    readers = encoders[0], reader, encoders[1], reader, None, None
    pipeline = diffusers.StableDiffusion3Pipeline(transformer, scheduler, autoencoder(diffusers, tiny), *readers)
    return StableDiffusion3Generator(pipeline, arguments.steps, 48 if tiny else SIDE)


GENERATORS = {"flow": flow, "z_image": z_image, "sd3": sd3}


def autoencoder(diffusers: Any, tiny: bool) -> Any:
    """Of sides 2 or 8 times smaller."""
    channels = (16, 16) if tiny else (32, 64, 128, 128)
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels), up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels, latent_channels=16, norm_num_groups=8, layers_per_block=1 if tiny else 2,
        scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def tokenizer(words: Sequence[str]) -> Any:
    """A word for a token."""
    ids = {word: i for i, word in enumerate(dict.fromkeys(["[pad]", "[end]", "user", "assistant", *words]))}
    core = Tokenizer(WordLevel(ids, unk_token="[pad]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    chat = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
    special = {"pad_token": "[pad]", "unk_token": "[pad]", "eos_token": "[end]", "bos_token": "[end]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, chat_template=chat, **special)


@contextmanager
def checkpointed(generator: Any) -> Iterator[None]:
    """Keep the inputs of layers only, for a while."""
    if isinstance(generator, FlowGenerator):
        blocks: Any = generator.transformer.blocks
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield
        for block in blocks:
            del block.forward
        return
    parts = generator.transformer, generator.pipeline.vae
    for part in parts:
        part.enable_gradient_checkpointing()
    yield
    for part in parts:
        part.disable_gradient_checkpointing()


class Clock(L.Callback):
    """Seconds of each step, by part; a step is charged to the innermost part that is watched."""

    def __init__(self, on_gpu: bool, between: Callable[[int], None] = lambda step: None) -> None:
        self.on_gpu = on_gpu
        self.between = between
        self.seconds: list[dict[str, float]] = []
        self._open: list[str] = []
        self._last = 0.0

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Charge the time of a method to a part."""
        method = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._mark()
            self._open.append(part)
            try:
                return method(*args, **kwargs)
            finally:
                self._mark()
                self._open.pop()

        object.__setattr__(owner, name, watched)

    def begin(self) -> None:
        """A step begins."""
        self.between(len(self.seconds))
        self.seconds.append(dict.fromkeys(PARTS, 0.0))
        self._open = ["other"]
        self._last = self._now()

    def end(self) -> None:
        """A step ends."""
        self._mark()

    def on_train_batch_start(self, *_: Any) -> None:
        """See :meth:`begin`."""
        self.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        """See :meth:`end`."""
        self.end()

    def _mark(self) -> None:
        now = self._now()
        self.seconds[-1][self._open[-1]] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


class Bench:
    """A generator and a student, and the ways to use them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.arguments = arguments
        self.on_gpu = arguments.device.startswith("cuda")
        self.model, prompts, words = student(arguments)
        self.generator = GENERATORS[arguments.generator](arguments, words)
        self.generator.to(arguments.device, getattr(torch, arguments.dtype))
        self.batch = PromptBatch([str(i) for i in range(len(prompts))], prompts)

    def run(self, way: Way, batches: Sequence[PromptBatch], clock: Clock) -> None:
        """One step for each batch."""
        for part in (self.generator, self.model):
            part.to(self.arguments.device)  # Lightning leaves what it has trained on the CPU
        if way.steps:
            with checkpointed(self.generator) if way.checkpointing else nullcontext():
                return self._learn(way, batches, clock)
        self.generator.eval()
        for number, batch in enumerate(batches):
            sources = [torch.Generator().manual_seed(1000 * number + i) for i in range(len(batch))]
            clock.begin()
            with torch.no_grad():
                images = self.generator.sample(batch.prompts, sources)
                if way.calls:
                    self.model(images=images.float(), prompts=batch.prompts).mean.sum().item()
            clock.end()

    def _learn(self, way: Way, batches: Sequence[PromptBatch], clock: Clock) -> None:
        names = self.model.rubric.dimensions[: way.dimensions]
        asked = [names] if way.calls == 1 else [(name,) for name in names]
        stage = TextToImage(
            self.generator,
            {some[0]: Reward(self.model, RiskAverse(0.5), dimensions=list(some)) for some in asked},
            way.path(self.arguments),
            velocity_distance=float(way.distance),
            optimizer=partial(torch.optim.AdamW, lr=1e-7),
            warmup=0.0,
            decay=0.0,
        )
        trainer = L.Trainer(
            accelerator="gpu" if self.on_gpu else "cpu",
            devices=1,
            max_steps=len(batches),
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        with ExitStack() as stack:
            for owner, name, part in (
                (self.generator, "sample", "sampling"),
                (stage, "_image_gradient", "reward"),
                (stage, "manual_backward", "backward"),
                (stage, "_step", "optimiser"),
            ):
                clock.watch(owner, name, part)
                stack.callback(object.__delattr__, owner, name)
            trainer.fit(stage, train_dataloaders=Loader(batches))

    def timed(self, way: Way) -> dict[str, float]:
        """Mean seconds of a step by part."""
        clock = Clock(self.on_gpu)
        self.run(way, [self.batch] * (1 + self.arguments.counted), clock)
        counted = clock.seconds[1:]
        return {part: sum(one[part] for one in counted) / len(counted) for part in PARTS}

    def peak(self, way: Way) -> int:
        """Bytes of an update beyond what is held between updates; on Linux, or on a GPU."""
        before = 0

        def between(step: int) -> None:
            nonlocal before
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            else:
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
                before = _high_water()

        self.run(way, [self.batch] * 2, Clock(self.on_gpu, between))
        return (torch.cuda.max_memory_allocated() if self.on_gpu else _high_water()) - before


class Loader:
    """A loader of these batches."""

    def __init__(self, batches: Sequence[PromptBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[PromptBatch]:
        """Each once."""
        return iter(self.batches)

    def __len__(self) -> int:
        """How many."""
        return len(self.batches)


def measured(ways: Sequence[str], steps: int) -> dict[str, int]:
    """Peaks, in a process of their own whose allocator hands back what is freed."""
    alone = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, *sys.argv, "--steps", str(steps), "--child", *ways]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    if done.returncode:
        raise SystemExit(f"memory at {steps} steps failed:\n{done.stderr[-3000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: seconds and their parts, ratios."""
    lines = [f"| way | seconds | / sampling | / sampling and reward | {' | '.join(PARTS)} |"]
    lines.append("|---" * (4 + len(PARTS)) + "|")
    seconds = {way: [sum(one[way].values()) for one in rounds] for way in rounds[0]}
    for way, each in seconds.items():
        told = ["{:.2f} ({:.2f} to {:.2f})".format(*ratios(seconds, way, against)) for against in (SAMPLING, SCORED)]
        parts = [f"{median(one[way][part] for one in rounds):.3f}" if WAYS[way].steps else "" for part in PARTS]
        lines.append(f"| {way} | {median(each):.3f} | {' | '.join(told)} | {' | '.join(parts)} |")
    lines.append("")
    pairs = [(name, f"{name}, one dimension") for name in (REFL, "K = 1")]
    pairs += [(f"{name}, four calls", name) for name in (REFL, "K = 1")]
    lines += [
        "{} / {}: {:.2f} ({:.2f} to {:.2f})".format(name, against, *ratios(seconds, name, against))
        for name, against in pairs
        if {name, against} <= seconds.keys()
    ]
    return "\n".join(lines)


def memory(peaks: dict[int, dict[str, int]], steps: int) -> str:
    """Markdown: memory of all ways at so many steps from noise to picture, of some at other numbers."""
    lines = [f"| peak in MB, by steps from noise to picture | {' | '.join(map(str, peaks))} |", "|---" * (1 + len(peaks)) + "|"]
    for way in peaks[steps]:
        told = " | ".join(f"{found[way] / 1e6:.1f}" if way in found else "" for found in peaks.values())
        lines += [f"| {way} | {told} |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", choices=GENERATORS, default="flow")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_vl", help="of the student")
    parser.add_argument("--size", choices=("world", "mid"), default="world")
    parser.add_argument("--images", type=int, default=8, help="of an update, all at a time")
    parser.add_argument("--steps", type=int, default=10, help="from noise to picture")
    parser.add_argument("--lengths", type=int, nargs="*", default=[10, 20, 40], help="steps for which memory is told beside")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counted", type=int, default=4, help="steps of a way in a round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    if arguments.child:
        print(json.dumps({way: bench.peak(WAYS[way]) for way in arguments.child}))
        return
    ways = list(dict.fromkeys([SAMPLING, SCORED, *arguments.ways]))
    device = torch.cuda.get_device_name() if bench.on_gpu else f"CPU {platform.machine()}, {arguments.threads} thread"
    trained = [p for p in bench.generator.parameters() if p.requires_grad]
    told = {name: getattr(arguments, name) for name in ("generator", "family", "size", "dtype", "images", "steps", "rounds")}
    told |= {"generator's parameters": f"{sum(p.numel() for p in trained) / 1e6:.1f} M"}
    told |= {"student's": f"{sum(p.numel() for p in bench.model.parameters()) / 1e6:.1f} M"}
    told |= {"gradients": f"{sum(p.numel() * p.element_size() for p in trained) / 1e6:.1f} MB"}
    told |= {"device": device, "torch": torch.__version__, "lightning": L.__version__, "zr": zr.__version__}
    print(", ".join(f"{name} {value}" for name, value in told.items()), flush=True)
    rounds = [{way: bench.timed(WAYS[way]) for way in ways} for _ in range(arguments.rounds)]
    print(f"\n{table(rounds)}", flush=True)
    peaks: dict[int, dict[str, int]] = {}
    if not arguments.no_memory:
        some = [way for way in ways if way in (SAMPLING, REFL, "K = 1", f"{REFL}, distance", "K = 1, distance")]
        lengths = sorted({arguments.steps, *arguments.lengths})
        peaks = {n: measured(ways if n == arguments.steps else some, n) for n in lengths}
        print(f"\n{memory(peaks, arguments.steps)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**told, "rounds": rounds, "peak bytes": peaks}, indent=2) + "\n")


if __name__ == "__main__":
    main()
