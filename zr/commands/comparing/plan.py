"""Plans of experiments: cells, what each follows from, and the digests by which a finished one is known."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from zr.commands.comparing.paper import FIGURES
from zr.commands.configs import PREFIX, packaged
from zr.version import __version__

__all__ = ["DATA", "RATE", "SPLITS", "Cell", "Plan"]

DATA = "data"
"""The cell that every plan has: its splits, those that are trained on apart from the one that is measured on."""

SPLITS = ("base", "train", "unlabelled", "validation", "test")
WRITTEN = ("base", "train", "unlabelled", "curated")
"""Splits of the built-in world that a cell may write for itself: nothing is measured on them."""

RATE = "model.optimizer.init_args.lr"
"""The option that ``rates`` stand for."""

MEASURES = 2
"""What is measured; a cell whose measures are of another number is measured again."""

DRAW = {"guidance", "steps", "best_of", "reward", "aggregation", "scorers", "against"}
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
REFERENCE = re.compile(r"\{([\w.-]+)\}")
MODULE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Cell:
    """One experiment of a plan; which fields it has says what it does.

    Args:
        name: of the cell, and of its folder.
        fit: recipes of ``zr fit``, ``zr:NAME`` or files beside the plan.
        label: the cell whose model labels ``data`` (``zr label``).
        mix: prompts to take of each split of ``data``, for a split ``train`` of them in random order.
        write: by split of the built-in world ``prompts`` and ``candidates``, such as the ``curated`` pictures that a generator
            learns from; in shards of their own, so that the plan's splits stay as they are.
        start: the cell whose model training starts from; without ``fit``, the cell that is measured or drawn from as it is.
        model: in place of a cell, a model's folder or its name on the hub.
        data: the cell whose ``splits`` are trained on, labelled or mixed; validation is always the plan's.
        splits: of ``data``, to train on or to label.
        options: of ``zr fit`` (``{"trainer.max_steps": 400}`` is ``--trainer.max_steps=400``) or of ``zr label``. In texts
            ``{seed}`` is the seed and ``{CELL}`` the folder of a cell, which this one then follows from.
        rates: learning rates, of which the one that validation prefers is kept; none for the recipe's. A rate that was tried
            is not tried again when others are added to its cell; cells that follow from it are run again.
        measure: how it is measured; None for not at all. ``traces`` of a model that reasons, or shall (``length``: their most
            tokens); without it the model answers as it was saved.
        draw: how pictures are drawn of a generator, one for each prompt that is measured on, for the world's judge; None for
            not at all. ``guidance`` and ``steps`` as in ``zr draw``; ``best_of`` so many, chosen by the model of the cell
            ``reward`` and an ``aggregation``, the mean without one; ``scorers``, cells whose models score the pictures too;
            ``against``, the drawn cell whose pictures of the same prompts and noise they are compared with.
        paper: size and method of the paper's row beside which it is shown; the one entry that ``like`` does not take over.
    """

    name: str
    fit: tuple[str, ...] = ()
    label: str = ""
    mix: Mapping[str, int] = field(default_factory=dict)
    write: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""
    model: str = ""
    data: str = DATA
    splits: tuple[str, ...] = ("train",)
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    measure: Mapping[str, int] | None = None
    draw: Mapping[str, Any] | None = None
    paper: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """Cells that its options name."""
        texts = (value for value in self.options.values() if isinstance(value, str))
        return tuple(name for text in texts for name in REFERENCE.findall(text) if name != "seed")

    @property
    def origins(self) -> tuple[str, ...]:
        """Cells that what it makes follows from."""
        if self.name == DATA:
            return ()
        trained = (DATA, self.data) if self.fit or self.label or self.mix else ()
        measured = (DATA,) if self.measure is not None else ()
        named = [name for name in (*trained, *measured, self.start, self.label, *self.references) if name]
        return tuple(dict.fromkeys(named))

    @property
    def asked(self) -> tuple[str, ...]:
        """Cells whose models choose or score what is drawn of it."""
        asked = self.draw or {}
        return tuple(dict.fromkeys(name for name in (asked.get("reward"), *asked.get("scorers", ())) if name))

    @property
    def needs(self) -> tuple[str, ...]:
        """Cells that must be there before it runs."""
        against = (self.draw or {}).get("against")
        drawn = () if self.draw is None else (DATA, *self.asked, *([against] if against else []))
        return tuple(dict.fromkeys((*self.origins, *drawn)))

    @property
    def makes_data(self) -> bool:
        """Whether shards come of it, in place of a model."""
        return bool(self.label or self.mix or self.write)


@dataclass(frozen=True)
class Plan:
    """Cells, seeds and what is asked of them.

    Args:
        name: of the plan.
        file: it was read from; recipes and modules of the user's own lie beside it.
        data: by split of the built-in world ``prompts`` and ``candidates``; or ``folder``, the user's own shards.
        seeds: each cell is run with each, of data, base and method.
        cells: by name, ``data`` among them; as they are written, but each after what it follows from. In this order they run.
        split: that is measured on: ``test``, or ``validation`` for a search, which leaves the test split alone.
        baseline: the cell that all measured ones are compared with.
        teacher: the cell from whose distributions the others' distance is measured.
        ordering: chains of cells, of which each is expected to be better than the one before.
        figures: pictures of mean HPA beside that of all cells: by title, panel and row a cell. In a panel the others are
            compared with the first, seed by seed.

    Example:
        >>> cells = {"base": {"fit": ["zr:look"]}, "sft": {"fit": ["zr:supervised"], "start": "base", "measure": {}}}
        >>> plan = Plan.of({"cells": cells, "data": {"train": {"prompts": 5, "candidates": 2}}})
        >>> list(plan.cells), plan.cells["sft"].needs
        (['data', 'base', 'sft'], ('data', 'base'))
        >>> Plan.of({"cells": {"sft": {"fit": ["zr:supervised"], "start": "bas"}}})
        Traceback (most recent call last):
        ValueError: plan: cell sft names the cell 'bas', which the plan does not have; it has sft
    """

    name: str
    file: Path
    data: Mapping[str, Any]
    seeds: tuple[int, ...]
    cells: Mapping[str, Cell]
    split: str = "test"
    baseline: str = ""
    teacher: str = ""
    ordering: tuple[tuple[str, ...], ...] = ()
    figures: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)

    @classmethod
    def load(cls, source: str, quick: bool = False) -> Plan:
        """Read a plan.

        Args:
            source: ``zr:NAME`` of a packaged one, or a YAML file. Its ``like: PLAN`` takes another plan's entries where it has
                none of its own.
            quick: with what it changes under ``quick``.

        Raises:
            FileNotFoundError: no such plan or recipe.
            ValueError: what :meth:`of` refuses.
        """
        file = _file(source)
        entries = _entries(file, ())
        changes = entries.pop("quick", None)
        if quick:
            if changes is None:
                raise ValueError(f"{file}: the plan has no entry quick, which says what --quick leaves out")
            gone = {name: None for name, cell in (entries.get("cells") or {}).items() if cell is None}
            entries = _merged(_merged(entries, changes), {"cells": gone})  # what a plan has taken away stays away
        return cls.of(entries, f"{file.stem}{'-quick' if quick else ''}", file)

    @classmethod
    def of(cls, entries: Mapping[str, Any], name: str = "plan", file: Path = Path("plan.yaml")) -> Plan:
        """A plan from plain data, checked before anything runs.

        Raises:
            FileNotFoundError: a recipe that is not there.
            ValueError: an unknown entry, split or cell; cells that wait for each other; a cell without what it starts from.
        """
        allowed = {f.name for f in fields(cls)} - {"name", "file"} | {"options"}
        _known(name, entries, allowed)
        _shape(f"{name}: cells", entries.get("cells") or {}, Mapping, "a mapping of names to cells")
        _each(f"{name}: seeds", entries.get("seeds") or (), int, "a list of whole numbers such as [0, 1, 2]")
        _each(f"{name}: ordering", entries.get("ordering") or (), list | tuple, "a list of chains such as [[sft, gdso]]")
        written: dict[str, Any] = {key: value for key, value in (entries.get("cells") or {}).items() if value is not None}
        if not written:
            raise ValueError(f"{name}: a plan needs cells")
        everywhere = entries.get("options") or {}
        found = {key: _cell(name, key, _likeness(name, key, written, ()), everywhere) for key in written}
        graph = {key: [n for n in cell.needs if n != DATA] for key, cell in found.items()}
        splits = _data(name, entries.get("data") or {})
        for cell in found.values():
            _check(name, cell, found, file)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            raise ValueError(f"{name}: cells wait for each other: {' -> '.join(reversed(error.args[1]))}") from None
        for cell in found.values():
            _check_drawing(name, cell, found, file, splits)
        cells = {DATA: Cell(DATA), **{key: found[key] for key in _ordered(graph)}}
        plan = cls(
            name,
            file,
            splits,
            tuple(entries.get("seeds") or (0,)),
            cells,
            entries.get("split") or "test",
            entries.get("baseline") or "",
            entries.get("teacher") or "",
            tuple(tuple(chain) for chain in entries.get("ordering") or ()),
            _figures(name, entries.get("figures") or {}),
        )
        if plan.split not in ("test", "validation"):
            raise ValueError(f"{name}: split is what is measured on, test or validation, got {plan.split!r}")
        chains = [("ordering", chain) for chain in plan.ordering]
        chains += [("figures", tuple(rows.values())) for panels in plan.figures.values() for rows in panels.values()]
        for what, named in (("baseline", (plan.baseline,)), ("teacher", (plan.teacher,)), *chains):
            for key in filter(None, named):
                if key not in cells:
                    raise ValueError(_absent(name, what, key, found))
                if cells[key].measure is None:
                    raise ValueError(f"{name}: {what} names the cell {key!r}, which is not measured: give it `measure: {{}}`")
        return plan

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the cells that are measured, in the order of the plan."""
        return tuple(name for name, cell in self.cells.items() if cell.measure is not None)

    @property
    def drawn(self) -> tuple[str, ...]:
        """Names of the cells that pictures are drawn of, in the order of the plan."""
        return tuple(name for name, cell in self.cells.items() if cell.draw is not None)

    def needed(self, names: Iterable[str]) -> set[str]:
        """Cells, and all that they follow from.

        Raises:
            ValueError: a cell that the plan does not have.
        """
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in self.cells:
                raise ValueError(_absent(self.name, "the command", name, self.cells))
            if name not in found:
                found.add(name)
                waiting += self.cells[name].needs
        return found

    def following(self, names: Iterable[str]) -> set[str]:
        """Cells, and all whose product follows from them.

        Raises:
            ValueError: a cell that the plan does not have.
        """
        found = set(names)
        self.needed(found)
        for name, cell in self.cells.items():  # each comes after what it follows from
            if found & set(cell.origins):
                found.add(name)
        return found

    def recipes(self, cell: Cell) -> list[Path]:
        """Files of a cell's recipes."""
        return [recipe(name, self.file) for name in cell.fit]

    def digest(self, name: str, seed: int) -> str:
        """Of all that decides on what a cell makes: its settings, recipes and modules, and those of all it follows from."""
        return self._digest(self.cells[name], seed)

    def trials(self, name: str, seed: int) -> dict[float, str]:
        """By learning rate of a cell that tries some: the digest that it would have with this one alone."""
        cell = self.cells[name]
        return {rate: self._digest(replace(cell, rates=(), options={**cell.options, RATE: rate}), seed) for rate in cell.rates}

    def _digest(self, cell: Cell, seed: int) -> str:
        later = ("measure", "draw", "paper")  # what does not decide on it
        settings = {key: value for key, value in asdict(cell).items() if key not in later and (key != "write" or value)}
        settings["options"] = {key: value for key, value in cell.options.items() if key != RATE or not cell.rates}
        texts = [json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), default=str) for path in self.recipes(cell)]
        about = {
            "zr": __version__,
            "seed": seed,
            "cell": settings,
            "recipes": texts,  # without their comments, which may change
            "modules": self._modules([*texts, *(value for value in cell.options.values() if isinstance(value, str))]),
            "needs": {need: self.digest(need, seed) for need in cell.origins},
            "data": [self.data, self.split] if cell.name == DATA else None,
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def measured_digest(self, name: str, seed: int) -> str:
        """Of all that decides on a cell's measures."""
        about = [MEASURES, self.digest(name, seed), self.digest(DATA, seed), self.cells[name].measure, self.split]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def drawn_digest(self, name: str, seed: int) -> str:
        """Of all that decides on the pictures of a cell and their scores."""
        cell = self.cells[name]
        settings = {key: value for key, value in (cell.draw or {}).items() if key != "against"}
        followed = {need: self.digest(need, seed) for need in (DATA, *cell.asked)}
        about = [self.digest(name, seed), settings, followed, self.split]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def _modules(self, texts: list[str]) -> dict[str, str]:
        """The text of each module beside the plan that a class path names."""
        names = {path.split(".")[0] for text in texts for path in MODULE.findall(text)}
        files = {name: self.file.parent / f"{name}.py" for name in sorted(names)}
        return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}


