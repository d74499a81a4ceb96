"""Reward models and their parts: backbones, heads, prefixes, policies."""

from zr.models.backbones.clip import CLIPBackbone
from zr.models.backbones.tiny import tiny_clip, tiny_qwen3_5, tiny_qwen3_vl
from zr.models.backbones.vlm import VLMBackbone
from zr.models.heads import Head, LinearHead, OrdinalHead, ScoreTokenHead
from zr.models.policy import Policy, Rollouts, SamplingRule
from zr.models.reward import ReasoningReward, RewardModel, Scorer, compose, load

__all__ = [
    "CLIPBackbone",
    "Head",
    "LinearHead",
    "OrdinalHead",
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
    "tiny_clip",
    "tiny_qwen3_5",
    "tiny_qwen3_vl",
]
