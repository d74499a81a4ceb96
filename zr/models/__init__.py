"""Reward models and their parts: backbones, heads, prefixes, policies.

The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zr.models.backbones.clip import CLIPBackbone as CLIPBackbone
    from zr.models.backbones.tiny import tiny_clip as tiny_clip
    from zr.models.backbones.tiny import tiny_qwen3_5 as tiny_qwen3_5
    from zr.models.backbones.tiny import tiny_qwen3_vl as tiny_qwen3_vl
    from zr.models.backbones.vlm import VLMBackbone as VLMBackbone
    from zr.models.heads import Head as Head
    from zr.models.heads import LinearHead as LinearHead
    from zr.models.heads import OrdinalHead as OrdinalHead
    from zr.models.heads import ScoreTokenHead as ScoreTokenHead
    from zr.models.policy import Policy as Policy
    from zr.models.policy import Rollouts as Rollouts
    from zr.models.policy import SamplingRule as SamplingRule
    from zr.models.reward import ReasoningReward as ReasoningReward
    from zr.models.reward import RewardModel as RewardModel
    from zr.models.reward import Scorer as Scorer
    from zr.models.reward import compose as compose
    from zr.models.reward import load as load
    from zr.models.reward import reasoning as reasoning

_HOME = {
    "CLIPBackbone": "backbones.clip",
    "Head": "heads",
    "LinearHead": "heads",
    "OrdinalHead": "heads",
    "Policy": "policy",
    "ReasoningReward": "reward",
    "RewardModel": "reward",
    "Rollouts": "policy",
    "SamplingRule": "policy",
    "ScoreTokenHead": "heads",
    "Scorer": "reward",
    "VLMBackbone": "backbones.vlm",
    "compose": "reward",
    "load": "reward",
    "reasoning": "reward",
    "tiny_clip": "backbones.tiny",
    "tiny_qwen3_5": "backbones.tiny",
    "tiny_qwen3_vl": "backbones.tiny",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"zr.models.{_HOME[name]}"), name)
    raise AttributeError(f"module 'zr.models' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")


def __dir__() -> list[str]:
    return sorted(_HOME)