def _ordered(graph: Mapping[str, Sequence[str]]) -> list[str]:
    """The nodes as they are written, but each after those that it points to."""
    placed: dict[str, None] = {}

    def place(name: str) -> None:
        for other in graph[name]:
            if other not in placed:
                place(other)
        placed[name] = None

    for name in graph:
        place(name)
    return list(placed)


def recipe(name: str, plan: Path) -> Path:
    """The file of a recipe: a packaged one, or one beside the plan.

    Raises:
        FileNotFoundError: it is not there.
    """
    if name.startswith(PREFIX):
        return packaged(name)
    path = plan.parent / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}: name a packaged one (zr configs), or a file beside the plan")
    return path.resolve()


def _file(source: str) -> Path:
    if source.startswith(PREFIX):
        path = packaged(f"{PREFIX}supervised").parent / "plans" / f"{source.removeprefix(PREFIX)}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(f"{PREFIX}{file.stem}" for file in path.parent.glob("*.yaml")))
            raise FileNotFoundError(f"there is no packaged plan {source}; there are {known}")
        return path
    if not Path(source).is_file():
        raise FileNotFoundError(f"there is no plan {source}: give a YAML file, or a packaged plan such as zr:main")
    return Path(source).resolve()


def _entries(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """What a plan says, what it takes of others included."""
    if file in seen:
        raise ValueError(f"plans are like each other: {' -> '.join(map(str, (*seen, file)))}")
    try:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from None
    if not isinstance(own, dict):
        raise ValueError(f"{file}: a plan is a mapping with cells, got {type(own).__name__}")
    other = own.pop("like", None)
    if other is None:
        return own
    near = file.parent / other
    return _merged(_entries(near.resolve() if near.is_file() else _file(other), (*seen, file)), own)


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The second over the first, mapping by mapping; a null takes an entry away."""
    merged = dict(first)
    for key, value in second.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def _likeness(plan: str, name: str, cells: Mapping[str, Any], seen: tuple[str, ...]) -> dict[str, Any]:
    """A cell's entries, those of the cell that it is ``like`` included."""
    if name in seen:
        raise ValueError(f"{plan}: cells are like each other: {' -> '.join((*seen, name))}")
    if name not in cells:
        raise ValueError(_absent(plan, f"cell {seen[-1]}", name, cells))
    if not isinstance(cells[name], Mapping):
        raise ValueError(f"{plan}: cell {name} must be a mapping such as {{fit: [zr:supervised]}}, got {cells[name]!r}")
    own = dict(cells[name])
    other = own.pop("like", None)
    if other is None:
        return own
    parent = _likeness(plan, other, cells, (*seen, name))
    return _merged(
        {key: value for key, value in parent.items() if key != "paper"}, own
    )  # a cell of one's own is not the paper's


def _cell(plan: str, name: str, entries: Mapping[str, Any], everywhere: Mapping[str, Any]) -> Cell:
    if not NAME.fullmatch(name) or name in (DATA, "seed"):
        raise ValueError(f"{plan}: a cell's name has letters, digits, '_', '.', '-', and is not data or seed; got {name!r}")
    known = {f.name for f in fields(Cell)} - {"name"}
    _known(f"{plan}: cell {name}", entries, known)
    given = {key: value for key, value in entries.items() if value is not None}
    for key in ("fit", "splits", "rates", "paper"):
        if key in given:
            _shape(f"{plan}: cell {name}: {key}", given[key], list | tuple | str, "a list")
            given[key] = tuple([given[key]] if isinstance(given[key], str) else given[key])
    for key in ("options", "mix", "write", "measure", "draw"):
        _shape(f"{plan}: cell {name}: {key}", given.get(key, {}), Mapping, "a mapping")
    _each(f"{plan}: cell {name}: rates", given.get("rates", ()), int | float, "a list of numbers such as [0.0003, 0.001]")
    if given.get("paper", ()) not in ((), *FIGURES):
        rows = "; ".join(", ".join(row) for row in FIGURES)
        raise ValueError(f"{plan}: cell {name}: paper is a row of the paper's tables, got {given['paper']!r}; there are {rows}")
    if "measure" in given:
        _known(f"{plan}: cell {name}: measure", given["measure"], {"traces", "length"})
    if "draw" in given:
        _known(f"{plan}: cell {name}: draw", given["draw"], DRAW)
        given["draw"] = {key: value for key, value in given["draw"].items() if value is not None}
        if isinstance(scorers := given["draw"].get("scorers"), str):
            given["draw"]["scorers"] = [scorers]
    _sizes(f"{plan}: cell {name}: write", given.get("write", {}), WRITTEN)
    if given.get("fit"):
        given["options"] = {**everywhere, **given.get("options", {})}
    return Cell(name, **given)


def _check(plan: str, cell: Cell, cells: Mapping[str, Cell], file: Path) -> None:
    """That a cell can run."""
    where = f"{plan}: cell {cell.name}"
    for named in cell.needs:
        if named != DATA and named not in cells:
            raise ValueError(_absent(plan, f"cell {cell.name}", named, cells))
    kinds = [kind for kind in ("fit", "label", "mix", "write") if getattr(cell, kind)]
    if len(kinds) > 1:
        raise ValueError(f"{where} has {' and '.join(kinds)}: give it one of them")
    if cell.start and cell.model:
        raise ValueError(f"{where} has start and model: start is a cell, model one from elsewhere; give it one of them")
    if cell.data != DATA and not cells[cell.data].makes_data:
        raise ValueError(f"{where} reads the data of {cell.data}, which makes none: name a cell with label, mix or write")
    for key in ("start", "label"):
        other = cells.get(getattr(cell, key))
        if other is not None and other.makes_data:
            raise ValueError(f"{where} needs a model to {key} from, and {other.name} makes data")
    texts = [_recipe_text(f"{where}: {name}", recipe(name, file)) for name in cell.fit]
    if not (cell.start or cell.model) and (not kinds or any("${start}" in text for text in texts)):
        raise ValueError(f"{where} has nothing to start from: give it start (a cell) or model (a folder or a name on the hub)")
    if kinds and "fit" not in kinds and cell.measure is not None:
        raise ValueError(f"{where} makes data, which cannot be measured: leave measure out")
    if cell.rates and not cell.fit:
        raise ValueError(f"{where} has rates and does not train: leave them out")


def _recipe_text(where: str, path: Path) -> str:
    """A recipe's text, which is YAML."""
    text = path.read_text(encoding="utf-8")
    try:
        yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {error}") from None
    return text


def _check_drawing(plan: str, cell: Cell, cells: Mapping[str, Cell], file: Path, splits: Mapping[str, Any]) -> None:
    """That a cell can be drawn from, if it shall be."""
    where = f"{plan}: cell {cell.name}"
    generator = _makes_generator(cell, cells, file)
    if cell.measure is not None and generator:
        raise ValueError(f"{where} makes a generator, which no score is asked of: give it draw in place of measure")
    if cell.draw is None:
        return
    if cell.makes_data or not generator:
        raise ValueError(f"{where} makes no generator to draw with: leave draw out, or let a recipe keep one (KeepGenerator)")
    if "folder" in splits:
        raise ValueError(f"{where} draws, and only the built-in world has a judge: leave out draw, or data's folder")
    for name in cell.asked:
        if cells[name].makes_data or _makes_generator(cells[name], cells, file):
            raise ValueError(f"{where} lets {name} score its pictures, which makes no reward model: name a cell that does")
    numbers, best = {"guidance": 0, "steps": 1, "best_of": 1}, {"best_of", "reward"}
    for key, least in numbers.items():
        value = cell.draw.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int if least else int | float) or value < least:
            raise ValueError(f"{where}: draw: {key} must be a number of at least {least}, got {value!r}")
    if len(best & cell.draw.keys()) == 1 or ("aggregation" in cell.draw and not best <= cell.draw.keys()):
        raise ValueError(f"{where}: draw: best_of and reward go together: how many are drawn, and whose model chooses")
    other = cell.draw.get("against")
    if other is not None and cells[other].draw is None:
        drawn = ", ".join(name for name, one in cells.items() if one.draw is not None and name != cell.name) or "none"
        raise ValueError(f"{where} is drawn against {other!r}, which is not drawn; {drawn} is: give it `draw: {{}}`")


