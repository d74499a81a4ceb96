"""The LightningModules, each the formula of its injected parts."""

from zr.stages.callbacks import KeepBestModel, WriteDistributions
from zr.stages.language import Language, ReasonThenScore, ScoreOnly, ScoreThenReason
from zr.stages.scoring import ScoreMetrics, ScoringStage
from zr.stages.supervised import Supervised
from zr.stages.terms import Term, objective

__all__ = [
    "KeepBestModel",
    "Language",
    "ReasonThenScore",
    "ScoreMetrics",
    "ScoreOnly",
    "ScoreThenReason",
    "ScoringStage",
    "Supervised",
    "Term",
    "WriteDistributions",
    "objective",
]
