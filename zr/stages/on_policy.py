"""On-policy distillation (OPD): the student reasons, the teacher judges each token that it wrote."""

from __future__ import annotations

from dataclasses import replace

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from zr.data import Batch
from zr.losses import on_policy_distillation_loss
from zr.models.policy import Evaluation, Policy, Rollouts
from zr.models.reward import ReasoningReward, RewardModel
from zr.scores import ScoreDistribution
from zr.stages.frozen import FrozenTeacher
from zr.stages.rollouts import RolloutStage
from zr.stages.terms import Term, objective

__all__ = ["OnPolicy"]


class OnPolicy(FrozenTeacher, RolloutStage):
    r"""A student that reasons, distilled on the traces that it samples itself.

    .. math:: A_t = \log \pi_T(y_t) - \log \pi_{old}(y_t), \qquad L = -E \, \frac1T \sum_t A_t \log \pi(y_t)

    A training step samples a trace for each image of a batch in each dimension. No annotation is needed. In the paper the score
    is one more token of ``y``; here it is not sampled, so a term compares the two distributions after the student's trace
    instead: the reverse KL is the expectation of what that token would add, times T.

    Memory does not grow with the number of rollouts: they are evaluated in parts of ``micro_batch`` on a cut prefix, and the
    gradient of the terms with respect to the labels' logits is taken first, for all together. Several processes
    (``strategy="ddp"``) make the update that one makes of their joined batches.

    Args:
        model: the student, its sampling rule, and the number of traces that evaluation averages.
        teacher: a model that reasons, with the student's vocabulary, as ``zr.load`` gives it; needed to train, and no part of
            the checkpoint.
        terms: losses on the score distributions after the student's traces, by name. What they compare with the teacher is
            measured after the same trace.
        micro_batch: rollouts in one pass; None for all.
        gradient_clip: largest norm of the gradient; None for any.
        frozen: modules of the transformers model that keep their weights, for example ``model.visual``.
        optimizer: makes the optimiser.
        warmup: share of all steps in which the learning rate rises.
        decay: share of all steps, at the end, in which it falls to 0.
        seed: of the traces. Each is drawn from (seed, batch of the run, image, dimension).

    Raises:
        ValueError: a teacher that does not reason, has another vocabulary, scale or end of a trace, or shares weights with the
            student; greedy traces, dropout, an unknown module to freeze; in training, no teacher, gradients that are scaled
            (16-mixed), a gradient that is not finite.

    Reference: Z-Reward (arXiv 2606.09076), eqs. (18), (19).
    """

    def __init__(
        self,
        model: ReasoningReward,
        teacher: RewardModel | None = None,
        terms: dict[str, Term] | None = None,
        micro_batch: int | None = None,
        gradient_clip: float | None = 1.0,
        frozen: list[str] | None = None,
        optimizer: OptimizerCallable = AdamW,
        warmup: float = 0.05,
        decay: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(model, micro_batch, gradient_clip, frozen, optimizer, warmup, decay, seed)
        if teacher is not None:
            if not isinstance(teacher, ReasoningReward):
                raise ValueError(f"the teacher of traces must reason, got {type(teacher).__name__}: see zr.models.reasoning")
            _check_vocabulary(model.policy, teacher.policy)
        self.put_beside(teacher, model)
        self.terms = nn.ModuleDict(terms or {})
        self.keep_plain_hyperparameters()
        self.hparams.pop("teacher", None)  # else a checkpoint could not be read where the teacher is not

    def on_fit_start(self) -> None:
        """Refuse what would be silently wrong.

        Raises:
            ValueError: no teacher, gradients that are scaled.
        """
        super().on_fit_start()
        if self.teacher is None:
            raise ValueError("on-policy distillation needs a teacher to train: OnPolicy(model, teacher=zr.load(FOLDER))")

    def training_step(self, batch: Batch) -> None:
        """Sample a trace of each image and dimension, and step towards what the teacher would have written."""
        sampled = self._sample(batch)
        parts = self.parts(len(sampled))
        wanted, answers = self._judged(batch, sampled, parts)
        shape = (len(batch.images), len(self.policy.rubric.dimensions), -1)
        leaf = sampled.logits.detach().float().requires_grad_()
        terms: dict[str, Term] = dict(self.terms.items())  # type: ignore[arg-type]
        prediction = ScoreDistribution(leaf.reshape(shape), self.policy.rubric.bins)
        given = replace(batch, teacher=answers.probs.reshape(shape))
        direct, means = objective(terms, prediction, given, self.mean_over_processes)
        (pull,) = torch.autograd.grad(direct, leaf)
        found = self._backward(batch, sampled, wanted, pull, parts)
        self.step(batch)
        self.batches += 1
        self._log_batch(sampled, found, wanted, means)

    def _sample(self, batch: Batch) -> Rollouts:
        """A rollout of each image and dimension, in this order; rows are images of the batch."""
        names = self.policy.rubric.dimensions
        row = torch.arange(len(batch.images)).repeat_interleave(len(names))
        with torch.no_grad():
            rollouts = self.policy.sample(
                prefix=self.policy.backbone.encode(batch.images, batch.prompts).fork(row),
                dimensions=list(names) * len(batch.images),
                group_size=1,
                rule=self.model.rule,
                seeds=[self.trace_seed(key, name) for key in batch.keys for name in names],
            )
        return replace(rollouts, row=row.to(rollouts.row.device)[rollouts.row])

    @torch.no_grad()
    def _judged(self, batch: Batch, sampled: Rollouts, parts: list[slice]) -> tuple[Tensor, ScoreDistribution]:
        """Log-probs ``(M, T)`` of the traces under the teacher, and what it answers after them, ``(M,)``."""
        policy: Policy = self.teacher.policy
        prefix = policy.backbone.encode(batch.images, batch.prompts)
        found = [policy.evaluate(prefix=prefix, rollouts=sampled.select(part), rule=self.model.rule) for part in parts]
        logits = torch.cat([now.scores.logits for now in found])
        return torch.cat([now.log_probs for now in found]), ScoreDistribution(logits, self.policy.rubric.bins)

    def _backward(self, batch: Batch, sampled: Rollouts, wanted: Tensor, pull: Tensor, parts: list[slice]) -> list[Evaluation]:
        """The gradient of the objective, added to that of the parameters."""
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]  # of a step that was broken off
        count = float(self.mean_over_processes(torch.tensor(float(len(sampled)), device=pull.device)))
        cut = self.policy.ask(self.policy.backbone.encode(batch.images, batch.prompts), sampled).cut()
        found: list[Evaluation] = []
        with self.unsynchronised():
            for part in parts:
                rollouts = sampled.select(part)
                now = self.policy.evaluate(prefix=cut, rollouts=rollouts, rule=self.model.rule)
                loss = on_policy_distillation_loss(now.log_probs, now.log_probs, wanted[part], rollouts.mask)
                self.manual_backward(loss.sum() / count + (now.scores.logits * pull[part]).sum())
                found.append(Evaluation(now.log_probs.detach(), now.entropy, now.scores.detach()))
        self.join(cut.replay_loss())
        return found

    def _log_batch(self, sampled: Rollouts, found: list[Evaluation], wanted: Tensor, means: dict[str, Tensor]) -> None:
        """Log what a batch of rollouts was like."""
        tokens = sampled.mask.sum(-1)
        far = (torch.cat([now.log_probs for now in found]) - wanted) * sampled.mask
        each = {
            "length": tokens.float(),
            "forced": sampled.forced.float(),
            "entropy": torch.cat([now.entropy.sum(-1) for now in found]) / tokens,
            "reverse_kl": far.sum(-1) / tokens,
        }
        self.log_each(each, sampled.dimension)
        self.log_dict({f"train/{name}": value for name, value in means.items()})


def _check_vocabulary(student: Policy, teacher: Policy) -> None:
    """Refuse a teacher that reads a token of the student as another one."""
    own, other = (policy.backbone.processor.tokenizer.get_vocab() for policy in (student, teacher))
    if own != other:
        token = min((t for t in own.keys() | other.keys() if own.get(t) != other.get(t)), key=lambda t: (own.get(t, -1), t))
        raise ValueError(
            f"on-policy distillation needs one vocabulary: the student has {len(own)} tokens, the teacher {len(other)}, and "
            f"{token!r} is number {own.get(token)} of the one and {other.get(token)} of the other: take a teacher of the "
            "student's family, or learn its distributions by zr.stages.Student, which needs no common token"
        )
    ends = [policy.backbone.prompts.end_id for policy in (student, teacher)]
    if ends[0] != ends[1]:
        raise ValueError(
            f"student and teacher end a trace with the tokens {ends[0]} and {ends[1]}: give them one end in the wording"
        )
