"""Reward models and their parts: backbones, heads, prefixes, policies."""

from zr.models.backbones.tiny import tiny_qwen3_5, tiny_qwen3_vl
from zr.models.backbones.vlm import VLMBackbone
from zr.models.heads import Head, LinearHead, ScoreTokenHead
from zr.models.policy import Policy, Rollouts, SamplingRule
from zr.models.reward import ReasoningReward, RewardModel, Scorer, compose, load, reasoning

__all__ = [
    "Head",
    "LinearHead",
    "Policy",
    "ReasoningReward",
    "RewardModel",
    "Rollouts",
    "SamplingRule",
    "ScoreTokenHead",
    "Scorer",
    "VLMBackbone",
    "compose",
    "load",
    "reasoning",
    "tiny_qwen3_5",
    "tiny_qwen3_vl",
]
