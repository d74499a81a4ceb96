"""One prompt with its candidate images and everything that people or models said about them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from zr.data.annotation import bin_position, check_refinement
from zr.rubric import Scale

__all__ = ["Annotation", "Candidate", "LabelledDistribution", "Record", "decode", "image_type", "read_image"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
FIELDS = ("key", "prompt", "candidates", "scores", "preferences", "distributions", "texts")
MAGIC = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "webp"),
)


@dataclass(frozen=True)
class Candidate:
    """An image that was made for the prompt.

    Args:
        id: name within the record.
        image: the original bytes of a PNG, JPEG or WebP file.
    """

    id: str
    image: bytes = field(repr=False)


@dataclass(frozen=True)
class Annotation:
    """One annotator's score of one image in one dimension.

    Args:
        score: a bin of the scale.
        refined: seen again in a comparison with the other candidates, which may have moved it by half a point.
        coarse: the integer of the first round, for a refined score whose first round was kept.
    """

    score: float
    refined: bool = False
    coarse: float | None = None


@dataclass(frozen=True)
class LabelledDistribution:
    """A labeller's (usually a teacher's) distribution over the scores of one image in one dimension.

    Args:
        probs: K probabilities, lowest bin first.
        traces: the reasoning that led to it; may be empty.
        scale_id: identity of the scale whose bins the probabilities belong to.
    """

    probs: tuple[float, ...]
    traces: tuple[str, ...] = ()
    scale_id: str = ""


@dataclass(frozen=True)
class Record:
    """A prompt, its candidates and their annotation, any part of which may be missing.

    Keys and ids become file names, so they are restricted: letters, digits, ``_`` and ``-``, a letter or digit first, 64 at
    most. Nothing else is checked here: :meth:`validate` does it against a scale.

    Args:
        key: name of the record, unique in its split.
        prompt: what the images were asked to show.
        candidates: the images.
        scores: dimension -> candidate id -> annotator -> score.
        preferences: dimension -> ``(a, b, share)``: the share in [0, 1] of judges who prefer candidate a to candidate b.
        distributions: dimension -> candidate id -> labeller -> distribution.
        texts: dimension -> candidate id -> target text, such as a rationale.

    Example:
        >>> record = Record("p1", "a red cube", (Candidate("a", b"..."),), scores={"realism": {"a": {"ann": Annotation(4.5)}}})
        >>> record.to_dict()["scores"]
        {'realism': {'a': {'ann': 4.5}}}
        >>> Record.from_dict(record.to_dict(), images={"a": b"..."}) == record
        True
    """

    key: str
    prompt: str
    candidates: tuple[Candidate, ...]
    scores: Mapping[str, Mapping[str, Mapping[str, Annotation]]] = field(default_factory=dict)
    preferences: Mapping[str, Sequence[tuple[str, str, float]]] = field(default_factory=dict)
    distributions: Mapping[str, Mapping[str, Mapping[str, LabelledDistribution]]] = field(default_factory=dict)
    texts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def validate(self, scale: Scale, images: bool = True) -> None:
        """Check the record against a scale.

        Args:
            scale: the scale that dimensions, scores and distributions must belong to.
            images: decode the images too; False where they are decoded next anyway.

        Raises:
            ValueError: the first thing that is wrong; the message names record, candidate, field and remedy.
        """
        _check_name(self.key, f"record {self.key!r}: key")
        where = f"record {self.key!r}"
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"{where}: prompt is empty: give the text that the images were asked to show")
        if not self.candidates:
            raise ValueError(f"{where}: candidates is empty: give at least one image, or leave the record out")
        ids = [candidate.id for candidate in self.candidates]
        for candidate in self.candidates:
            _check_name(candidate.id, f"{where}: candidate id {candidate.id!r}")
            if ids.count(candidate.id) > 1:
                raise ValueError(f"{where}: candidate id {candidate.id!r} is repeated: give each candidate an id of its own")
        for part in ("scores", "preferences", "distributions", "texts"):
            for dimension in getattr(self, part):
                if dimension not in scale.dimensions:
                    raise ValueError(
                        f"{where}, {part}: unknown dimension {dimension!r}: the scale has {', '.join(scale.dimensions)}; "
                        "correct the name or use the rubric that the annotation was made with"
                    )
        for part, by_dimension in (("scores", self.scores), ("distributions", self.distributions), ("texts", self.texts)):
            for dimension, by_candidate in by_dimension.items():
                for name in by_candidate:
                    _check_known(name, ids, f"{where}, {part}.{dimension}")
        self._check_scores(scale)
        self._check_preferences(ids)
        self._check_distributions(scale)
        if images:
            for candidate in self.candidates:
                decode(candidate, self.key)

    def _check_scores(self, scale: Scale) -> None:
        for dimension, by_candidate in self.scores.items():
            for name, by_annotator in by_candidate.items():
                for annotator, annotation in by_annotator.items():
                    try:
                        bin_position(annotation.score, scale.bins)
                        if annotation.coarse is not None:
                            if not annotation.refined:
                                raise ValueError("a coarse score stands beside a refined one only: say refined: true")
                            check_refinement(annotation.score, annotation.coarse)
                            bin_position(annotation.coarse, scale.bins)
                    except ValueError as error:
                        place = f"record {self.key!r}, candidate {name!r}, scores.{dimension}.{annotator}"
                        bins = ", ".join(f"{b:g}" for b in scale.bins)
                        raise ValueError(f"{place}: {error}; correct it or leave it out (bins: {bins})") from None

    def _check_preferences(self, ids: Sequence[str]) -> None:
        for dimension, choices in self.preferences.items():
            seen = set()
            for first, second, share in choices:
                place = f"record {self.key!r}, preferences.{dimension}"
                _check_known(first, ids, place)
                _check_known(second, ids, place)
                if first == second:
                    raise ValueError(f"{place}: candidate {first!r} is compared with itself: leave the comparison out")
                if frozenset((first, second)) in seen:
                    raise ValueError(f"{place}: {first!r} and {second!r} are compared twice: join the two into one share")
                if not 0.0 <= share <= 1.0:
                    raise ValueError(f"{place}: the share that prefers {first!r} to {second!r} must be in [0, 1], got {share}")
                seen.add(frozenset((first, second)))

    def _check_distributions(self, scale: Scale) -> None:
        for dimension, by_candidate in self.distributions.items():
            for name, by_labeller in by_candidate.items():
                for labeller, labelled in by_labeller.items():
                    place = f"record {self.key!r}, candidate {name!r}, distributions.{dimension}.{labeller}"
                    if labelled.scale_id != scale.scale_id:
                        raise ValueError(
                            f"{place}: made for scale {labelled.scale_id!r}, this is scale {scale.scale_id!r} "
                            f"({', '.join(scale.dimensions)}; {len(scale.bins)} bins): use the labeller's rubric or label again"
                        )
                    if len(labelled.probs) != len(scale.bins):
                        raise ValueError(
                            f"{place}: {len(labelled.probs)} probabilities for {len(scale.bins)} bins: give one per bin"
                        )
                    total = math.fsum(labelled.probs)
                    if not abs(total - 1.0) <= 1e-3 or min(labelled.probs) < 0.0:
                        raise ValueError(
                            f"{place}: probabilities must be non-negative and sum to one, got {labelled.probs} "
                            f"(sum {total:g}): store probabilities, not logits or counts"
                        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data without the images, which :meth:`from_dict` takes beside it.

        A score is a number or ``{"score": 4.5, "refined": true, "coarse": 4}``, a preference ``[a, b, share]``. Empty
        parts are left out.
        """
        scores = {
            dimension: {
                name: {who: _plain_annotation(annotation) for who, annotation in by.items()}
                for name, by in by_candidate.items()
            }
            for dimension, by_candidate in self.scores.items()
        }
        distributions = {
            dimension: {
                name: {who: {"probs": list(d.probs), "traces": list(d.traces), "scale_id": d.scale_id} for who, d in by.items()}
                for name, by in by_candidate.items()
            }
            for dimension, by_candidate in self.distributions.items()
        }
        parts: dict[str, Any] = {
            "scores": scores,
            "preferences": {dimension: [list(choice) for choice in choices] for dimension, choices in self.preferences.items()},
            "distributions": distributions,
            "texts": {dimension: dict(by_candidate) for dimension, by_candidate in self.texts.items()},
        }
        head = {"key": self.key, "prompt": self.prompt, "candidates": [{"id": c.id} for c in self.candidates]}
        return {**head, **{name: part for name, part in parts.items() if part}}

    @classmethod
    def from_dict(cls, data: Any, images: Mapping[str, bytes]) -> Record:
        """Build a record from plain JSON data and the bytes of its images, by candidate id.

        Raises:
            ValueError: a missing, unknown or ill-typed field; the message names record and field.
        """
        key = data.get("key") if isinstance(data, Mapping) else None
        where = f"record {key!r}"
        top = _fields(data, where, required=("key", "prompt", "candidates"), optional=FIELDS[3:])
        for name in ("key", "prompt"):
            _check_type(top[name], str, f"{where}: {name}")
        candidates = []
        for i, entry in enumerate(_list(top["candidates"], f"{where}: candidates")):
            name = _fields(entry, f"{where}, candidates[{i}]", required=("id",))["id"]
            _check_type(name, str, f"{where}, candidates[{i}].id")
            if name not in images:
                raise ValueError(f"{where}, candidate {name!r}: its image is missing: give a PNG, JPEG or WebP file for it")
            candidates.append(Candidate(name, images[name]))
        return cls(
            key=top["key"],
            prompt=top["prompt"],
            candidates=tuple(candidates),
            scores=_tree(top.get("scores", {}), f"{where}, scores", 3, _annotation),
            preferences=_tree(top.get("preferences", {}), f"{where}, preferences", 1, _choices),
            distributions=_tree(top.get("distributions", {}), f"{where}, distributions", 3, _distribution),
            texts=_tree(top.get("texts", {}), f"{where}, texts", 2, _text),
        )


