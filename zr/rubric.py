"""What is scored and how it is asked: the scale, which has an identity, and the wording, which has none."""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

__all__ = ["Rubric", "Scale", "Wording"]

PACKAGED = "zr:"


@dataclass(frozen=True)
class Scale:
    """Dimension names, one ascending tuple of bins for all of them, and anchors that say what earns which score.

    Args:
        bins: strictly ascending scores, at least two.
        anchors: per dimension, in their order: score -> the defects that earn it. May be empty for a dimension.

    Raises:
        ValueError: bins that do not ascend, no dimension, an anchor outside the bins' range.

    Example:
        >>> scale = Scale(bins=(1.0, 2.0, 3.0), anchors={"sharpness": {1.0: "blurred", 3.0: "crisp"}})
        >>> scale.dimensions, scale.range
        (('sharpness',), 2.0)
        >>> scale.scale_id == Scale(bins=(1, 2, 3), anchors={"sharpness": {}}).scale_id   # names and bins only
        True
    """

    bins: tuple[float, ...]
    anchors: Mapping[str, Mapping[float, str]]

    def __post_init__(self) -> None:
        bins = tuple(float(b) for b in self.bins)
        if len(bins) < 2 or not all(map(math.isfinite, bins)) or any(a >= b for a, b in pairwise(bins)):
            raise ValueError(f"scale.bins must be at least two finite scores in strictly ascending order, got {bins}")
        if not self.anchors:
            raise ValueError("scale.anchors names no dimension: give at least one, with an empty mapping if it has no anchors")
        anchors: dict[str, Mapping[float, str]] = {}
        for name, texts in self.anchors.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"scale.anchors: a dimension's name must be an identifier such as 'realism', got {name!r}")
            by_score = {float(score): str(text) for score, text in (texts or {}).items()}
            outside = [s for s in by_score if not bins[0] <= s <= bins[-1]]
            if outside:
                raise ValueError(
                    f"scale.anchors.{name}: anchor {outside[0]:g} lies outside the bins {bins[0]:g} to {bins[-1]:g}"
                )
            anchors[name] = MappingProxyType(dict(sorted(by_score.items())))
        object.__setattr__(self, "bins", bins)
        object.__setattr__(self, "anchors", MappingProxyType(anchors))

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The names, in order; D of them."""
        return tuple(self.anchors)

    @property
    def range(self) -> float:
        """Highest bin minus lowest bin, the R of eqs. (7) to (11)."""
        return self.bins[-1] - self.bins[0]

    @property
    def scale_id(self) -> str:
        """Identity of the scale: a hash of the dimensions' names and the bins. Records, labels and models match on it."""
        text = json.dumps([list(self.dimensions), list(self.bins)])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only view cannot be pickled, and loaders' workers are sent the scale.
        return (Scale, (self.bins, {name: dict(texts) for name, texts in self.anchors.items()}))


@dataclass(frozen=True)
class Wording:
    """How a model is asked for a score: teacher and student may differ in it, and share the scale.

    Args:
        system: system text, the same for every sample. ``{anchors}`` becomes all anchors, ``{labels}`` the map of labels.
        instructions: per dimension, the short text after the prompt that says what to judge.
        labels: one token per bin, in the order of the bins.
        template: arguments for the chat template, such as ``enable_thinking``.
        end: the one token that ends a trace.
        marker: text that stands between the (empty or written) trace and the label; always appended, never sampled. It ends
            without a space: most tokenizers write the space and the label as one token.
    """

    system: str
    instructions: Mapping[str, str]
    labels: tuple[str, ...]
    template: Mapping[str, Any] = field(default_factory=dict)
    end: str = "</think>"
    marker: str = "\n\nScore:"

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        object.__setattr__(self, "instructions", MappingProxyType(dict(self.instructions)))
        object.__setattr__(self, "template", MappingProxyType(dict(self.template)))

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.system, dict(self.instructions), self.labels, dict(self.template), self.end, self.marker)
        return (Wording, arguments)


