"""The LightningModules, each the formula of its injected parts."""

from zr.stages.callbacks import Alarm, KeepBestModel, WriteDistributions, WriteRollouts
from zr.stages.comparison import Comparison, ComparisonMetrics
from zr.stages.frozen import FrozenTeacher
from zr.stages.generator import FlowMatching, KeepGenerator
from zr.stages.gradient_paths import GradientPath, LastSteps, RandomTruncation, ReFL
from zr.stages.labelling import Labelling, WriteLabels
from zr.stages.language import Language, ReasonThenScore, ScoreOnly, ScoreThenReason
from zr.stages.on_policy import OnPolicy
from zr.stages.reward import Reward
from zr.stages.rollout_terms import Credit, Decoding, ExpectedScore, ParsedScore, PolicyTerm, ReferenceTerm
from zr.stages.rollouts import RolloutStage
from zr.stages.scoring import ScoreMetrics, ScoringStage
from zr.stages.student import Student
from zr.stages.supervised import Supervised
from zr.stages.teacher import Sampled, Teacher
from zr.stages.terms import Term, objective, rollout_objective
from zr.stages.text_to_image import TextToImage
from zr.stages.training import TrainingStage

__all__ = [
    "Alarm",
    "Comparison",
    "ComparisonMetrics",
    "Credit",
    "Decoding",
    "ExpectedScore",
    "FlowMatching",
    "FrozenTeacher",
    "GradientPath",
    "KeepBestModel",
    "KeepGenerator",
    "Labelling",
    "Language",
    "LastSteps",
    "OnPolicy",
    "ParsedScore",
    "PolicyTerm",
    "RandomTruncation",
    "ReFL",
    "ReasonThenScore",
    "ReferenceTerm",
    "Reward",
    "RolloutStage",
    "Sampled",
    "ScoreMetrics",
    "ScoreOnly",
    "ScoreThenReason",
    "ScoringStage",
    "Student",
    "Supervised",
    "Teacher",
    "Term",
    "TextToImage",
    "TrainingStage",
    "WriteDistributions",
    "WriteLabels",
    "WriteRollouts",
    "objective",
    "rollout_objective",
]
