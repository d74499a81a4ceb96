"""Who is whose in the pairs that people judge blindly, and what they answered."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from zr.commands.pictures import Folder
from zr.data.record import SHORT, parse_json
from zr.data.shards import atomic

__all__ = ["KEY", "Answer", "Hidden", "Key"]

KEY = "key.json"
FORMAT = 1
GOOD = {"left": 1, "same": 0, "right": -1}
"""What an answer says of the left picture."""


@dataclass(frozen=True)
class Hidden:
    """What a pair's id hides.

    Args:
        index: of the picture in both folders.
        new_left: whether the left picture is the new generator's.
    """

    index: int
    new_left: bool


@dataclass(frozen=True)
class Answer:
    """What one person said of one pair in one dimension.

    Args:
        key: of the prompt.
        dimension: what was asked.
        outcome: 1 where the new generator's picture is better, 0 where both are alike, -1 where it is worse.
        person: who answered.
    """

    key: str
    dimension: str
    outcome: int
    person: str


@dataclass(frozen=True)
class Key:
    """The answer key of a page, which the page itself does not hold.

    Args:
        about: what the page was made of, as plain values.
        dimensions: what is asked of each pair.
        pairs: by opaque id, in the order in which they are shown.
    """

    about: Mapping[str, Any]
    dimensions: Sequence[str]
    pairs: Mapping[str, Hidden]

    @classmethod
    def draw(cls, new: Folder, old: Folder, dimensions: Sequence[str], count: int | None, seed: int) -> Key:
        """Pairs in random order; of each the new picture is on the left or on the right, equally often but for one.

        Ids come from the pictures, so answers to a page of other pictures are not mistaken for answers to this one.

        Args:
            new: pictures of one generator.
            old: those of the other, in the same order.
            dimensions: what is asked of each pair.
            count: of pairs, drawn at random; None for all.
            seed: of order and sides.

        Raises:
            ValueError: more pairs than there are.
        """
        digests = [_digest(seed, new.read(p), old.read(p)) for p in new.pictures]
        whole = _digest(seed, *(digest.encode() for digest in digests))
        chance = random.Random(whole)
        if count is not None and count > len(digests):
            raise ValueError(f"--pairs {count}: there are {len(digests)}, give at most as many")
        order = chance.sample(range(len(digests)), len(digests) if count is None else count)
        sides = [place % 2 == 0 for place in range(len(order))]
        chance.shuffle(sides)
        ids = [_digest(seed, digests[index].encode(), str(index).encode()) for index in order]
        about = {
            "format": FORMAT,
            "new": str(new.path),
            "old": str(old.path),
            "pictures": whole,
            "seed": seed,
            "pairs": len(order),
        }
        return cls(about, tuple(dimensions), {i: Hidden(index, side) for i, index, side in zip(ids, order, sides, strict=True)})

    def save(self, path: Path) -> None:
        """Write the key, or see that it is there already.

        Raises:
            FileExistsError: another page's key is there, without which that page's answers could not be read.
        """
        if path.exists():
            if _compared(Key.load(path)) != _compared(self):
                raise FileExistsError(
                    f"{path} is of other pictures, dimensions or pairs, and answers would be lost: choose another --output"
                )
            return
        pairs = {name: vars(hidden) for name, hidden in self.pairs.items()}
        data = {**self.about, "dimensions": list(self.dimensions), "hidden": pairs}
        with atomic(path) as file:
            file.write((json.dumps(data, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Key:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no key there.
            ValueError: something else.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: give as --output the folder of the page that was answered")
        try:
            data = parse_json(path.read_bytes())
            pairs = {name: Hidden(**hidden) for name, hidden in data.pop("hidden").items()}
            dimensions = tuple(data.pop("dimensions"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path} is no answer key of `zr gsb`, or damaged: take it from the folder that was written"
            ) from None
        if data.get("format") != FORMAT:
            raise ValueError(f"{path} has format {data.get('format')}; this zr reads format {FORMAT}")
        return cls(data, dimensions, pairs)

    def check(self, new: Folder, old: Folder, path: Path) -> None:
        """See that the key is of these folders, in this order.

        Raises:
            ValueError: it is not.
        """
        if _compared(self) != _compared(Key.draw(new, old, self.dimensions, self.about["pairs"], self.about["seed"])):
            raise ValueError(
                f"{path} was written for NEW {self.about['new']} and OLD {self.about['old']}: give these, in this order, "
                "with the pictures that they had"
            )

    def read(self, paths: Sequence[Path], new: Folder) -> list[Answer]:
        """The answers of people.

        Args:
            paths: files that the page saved.
            new: pictures that the key is of.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged line, an answer to another page, a pair that a person answers twice, no answer at all.
        """
        found: dict[tuple[str, str, str], str] = {}
        answers = []
        for path in paths:
            for where, entry in _entries(path):
                pair, dimension, person = entry["pair"], entry["dimension"], entry["person"]
                if pair not in self.pairs:
                    raise ValueError(f"{where}: there is no pair {SHORT.repr(pair)}: these answers are of another page")
                if dimension not in self.dimensions:
                    raise ValueError(f"{where}: {SHORT.repr(dimension)} was not asked, only {', '.join(self.dimensions)}")
                if (pair, dimension, person) in found:
                    before = found[pair, dimension, person]
                    raise ValueError(
                        f"{where}: {SHORT.repr(person)} answers pair {pair} again, after {before}: keep one of them"
                    )
                found[pair, dimension, person] = where
                hidden = self.pairs[pair]
                outcome = GOOD[entry["answer"]] * (1 if hidden.new_left else -1)
                answers.append(Answer(new.pictures[hidden.index].key, dimension, outcome, person))
        if not answers:
            raise ValueError(f"{', '.join(map(str, paths))}: there is no answer: save the page's answers again")
        return answers


def _entries(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of a file that a page saved, checked, and where they stand."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of answers {path}")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where} is damaged ({error}): save the page's answers again") from None
        fields = ("pair", "dimension", "answer", "person")
        texts = isinstance(entry, dict) and all(isinstance(entry.get(field), str) for field in fields)
        if not texts or entry["answer"] not in GOOD:
            raise ValueError(
                f"{where}: texts {', '.join(fields)} are needed, with an answer of {', '.join(GOOD)}; got {SHORT.repr(line)}"
            )
        yield where, entry


def _digest(seed: int, *parts: bytes) -> str:
    digest = blake2b(str(seed).encode(), digest_size=8)
    for part in parts:
        digest.update(blake2b(part).digest())
    return digest.hexdigest()


def _compared(key: Key) -> tuple[Any, ...]:
    """What two keys must share: not the places of the folders, which may be moved."""
    return key.about.get("pictures"), key.dimensions, list(key.pairs.items())