@dataclass(frozen=True)
class Rubric:
    """A scale and a wording. Plain data, YAML in and out.

    Args:
        scale: what is scored; its ``scale_id`` is what records, labels and models are matched on.
        wording: how it is asked.

    Raises:
        ValueError: a dimension without instruction, labels that do not match the bins or repeat.

    Example:
        >>> rubric = Rubric.load("zr:direct")
        >>> rubric.dimensions
        ('alignment', 'realism', 'aesthetics', 'plausibility')
        >>> rubric.bins[0], rubric.bins[-1], len(rubric.bins), rubric.wording.labels[-1]
        (1.0, 5.0, 9, 'I')
        >>> Rubric.load("zr:reasoning").scale_id == rubric.scale_id      # teacher and student differ in wording only
        True
    """

    scale: Scale
    wording: Wording

    def __post_init__(self) -> None:
        labels, names = self.wording.labels, self.scale.dimensions
        if len(labels) != len(self.scale.bins):
            raise ValueError(f"wording.labels: {len(labels)} labels for {len(self.scale.bins)} bins; give one per bin")
        if len(set(labels)) != len(labels):
            raise ValueError(f"wording.labels must differ from each other, got {labels}")
        missing = [name for name in names if name not in self.wording.instructions]
        unknown = [name for name in self.wording.instructions if name not in names]
        if missing or unknown:
            raise ValueError(
                f"wording.instructions must name the scale's dimensions {names}: missing {missing}, unknown {unknown}"
            )

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the dimensions, in order."""
        return self.scale.dimensions

    @property
    def bins(self) -> tuple[float, ...]:
        """The ascending scores."""
        return self.scale.bins

    @property
    def scale_id(self) -> str:
        """Identity of the scale; see :attr:`Scale.scale_id`."""
        return self.scale.scale_id

    def index(self, dimensions: Sequence[str] | None = None) -> list[int]:
        """Positions of ``dimensions`` in the scale; all of them for None.

        Raises:
            ValueError: an unknown or repeated dimension.
        """
        if dimensions is None:
            return list(range(len(self.dimensions)))
        unknown = [name for name in dimensions if name not in self.dimensions]
        if isinstance(dimensions, str) or unknown or len(set(dimensions)) != len(dimensions) or not dimensions:
            raise ValueError(f"dimensions must be a list of different names among {list(self.dimensions)}, got {dimensions!r}")
        return [self.dimensions.index(name) for name in dimensions]

    def select(self, dimensions: Sequence[str]) -> Rubric:
        """The rubric of some of its dimensions, in the order given. It has a scale, and so an identity, of its own."""
        self.index(dimensions)
        scale = Scale(self.bins, {name: self.scale.anchors[name] for name in dimensions})
        wording = replace(self.wording, instructions={name: self.wording.instructions[name] for name in dimensions})
        return Rubric(scale, wording)

    def system_text(self) -> str:
        """The wording's system text with ``{anchors}`` and ``{labels}`` filled in."""
        labels = ", ".join(f"{label} = {score:g}" for label, score in zip(self.wording.labels, self.bins, strict=True))
        lines: list[str] = []
        for name, texts in self.scale.anchors.items():
            lines.append(f"{name}:")
            lines.extend(f"  {score:g}: {text}" for score, text in sorted(texts.items(), reverse=True))
        return self.wording.system.replace("{labels}", labels).replace("{anchors}", "\n".join(lines))

    @classmethod
    def load(cls, path: str | Path) -> Rubric:
        """Read a rubric from a YAML file, or a packaged one by name, such as ``zr:direct``, ``zr:reasoning`` or ``zr:koniq``.

        Raises:
            FileNotFoundError: no such file or packaged rubric.
            ValueError: not a rubric; the message names the file and the field.
        """
        if str(path).startswith(PACKAGED):
            name = str(path).removeprefix(PACKAGED)
            folder = resources.files("zr.configs") / "rubrics"
            source = folder / f"{name}.yaml"
            if not source.is_file():
                known = sorted(f"{PACKAGED}{entry.name.removesuffix('.yaml')}" for entry in folder.iterdir())
                raise FileNotFoundError(f"no packaged rubric {path}: there are {', '.join(known)}")
        else:
            source = Path(path)
        try:
            return cls.from_dict(yaml.safe_load(source.read_text(encoding="utf-8")))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is not a rubric: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the rubric as YAML, so that :meth:`load` gives an equal one."""
        data = self.to_dict()
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
        if yaml.safe_load(text) != data:  # PyYAML writes U+0085 as it is, and reads it as the break of a folded line
            text = yaml.safe_dump(data, sort_keys=False, width=120)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def from_dict(cls, data: Any) -> Rubric:
        """Build a rubric from plain data.

        Raises:
            ValueError: a missing, unknown or ill-typed field; the message names it.
        """
        top = _fields(data, "rubric", required=("scale", "wording"))
        scale = _fields(top["scale"], "scale", required=("bins", "anchors"))
        wording = _fields(
            top["wording"], "wording", required=("system", "instructions"), optional=("labels", "template", "end", "marker")
        )
        for key in ("anchors", "instructions", "template"):
            value = (scale if key == "anchors" else wording).get(key, {})
            if not isinstance(value, Mapping):
                raise ValueError(f"{key} must be a mapping, got {type(value).__name__}")
        for name, texts in scale["anchors"].items():
            if texts is not None and not (
                isinstance(texts, Mapping) and all(_is_number(score) and isinstance(text, str) for score, text in texts.items())
            ):
                raise ValueError(f"scale.anchors.{name} must map scores to texts, got {texts!r}")
        for name, text in wording["instructions"].items():
            if not isinstance(text, str):
                raise ValueError(f"wording.instructions.{name} must be text, got {text!r}")
        for key, value in (("scale.bins", scale["bins"]), ("wording.labels", wording.get("labels", []))):
            if not isinstance(value, list):
                raise ValueError(f"{key} must be a list, got {type(value).__name__}")
        if not all(map(_is_number, scale["bins"])):
            raise ValueError(f"scale.bins must be numbers, got {scale['bins']}")
        if not all(isinstance(label, str) and label for label in wording.get("labels", [])):
            raise ValueError(f"wording.labels must be texts, put quotes around them: got {wording['labels']}")
        for key in ("system", "end", "marker"):
            if not isinstance(wording.get(key, ""), str):
                raise ValueError(f"wording.{key} must be text, got {wording[key]!r}")
        labels = tuple(wording["labels"]) if "labels" in wording else letters(len(scale["bins"]))
        return cls(Scale(**scale), Wording(**{**wording, "labels": labels}))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` takes."""
        scale, wording = self.scale, self.wording
        return {
            "scale": {"bins": list(scale.bins), "anchors": {name: dict(texts) for name, texts in scale.anchors.items()}},
            "wording": {
                "system": wording.system,
                "instructions": dict(wording.instructions),
                "labels": list(wording.labels),
                "template": dict(wording.template),
                "end": wording.end,
                "marker": wording.marker,
            },
        }


def letters(count: int) -> tuple[str, ...]:
    """The default labels: A, B, C, ... for ``count`` bins, lowest first. Never digits, which could contradict the anchors."""
    if count > len(string.ascii_uppercase):
        raise ValueError(f"{count} bins are more than the {len(string.ascii_uppercase)} letters: give wording.labels yourself")
    return tuple(string.ascii_uppercase[:count])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fields(data: Any, name: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{name} must be a mapping with {list(required)}, got {type(data).__name__}")
    missing = [key for key in required if key not in data]
    unknown = [str(key) for key in data if key not in (*required, *optional)]
    if missing or unknown:
        raise ValueError(f"{name}: missing {missing}, unknown {unknown}; the fields are {[*required, *optional]}")
    return dict(data)
