"""Prompts alone, for what makes images itself: from a text file, a JSONL file or the records of shards."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zr.data.counting import CountedData
from zr.data.record import SHORT, parse_json
from zr.data.remote import RemotePath, place
from zr.data.shards import read_shards

__all__ = ["PromptBatch", "PromptData", "PromptLoader", "read_prompts"]


@dataclass  # not frozen, or Lightning could not hand it to a device
class PromptBatch:
    """Prompts, and the keys that they are known by.

    Args:
        keys: N names, none twice among the prompts of a split.
        prompts: N texts.
    """

    keys: list[str]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, part: slice) -> PromptBatch:
        """Some of them."""
        return PromptBatch(self.keys[part], self.prompts[part])


def read_prompts(source: str | Path) -> PromptBatch:
    r"""All prompts of a source.

    Args:
        source: a local path or an address. ``FILE.txt``: a prompt in each line, whose number is its key. ``FILE.jsonl``: an
            object in each line with ``prompt`` and, if it shall have another key than the number of the line, ``key``; other
            fields are not looked at. Else ``FOLDER/SPLIT`` of shards: their records' prompts and keys. The shards are read
            through for that; of a large set write the prompts to a file once.

    Raises:
        FileNotFoundError: no such file, folder or split.
        ValueError: a line that is blank, no UTF-8 or no such object, a key that repeats, no prompt at all.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "prompts.txt")
        ...     _ = file.write_text("a red ring\na blue square\n")
        ...     read_prompts(file)
        PromptBatch(keys=['1', '2'], prompts=['a red ring', 'a blue square'])
    """
    path = place(source)
    if path.name.endswith((".txt", ".jsonl")):
        found = list(_lines(path))
    else:
        found = [(record.key, record.prompt) for record in read_shards(str(path.parent), path.name)]
    if not found:
        raise ValueError(f"{path} holds no prompt: write one in each line")
    keys = [key for key, _ in found]
    if len(set(keys)) < len(keys):
        again = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"{path}: the key {SHORT.repr(again)} is repeated: give each prompt its own")
    return PromptBatch(keys, [prompt for _, prompt in found])


def _lines(path: Path | RemotePath) -> Iterator[tuple[str, str]]:
    """Key and prompt of each line of a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        key, prompt = str(number), line.rstrip("\r")
        if path.name.endswith(".jsonl"):
            key, prompt = _fields(line, key, where)
        if not prompt.strip():
            raise ValueError(f"{where} holds no prompt: write one there, or remove the line")
        yield key, prompt


def _fields(line: str, number: str, where: str) -> tuple[str, str]:
    """Key and prompt of a JSON object."""
    try:
        data = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    given = (data.get("key", number), data.get("prompt")) if isinstance(data, dict) else (None, None)
    for value in given:
        if not isinstance(value, str) or not value or any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f'{where}: {{"prompt": TEXT}} is needed, and "key" a text if it is given; got {SHORT.repr(line)}')
    key, prompt = given
    return str(key), str(prompt)


