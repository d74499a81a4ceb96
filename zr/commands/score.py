"""``zr score``: scores of images by a saved model; interrupted, it goes on where it stopped."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # imported in the function: the stack takes seconds, `zr score --help` must not
    from torch import Tensor

    from zr.commands.inputs import Item, Problems
    from zr.commands.results import Journal
    from zr.models.aggregation import ScaleStatistics
    from zr.scores import ScoreDistribution

__all__ = ["fingerprint", "score"]

OUTPUTS = (".jsonl", ".csv", ".parquet")
READERS = 4
"""Threads that read and decode images while the model works."""


def score(
    images: list[Path],
    model: Path,
    prompt: str | None = None,
    output: Path | None = None,
    dimensions: list[str] | None = None,
    split: str | None = None,
    recursive: bool = False,
    best: int | None = None,
    rubric: str | None = None,
    batch_size: int = 16,
    budget: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    on_error: Literal["stop", "skip"] = "stop",
    calibrated: bool = False,
) -> None:
    r"""Score images: expected score, standard deviation and distribution per dimension.

    IMAGES are image files (PNG, JPEG, WebP), folders of them (by name, without the hidden ones), folders of shards, and .jsonl
    files whose lines have the texts `image` (a path relative to the file) and `prompt`; a line may have an `id`, and what else
    it has comes back as `extra`.

    Without OUTPUT, JSON lines go to standard output. OUTPUT ends in .jsonl, .csv or .parquet; tables have a row for each image.
    Run the same command again after an interruption, or with more images: what is scored already, known by prompt and key (the
    `id`, the path as it was given, or FOLDER/SPLIT/KEY.CANDIDATE in shards), is not scored again. For that, tables and --best
    keep OUTPUT.journal beside OUTPUT. A file of another model, scale or dimensions is never added to. One run at a time may
    write to an output.

    In CSV, invisible characters and line breaks are written as \u{HEX}, and a text that a spreadsheet could take for a formula
    gets an apostrophe before it.

    With --on_error skip, images and lines that cannot be scored are listed at the end, and a rerun tries them again; the exit
    status is 0 unless nothing could be scored. Damaged shards always stop the run.

    Args:
        images: what to score.
        model: folder of a saved model, or of a run, or a name on the hub.
        prompt: the prompt of image files and folders.
        output: file to write.
        dimensions: which of the model's dimensions; all without it.
        split: which split of shards; all of them without it.
        recursive: look into the folders of folders too; links to folders are not followed.
        best: keep, of the images of each prompt, this many with the highest mean over the dimensions, of standardised scores
            where the model has them; lines then have `rank` and `overall`, that mean.
        rubric: YAML file or packaged rubric (zr:direct) to ask a plain vision-language model under, or in whose wording a saved
            model is asked.
        batch_size: images that are scored together; where they do not fit into memory, fewer are taken.
        budget: most tokens in one pass of the model, over all images and questions; without it a batch is one pass.
        device: such as cpu or cuda:1; auto is cuda where there is one.
        dtype: of the backbone's weights; auto is the one they were saved in.
        on_error: stop at the first image that cannot be scored, or skip it.
        calibrated: apply the calibration that `zr calibrate` put into the model's folder.

    Raises:
        FileNotFoundError: no model, image, folder or split.
        FileExistsError: an output that would be lost.
        ValueError: an image or line that cannot be scored, an output of another model, a bad option.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from zr.commands.inputs import Problems, count, items
    from zr.commands.measuring import loaded

    _check(images, output, {"best": best, "batch_size": batch_size, "budget": budget})
    scorer = loaded(model, device, dtype, rubric=rubric, budget=budget, calibrated=calibrated)
    identity = fingerprint(model, calibrated)
    if rubric is not None:
        identity += f"-{hashlib.blake2b(repr(scorer.rubric).encode(), digest_size=6).hexdigest()}"
    if dtype != "auto":
        identity += f"-{dtype}"
    names = [scorer.rubric.dimensions[i] for i in scorer.rubric.index(dimensions)]
    head = {"bins": scorer.rubric.bins, "scale_id": scorer.rubric.scale_id, "model": identity, "dimensions": names}
    problems = Problems(skip=on_error == "skip")
    columns = (TextColumn("score"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = output is None and sys.stdout.isatty()  # the lines themselves show how far it is
    bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=False, disable=quiet)
    with ExitStack() as stack:
        journal, path = _journal(output, best, head, stack)
        before = len(journal.done)
        task = bar.add_task("", total=count(images, recursive), completed=before)
        stack.enter_context(bar)
        stack.enter_context(torch.inference_mode())
        new = _new(items(images, prompt, split, recursive, problems), journal, problems)
        for batch in _batches(_decoded(new, 2 * batch_size, problems), batch_size):
            for item, q in _scored(scorer, batch, names, problems):
                journal.add(_entry(item, q, names, scorer.statistics))
            journal.file.flush()
            bar.update(task, completed=len(journal.done) + len(problems.found))
        bar.update(task, completed=len(journal.done) + len(problems.found))
        made = len(journal.done) - before
        if made or before:
            _finish(output, best, path)
    _tell(made, before, problems)


def fingerprint(model: str | Path, calibrated: bool = False) -> str:
    """What tells a model from any other: a digest of all files in its folder that loading may read.

    Every byte counts, so it takes some two seconds for each gigabyte, and a model that is loaded and saved anew may be another.

    Args:
        model: folder of a model, or of a run, or a name on the hub.
        calibrated: whether it answers through its calibration; if not, that may come and go.
    """
    from zr.models.loading import READ, model_folder
    from zr.models.reward import CALIBRATED_STATISTICS, CALIBRATION

    folder = model_folder(model)
    digest = hashlib.blake2b(digest_size=16)
    unread = set() if calibrated else {folder / CALIBRATION, folder / CALIBRATED_STATISTICS}
    for path in sorted({path for pattern in READ for path in folder.rglob(pattern)} - unread):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _check(images: Sequence[Path], output: Path | None, numbers: Mapping[str, int | None]) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")
    if output is None:
        return
    if output.suffix not in OUTPUTS:
        raise ValueError(f"--output {output} must end in {', '.join(OUTPUTS)}, so that it is known what to write")
    if output.resolve() in [path.resolve() for path in images]:
        raise ValueError(f"--output {output} is read as input too: write to another file")


def _journal(output: Path | None, best: int | None, head: Mapping[str, Any], stack: ExitStack) -> tuple[Journal, Path | None]:
    """Where lines go, and its path; standard output has none."""
    from zr.commands.results import Journal

    if output is None and best is None:
        return Journal(sys.stdout, head), None
    if output is None:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "journal"
    elif output.suffix == ".jsonl" and best is None:
        path = output
    else:
        path = output.with_name(f"{output.name}.journal")
        if output.exists() and not path.exists():
            raise FileExistsError(f"{output} would be lost, as there is no {path.name} to go on with: move it away")
    journal = Journal.resume(path, head)
    stack.callback(journal.file.close)
    return journal, path


def _new(found: Iterable[Item], journal: Journal, problems: Problems) -> Iterator[Item]:
    """The images that have no line yet; one that is given twice is a mistake."""
    from zr.commands.results import digest

    seen: set[bytes] = set()
    for item in found:
        known = digest(item.key, item.prompt)
        if known in seen:
            problems.add(ValueError(f"{item.key} is given twice with the same prompt: leave one out, or give each line an id"))
        elif known not in journal.done:
            yield item
        seen.add(known)


def _decoded(found: Iterable[Item], ahead: int, problems: Problems) -> Iterator[tuple[Item, Tensor]]:
    """Images and their pixels, in order; at most ``ahead`` are decoded in advance."""
    waiting: deque[tuple[Item, Future[Tensor]]] = deque()

    def first() -> Iterator[tuple[Item, Tensor]]:
        item, future = waiting.popleft()
        try:
            yield item, future.result()
        except (ValueError, OSError) as error:
            problems.add(error)

    with ThreadPoolExecutor(READERS) as pool:
        for item in found:
            waiting.append((item, pool.submit(item.pixels)))
            if len(waiting) > ahead:
                yield from first()
        while waiting:
            yield from first()


def _batches(found: Iterable[tuple[Item, Tensor]], size: int) -> Iterator[list[tuple[Item, Tensor]]]:
    batch = []
    for pair in found:
        batch.append(pair)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _scored(
    scorer: Any, batch: Sequence[tuple[Item, Tensor]], names: Sequence[str], problems: Problems
) -> Iterator[tuple[Item, ScoreDistribution]]:
    """Images and their ``(D,)`` scores. A batch that fails is halved, until the image is found that it fails for."""
    import torch

    reason = ""
    try:
        q = scorer(images=[pixels for _, pixels in batch], prompts=[item.prompt for item, _ in batch], dimensions=names)
    except (ValueError, torch.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
    if not reason:
        yield from ((item, q[row]) for row, (item, _) in enumerate(batch))
    elif len(batch) > 1:
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            yield from _scored(scorer, half, names, problems)
    else:
        ((item, pixels),) = batch
        size = f"{pixels.shape[2]} x {pixels.shape[1]} pixels"
        problems.add(ValueError(f"{item.key} ({size}) cannot be scored: {reason.removeprefix('sample 0: ')}"))


def _entry(item: Item, q: ScoreDistribution, names: Sequence[str], statistics: ScaleStatistics | None) -> dict[str, Any]:
    """The line of one image."""
    parts = {"score": q.mean, "stddev": q.stddev}
    if statistics is not None:
        parts["standardised"] = statistics.standardise(q.mean, names)
    columns = {name: [round(value, 6) for value in part.tolist()] for name, part in parts.items()}
    probs = [[round(p, 6) for p in row] for row in q.probs.tolist()]
    scores = {
        name: {**{part: values[d] for part, values in columns.items()}, "probs": probs[d]} for d, name in enumerate(names)
    }
    extra = {"extra": item.extra} if item.extra else {}
    return {"key": item.key, "image": item.image, "prompt": item.prompt, **extra, "scores": scores}


def _finish(output: Path | None, best: int | None, path: Path | None) -> None:
    """Make the output of the journal, where it is not the journal itself."""
    from zr.commands.results import best_of_prompt, entries, write_lines, write_table

    if path is None or path == output:
        return
    lines = entries(path) if best is None else best_of_prompt(path, best, _overall)
    if output is None:
        write_lines(lines, sys.stdout)
    else:
        write_table(lines, output)


def _overall(entry: Mapping[str, Any]) -> float:
    """The mean over dimensions."""
    values = [v.get("standardised", v["score"]) for v in entry["scores"].values()]
    return float(sum(values) / len(values))


def _tell(made: int, before: int, problems: Problems) -> None:
    from zr.report.text import plain

    there = f", {before} were there already" if before else ""
    print(f"{made} images scored{there}", file=sys.stderr)
    if problems.found:
        print(f"{len(problems.found)} skipped:", file=sys.stderr)
        for reason in problems.found:
            print(plain(f"  {reason}"), file=sys.stderr)
    if not made and problems.found and not before:
        raise ValueError("nothing could be scored")
