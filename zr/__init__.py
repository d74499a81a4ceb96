"""Reward models for text-to-image generation that answer with a distribution over rubric scores.

The names below are imported when they are first used: importing the whole stack takes seconds, ``zr --help`` must not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zr.version import __version__

if TYPE_CHECKING:
    from zr.models import ReasoningReward as ReasoningReward
    from zr.models import RewardModel as RewardModel
    from zr.models import compose as compose
    from zr.models import load as load
    from zr.rubric import Rubric as Rubric
    from zr.scores import ScoreDistribution as ScoreDistribution

_HOME = {
    "ReasoningReward": "zr.models",
    "RewardModel": "zr.models",
    "Rubric": "zr.rubric",
    "ScoreDistribution": "zr.scores",
    "compose": "zr.models",
    "load": "zr.models",
}

__all__ = ["ReasoningReward", "RewardModel", "Rubric", "ScoreDistribution", "__version__", "compose", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'zr' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")


def __dir__() -> list[str]:
    return sorted(__all__)