def _makes_generator(cell: Cell, cells: Mapping[str, Cell], file: Path) -> bool:
    """Whether a cell ends with a generator; of a model from elsewhere the plan says so by drawing."""
    origin = cell
    while origin.start and not origin.fit:
        origin = cells[origin.start]
    if origin.fit:
        return any("KeepGenerator" in recipe(name, file).read_text(encoding="utf-8") for name in origin.fit)
    return cell.draw is not None


def _data(plan: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's data, checked."""
    if "folder" in entries:
        _known(f"{plan}: data", entries, {"folder"})
        return dict(entries)
    return _sizes(f"{plan}: data", entries, SPLITS)


def _sizes(where: str, entries: Mapping[str, Any], splits: Sequence[str]) -> dict[str, Any]:
    """How much is written of each split, checked."""
    _known(where, entries, set(splits))
    for split, size in entries.items():
        if not isinstance(size, Mapping) or set(size) != {"prompts", "candidates"}:
            raise ValueError(f"{where}: {split} is {{prompts: NUMBER, candidates: NUMBER}}, got {size!r}")
    return {split: dict(size) for split, size in entries.items()}


def _figures(plan: str, entries: Mapping[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    """The plan's figures, checked but for the cells; a null takes one away."""
    found = {title: panels for title, panels in entries.items() if panels is not None}
    for title, panels in found.items():
        rows = list(panels.values()) if isinstance(panels, Mapping) else [None]
        if not all(isinstance(row, Mapping) and all(isinstance(cell, str) for cell in row.values()) for row in rows):
            raise ValueError(f"{plan}: figures: {title} is {{PANEL: {{ROW: CELL}}}}, got {panels!r}")
    return {
        str(title): {str(panel): {str(row): cell for row, cell in rows.items()} for panel, rows in of.items()}
        for title, of in found.items()
    }


def _shape(where: str, given: Any, kind: Any, wanted: str) -> None:
    if not isinstance(given, kind):
        raise ValueError(f"{where} must be {wanted}, got {given!r}")


def _each(where: str, given: Any, kind: Any, wanted: str) -> None:
    if not isinstance(given, list | tuple) or not all(isinstance(one, kind) and not isinstance(one, bool) for one in given):
        raise ValueError(f"{where} must be {wanted}, got {given!r}")


def _known(where: str, entries: Mapping[str, Any], allowed: set[str]) -> None:
    for key in entries:
        if key not in allowed:
            raise ValueError(f"{where}: there is no entry {key!r}; there are {', '.join(sorted(allowed))}")


def _absent(plan: str, who: str, name: str, cells: Mapping[str, Any]) -> str:
    there = ", ".join(cell for cell in cells if cell != DATA)
    return f"{plan}: {who} names the cell {name!r}, which the plan does not have; it has {there}"