def image_type(data: bytes) -> str | None:
    """``"png"``, ``"jpg"`` or ``"webp"`` by the first bytes of a file; None for anything else.

    Example:
        >>> image_type(b"RIFF....WEBPVP8 "), image_type(b"GIF89a")
        ('webp', None)
    """
    return next((name for magic, name in MAGIC if magic.match(data)), None)


def decode(candidate: Candidate, key: str) -> Tensor:
    """Pixels of a candidate of the record ``key``; see :func:`read_image`."""
    return read_image(candidate.image, f"record {key!r}, candidate {candidate.id!r}: image")


def read_image(data: bytes, where: str) -> Tensor:
    """Pixels of an image file, ``(3, H, W)`` uint8 in RGB; an alpha channel is dropped.

    Args:
        data: the file's bytes.
        where: what the message calls the image.

    Raises:
        ValueError: no PNG, JPEG or WebP, truncated, damaged, or more than 8 bits a channel.
    """
    if image_type(data) is None:
        start = bytes(data[:8])
        raise ValueError(f"{where} is no PNG, JPEG or WebP file (it starts with {start!r}): convert it to one of them")
    try:
        pixels: Tensor = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0])
        raise ValueError(
            f"{where} cannot be decoded: truncated, damaged or of an unknown kind ({len(data)} bytes; {reason}): "
            "replace the file or leave it out"
        ) from None
    if pixels.dtype != torch.uint8:
        raise ValueError(f"{where} has {pixels.dtype} pixels: save it with 8 bits a channel")
    return pixels


