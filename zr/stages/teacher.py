"""The teacher: a policy that reasons, improved by group-relative rewards and by direct losses on its score distributions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from zr.data import Batch
from zr.losses import ClippedPolicyGradient, PolicyGradient
from zr.metrics import Coupling
from zr.models.policy import Evaluation, Rollouts
from zr.models.reward import ReasoningReward
from zr.models.sharding import anyone, as_share, whole
from zr.scores import ScoreDistribution
from zr.stages.rollout_terms import Credit, PolicyTerm, ReferenceTerm
from zr.stages.rollouts import RolloutStage
from zr.stages.terms import Term, rollout_objective

__all__ = ["Sampled", "Teacher"]

EQUAL = 1e-3
"""Rewards of a group that spread by less, in their unit, count as equal: nothing is learned from their order."""


@dataclass(frozen=True)
class Sampled:
    """One sampled batch: what a callback may show.

    Args:
        batch: the images, P pairs of them.
        rollouts: 2PG of them, of pair, side and number in this order; rows are images of the batch.
        credit: what they earned; None without a policy term.
    """

    batch: Batch
    rollouts: Rollouts
    credit: Credit | None


class Teacher(RolloutStage):
    r"""Group-wise direct score optimisation (GDSO); with other parts GRPO, the direct terms alone, or the exact gradient.

    A training step samples G reasoning outputs for both images of each of P pairs, and makes ``updates`` steps of the
    optimiser down

    .. math:: L = w \, L_{policy} + \beta \, KL + \sum \alpha \, L_{direct}

    Advantages are constants; direct losses pass through the score distributions with the traces held fixed. The gradient of
    the direct losses with respect to the labels' logits is taken first, for all rollouts together; then the rollouts are
    evaluated in parts of ``micro_batch`` on a cut prefix, each with a backward pass of its own. So the update does not depend
    on the split, memory not on the number of rollouts, and an image is encoded once for all that is said of it.

    Training wants pairs with scores, and equally many on each process: ``ScoreData(pairs=..., pairs_per_batch=P)``. A trace
    that the length limit cut is closed by force, and counts like the others (see ``forced_penalty``). Several processes
    (``strategy="ddp"``, or ``ModelParallelStrategy`` for sharded weights) make the update that one makes of their joined
    batches. Sharded gradients are reduced after each micro-batch, since whole ones would not fit where whole weights do not.

    Checkpoints lie between batches; ``ModelCheckpoint(every_n_train_steps=...)`` counts steps of the optimiser, and warns that
    it keeps the weights after one, as is right.

    Args:
        model: the policy to improve, its sampling rule, and the number of traces that evaluation averages.
        terms: direct losses on the score distributions (eqs. 8, 11), by name; may be empty beside a policy term.
        policy: the term of rewards and log-probs; None for the direct losses alone.
        reference: the term that keeps the policy near what it was; None for none.
        group_size: G, traces for each image of a pair.
        updates: K_gdso, steps of the optimiser on one sampled batch; more than one want a clipped loss.
        micro_batch: rollouts in one pass; None for all.
        gradient_clip: largest norm of the gradient; None for any.
        label_mass: weight of -log P(any label) at the score position, against drift off the labels; wants a policy with
            ``off_scale``.
        frozen: modules of the transformers model that keep their weights, for example ``model.visual``.
        optimizer: makes the optimiser.
        warmup: share of all updates in which the learning rate rises.
        decay: share of all updates, at the end, in which it falls to 0.
        coupling: validation batches, from the first on, on which :class:`zr.metrics.Coupling` is measured, as
            ``val/coupling_...``; the other trace is that of the image half a batch further.
        seed: of the traces. Each is drawn from (seed, batch of the run, pair, dimension, side, number), so a resumed run draws
            the same, and so do processes that share a batch.
        part_norms_every: sampled batches from one to the next for which the norm of the gradient is logged part by part, as
            ``train/gradient_norm_policy``, ``_kl``, ``_direct`` and ``_label_mass``, weights included, before clipping; each
            costs one more pass for each part. 0 for none.

    Raises:
        ValueError: G below 2, no part with a weight, several updates by a loss without ratio, greedy traces, dropout, an
            unknown module to freeze, ``label_mass`` without ``off_scale``; in training, gradients that are scaled (16-mixed),
            a pair without two scores, a gradient that is not finite.

    Reference: Z-Reward (arXiv 2606.09076), Algorithm 1, eqs. (3)-(14).
    """

    reference_weights: dict[str, Tensor] | None

    def __init__(
        self,
        model: ReasoningReward,
        terms: dict[str, Term],
        policy: PolicyTerm | None = None,
        reference: ReferenceTerm | None = None,
        group_size: int = 8,
        updates: int = 1,
        micro_batch: int | None = None,
        gradient_clip: float | None = 1.0,
        label_mass: float = 0.0,
        frozen: list[str] | None = None,
        optimizer: OptimizerCallable = AdamW,
        warmup: float = 0.05,
        decay: float = 0.5,
        coupling: int = 1,
        seed: int = 0,
        part_norms_every: int = 0,
    ) -> None:
        super().__init__(model, micro_batch, gradient_clip, frozen, optimizer, warmup, decay, seed)
        counts = {
            "group_size": (group_size, 2),
            "updates": (updates, 1),
            "label_mass": (label_mass, 0),
            "coupling": (coupling, 0),
            "part_norms_every": (part_norms_every, 0),
        }
        for name, (value, least) in counts.items():
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not (policy is not None and policy.weight) and not any(term.weight for term in terms.values()):
            raise ValueError("there is nothing to learn: give a policy term, or a direct loss with a positive weight")
        if label_mass and not model.policy.head.with_off_scale:
            raise ValueError("label_mass needs the probability outside the labels: build the policy with off_scale=True")
        if updates > 1 and policy is not None and isinstance(policy.loss, PolicyGradient):
            raise ValueError(f"PolicyGradient is for one update of a sample, not for {updates}: use ClippedPolicyGradient")
        self.terms = nn.ModuleDict(terms)
        self.policy_term = policy
        self.reference = reference
        self.group_size = group_size
        self.updates = updates
        self.label_mass = label_mass
        self.coupling_batches = coupling
        self.coupling = Coupling()
        self.part_norms_every = part_norms_every
        self.sampled: Sampled | None = None
        self.reference_weights = None
        self.keep_plain_hyperparameters()

    def training_step(self, batch: Batch) -> None:
        """Sample a batch of traces and improve the policy on them."""
        annotated = self._annotated(batch)
        sampled, seeds = self._sample(batch)
        shape = (len(batch.pairs), 2, self.group_size, -1)
        scores = ScoreDistribution(sampled.logits.reshape(shape), self.policy.rubric.bins)
        credit = None
        if self.policy_term is not None:
            length = self.model.rule.length
            credit = self.policy_term.credit(scores, annotated, sampled, length, seeds, self.over_processes)
        self.sampled = Sampled(batch, sampled, credit)
        parts = self.parts(len(sampled))
        reference = self._reference(batch, sampled, parts)
        old: list[Tensor] = []
        for update in range(self.updates):
            logits = sampled.logits if update == 0 else self._logits(batch, sampled, parts)
            found, means = self._update(batch, sampled, credit, logits.reshape(shape), reference, old, parts, update == 0)
            if update == 0:
                self._log_batch(annotated, scores, self.sampled, found, reference)
        self.log_dict({f"train/{name}": value for name, value in means.items()})
        if isinstance(self.policy_term, PolicyTerm) and isinstance(self.policy_term.loss, ClippedPolicyGradient):
            self.log("train/clipped", self._clipped(self.policy_term.loss, found, old, sampled.mask))
        self.batches += 1

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        """Measure a batch; the first ones also for what the reasoning does to the score."""
        super().validation_step(batch)
        if self._couples(batch, batch_idx):
            self.coupling.update(**self._coupled(batch))

    def accompany(self, batch: Batch, batch_idx: int) -> None:
        """Make the passes of an evaluation step."""
        super().accompany(batch, batch_idx)
        if (self.trainer.validating or self.trainer.sanity_checking) and self._couples(batch, batch_idx):
            self._coupled(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the measures under ``val/``."""
        super().on_validation_epoch_end()
        if self.coupling_batches:
            self.log_dict({f"val/coupling_{name}": value for name, value in self.coupling.compute().items()})
            self.coupling.reset()

    def total_steps(self) -> int:
        """Steps of the optimiser in the whole run."""
        steps, most = super().total_steps() * self.updates, self.trainer.max_steps
        return steps if most < 0 else min(steps, most)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference, whole: a resumed outer iteration goes on with its own."""
        if self.reference_weights is not None:
            gathered = ((name, whole(weight)) for name, weight in self.reference_weights.items())
            kept = {name: weight.cpu() for name, weight in gathered if self.trainer.is_global_zero}
        checkpoint["reference_weights"] = None if self.reference_weights is None else kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference up again."""
        self.reference_weights = checkpoint["reference_weights"]

    def _annotated(self, batch: Batch) -> Tensor:
        """``(P, 2)`` scores of the pairs' sides."""
        if batch.preference is None or not len(batch.pairs):
            raise ValueError(
                f"a batch ({batch.keys[0]}, ...) has no pair to compare: give the data module a pair policy and pairs_per_batch"
            )
        scores = batch.scores[batch.pairs, batch.pair_dimension[:, None]]
        missing = scores.isnan().any(-1).nonzero().flatten().tolist()
        if missing:
            first, second = (batch.keys[i] for i in batch.pairs[missing[0]].tolist())
            dimension = self.policy.rubric.dimensions[int(batch.pair_dimension[missing[0]])]
            raise ValueError(
                f"the pair {first}, {second} has no two scores in {dimension}: "
                "a teacher learns from scores; leave choices out of its split, or train on them with zr.stages.Supervised"
            )
        return scores

    def _sample(self, batch: Batch) -> tuple[Rollouts, list[int]]:
        """Rollouts whose rows are images of the batch, and the seed of each."""
        sides = batch.pairs.flatten().tolist()
        names = [self.policy.rubric.dimensions[d] for d in batch.pair_dimension.repeat_interleave(2).tolist()]
        pair = [batch.keys[i] for i in sides]
        seeds = [
            self.trace_seed(pair[p - p % 2], pair[p - p % 2 + 1], names[p], p % 2, number)
            for p in range(len(sides))
            for number in range(self.group_size)
        ]
        row = torch.tensor(sides)
        with torch.no_grad():
            prefix = self.policy.backbone.encode(batch.images, batch.prompts).fork(row)
            rollouts = self.policy.sample(
                prefix=prefix, dimensions=names, group_size=self.group_size, rule=self.model.rule, seeds=seeds
            )
        return replace(rollouts, row=row.to(rollouts.row.device)[rollouts.row]), seeds

    def _update(
        self,
        batch: Batch,
        sampled: Rollouts,
        credit: Credit | None,
        logits: Tensor,
        reference: Tensor | None,
        old: list[Tensor],
        parts: list[slice],
        first: bool,
    ) -> tuple[list[Evaluation], dict[str, Tensor]]:
        """One step of the optimiser; ``old`` is filled by the first one, at the weights that sampled."""
        optimizer: Any = self.optimizers()
        leaf = logits.detach().float().requires_grad_()
        terms: dict[str, Term] = dict(self.terms.items())  # type: ignore[arg-type]
        direct, means = rollout_objective(
            terms, ScoreDistribution(leaf, self.policy.rubric.bins), batch, self.mean_over_processes
        )
        (pull,) = torch.autograd.grad(direct, leaf)
        pull = pull.reshape(len(sampled), -1)
        optimizer.zero_grad()  # of a step that was broken off
        if first and self.part_norms_every and int(self.batches) % self.part_norms_every == 0:
            for name in self._part_names():
                self._backward(batch, sampled, credit, pull, reference, old, parts, only=name)
                gradients = [p.grad for p in self.trained() if p.grad is not None]
                self.log(f"train/gradient_norm_{name}", whole(nn.utils.get_total_norm(gradients)))
                optimizer.zero_grad()
        found = self._backward(batch, sampled, credit, pull, reference, old, parts)
        self.step(batch)
        return found, means

    def _part_names(self) -> list[str]:
        """Parts of the objective, as :meth:`_backward` calls them."""
        given = {
            "policy": self.policy_term is not None and self.policy_term.weight,
            "kl": self.reference is not None,
            "direct": any(term.weight for term in self.terms.values()),
            "label_mass": self.label_mass,
        }
        return [name for name, there in given.items() if there]

    def _backward(
        self,
        batch: Batch,
        sampled: Rollouts,
        credit: Credit | None,
        pull: Tensor,
        reference: Tensor | None,
        old: list[Tensor],
        parts: list[slice],
        only: str | None = None,
    ) -> list[Evaluation]:
        """The gradient of the objective, or of one part of it, added to that of the parameters."""
        count = float(self.mean_over_processes(torch.tensor(float(len(sampled)), device=pull.device)))
        cut = self.policy.ask(self.policy.backbone.encode(batch.images, batch.prompts), sampled).cut()
        found: list[Evaluation] = []
        with self.unsynchronised():
            for number, part in enumerate(parts):
                rollouts = sampled.select(part)
                now = self.policy.evaluate(prefix=cut, rollouts=rollouts, rule=self.model.rule)
                losses = {"direct": (now.scores.logits * pull[part]).sum()}
                if self.policy_term is not None and credit is not None:
                    mine = credit.select(part)
                    if len(old) <= number:
                        old.append(self.policy_term.with_label(now.log_probs, rollouts, mine, now.scores)[0].detach())
                    gained = self.policy_term(now.log_probs, old[number], rollouts, mine, now.scores)
                    losses["policy"] = self.policy_term.weight * gained.sum() / count
                if self.reference is not None and reference is not None:
                    far = self.reference.estimator(now.log_probs, reference[part], rollouts.mask)
                    losses["kl"] = self.reference.weight * far.sum() / count
                if self.label_mass and now.log_mass is not None:
                    losses["label_mass"] = -self.label_mass * now.log_mass.sum() / count
                self.manual_backward(torch.stack(list(losses.values())).sum() if only is None else losses[only])
                found.append(Evaluation(now.log_probs.detach(), now.entropy, now.scores.detach()))
        self.join(cut.replay_loss())
        return found

    def _logits(self, batch: Batch, sampled: Rollouts, parts: list[slice]) -> Tensor:
        """The labels' logits of all rollouts under the weights of now."""
        with torch.no_grad():
            prefix = self.policy.backbone.encode(batch.images, batch.prompts)
            return torch.cat([self.policy.score(prefix=prefix, rollouts=sampled.select(part)).logits for part in parts])

    def _reference(self, batch: Batch, sampled: Rollouts, parts: list[slice]) -> Tensor | None:
        """Log-probs of the traces under the reference, whose weights are the present ones when an outer iteration begins."""
        if self.reference is None:
            return None
        trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        if self.reference_weights is None or int(self.batches) % self.reference.refresh == 0:
            self.reference_weights = {name: p.detach().clone() for name, p in trained.items()}
        self.reference_weights = {name: as_share(weight, trained[name]) for name, weight in self.reference_weights.items()}
        with torch.no_grad(), _holding(trained, self.reference_weights):
            prefix = self.policy.backbone.encode(batch.images, batch.prompts)
            found = [self.policy.evaluate(prefix=prefix, rollouts=sampled.select(p), rule=self.model.rule) for p in parts]
            return torch.cat([now.log_probs for now in found])

    def _log_batch(
        self, annotated: Tensor, scores: ScoreDistribution, sampled: Sampled, found: list[Evaluation], reference: Tensor | None
    ) -> None:
        """Log what a batch of rollouts was like, per dimension and over all, of all processes."""
        rollouts, credit = sampled.rollouts, sampled.credit
        group = scores.batch_shape[-1]
        tokens = rollouts.mask.sum(-1)
        middle = scores.mean.mean(-1)
        gap = ((middle[:, 0] - middle[:, 1]) - (annotated[:, 0] - annotated[:, 1])).abs()
        each = {
            "length": tokens.float(),
            "forced": rollouts.forced.float(),
            "error": (scores.mean - annotated[..., None]).abs().flatten(),
            "gap_error": gap.repeat_interleave(2 * group),
            "score_entropy": scores.entropy().flatten(),
            "entropy": torch.cat([now.entropy.sum(-1) for now in found]) / tokens,
        }
        if credit is not None:
            spread = credit.reward.reshape(-1, group).std(-1).repeat_interleave(group)
            each |= {"reward": credit.reward, "advantage": credit.advantage.abs()}
            each |= {"spread": spread, "equal_groups": (spread < EQUAL).float()}
        if reference is not None:
            far = torch.cat([now.log_probs for now in found]) - reference
            each["kl"] = (far * rollouts.mask).sum(-1)
        if self.policy.head.with_off_scale:
            each["off_scale"] = torch.cat([now.scores.off_scale for now in found])
        self.log_each(each, rollouts.dimension)

    def _clipped(self, loss: ClippedPolicyGradient, found: list[Evaluation], old: list[Tensor], mask: Tensor) -> Tensor:
        """Share of tokens whose ratio no longer counts."""
        now = torch.cat([part.log_probs for part in found])
        ratio = (now - torch.cat(old)[:, : now.shape[1]]).exp()[mask]
        beyond = ((ratio < 1 - loss.low) | (ratio > 1 + loss.high)).float()
        sums = self.mean_over_processes(torch.stack([beyond.sum(), beyond.new_tensor(len(beyond))]))
        return sums[0] / sums[1]

    def _couples(self, batch: Batch, batch_idx: int) -> bool:
        """Whether the coupling is measured on a validation batch; processes that share the weights agree on it."""
        return batch_idx < self.coupling_batches and not anyone(self.model, len(batch.images) < 2)

    @torch.no_grad()
    def _coupled(self, batch: Batch) -> dict[str, ScoreDistribution]:
        """Scores after the own trace of each image and dimension, after none, after another image's, after a second own one."""
        names, count = self.policy.rubric.dimensions, len(batch.images)
        asked = count * len(names)
        encoded = self.policy.backbone.encode(batch.images, batch.prompts)
        prefix = encoded.fork(torch.arange(count).repeat_interleave(len(names)))
        seeds = [self.trace_seed(key, name, number) for key in batch.keys for name in names for number in range(2)]
        rollouts = self.policy.sample(
            prefix=prefix, dimensions=list(names) * count, group_size=2, rule=self.model.rule, seeds=seeds
        )
        own, again = (rollouts.select(slice(number, None, 2)) for number in range(2))
        further = (torch.arange(asked) + count // 2 * len(names)) % asked
        varied = {
            "own": own,
            "removed": replace(own, mask=torch.zeros_like(own.mask)),
            "other": replace(own.select(further.to(own.row.device)), row=own.row),
            "again": again,
        }
        return {name: self.policy.score(prefix=prefix, rollouts=part) for name, part in varied.items()}


@contextmanager
def _holding(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> Iterator[None]:
    """Parameters with other weights for a while; copied in place, which sharded ones can bear."""
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data.copy_(weights[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(own[name])
