"""Records of the world: prompts in splits, scenes drawn by lot, simulated annotators, and the base model's lessons."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zr.data.record import Annotation, Candidate, Record
from zr.data.shapes.scene import (
    COLOURS,
    DIMENSIONS,
    FINE,
    MISTAKEN,
    SEVERITY,
    SHAPES,
    STATES,
    Scene,
    Thing,
    alignment_defect,
    draw,
    read_prompt,
    true_scores,
    write_prompt,
)
from zr.rubric import Rubric, Scale, Wording, letters

Split = Literal["base", "train", "unlabelled", "curated", "validation", "test"]

_SPLITS: Mapping[str, tuple[int, int]] = {
    "test": (0, 3000),
    "validation": (3000, 5000),
    "train": (5000, 8000),
    "base": (8000, 14000),
    "unlabelled": (14000, len(COLOURS) ** 4 * len(SHAPES) ** 4),
    "curated": (14000, len(COLOURS) ** 4 * len(SHAPES) ** 4),
}


@cache
def _all_prompts() -> tuple[str, ...]:
    kinds = tuple(product(COLOURS, SHAPES))
    order = np.random.default_rng(2606).permutation(len(kinds) ** 4)
    return tuple(write_prompt(tuple(kinds[i // len(kinds) ** k % len(kinds)] for k in range(4))) for i in order.tolist())


def prompts(split: Split) -> tuple[str, ...]:
    """All prompts of a split, in a fixed order. The splits share no prompt, but for ``curated``, which has ``unlabelled``'s.

    Example:
        >>> {name: len(prompts(name)) for name in ("train", "test")}
        {'train': 3000, 'test': 3000}
    """
    first, last = _SPLITS[split]
    return _all_prompts()[first:last]


FOLLOWS = (0.35, 0.6, 0.85)
"""How often a candidate follows the prompt in a slot: one of these, per image."""

CURATED_FOLLOW, CURATED_FLAWS = (0.85, 1.0), 0.3
"""The same for the pictures that a curator keeps, and the share that is left of all other defects."""

LESSONS_FOLLOW = (0.0, 0.3, 0.6)
"""The same for the base model's lessons: a model that could guess from the prompt would not learn to look."""


def imagine(prompt: str, rng: np.random.Generator, follows: Sequence[float] = FOLLOWS, flaws: float = 1.0) -> Scene:
    """Draw the scene of one candidate: how well it follows the prompt, and which defects it has.

    Args:
        prompt: of the world.
        rng: decides.
        follows: how often a slot is filled as the prompt says; one of these is drawn.
        flaws: scales how often there is each other defect.
    """
    aligned, sound = rng.choice(list(follows)), 1 - flaws * (1 - rng.choice([0.4, 0.65, 0.9]))
    things = [_fill(asked, aligned, sound, rng) for asked in read_prompt(prompt)]
    resolution = rng.choice(["", "", "", "blurred", "blocky"])
    realism = {resolution} if resolution and (flaws == 1 or rng.random() < flaws) else set()
    realism |= {name for name in ("striped", "speckled") if rng.random() < 0.4 * flaws}
    aesthetics = {name for name in SEVERITY["aesthetics"] if rng.random() < 0.35 * flaws}
    seed = int(rng.integers(2**31))
    return Scene((things[0], things[1], things[2], things[3]), frozenset(realism), frozenset(aesthetics), seed)


def _fill(asked: tuple[str, str], aligned: float, sound: float, rng: np.random.Generator) -> Thing | None:
    colour, shape = asked
    state = "grounded" if rng.random() < sound else str(rng.choice(STATES[1:]))
    if rng.random() >= aligned:
        match rng.choice(list(SEVERITY["alignment"])):
            case "colour":
                colour = str(rng.choice([c for c in COLOURS if c != colour]))
            case "shape":
                shape = str(rng.choice([s for s in SHAPES if s != shape]))
            case _:
                return None
    return Thing(colour, shape, state)


@dataclass(frozen=True)
class Annotator:
    """A simulated annotator: reports score + bias + noise, rounded to a bin and clipped to the scale."""

    name: str
    bias: float
    noise: float = 0.4

    def report(self, score: float, rng: np.random.Generator) -> float:
        """The score that the annotator writes down for a true ``score``."""
        return float(np.clip(np.round(2 * (score + self.bias + self.noise * rng.normal())) / 2, 1, 5))


def annotators(count: int = 5, seed: int = 0) -> list[Annotator]:
    """Annotators whose biases are drawn from N(0, 0.25)."""
    biases = np.random.default_rng([seed, 2]).normal(0, 0.25, count)
    return [Annotator(f"ann{i}", float(bias)) for i, bias in enumerate(biases)]


def scenes(split: Split, count: int, candidates: int = 4, seed: int = 0) -> Iterator[tuple[str, list[Scene]]]:
    """The first ``count`` prompts of a split's seeded order, each with the scenes of its candidates.

    Raises:
        ValueError: more prompts than the split has.
    """
    pool = prompts(split)
    if count > len(pool):
        raise ValueError(f"the split {split!r} has {len(pool)} prompts, {count} were asked for: use more candidates per prompt")
    for i in np.random.default_rng([seed, 3]).permutation(len(pool))[:count].tolist():
        rng = np.random.default_rng([seed, 4, _SPLITS[split][0] + i])
        follows = LESSONS_FOLLOW if split == "base" else FOLLOWS
        if split == "curated":
            yield pool[i], [imagine(pool[i], rng, CURATED_FOLLOW, CURATED_FLAWS) for _ in range(candidates)]
        else:
            yield pool[i], [imagine(pool[i], rng, follows) for _ in range(candidates)]


