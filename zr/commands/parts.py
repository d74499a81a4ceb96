"""Parts that a command is given by name: scorers, and whatever a YAML text builds by class path."""

from __future__ import annotations

from typing import Any, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from zr.commands.measuring import chosen, loaded
from zr.models import Scorer

__all__ = ["SHAPES", "built", "scorer"]

SHAPES = "shapes"
"""What the built-in world's judge is called where a model may be named."""


def built(kind: type, text: str, where: str) -> Any:
    """The part that a YAML text describes.

    Args:
        kind: what it must be.
        text: a class path alone, or ``class_path`` and ``init_args``, as in a recipe.
        where: what an error calls it.

    Raises:
        FileNotFoundError: the part finds no file.
        ValueError: no YAML, another class, an option that it does not have, whatever it refuses.

    Example:
        >>> from zr.models import Aggregation
        >>> built(Aggregation, "{class_path: zr.models.RiskAverse, init_args: {deviations: 0.5}}", "--aggregation").deviations
        0.5
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML ({' '.join(str(error).split())}): give class_path and init_args") from None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    if not isinstance(data, str | dict):
        raise ValueError(f"{where} must give the class_path of a {kind.__name__} and its init_args, got {text.strip()[:100]!r}")
    try:
        return parser.instantiate_classes(parser.parse_object({"part": data})).part
    except ArgumentError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise ValueError(f"{where} describes no {kind.__name__}: {error}") from None


def scorer(name: str, device: str) -> Scorer:
    """A saved model, or the world's judge by the name ``shapes``; see :func:`~zr.commands.measuring.loaded`."""
    from zr.data import shapes

    return cast(Scorer, shapes.judge if name == SHAPES else loaded(name, chosen(device)).eval())
