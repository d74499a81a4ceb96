"""``zr score``: scores of images by a saved model, one JSON line each."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

__all__ = ["score"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def score(
    images: list[Path],
    model: Path,
    prompt: str | None = None,
    output: Path | None = None,
    dimensions: list[str] | None = None,
    batch_size: int = 16,
) -> None:
    """Score images: expected score, standard deviation and distribution per dimension.

    Args:
        images: image files, folders of images, or JSONL files whose lines have `image` (a path relative to the file) and
            `prompt`.
        model: folder of a saved model, or of a run.
        prompt: the prompt of image files and folders.
        output: JSONL file to write; without it lines go to standard output.
        dimensions: which of the model's dimensions; all without it.
        batch_size: images in a forward pass.
    """
    import torch

    from zr.data.record import read_image
    from zr.models import load

    scorer = load(model)
    items = [item for path in images for item in _items(path, prompt)]
    names = [scorer.rubric.dimensions[i] for i in scorer.rubric.index(dimensions)]
    with ExitStack() as stack:
        file = sys.stdout if output is None else stack.enter_context(output.open("w", encoding="utf-8"))
        stack.enter_context(torch.inference_mode())
        for start in range(0, len(items), batch_size):
            part = items[start : start + batch_size]
            pixels = [read_image(path.read_bytes(), str(path)) for path, _ in part]
            scores = scorer(images=pixels, prompts=[text for _, text in part], dimensions=names)
            for row, (path, text) in enumerate(part):
                q = scores[row]
                values = {
                    name: {
                        "score": round(q.mean[d].item(), 4),
                        "stddev": round(q.stddev[d].item(), 4),
                        "probs": [round(p, 5) for p in q.probs[d].tolist()],
                    }
                    for d, name in enumerate(names)
                }
                file.write(json.dumps({"image": str(path), "prompt": text, "scores": values}) + "\n")


def _items(path: Path, prompt: str | None) -> list[tuple[Path, str]]:
    """The images that an argument stands for, each with its prompt."""
    if path.suffix == ".jsonl":
        found = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("image"), str)
                or not isinstance(entry.get("prompt"), str)
            ):
                raise ValueError(f"{path}, line {number}: an object with the texts `image` and `prompt` is needed")
            found.append((path.parent / entry["image"], entry["prompt"]))
        return found
    if prompt is None:
        raise ValueError(f"{path} needs --prompt, the text that the image shall show; or give a JSONL file with prompts")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path} is no image and no folder with images ({', '.join(sorted(SUFFIXES))})")
    return [(file, prompt) for file in files]