def records(split: Split, count: int, candidates: int = 4, seed: int = 0) -> Iterator[Record]:
    """Annotated records of the world.

    Args:
        split: ``train``, ``validation`` and ``test`` carry the scores of five annotators, ``unlabelled`` carries none,
            ``base`` carries the base model's lessons: what is seen (:func:`describe`) and a mistaken score (``MISTAKEN``).
            ``train`` also carries what is seen, as a stronger model would have written it beside the scores. ``curated`` has
            no scores, but good pictures only, for a generator to learn from.
        count: prompts.
        candidates: images per prompt.
        seed: of prompts, scenes and annotators.

    Example:
        >>> record = next(records("train", count=1, candidates=2))
        >>> len(record.candidates), sorted(record.scores["realism"]["c0"])
        (2, ['ann0', 'ann1', 'ann2', 'ann3', 'ann4'])
    """
    team = annotators(seed=seed)
    for number, (prompt, drawn) in enumerate(scenes(split, count, candidates, seed)):
        rng = np.random.default_rng([seed, 5, number])
        ids = [f"c{i}" for i in range(len(drawn))]
        texts: dict[str, dict[str, str]] = {}
        if split in ("base", "train"):
            seen = {c: describe(scene, prompt) for c, scene in zip(ids, drawn, strict=True)}
            texts = {d: {c: seen[c][d] for c in ids} for d in DIMENSIONS}
        scores: dict[str, dict[str, dict[str, Annotation]]] = {}
        if split == "base":
            believed = {c: true_scores(scene, prompt, MISTAKEN) for c, scene in zip(ids, drawn, strict=True)}
            scores = {d: {c: {"belief": Annotation(round(2 * believed[c][d]) / 2)} for c in ids} for d in DIMENSIONS}
        elif split not in ("unlabelled", "curated"):
            true = {c: true_scores(scene, prompt) for c, scene in zip(ids, drawn, strict=True)}
            scores = {d: {c: {a.name: Annotation(a.report(true[c][d], rng)) for a in team} for c in ids} for d in DIMENSIONS}
        yield Record(
            key=f"{split}-{number:05d}",
            prompt=prompt,
            candidates=tuple(Candidate(c, encode_png(draw(scene))) for c, scene in zip(ids, drawn, strict=True)),
            scores=scores,
            texts=texts,
        )


def rubric(dimensions: Sequence[str] = DIMENSIONS, reasoning: bool = False) -> Rubric:
    """The world's rubric: nine half-point bins, and a wording of few words.

    Args:
        dimensions: which of the four, in order.
        reasoning: whether a trace stands before the score (the teacher's wording) or not (the student's).

    Example:
        >>> rubric(["realism"], reasoning=True).wording.template["enable_thinking"]
        True
    """
    anchors = {
        name: {5.0: "no defect", 1.0: "four points of defects or more"}
        | {5.0 - cost: f"the cost of being {defect}" for defect, cost in SEVERITY[name].items()}
        for name in DIMENSIONS
    }
    bins = tuple(1 + k / 2 for k in range(9))
    wording = Wording(
        system="judge",
        instructions={name: name for name in DIMENSIONS},
        labels=letters(len(bins)),
        template={"enable_thinking": reasoning},
        marker=" score",
    )
    return Rubric(Scale(bins, anchors), wording).select(dimensions)


def vocabulary() -> list[str]:
    """Every word that the world writes, beside those of its rubric."""
    kinds = [*COLOURS, *SHAPES, *STATES, "right", "nothing", "colour", "shape", "missing", ",", ";"]
    found = [*(name for names in SEVERITY.values() for name in names), *(w for fine in FINE.values() for w in fine.values())]
    return list(dict.fromkeys([*DIMENSIONS, *kinds, *found]))


def describe(scene: Scene, prompt: str) -> dict[str, str]:
    """Per dimension, the reasoning text of a careful viewer: what is seen, slot by slot or check by check.

    Example:
        >>> things = (Thing("red", "ring"), None, Thing("green", "ring"), Thing("red", "square", "floating"))
        >>> text = describe(Scene(things, realism=frozenset({"speckled"})), "red ring, blue square; green triangle, red square")
        >>> text["alignment"]
        'red ring right, nothing nothing missing, green ring shape, red square right'
        >>> text["realism"], text["plausibility"]
        ('even speckled sharp', 'grounded nothing grounded floating')
    """
    slots = list(zip(scene.things, read_prompt(prompt), strict=True))
    seen = [
        f"{'nothing nothing' if t is None else f'{t.colour} {t.shape}'} {alignment_defect(t, asked) or 'right'}"
        for t, asked in slots
    ]
    resolution = next((name for name in ("blurred", "blocky") if name in scene.realism), "sharp")
    checks = [*(n if n in scene.realism else FINE["realism"][n] for n in ("striped", "speckled")), resolution]
    looks = [n if n in scene.aesthetics else fine for n, fine in FINE["aesthetics"].items()]
    return {
        "alignment": ", ".join(seen),
        "realism": " ".join(checks),
        "aesthetics": " ".join(looks),
        "plausibility": " ".join("nothing" if t is None else t.state for t, _ in slots),
    }


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """The bytes of a picture, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