def _plain_annotation(annotation: Annotation) -> float | dict[str, float | bool]:
    score = float(annotation.score)
    if not annotation.refined and annotation.coarse is None:
        return score
    coarse = {} if annotation.coarse is None else {"coarse": float(annotation.coarse)}
    return {"score": score, "refined": annotation.refined, **coarse}


def _annotation(value: Any, place: str) -> Annotation:
    if isinstance(value, Mapping):
        entry = _fields(value, place, required=("score",), optional=("refined", "coarse"))
        _check_type(entry.get("refined", False), bool, f"{place}.refined")
        coarse = _number(entry["coarse"], f"{place}.coarse") if "coarse" in entry else None
        return Annotation(_number(entry["score"], f"{place}.score"), entry.get("refined", False), coarse)
    return Annotation(_number(value, place))


def _choices(value: Any, place: str) -> list[tuple[str, str, float]]:
    choices = []
    for i, choice in enumerate(_list(value, place)):
        if len(_list(choice, f"{place}[{i}]")) != 3:
            raise ValueError(f"{place}[{i}] must be [a, b, share that prefers a], got {choice!r}")
        first, second, share = choice
        _check_type(first, str, f"{place}[{i}][0]")
        _check_type(second, str, f"{place}[{i}][1]")
        choices.append((first, second, _number(share, f"{place}[{i}][2]")))
    return choices


def _distribution(value: Any, place: str) -> LabelledDistribution:
    entry = _fields(value, place, required=("probs", "scale_id"), optional=("traces",))
    _check_type(entry["scale_id"], str, f"{place}.scale_id")
    return LabelledDistribution(
        probs=tuple(_number(p, f"{place}.probs[{i}]") for i, p in enumerate(_list(entry["probs"], f"{place}.probs"))),
        traces=tuple(_text(t, f"{place}.traces[{i}]") for i, t in enumerate(_list(entry.get("traces", []), f"{place}.traces"))),
        scale_id=entry["scale_id"],
    )


def _text(value: Any, place: str) -> str:
    _check_type(value, str, place)
    return str(value)


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place} must be a number, got {value!r}: leave it out if it is unknown")
    return float(value)


def _tree(data: Any, place: str, depth: int, leaf: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Apply ``leaf(value, place)`` below ``depth`` levels of mappings."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{place} must be a mapping, got {type(data).__name__}")
    below: Callable[[Any, str], Any] = leaf if depth == 1 else lambda value, where: _tree(value, where, depth - 1, leaf)
    return {str(name): below(value, f"{place}.{name}") for name, value in data.items()}


def _list(data: Any, place: str) -> list[Any]:
    if not isinstance(data, list | tuple):
        raise ValueError(f"{place} must be a list, got {type(data).__name__}")
    return list(data)


def _fields(data: Any, place: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{place} must be a mapping with {', '.join(required)}, got {type(data).__name__}")
    missing = [name for name in required if name not in data]
    unknown = [str(name) for name in data if name not in (*required, *optional)]
    if missing:
        raise ValueError(f"{place}: missing field {', '.join(missing)}: add it (fields: {', '.join([*required, *optional])})")
    if unknown:
        raise ValueError(f"{place}: unknown field {', '.join(unknown)}: the fields are {', '.join([*required, *optional])}")
    return dict(data)


def _check_type(value: Any, kind: type, place: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{place} must be {kind.__name__}, got {value!r}")


def _check_name(name: Any, place: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{place} is no safe file name: use 1 to 64 letters, digits, '_' and '-', beginning with a letter or digit"
        )


def _check_known(name: str, ids: Sequence[str], place: str) -> None:
    if name not in ids:
        raise ValueError(f"{place}: unknown candidate {name!r}: the record has {', '.join(ids)}; correct the id")
