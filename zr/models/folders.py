"""Folders that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_whole"]


@contextmanager
def written_whole(folder: str | Path, about: str) -> Iterator[Path]:
    """A new folder to write into, which takes its place when all is written; what was saved there before is replaced.

    Args:
        folder: where it goes.
        about: the file by which a folder that may be replaced is known.

    Yields:
        The new folder, empty, beside the place.

    Raises:
        FileExistsError: a folder that holds something else, which would be lost.

    Example:
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with written_whole(Path(place, "saved"), "about.json") as new:
        ...         _ = (new / "about.json").write_text("{}")
        ...         before = Path(place, "saved").exists()
        ...     before, Path(place, "saved", "about.json").read_text()
        (False, '{}')
    """
    target = Path(folder).resolve()
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / about).is_file()):
        raise FileExistsError(f"{target} is there and holds no zr model: it would be lost, so choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        (staging / "new").mkdir()
        yield staging / "new"
        if target.exists():
            target.rename(staging / "old")
        (staging / "new").rename(target)
    finally:
        if (staging / "old").exists() and not target.exists():
            (staging / "old").rename(target)
        shutil.rmtree(staging)
