"""What training minimises: pure functions, and thin modules of the same name that hold their hyperparameters."""

from zr.losses.base import DistillationLoss, ItemLoss, PairLoss, ScoreTarget
from zr.losses.expectation import (
    AbsoluteExpectationLoss,
    SquaredExpectationLoss,
    absolute_expectation_loss,
    squared_expectation_loss,
)
from zr.losses.pairwise import BradleyTerryLoss, GapLoss, bradley_terry_loss, gap_loss, preference_share
from zr.losses.pointwise import (
    BinCrossEntropy,
    InterpolatedCrossEntropy,
    RankedProbabilityLoss,
    SoftLabelCrossEntropy,
    VotesRankedProbabilityLoss,
    bin_cross_entropy,
    interpolated_cross_entropy,
    linear_weights,
    ranked_probability_loss,
    soft_cross_entropy,
    soft_label,
    votes_ranked_probability_loss,
)

__all__ = [
    "AbsoluteExpectationLoss",
    "BinCrossEntropy",
    "BradleyTerryLoss",
    "DistillationLoss",
    "GapLoss",
    "InterpolatedCrossEntropy",
    "ItemLoss",
    "PairLoss",
    "RankedProbabilityLoss",
    "ScoreTarget",
    "SoftLabelCrossEntropy",
    "SquaredExpectationLoss",
    "VotesRankedProbabilityLoss",
    "absolute_expectation_loss",
    "bin_cross_entropy",
    "bradley_terry_loss",
    "gap_loss",
    "interpolated_cross_entropy",
    "linear_weights",
    "preference_share",
    "ranked_probability_loss",
    "soft_cross_entropy",
    "soft_label",
    "squared_expectation_loss",
    "votes_ranked_probability_loss",
]
