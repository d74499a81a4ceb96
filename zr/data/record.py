"""One prompt with its candidate images and everything that people or models said about them."""

from __future__ import annotations

import io
import json
import math
import re
import reprlib
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from zr.data.annotation import bin_position, check_refinement
from zr.rubric import Scale

__all__ = [
    "Annotation",
    "Candidate",
    "LabelledDistribution",
    "Reasoning",
    "Record",
    "decode",
    "image_size",
    "image_type",
    "parse_json",
    "read_image",
]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_PIXELS = 8192 * 8192  # 200 MB once decoded; a file of a few bytes can claim far more
FIELDS = ("key", "prompt", "candidates", "scores", "preferences", "distributions", "texts")
MAGIC = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "webp"),
)
# orientation 2 to 8 in the EXIF data of a WebP, little or big endian
TURNED = re.compile(rb"EXIF.*(\x12\x01\x03\0\x01\0\0\0[\x02-\x08]\0|\x01\x12\0\x03\0\0\0\x01\0[\x02-\x08])", re.DOTALL)
T = TypeVar("T")
SURROGATE = re.compile("[\ud800-\udfff]")
FILTERS = Lock()  # of warnings, which all threads share: two that change them at a time would leave them changed
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 100


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
class Reasoning:
    """How the traces agree whose distributions a labeller averaged.

    Args:
        traces: how many there were.
        forced: of them, how many the limit of length cut.
        tokens: written in all of them together.
        spread: mean KL(q_k || q) between the distribution after each trace and their mean, in nats.
        probs: the distributions after each trace; may be empty.
        ids: of the tokens of each trace, which its text may not give back; may be empty.
    """

    traces: int
    forced: int
    tokens: int
    spread: float
    probs: tuple[tuple[float, ...], ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class LabelledDistribution:
    """A labeller's (usually a teacher's) distribution over the scores of one image in one dimension.

    Args:
        probs: K probabilities, lowest bin first.
        traces: the reasoning that led to it; may be empty.
        scale_id: identity of the scale whose bins the probabilities belong to.
        off_scale: probability that the labeller put outside the labels; None where it did not say.
        reasoning: how its traces agree; None of a labeller that writes none, or did not say.
    """

    probs: tuple[float, ...]
    traces: tuple[str, ...] = ()
    scale_id: str = ""
    off_scale: float | None = None
    reasoning: Reasoning | None = None


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
        where = f"record {SHORT.repr(self.key)}"
        _check_name(self.key, f"{where}: key")
        _text(self.prompt, f"{where}: prompt")
        if not self.prompt.strip():
            raise ValueError(f"{where}: prompt is empty: give the text that the images were asked to show")
        if not self.candidates:
            raise ValueError(f"{where}: candidates is empty: give at least one image, or leave the record out")
        ids = Counter(candidate.id for candidate in self.candidates)
        for name, count in ids.items():
            _check_name(name, f"{where}: candidate id {SHORT.repr(name)}")
            if count > 1:
                raise ValueError(f"{where}: candidate id {name!r} is repeated: give each candidate an id of its own")
        for part in ("scores", "preferences", "distributions", "texts"):
            for dimension in getattr(self, part):
                if dimension not in scale.dimensions:
                    raise ValueError(
                        f"{where}, {part}: unknown dimension {SHORT.repr(dimension)}: the scale has "
                        f"{', '.join(scale.dimensions)}; correct the name or use the rubric that the annotation was made with"
                    )
        for part, by_dimension in (("scores", self.scores), ("distributions", self.distributions), ("texts", self.texts)):
            for dimension, by_candidate in by_dimension.items():
                for name in by_candidate:
                    _check_known(name, ids, f"{where}, {part}.{dimension}")
        for dimension, texts in self.texts.items():
            for name, text in texts.items():
                _text(text, f"{where}, texts.{dimension}.{name}")
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
                    place = f"record {self.key!r}, candidate {name!r}, scores.{dimension}.{_shown(annotator)}"
                    _text(annotator, f"{place}: the annotator's name")
                    try:
                        bin_position(annotation.score, scale.bins)
                        if annotation.coarse is not None:
                            if not annotation.refined:
                                raise ValueError("a coarse score stands beside a refined one only: say refined: true")
                            check_refinement(annotation.score, annotation.coarse)
                            bin_position(annotation.coarse, scale.bins)
                    except ValueError as error:
                        bins = ", ".join(f"{b:g}" for b in scale.bins)
                        raise ValueError(f"{place}: {error}; correct it or leave it out (bins: {bins})") from None

    def _check_preferences(self, ids: Collection[str]) -> None:
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
                    place = f"record {self.key!r}, candidate {name!r}, distributions.{dimension}.{_shown(labeller)}"
                    _text(labeller, f"{place}: the labeller's name")
                    for i, trace in enumerate(labelled.traces):
                        _text(trace, f"{place}.traces[{i}]")
                    if labelled.scale_id != scale.scale_id:
                        raise ValueError(
                            f"{place}: made for scale {SHORT.repr(labelled.scale_id)}, this is scale {scale.scale_id!r} "
                            f"({', '.join(scale.dimensions)}; {len(scale.bins)} bins): use the labeller's rubric or label again"
                        )
                    _check_probs(labelled.probs, scale, place)
                    if not (labelled.off_scale is None or 0.0 <= labelled.off_scale <= 1.0):
                        raise ValueError(f"{place}.off_scale must be a probability, got {labelled.off_scale}: leave it out")
                    if labelled.reasoning is not None:
                        _check_reasoning(labelled.reasoning, labelled.traces, scale, f"{place}.reasoning")

    def select(self, dimensions: Sequence[str]) -> Record:
        """The same prompt and images with what was said of some dimensions only, for the scale of :meth:`zr.Rubric.select`.

        Args:
            dimensions: names; nothing need be said of them.

        Raises:
            ValueError: one name instead of a list.

        Example:
            >>> said = {d: {"a": {"ann": Annotation(4.5)}} for d in ("realism", "aesthetics")}
            >>> list(Record("p1", "a red cube", (Candidate("a", b"..."),), scores=said).select(["realism"]).scores)
            ['realism']
        """
        if isinstance(dimensions, str):
            raise ValueError(f"dimensions is one text: give a list, [{dimensions!r}]")

        def kept(said: Mapping[str, T]) -> dict[str, T]:
            return {name: value for name, value in said.items() if name in dimensions}

        return replace(
            self,
            scores=kept(self.scores),
            preferences=kept(self.preferences),
            distributions=kept(self.distributions),
            texts=kept(self.texts),
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
                name: {who: _plain_distribution(labelled) for who, labelled in by.items()} for name, by in by_candidate.items()
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
        where = f"record {SHORT.repr(key)}"
        top = _fields(data, where, required=("key", "prompt", "candidates"), optional=FIELDS[3:])
        for name in ("key", "prompt"):
            _text(top[name], f"{where}: {name}")
        candidates = []
        for i, entry in enumerate(_list(top["candidates"], f"{where}: candidates")):
            name = _fields(entry, f"{where}, candidates[{i}]", required=("id",))["id"]
            _text(name, f"{where}, candidates[{i}].id")
            if name not in images:
                raise ValueError(
                    f"{where}, candidate {SHORT.repr(name)}: its image is missing: give a PNG, JPEG or WebP file for it"
                )
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
    """Pixels of an image file, ``(3, H, W)`` uint8 in RGB, equal to Pillow's ``convert("RGB")``.

    Grey, palette and CMYK become RGB; an alpha channel or a transparent colour is dropped, not blended with a background; of
    an animated PNG the default image is read. An image is turned as the EXIF data of a JPEG or PNG say, which is how a viewer
    shows it to an annotator.

    Args:
        data: the file's bytes.
        where: what the message calls the image.

    Raises:
        ValueError: no PNG, JPEG or WebP, truncated, damaged, more than 8 bits a channel, more than 8192 x 8192 pixels, an
            animated WebP, or a WebP that is to be turned.
    """
    if image_type(data) is None:
        start = bytes(data[:8])
        raise ValueError(f"{where} is no PNG, JPEG or WebP file (it starts with {start!r}): convert it to one of them")
    width, height = image_size(data) or (0, 0)  # neither: the decoder says why
    if width * height > MAX_PIXELS:
        raise ValueError(f"{where} has {width} x {height} pixels, more than {MAX_PIXELS} are not decoded: make it smaller")
    if image_type(data) == "png" and data[24:25] > b"\x08":
        raise ValueError(f"{where} has {data[24]} bits a channel: save it with 8 bits")
    if data[12:16] == b"VP8X" and TURNED.search(data):
        raise ValueError(f"{where} is a WebP that its EXIF data turn: save it with its pixels turned, without EXIF data")
    try:
        if image_type(data) == "png":
            return _png(data)
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: Tensor = decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, OSError, SyntaxError, ValueError, struct.error, UserWarning) as error:
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0])
        raise ValueError(
            f"{where} cannot be decoded: truncated, damaged or of an unknown kind ({len(data)} bytes; {reason}): "
            "replace the file or leave it out"
        ) from None
    return pixels


