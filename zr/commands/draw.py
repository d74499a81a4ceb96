"""``zr draw``: pictures of a generator for the prompts of a split; interrupted, it goes on where it stopped."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported in the functions: the stack takes seconds, `zr draw --help` must not
    import torch
    from torch import Tensor

    from zr.commands.pictures import Picture
    from zr.models.generators import BestOf, Generator

__all__ = ["draw"]

FILES = (".yaml", ".yml")
"""How the name of a GENERATOR ends that says how to build one."""

MEAN = "{class_path: zr.models.RiskAverse, init_args: {deviations: 0.0}}"
"""The plain mean over the dimensions."""


def draw(
    generator: Path,
    prompts: str,
    output: Path,
    split: str = "validation",
    count: int | None = None,
    images: int = 1,
    seed: int = 0,
    best_of: int | None = None,
    reward: str | None = None,
    aggregation: str = MEAN,
    dimensions: list[str] | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Draw pictures of prompts into a folder, for `zr gsb` to compare with those of another generator.

    OUTPUT gets a PNG for each picture, and prompts.jsonl with a line for each: its file, the key of its prompt, the prompt, its
    number and the seed. The noise of a picture is drawn from (seed, key, number), so generators with latents of one shape start
    from the same noise, and two folders can be compared picture by picture.

    GENERATOR is a folder that a generator was saved to, or a run's folder, or a YAML file with the class_path and init_args of
    a generator, as a recipe has them; for Z-Image:

        class_path: zr.models.generators.ZImageGenerator.from_pretrained
        init_args: {source: Tongyi-MAI/Z-Image, steps: 28, side: 512, dtype: bfloat16}

    With --best_of N and --reward MODEL, N pictures are drawn for each line and the one with the largest reward is kept; number
    0 of the N is the one that is drawn without it. The lines then tell which one was kept, and the rewards of all.

    Run the same command again after an interruption: it goes on, and with the same batch size on the same machine the result is
    that of an uninterrupted run, byte for byte. Other settings are refused. One run at a time may write to OUTPUT.

    Args:
        generator: folder of a generator, or of a run, or a YAML file that says how to build one.
        prompts: folder of shards, or a file of prompts (.txt: one in each line; .jsonl: lines with `prompt` and `key`).
        output: folder for the pictures; made if needed.
        split: which split of the shards.
        count: prompts, from the first on; all without it.
        images: pictures of each prompt.
        seed: of the noise.
        best_of: draw so many for each picture, and keep the best.
        reward: what it is chosen by: folder of a saved model, or of a run, a name on the hub, or shapes, the built-in world's
            judge.
        aggregation: what makes one number of the dimensions: class path, or YAML with class_path and init_args; without it the
            mean of the expected scores.
        dimensions: which of the reward's dimensions; all without it.
        guidance: scale of classifier-free guidance of a saved generator; none without it. In a YAML it is an init_arg.
        steps: from noise to picture, of a saved generator; as many as were saved without it. In a YAML it is an init_arg.
        batch_size: pictures that are drawn together.
        device: such as cpu or cuda:1; auto is cuda where there is one.

    Raises:
        FileNotFoundError: no generator, model, file, folder or split.
        FileExistsError: OUTPUT holds something else.
        ValueError: other settings than OUTPUT was begun with, a prompt that the generator does not take, a bad option.
    """
    for name, number in {
        "count": count,
        "images": images,
        "best_of": best_of,
        "steps": steps,
        "batch_size": batch_size,
    }.items():
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")
    if (best_of is None) != (reward is None):
        raise ValueError("--best_of and --reward go together: how many are drawn, and what the best one is chosen by")
    if best_of is None and (aggregation != MEAN or dimensions is not None):
        raise ValueError("--aggregation and --dimensions say what --best_of chooses by: give --best_of and --reward too")
    if generator.suffix in FILES and (guidance, steps) != (None, None):
        raise ValueError(f"--guidance and --steps are for saved generators: write them into the init_args of {generator}")

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text
    from transformers.utils.logging import disable_progress_bar

    from zr.commands.pictures import LINES, numbered, settled
    from zr.data import read_prompts
    from zr.report.text import plain

    disable_progress_bar()
    source = prompts if prompts.endswith((".txt", ".jsonl")) else f"{prompts.rstrip('/')}/{split}"
    found = read_prompts(source).select(slice(count))
    if count is not None and len(found) < count:
        raise ValueError(f"{source} has {len(found)} prompts, --count {count} were asked for: give fewer")
    pictures = numbered(found, images)
    settings = {
        "generator": _fingerprint(generator),
        "prompts": hashlib.blake2b(repr(found).encode(), digest_size=16).hexdigest(),
        "pictures": len(pictures),
        **{"images": images, "seed": seed, "best_of": best_of, "guidance": guidance, "steps": steps},
        **_chosen_by(reward, aggregation, dimensions),
    }
    made = _generator(generator, guidance, steps, device)
    best = None if best_of is None or reward is None else _best_of(made, best_of, reward, aggregation, dimensions, device)
    settled(output, settings)
    (output / "images").mkdir(exist_ok=True)
    columns = (TextColumn("draw"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar, (output / LINES).open("a+b") as lines:
        begun = _go_on(lines, pictures, batch_size, output / LINES)
        task = bar.add_task("", total=len(pictures), completed=begun)
        for start in range(begun, len(pictures), batch_size):
            part = pictures[start : start + batch_size]
            lines.write(_draw(made if best is None else best, part, seed, output))
            lines.flush()
            bar.update(task, advance=len(part))
    Console().print(Text(plain(f"{len(pictures):,} pictures in {output}, a line for each in {output / LINES}")))


def _generator(place: Path, guidance: float | None, steps: int | None, device: str) -> Generator:
    """The generator, ready to draw."""
    from zr.commands.measuring import chosen
    from zr.commands.parts import built
    from zr.models.generators import FlowGenerator, FullGuidance, Generator

    if place.suffix in FILES:
        made: Generator = built(Generator, place.read_text(encoding="utf-8"), str(place))
    else:
        scale = None if guidance is None else FullGuidance(guidance)
        made = FlowGenerator.from_pretrained(place, steps=steps, guidance=scale)
    return made.to(chosen(device)).eval()


def _best_of(
    made: Generator, count: int, reward: str, aggregation: str, dimensions: Sequence[str] | None, device: str
) -> BestOf:
    from zr.commands.parts import built, scorer
    from zr.models import Aggregation
    from zr.models.generators import BestOf

    return BestOf(made, scorer(reward, device), built(Aggregation, aggregation, "--aggregation"), count, dimensions)


def _fingerprint(place: Path) -> str:
    """What tells a generator from any other: a digest of the files of a saved one, or of what a YAML file says."""
    from zr.models.generators.flow import ABOUT, RUN_GENERATOR

    folder = next((folder for folder in (place, place / RUN_GENERATOR) if (folder / ABOUT).is_file()), None)
    if folder is None and not (place.suffix in FILES and place.is_file()):
        raise FileNotFoundError(f"{place} holds no generator, nor is it a YAML file that says how to build one")
    digest = hashlib.blake2b(digest_size=16)
    for path in [place] if folder is None else sorted(path for path in folder.rglob("*") if path.is_file()):
        name = "" if folder is None else path.relative_to(folder).as_posix()
        with path.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def _chosen_by(reward: str | None, aggregation: str, dimensions: Sequence[str] | None) -> dict[str, Any]:
    """What the best pictures are chosen by, as settings; of nothing where all are kept."""
    if reward is None:
        return {"reward": None, "aggregation": None, "dimensions": None}
    from zr.commands.parts import SHAPES
    from zr.commands.score import fingerprint

    identity = reward if reward == SHAPES else fingerprint(reward)
    return {"reward": identity, "aggregation": aggregation, "dimensions": dimensions}


def _go_on(lines: Any, pictures: Sequence[Picture], batch_size: int, path: Path) -> int:
    """How many pictures are there; lines after the last whole batch, which a killed run may have left, are cut off."""
    from zr.commands.pictures import read_lines

    lines.seek(0)
    whole = [line for line in lines if line.endswith(b"\n")]
    found = read_lines(whole, path)
    if found != list(pictures[: len(found)]):
        raise ValueError(f"{path} names other pictures than are drawn now: remove the folder, and draw it again")
    count = len(found) if len(found) == len(pictures) else len(found) - len(found) % batch_size
    lines.truncate(sum(map(len, whole[:count])))
    return count


def _draw(maker: Generator | BestOf, pictures: Sequence[Picture], seed: int, output: Path) -> bytes:
    """Write the files of some pictures; their lines."""
    import torch

    from zr.data.shards import atomic
    from zr.models.generators import BestOf
    from zr.models.generators.noise import source

    prompts = [picture.prompt for picture in pictures]
    sources: list[torch.Generator] = [source(seed, picture.key, picture.number) for picture in pictures]
    told: list[dict[str, Any]] = [{} for _ in pictures]
    with torch.no_grad():
        if isinstance(maker, BestOf):
            images, numbers, rewards = maker.search(prompts=prompts, generator=sources)
            told = [{"kept": n, "rewards": row} for n, row in zip(numbers.tolist(), rewards.tolist(), strict=True)]
        else:
            images = maker.sample(prompts=prompts, generator=sources)
    lines = []
    for picture, image, more in zip(pictures, images, told, strict=True):
        if not bool(image.isfinite().all()):
            raise ValueError(f"picture {picture.number} of the prompt {picture.key!r} is not finite: look at the generator")
        with atomic(output / picture.file) as file:
            file.write(_png(image))
        line = {"file": picture.file, "key": picture.key, "prompt": picture.prompt, "number": picture.number, "seed": seed}
        lines.append(json.dumps(line | more) + "\n")
    return "".join(lines).encode()


def _png(image: Tensor) -> bytes:
    """A picture ``(3, H, W)`` in [0, 1] as a file, with 8 bits a channel."""
    from PIL import Image

    pixels = (image.float() * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
