"""A folder of pictures that `zr draw` made and `zr gsb` compares: the pictures, a line for each, and how they were made."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zr.data.prompts import PromptBatch
from zr.data.record import SHORT, parse_json
from zr.data.shards import atomic

__all__ = ["LINES", "SETTINGS", "Folder", "Picture", "numbered", "settled"]

LINES = "prompts.jsonl"
SETTINGS = "settings.json"
IMAGES = "images"


@dataclass(frozen=True)
class Picture:
    """One picture to draw, or drawn.

    Args:
        key: of its prompt.
        prompt: what it shall show.
        number: which one of its prompt.
    """

    key: str
    prompt: str
    number: int

    @property
    def file(self) -> str:
        """Where it lies in its folder; a key that is no plain lower-case name is told from any other by a digest."""
        plain = re.sub(r"[^a-z0-9_-]", "_", self.key.lower())[:80]
        if plain != self.key:
            plain += f"-{hashlib.blake2b(self.key.encode(), digest_size=6).hexdigest()}"
        return f"{IMAGES}/{plain}.{self.number}.png"


def numbered(prompts: PromptBatch, images: int) -> list[Picture]:
    """The pictures of prompts, ``images`` of each."""
    return [Picture(*pair, number) for pair in zip(prompts.keys, prompts.prompts, strict=True) for number in range(images)]


def settled(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings of a folder, which is made if needed, or see that they are those that it was begun with.

    Raises:
        FileExistsError: a folder with other contents.
        ValueError: another setting, which the message names.
    """
    file = folder / SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds something else, and no {SETTINGS}: choose an empty or a new folder")
        with atomic(file) as new:
            new.write((json.dumps(settings, indent=2) + "\n").encode())
        return
    found = _settings(file)
    for name in [*settings, *found]:
        if found.get(name) != settings.get(name):
            raise ValueError(
                f"{folder} was begun with {name} {SHORT.repr(found.get(name))}, now it is {SHORT.repr(settings.get(name))}: "
                "give the same, or choose another folder"
            )


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): remove the folder, and draw it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object: remove the folder, and draw it again")
    return found


@dataclass(frozen=True)
class Folder:
    """A complete folder, as `zr draw` leaves it.

    Args:
        path: of the folder.
        settings: how it was drawn.
        pictures: its pictures, in order.
    """

    path: Path
    settings: Mapping[str, Any]
    pictures: Sequence[Picture]

    @classmethod
    def load(cls, path: Path) -> Folder:
        """Read what a folder holds; pictures are read when asked for.

        Raises:
            FileNotFoundError: not a folder of `zr draw`.
            ValueError: a damaged line, a folder that is not finished.
        """
        if not (path / SETTINGS).is_file():
            raise FileNotFoundError(f"{path} holds no pictures of `zr draw`: {SETTINGS} is not there")
        settings = _settings(path / SETTINGS)
        lines = path / LINES
        pictures = read_lines(lines.read_bytes().splitlines(), lines) if lines.is_file() else []
        if len(pictures) != settings.get("pictures"):
            wanted = settings.get("pictures")
            raise ValueError(f"{path} holds {len(pictures)} of its {wanted} pictures: run its `zr draw` again, it goes on")
        return cls(path, settings, pictures)

    def read(self, picture: Picture) -> bytes:
        """The PNG file of a picture."""
        file = self.path / picture.file
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there, but a line in {self.path / LINES} names it: draw the folder again")
        return file.read_bytes()


def read_lines(lines: Iterable[bytes], path: Path) -> list[Picture]:
    """The pictures of lines of a file ``path``.

    Raises:
        ValueError: a line that `zr draw` did not write, or a picture that has two.
    """
    found: dict[tuple[str, int], Picture] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            entry = parse_json(line)
            picture = Picture(entry["key"], entry["prompt"], entry["number"])
            known = picture.file == entry["file"] and isinstance(picture.prompt, str) and type(picture.number) is int
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise ValueError(f"{where} is no line of `zr draw`: {SHORT.repr(line)}; remove the folder, and draw it again")
        if (picture.key, picture.number) in found:
            raise ValueError(f"{where} names picture {picture.number} of {SHORT.repr(picture.key)} again: remove the line")
        found[picture.key, picture.number] = picture
    return list(found.values())