def _png(data: bytes) -> Tensor:
    """Pixels by Pillow: torchvision 0.29 crashes on a damaged palette. Pillow skips checksums, so they are verified here."""
    at, names = 8, [b""]
    while names[-1] != b"IEND":
        if at + 12 > len(data):
            raise ValueError("it ends within a chunk")
        length, name = struct.unpack_from(">I4s", data, at)
        chunk, checksum = data[at + 4 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if zlib.crc32(chunk).to_bytes(4, "big") != checksum:
            raise ValueError(f"chunk {name!r} is damaged or cut")
        names.append(name)
        at += 12 + length
    with FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"PIL\.")  # not for what other threads decode meanwhile
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            image.info.pop("transparency", None)  # Pillow would warn that it drops it
            pixels = np.array((ImageOps.exif_transpose(image) if b"eXIf" in names else image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that the header of a PNG, JPEG or WebP names, read without decoding; None where it names none.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> Image.new("RGB", (8, 5)).save(file := io.BytesIO(), "JPEG")
        >>> image_size(file.getvalue())
        (8, 5)
    """
    kind = image_type(data)
    try:
        if kind == "png":
            width, height = struct.unpack_from(">II", data, 16)
        elif kind == "jpg":
            at = 2
            while not (0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in (0xC4, 0xC8, 0xCC)):  # a frame
                if data[at] != 0xFF or data[at + 1] == 0:
                    return None
                at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
            height, width = struct.unpack_from(">HH", data, at + 5)
        elif data[12:16] == b"VP8X":
            width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        elif data[12:16] == b"VP8L":
            (packed,) = struct.unpack_from("<I", data, 21)
            width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        else:
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    except (struct.error, IndexError):
        return None
    return width, height


def parse_json(text: str | bytes) -> Any:
    """Plain data of a JSON text. Unlike :func:`json.loads`, it refuses what would be dropped in silence.

    Raises:
        ValueError: no JSON, an object that has a name twice, or nesting too deep to read.

    Example:
        >>> parse_json('{"ann": 4, "bob": {"score": 3.5}}')
        {'ann': 4, 'bob': {'score': 3.5}}
        >>> parse_json('{"ann": 4, "ann": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the name 'ann' stands twice in one object: keep one of them
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply to be read: a record has at most five levels") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {SHORT.repr(name)} stands twice in one object: keep one of them")
    return found


def _shown(name: Any) -> str:
    """A name as it stands in a message: in quotes and cut short where it would spoil the line."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 64 else SHORT.repr(name)


def _plain_annotation(annotation: Annotation) -> float | dict[str, float | bool]:
    score = float(annotation.score)
    if not annotation.refined and annotation.coarse is None:
        return score
    coarse = {} if annotation.coarse is None else {"coarse": float(annotation.coarse)}
    return {"score": score, "refined": annotation.refined, **coarse}


def _plain_distribution(labelled: LabelledDistribution) -> dict[str, Any]:
    plain: dict[str, Any] = {"probs": list(labelled.probs), "traces": list(labelled.traces), "scale_id": labelled.scale_id}
    if labelled.off_scale is not None:
        plain["off_scale"] = labelled.off_scale
    if labelled.reasoning is not None:
        plain["reasoning"] = {name: part for name, part in asdict(labelled.reasoning).items() if part != ()}
    return plain


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
            raise ValueError(f"{place}[{i}] must be [a, b, share that prefers a], got {SHORT.repr(choice)}")
        first, second, share = choice
        _check_type(first, str, f"{place}[{i}][0]")
        _check_type(second, str, f"{place}[{i}][1]")
        choices.append((first, second, _number(share, f"{place}[{i}][2]")))
    return choices


def _distribution(value: Any, place: str) -> LabelledDistribution:
    entry = _fields(value, place, required=("probs", "scale_id"), optional=("traces", "off_scale", "reasoning"))
    _check_type(entry["scale_id"], str, f"{place}.scale_id")
    return LabelledDistribution(
        probs=_each(entry["probs"], f"{place}.probs", _number),
        traces=_each(entry.get("traces", []), f"{place}.traces", _text),
        scale_id=entry["scale_id"],
        off_scale=_number(entry["off_scale"], f"{place}.off_scale") if "off_scale" in entry else None,
        reasoning=_reasoning(entry["reasoning"], f"{place}.reasoning") if "reasoning" in entry else None,
    )


def _reasoning(value: Any, place: str) -> Reasoning:
    entry = _fields(value, place, required=("traces", "forced", "tokens", "spread"), optional=("probs", "ids"))
    return Reasoning(
        traces=_whole(entry["traces"], f"{place}.traces"),
        forced=_whole(entry["forced"], f"{place}.forced"),
        tokens=_whole(entry["tokens"], f"{place}.tokens"),
        spread=_number(entry["spread"], f"{place}.spread"),
        probs=_each(entry.get("probs", []), f"{place}.probs", lambda row, where: _each(row, where, _number)),
        ids=_each(entry.get("ids", []), f"{place}.ids", lambda row, where: _each(row, where, _whole)),
    )


def _text(value: Any, place: str) -> str:
    _check_type(value, str, place)
    if not value.isascii() and SURROGATE.search(value):
        raise ValueError(f"{place} has half a surrogate pair, which is no character: got {SHORT.repr(value)}; write it again")
    return str(value)


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place} must be a number, got {SHORT.repr(value)}: leave it out if it is unknown")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{place} must be a number, got an integer of {int(value).bit_length()} bits: correct it") from None


def _whole(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{place} must be a whole number, 0 or more, got {SHORT.repr(value)}: correct it")
    return value


def _each(data: Any, place: str, leaf: Callable[[Any, str], T]) -> tuple[T, ...]:
    return tuple(leaf(value, f"{place}[{i}]") for i, value in enumerate(_list(data, place)))


def _tree(data: Any, place: str, depth: int, leaf: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Apply ``leaf(value, place)`` below ``depth`` levels of mappings."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{place} must be a mapping, got {type(data).__name__}")
    below: Callable[[Any, str], Any] = leaf if depth == 1 else lambda value, where: _tree(value, where, depth - 1, leaf)
    return {_text(name, f"{place}: a name"): below(value, f"{place}.{_shown(name)}") for name, value in data.items()}


def _list(data: Any, place: str) -> list[Any]:
    if not isinstance(data, list | tuple):
        raise ValueError(f"{place} must be a list, got {type(data).__name__}")
    return list(data)


def _fields(data: Any, place: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{place} must be a mapping with {', '.join(required)}, got {type(data).__name__}")
    missing = [name for name in required if name not in data]
    unknown = [_shown(name) for name in data if name not in (*required, *optional)]
    if missing:
        raise ValueError(f"{place}: missing field {', '.join(missing)}: add it (fields: {', '.join([*required, *optional])})")
    if unknown:
        raise ValueError(f"{place}: unknown field {', '.join(unknown[:8])}: the fields are {', '.join([*required, *optional])}")
    return dict(data)


def _check_type(value: Any, kind: type, place: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{place} must be {kind.__name__}, got {SHORT.repr(value)}")


def _check_name(name: Any, place: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{place} is no safe file name: use 1 to 64 letters, digits, '_' and '-', beginning with a letter or digit"
        )


def _check_probs(probs: Sequence[float], scale: Scale, place: str) -> None:
    if len(probs) != len(scale.bins):
        raise ValueError(f"{place}: {len(probs)} probabilities for {len(scale.bins)} bins: give one per bin")
    if not (all(0.0 <= p <= 2.0 for p in probs) and abs(math.fsum(probs) - 1.0) <= 1e-3):
        raise ValueError(
            f"{place}: probabilities must be non-negative and sum to one, got {probs} "
            f"(sum {sum(probs):g}): store probabilities, not logits or counts"
        )


def _check_reasoning(reasoning: Reasoning, texts: Sequence[str], scale: Scale, place: str) -> None:
    count = reasoning.traces
    if not (count >= 1 and 0 <= reasoning.forced <= count and reasoning.tokens >= 0):
        raise ValueError(f"{place}: {count} traces, {reasoning.forced} of them forced, {reasoning.tokens} tokens: correct them")
    if not 0.0 <= reasoning.spread <= math.log(count) + 1e-3:
        raise ValueError(f"{place}.spread of {count} traces must be in [0, log {count}], got {reasoning.spread}: label again")
    for name, part in (("traces", texts), ("probs", reasoning.probs), ("ids", reasoning.ids)):
        if len(part) not in (0, count):
            raise ValueError(f"{place} is of {count} traces, {name} are given for {len(part)}: give them for all or for none")
    for i, probs in enumerate(reasoning.probs):
        _check_probs(probs, scale, f"{place}.probs[{i}]")


def _check_known(name: str, ids: Collection[str], place: str) -> None:
    if name not in ids:
        raise ValueError(f"{place}: unknown candidate {SHORT.repr(name)}: the record has {', '.join(ids)}; correct the id")