class PromptLoader:
    """An iterable of :class:`PromptBatch` with a length. Made by :class:`PromptData`.

    Training goes through all prompts in an order drawn from (seed, epoch), of which rank r takes those numbered r, r + ranks,
    ...; where they do not divide, the last ones are taken from the beginning of the order again, so that all ranks give equally
    many. What was given is counted, and a loaded state goes on after it. Evaluation gives each prompt once, in order.

    Args:
        prompts: of the split, for all ranks.
        batch_size: prompts in a batch; the last one of a pass may be smaller.
        seed: of the order; None for evaluation.
        epoch: called at the beginning of a pass, with the epoch that a loaded state asks for, or None; gives the pass's epoch.
        processed: gives how many batches of the pass have been worked through; None where nobody counts.
        rank: of this process.
        ranks: how many there are.
    """

    def __init__(
        self,
        prompts: PromptBatch,
        batch_size: int,
        seed: int | None,
        epoch: Callable[[int | None], int],
        processed: Callable[[], int | None],
        rank: int,
        ranks: int,
    ) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.processed = processed
        self.rank = rank
        self.ranks = ranks
        self.settings = {
            "ranks": ranks,
            "batch_size": batch_size,
            "seed": seed,
            "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
        }
        self._given = (-1, 0)  # epoch, batches
        self._loaded = False

    def __len__(self) -> int:
        return -(-len(self._mine(0)) // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        loaded, (epoch, batches) = self._loaded, self._given
        now = self.epoch(epoch + (batches == 0) if loaded else None)
        first = batches if loaded and epoch == now else 0
        self._loaded, self._given = False, (now, first)
        mine = self._mine(now)
        for number in range(first, len(self)):
            some = mine[number * self.batch_size : (number + 1) * self.batch_size]
            self._given = (now, number + 1)
            yield PromptBatch([self.prompts.keys[i] for i in some], [self.prompts.prompts[i] for i in some])

    def state_dict(self) -> dict[str, Any]:
        """How far all ranks came, as plain values."""
        epoch, batches = self._given
        if self.processed() == batches - 1:
            batches -= 1  # the last one is being worked on
        return {"settings": self.settings, "epoch": epoch, "batches": batches, "length": len(self)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there at the next pass; from the end of an epoch, with the next epoch.

        Raises:
            ValueError: in the middle of an epoch, something differs that decides on the order.
        """
        batches = state_dict["batches"] if state_dict["batches"] < state_dict["length"] else 0
        for name, now in self.settings.items() if batches else ():
            then = state_dict["settings"][name]
            if then != now:
                raise ValueError(
                    f"the run was stopped in the middle of an epoch with {name}={then}, now it is {now}: resume with "
                    f"{name}={then}, or start a new epoch (from a checkpoint of the end of one, or without ckpt_path)"
                )
        self._given, self._loaded = (state_dict["epoch"], batches), True

    def _mine(self, epoch: int) -> list[int]:
        """The numbers of this rank's prompts, in the order of an epoch."""
        count = len(self.prompts)
        if self.seed is None:
            return list(range(self.rank, count, self.ranks))
        order = random.Random(f"{self.seed} {epoch}").sample(range(count), count)
        return [order[i % count] for i in range(self.rank, -(-count // self.ranks) * self.ranks, self.ranks)]


class PromptData(CountedData):
    r"""Batches of prompts, for stages that make images.

    Args:
        train: where the prompts for training are; see :func:`read_prompts`.
        validation: where those for validation are; None for none.
        batch_size: prompts in a batch of each process.
        limit: prompts of validation, from the first on; None for all.
        seed: of the order of training.

    Raises:
        FileNotFoundError: no such file, folder or split; raised by ``setup``, before the first step.
        ValueError: a batch size or limit below 1, prompts that cannot be read, fewer prompts than processes.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "prompts.txt")
        ...     _ = file.write_text("night\nday\ndusk\n")
        ...     loader = PromptData(file, file, batch_size=2).val_dataloader()
        >>> [batch.prompts for batch in loader]
        [['night', 'day'], ['dusk']]
    """

    def __init__(
        self,
        train: str | Path,
        validation: str | Path | None = None,
        batch_size: int = 8,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.train = train
        self.validation = validation
        self.batch_size = batch_size
        self.limit = limit
        self.seed = seed
        self._read: dict[str, PromptBatch] = {}

    def setup(self, stage: str) -> None:
        """Read the prompts that ``stage`` (fit or validate) needs, before anything expensive begins."""
        if stage == "fit":
            self.train_dataloader()
        self.val_dataloader()

    def train_dataloader(self) -> PromptLoader:
        """Batches of the prompts for training, in an order of its own in each epoch."""
        return self._loader(self.train, None, self.seed)

    def val_dataloader(self) -> PromptLoader | list[PromptLoader]:
        """Batches of the prompts for validation, each once; an empty list without any."""
        return [] if self.validation is None else self._loader(self.validation, self.limit, None)

    def _loader(self, source: str | Path, limit: int | None, seed: int | None) -> PromptLoader:
        if str(source) not in self._read:
            self._read[str(source)] = read_prompts(source)
        prompts = self._read[str(source)].select(slice(limit))
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if len(prompts) < ranks:
            raise ValueError(f"{source} gives {len(prompts)} prompts for {ranks} processes: add some, or use fewer devices")
        training = seed is not None
        return PromptLoader(
            prompts=prompts,
            batch_size=self.batch_size,
            seed=seed,
            **self.counting(training),
            rank=rank,
            ranks=ranks,
        )
