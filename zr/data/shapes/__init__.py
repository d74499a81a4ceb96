"""The built-in world: small scenes with known defects, so that everything here can be learned, and judged, on a laptop.

A prompt asks for four objects, one for each corner of a 3 x 3 grid, row by row: ``red ring, blue square; green
triangle, yellow ring``. A candidate image is drawn from a :class:`Scene`, which says what is really there and which
defects it has. The scores of its four dimensions follow from the drawn defects by the world's own rubric
(:func:`true_scores`); simulated annotators report them with bias, noise and half-point rounding. ``judge``
reads the same scores back from pixels, without learning.

Everything is a function of a seed.
"""

from zr.data.shapes.judge import Judge, Reading, judge, read
from zr.data.shapes.lots import annotators, describe, imagine, prompts, records, rubric, scenes, vocabulary
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
    defects,
    draw,
    read_prompt,
    true_scores,
    write_prompt,
)

__all__ = [
    "COLOURS",
    "DIMENSIONS",
    "FINE",
    "MISTAKEN",
    "SEVERITY",
    "SHAPES",
    "STATES",
    "Judge",
    "Reading",
    "Scene",
    "Thing",
    "annotators",
    "defects",
    "describe",
    "draw",
    "imagine",
    "judge",
    "prompts",
    "read",
    "read_prompt",
    "records",
    "rubric",
    "scenes",
    "true_scores",
    "vocabulary",
    "write_prompt",
]
