"""Reward models and their parts: backbones, heads, prefixes, policies, aggregations.

The names below are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zr._lazy import lazy

if TYPE_CHECKING:
    from zr.models.aggregation import Aggregation as Aggregation
    from zr.models.aggregation import Minimum as Minimum
    from zr.models.aggregation import RiskAverse as RiskAverse
    from zr.models.aggregation import ScaleStatistics as ScaleStatistics
    from zr.models.aggregation import SoftMinimum as SoftMinimum
    from zr.models.aggregation import WeightedSum as WeightedSum
    from zr.models.backbones.clip import CLIPBackbone as CLIPBackbone
    from zr.models.backbones.tiny import tiny_clip as tiny_clip
    from zr.models.backbones.tiny import tiny_qwen3_5 as tiny_qwen3_5
    from zr.models.backbones.tiny import tiny_qwen3_vl as tiny_qwen3_vl
    from zr.models.backbones.vlm import VLMBackbone as VLMBackbone
    from zr.models.calibration import Calibration as Calibration
    from zr.models.calibration import Isotonic as Isotonic
    from zr.models.calibration import Temperature as Temperature
    from zr.models.comparison import ComparisonReward as ComparisonReward
    from zr.models.comparison import comparing as comparing
    from zr.models.heads import Head as Head
    from zr.models.heads import LinearHead as LinearHead
    from zr.models.heads import OrdinalHead as OrdinalHead
    from zr.models.heads import ScoreTokenHead as ScoreTokenHead
    from zr.models.loading import load as load
    from zr.models.loading import scale_statistics as scale_statistics
    from zr.models.log_probs import token_log_probs as token_log_probs
    from zr.models.policy import Evaluation as Evaluation
    from zr.models.policy import Policy as Policy
    from zr.models.policy import PrefixSampler as PrefixSampler
    from zr.models.policy import Questions as Questions
    from zr.models.policy import Rollouts as Rollouts
    from zr.models.policy import Sampler as Sampler
    from zr.models.policy import SamplingRule as SamplingRule
    from zr.models.policy import Written as Written
    from zr.models.reward import ReasoningReward as ReasoningReward
    from zr.models.reward import RewardModel as RewardModel
    from zr.models.reward import compose as compose
    from zr.models.reward import reasoning as reasoning
    from zr.models.scorer import Scorer as Scorer
    from zr.models.scorer import as_reward as as_reward
    from zr.models.scorer import measure_scale as measure_scale

_HOME = {
    "Aggregation": "aggregation",
    "CLIPBackbone": "backbones.clip",
    "ComparisonReward": "comparison",
    "Calibration": "calibration",
    "Evaluation": "policy",
    "Head": "heads",
    "Isotonic": "calibration",
    "LinearHead": "heads",
    "Minimum": "aggregation",
    "OrdinalHead": "heads",
    "Policy": "policy",
    "PrefixSampler": "policy",
    "ReasoningReward": "reward",
    "RewardModel": "reward",
    "RiskAverse": "aggregation",
    "Questions": "policy",
    "Rollouts": "policy",
    "Sampler": "policy",
    "SamplingRule": "policy",
    "ScaleStatistics": "aggregation",
    "ScoreTokenHead": "heads",
    "Scorer": "scorer",
    "SoftMinimum": "aggregation",
    "Temperature": "calibration",
    "VLMBackbone": "backbones.vlm",
    "WeightedSum": "aggregation",
    "Written": "policy",
    "as_reward": "scorer",
    "comparing": "comparison",
    "compose": "reward",
    "load": "loading",
    "measure_scale": "scorer",
    "reasoning": "reward",
    "scale_statistics": "loading",
    "tiny_clip": "backbones.tiny",
    "tiny_qwen3_5": "backbones.tiny",
    "tiny_qwen3_vl": "backbones.tiny",
    "token_log_probs": "log_probs",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy(__name__, _HOME)
