"""What the paper reports (internal test set, Qwen3.5 models), to be shown beside a plan's own figures."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FIGURES"]


def _row(plcc: float | None, srcc: float | None, hpa: float, margin_hpa: float) -> dict[str, float | None]:
    return {"plcc": plcc, "srcc": srcc, "hpa": hpa, "margin_hpa": margin_hpa}


FIGURES: Mapping[tuple[str, str], Mapping[str, float | None]] = {
    ("27B", "zero-shot"): _row(0.6301, 0.5816, 0.7438, 0.9538),
    ("27B", "SFT"): _row(0.6458, 0.5914, 0.8135, 0.9644),
    ("27B", "RewardDance"): _row(0.6667, 0.6207, 0.8425, 0.9706),
    ("27B", "GRPO"): _row(0.7200, 0.6832, 0.8604, 0.9827),
    ("27B", "GDSO"): _row(0.7620, 0.7132, 0.8956, 0.9885),
    ("9B", "zero-shot"): _row(0.3411, 0.3167, 0.6563, 0.7501),
    ("9B", "SFT"): _row(0.5296, 0.4942, 0.7459, 0.8401),
    ("9B", "RewardDance"): _row(0.5182, 0.4338, 0.7817, 0.8972),
    ("9B", "GRPO"): _row(0.5340, 0.5072, 0.7703, 0.9076),
    ("9B", "GDSO"): _row(0.6341, 0.5665, 0.8395, 0.9599),
    ("9B", "OPD"): _row(None, None, 0.8311, 0.9643),
    ("9B", "RISD"): _row(0.7391, 0.6882, 0.8864, 0.9801),
}
"""Z-Reward (arXiv 2606.09076), tables 2 and 3, by size and method; None where it gives none."""
