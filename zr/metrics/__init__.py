"""What is measured on held-out data. PLCC and SRCC while training are :mod:`torchmetrics`' own classes."""

from zr.metrics.bootstrap import Interval, Statistic, bootstrap_difference, bootstrap_interval
from zr.metrics.calibration import (
    ExpectedCalibrationError,
    RankedProbabilityScore,
    ReliabilityCurve,
    VotesNegativeLogLikelihood,
    reliability,
)
from zr.metrics.correlation import plcc, srcc
from zr.metrics.evaluation import compare, evaluate
from zr.metrics.preference import HPA, hpa, pair_counts, same_prompt_pairs

__all__ = [
    "HPA",
    "ExpectedCalibrationError",
    "Interval",
    "RankedProbabilityScore",
    "ReliabilityCurve",
    "Statistic",
    "VotesNegativeLogLikelihood",
    "bootstrap_difference",
    "bootstrap_interval",
    "compare",
    "evaluate",
    "hpa",
    "pair_counts",
    "plcc",
    "reliability",
    "same_prompt_pairs",
    "srcc",
]
