"""Next-token targets: the base model's lessons, rationales, and both forms of answer (reason then score, score alone)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from zr.data import Batch
from zr.models import RewardModel, VLMBackbone
from zr.models.prompts import PromptBuilder
from zr.models.sharding import sharded
from zr.rubric import Rubric
from zr.stages.scoring import ScoringStage

__all__ = ["Answer", "Language", "ReasonThenScore", "ScoreOnly", "ScoreThenReason"]

IGNORED = -100


class Answer(Protocol):
    """A form of answer: which wording asks for it, whether it needs a text, and which tokens are its targets."""

    rubric: Rubric | None
    needs_text: bool

    def tokens(self, prompts: PromptBuilder, dimension: str, text: str, label: int) -> tuple[list[int], list[int]]:
        """The tokens of a question and its answer.

        Args:
            prompts: of this form's wording.
            dimension: what is judged.
            text: the target text.
            label: id of the score's label.

        Returns:
            Ids, and targets of the same length: the id itself where it is to be learned, ``IGNORED`` elsewhere.
        """


class ScoreOnly:
    """The label alone, in the model's own wording."""

    rubric: Rubric | None = None
    needs_text = False

    def tokens(self, prompts: PromptBuilder, dimension: str, text: str, label: int) -> tuple[list[int], list[int]]:
        """See :class:`Answer`."""
        question = prompts.question_ids(dimension)
        return [*question, label], [*[IGNORED] * len(question), label]


class ReasonThenScore:
    """The text as a trace, the end token, then the marker, which is given and not learned, and the label.

    Args:
        rubric: the reasoning wording; its template opens the trace.
    """

    needs_text = True

    def __init__(self, rubric: Rubric) -> None:
        self.rubric = rubric

    def tokens(self, prompts: PromptBuilder, dimension: str, text: str, label: int) -> tuple[list[int], list[int]]:
        """See :class:`Answer`."""
        question, trace, marker = prompts.suffix_ids(dimension), prompts.user_ids(text), prompts.marker_ids
        ids = [*question, *trace, prompts.end_id, *marker, label]
        return ids, [*[IGNORED] * len(question), *trace, prompts.end_id, *[IGNORED] * len(marker), label]


class ScoreThenReason:
    """The label, then the text as its rationale: trains on reasons, answers with one token (RewardDance style)."""

    rubric: Rubric | None = None
    needs_text = True

    def tokens(self, prompts: PromptBuilder, dimension: str, text: str, label: int) -> tuple[list[int], list[int]]:
        """See :class:`Answer`."""
        question, rationale = prompts.question_ids(dimension), prompts.user_ids(text)
        answer = [label, *rationale, prompts.end_id]
        return [*question, *answer], [*[IGNORED] * len(question), *answer]


class Language(ScoringStage):
    """Trains a vision-language reward model on the text of answers, by next-token cross-entropy.

    The prefix of an image is encoded once for all its dimensions and forms of answer. A score that lies between two bins
    is taught as the nearer one.

    Args:
        model: a reward model with a vision-language backbone and score-token head.
        answers: the forms to learn, by name.
        dimensions: which dimensions to teach; None for all. A model that is short of time learns the hardest one first.
        optimizer: makes the optimiser.
        warmup: share of all steps in which the learning rate rises.
        decay: share of all steps, at the end, in which it falls to 0.

    Raises:
        ValueError: no answer, an answer whose rubric has another scale.
    """

    def __init__(
        self,
        model: RewardModel,
        answers: dict[str, Answer],
        dimensions: list[str] | None = None,
        optimizer: OptimizerCallable = AdamW,
        warmup: float = 0.05,
        decay: float = 0.5,
    ) -> None:
        super().__init__(model, optimizer, warmup, decay)
        if not answers:
            raise ValueError("answers is empty: there is nothing to learn")
        self.answers = dict(answers)
        self.taught = model.rubric.index(dimensions)
        own: VLMBackbone = model.backbone
        worded = {n: own if a.rubric is None else own.reworded(a.rubric) for n, a in self.answers.items()}
        self.prompts = {name: backbone.prompts for name, backbone in worded.items()}
        self.keep_plain_hyperparameters()

    def training_step(self, batch: Batch) -> Tensor:
        """Cross-entropy per target token, over all answers of a batch."""
        rows, ids, targets = self._answers(batch)
        if not rows:
            raise ValueError(
                f"a batch ({batch.keys[0]}, ...) has nothing to learn: an answer needs a known score, and a text where it is "
                "written; train on a split that has both"
            )
        prefix = self.model.backbone.encode(batch.images, batch.prompts)
        total, count = torch.zeros((), device=self.device), 0
        for group in _by_length(ids, math.inf if sharded(self.model) else 2.0):  # one pass, if all processes make as many
            hidden = self.model.backbone.extend(prefix.fork(torch.tensor([rows[i] for i in group])), [ids[i] for i in group])
            width = hidden.shape[1]
            wanted = torch.tensor([[*targets[i], *[IGNORED] * (width - len(ids[i]))] for i in group], device=hidden.device)
            at, following = hidden[:, :-1], wanted[:, 1:]
            learned = following != IGNORED
            logits = self.model.backbone.logits(at[learned]).float()
            total = total + cross_entropy(logits, following[learned], reduction="sum")
            count += int(learned.sum())
        sums = self.mean_over_processes(torch.stack([total.detach(), total.new_tensor(count)]))
        self.log("train/loss", sums[0] / sums[1], prog_bar=True, batch_size=len(batch.prompts))
        return total / sums[1]

    def _answers(self, batch: Batch) -> tuple[list[int], list[list[int]], list[list[int]]]:
        """Row of the prefix, ids and targets of every answer that a batch teaches."""
        bins = torch.tensor(self.model.rubric.bins, device=batch.scores.device)
        nearest = (batch.scores[..., None] - bins).abs().nan_to_num(0.0).argmin(-1).tolist()
        known, texts = batch.known.tolist(), batch.texts
        rows, ids, targets = [], [], []
        for n in range(len(batch.prompts)):
            for d in self.taught:
                dimension = self.model.rubric.dimensions[d]
                for name, answer in self.answers.items():
                    text = texts[n].get(dimension) if texts is not None else None
                    if known[n][d] and (text is not None or not answer.needs_text):
                        prompts = self.prompts[name]
                        sequence, wanted = answer.tokens(prompts, dimension, text or "", prompts.label_ids[nearest[n][d]])
                        rows.append(n)
                        ids.append(sequence)
                        targets.append(wanted)
        return rows, ids, targets


def _by_length(ids: Sequence[Sequence[int]], stretch: float) -> list[list[int]]:
    """Positions in groups of similar length, so that little of a batch is padding: the longest at most ``stretch`` times."""
    groups: list[list[int]] = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if groups and len(ids[i]) <= stretch * len(ids[groups[-1][0]]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
