"""The third stage: a generator improves because the expected scores of its images are differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import AdamW

from zr.data.prompts import PromptBatch
from zr.models.generators.base import Generator
from zr.models.generators.noise import source
from zr.scores import ScoreDistribution
from zr.stages.gradient_paths import GradientPath
from zr.stages.reward import Reward
from zr.stages.starting_generator import StartingGenerator
from zr.stages.training import TrainingStage

__all__ = ["TextToImage"]


class TextToImage(TrainingStage):
    r"""Improves a generator by the gradient of rewards through its last denoising steps.

    .. math:: L = E_p \Big[ \sum_k L_k(R_k(p, I)) + w \, \|v - v_{start}\|^2 \Big]

    For each part of a batch the images are made; then the gradient of the rewards with respect to the images is taken, one
    reward after another; only then it goes on into the generator. So of a reward nothing is left when the next one is asked,
    or when the generator computes its checkpointed activations again, and the update does not depend on the split into parts: a
    batch is one update, however large, and memory goes by ``micro_batch`` and by the number of steps that carry gradient.

    Against reward hacking: the distance of velocities to the starting generator, warm-up and a small clip are on by default;
    LoRA (its scale is that of peft's configuration), a ceiling of each reward, aggregations that are averse to risk, and a
    held-out scorer that is never optimised are parts to give. Runs on one device, or on several by ``ddp``.

    Validation draws ``images`` pictures for each prompt, always from the same noise, and compares them with those of the
    starting generator. It logs, as ``val/NAME`` and ``val/NAME/DIMENSION``, each reward and the expected scores behind it, the
    same for the start as ``val/start/...``; ``val/diversity``, the root mean square distance of two images of one prompt, in
    pixel units; ``val/drift``, the mean squared distance of velocities over all steps. With a held-out scorer also
    ``val/gain/NAME``, how far a reward has risen, in standard deviations of the start's images, and ``val/gap``, the mean gain
    of what is optimised minus that of what is held out: an honest gain is seen by both, so
    ``zr.stages.Alarm(monitor="val/gap", above=..., stop=True)`` ends a run that is being hacked.

    Args:
        generator: what is improved; what of it is trained takes a gradient by now. It runs in evaluation mode.
        rewards: by name. They are frozen, and no part of the checkpoint.
        path: which steps carry gradient, for example :class:`zr.stages.LastSteps`.
        held_out: what the gap is measured by; its weight and ceiling do not matter.
        velocity_distance: w, for the mean square of the difference of velocities at the steps that carry gradient, a mean over
            these. Each costs one more pass without gradient. 0 for none. Its unit is that of the latents: try 1, 10, 100, and
            take what a judge that is not optimised prefers.
        micro_batch: images that are made at a time; None for all of a batch.
        gradient_clip: largest norm of the gradient; None for any.
        images: per prompt of validation; diversity wants two.
        image_norms_every: batches from one to the next for which ``train/image_gradient/NAME/DIMENSION`` is logged, the mean
            norm of the gradient of an expected score with respect to its image; each dimension costs one more backward pass
            through its scorer. 0 for none.
        optimizer: makes the optimiser.
        warmup: share of all steps in which the learning rate rises.
        decay: share of all steps, at the end, in which it falls to 0.
        seed: of noise and steps. Noise is drawn from (seed, batch of the run, key of the prompt), the steps from (seed, batch),
            the same on all processes, none of which then waits for another; so a resumed run draws the same.

    Raises:
        ValueError: no reward, more steps with gradient than there are, a held-out scorer that is optimised, a generator without
            a trained weight; in training, a reward without a gradient or that refuses the images, and images, rewards or
            gradients that are not finite, which is found before the weights change.

    Reference: Z-Reward (arXiv 2606.09076), section "Text-to-image"; ReFL (arXiv 2304.05977), DRaFT (arXiv 2309.17400),
    AlignProp (arXiv 2310.03739).
    """

    batches: Tensor

    def __init__(
        self,
        generator: Generator,
        rewards: dict[str, Reward],
        path: GradientPath,
        held_out: Reward | None = None,
        velocity_distance: float = 1.0,
        micro_batch: int | None = None,
        gradient_clip: float | None = 0.1,
        images: int = 2,
        image_norms_every: int = 0,
        optimizer: OptimizerCallable = AdamW,
        warmup: float = 0.05,
        decay: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, warmup, decay)
        counts = {
            "velocity_distance": (velocity_distance, 0),
            "micro_batch": (micro_batch, 1),
            "images": (images, 1),
            "image_norms_every": (image_norms_every, 0),
        }
        for name, (value, least) in counts.items():
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not rewards:
            raise ValueError("rewards is empty: there is nothing to learn")
        if HELD_OUT in rewards:
            raise ValueError(f"a reward cannot be called {HELD_OUT}: that is what the scorer is called that is not optimised")
        if held_out is not None and any(_shared(held_out, reward) for reward in rewards.values()):
            raise ValueError("the held-out scorer is optimised too, so it would notice nothing: hold out another one")
        if not any(p.requires_grad for p in generator.parameters()):
            raise ValueError("no weight of the generator is trained: unfreeze some, or add LoRA adapters")
        path.check(generator.steps)
        self.automatic_optimization = False
        self.generator = generator
        self.start = StartingGenerator(generator)
        self.rewards = dict(rewards)
        self.held_out = held_out
        self.path = path
        self.velocity_distance = velocity_distance
        self.micro_batch = micro_batch
        self.gradient_clip = gradient_clip
        self.images = images
        self.image_norms_every = image_norms_every
        self.seed = seed
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self._rows: list[Tensor] = []
        self._before: dict[tuple[str, ...], Tensor] = {}
        self.keep_plain_hyperparameters()

    @property
    def scorers(self) -> dict[str, Reward]:
        """The rewards by name, the one that is held out among them."""
        return self.rewards if self.held_out is None else self.rewards | {HELD_OUT: self.held_out}

    def on_fit_start(self) -> None:
        """Refuse what would be silently wrong.

        Raises:
            ValueError: gradients that are scaled.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError("gradients of 16-mixed are scaled, which clipping would not see: use bf16-mixed, or 32")

    def setup(self, stage: str) -> None:
        """Begin anew with what is known of the start."""
        self._before.clear()

    def on_train_start(self) -> None:
        """See :class:`~zr.stages.TrainingStage`; what makes the images is what will make them later."""
        super().on_train_start()
        self.generator.eval()

    def on_train_end(self) -> None:
        """Back to the mode in which a run begins."""
        self.generator.train()

    def training_step(self, batch: PromptBatch) -> None:
        """One update of the generator."""
        done = int(self.batches)
        drawn = self.path.draw(self.generator.steps, source(self.seed, done))
        sources = [source(self.seed, done, key, number) for key, number in _numbered(batch.keys)]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()  # of a step that was broken off
        parts = self._parts(len(batch.prompts))
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else self._unsynchronised():
                found = self._learn(batch.select(part), sources[part], drawn, len(batch.prompts), last)
            sums = {name: value + sums.get(name, 0) for name, value in found.items()}
        self._step(optimizer, batch)
        means = self.mean_over_processes(torch.stack(list(sums.values())) / len(batch.prompts))
        self.log_dict({f"train/{name}": value for name, value in zip(sums, means, strict=True)})
        self.log_dict({"train/gradient_steps": float(drawn[0]), "train/stop": float(drawn[1])})
        self.batches += 1

    def validation_step(self, batch: PromptBatch) -> None:
        """Images of a batch, those of the start beside them."""
        keys = tuple(batch.keys)
        if keys not in self._before:
            with self.start.standing_in():
                self._before[keys], _ = self._measured(batch)
        self._rows.append(torch.cat([*self._measured(batch, self.start), self._before[keys]], 1))

    def on_validation_epoch_end(self) -> None:
        """Log what all images together say.

        Raises:
            ValueError: scores of the start that do not vary, beside which a gap would mean nothing.
        """
        names = self._columns()
        names = [*names, "drift", *(f"start/{name}" for name in names)]
        table = torch.cat([torch.zeros(0, len(names), device=self.device), *self._rows])
        self._rows = []
        mean = self._mean(table)
        spread = dict(zip(names, self._mean((table - mean).square()).sqrt(), strict=True))
        found = dict(zip(names, mean, strict=True))
        if self.held_out is not None and not self.trainer.sanity_checking:
            gains = {}
            for name in self.scorers:
                if not spread[f"start/{name}"] > 0:
                    raise ValueError(
                        f"{name} scores all images of the start alike, so its gain has no unit: validate on more prompts"
                    )
                gains[name] = (found[name] - found[f"start/{name}"]) / spread[f"start/{name}"]
            found |= {f"gain/{name}": gain for name, gain in gains.items()}
            found["gap"] = torch.stack([gains[name] for name in self.rewards]).mean() - gains[HELD_OUT]
        self.log_dict({f"val/{name}": value for name, value in found.items()})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves the stage, called by ``to`` and its kin: scorers come along."""
        for reward in self.scorers.values():
            if isinstance(reward.scorer, nn.Module):
                reward.scorer._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _learn(
        self, batch: PromptBatch, sources: Sequence[torch.Generator], drawn: tuple[int, int], count: int, last: bool
    ) -> dict[str, Tensor]:
        """The gradient of a part of ``count`` prompts, added to that of the weights; sums of what is logged."""
        far: list[Tensor] = []

        def watch(latents: Tensor, velocity: Tensor, step: int, conditions: Any) -> None:
            far.append(self.start.distance(latents, velocity, step, conditions))

        steps, stop = drawn
        watched = watch if self.velocity_distance else None
        images = self.generator.sample(batch.prompts, sources, gradient_steps=steps, stop=stop, watch=watched)
        _check_finite("the image", images, batch.keys)
        gradient, sums = self._image_gradient(_wide(images.detach()), batch, count)
        loss = (_wide(images) * gradient).sum()  # its backward pass carries the gradient on; its value means nothing
        if far:
            distance = torch.stack(far).mean(0).sum()
            loss = loss + self.velocity_distance * distance / count
            sums["drift"] = distance.detach()
        if last and isinstance(self.trainer.strategy, DDPStrategy):
            loss = loss + sum(p.sum() * 0.0 for p in self._trained())  # DDP averages what a backward pass comes by
        self.manual_backward(loss)
        return sums

    def _image_gradient(self, images: Tensor, batch: PromptBatch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the mean loss over ``count`` prompts, with respect to the images of some of them; one reward after another."""
        leaf = images.requires_grad_()
        gradient, sums = torch.zeros_like(images), {"loss": images.new_zeros(())}
        for name in self.rewards:
            found, told = self._pull(name, leaf, batch)
            gradient += found
            sums["loss"] += told.pop("loss")
            sums |= told
        _check_finite("the gradient of the rewards", gradient, batch.keys)
        return gradient / count, sums

    def _pull(self, name: str, leaf: Tensor, batch: PromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the summed loss of one reward; nothing of its graph is left."""
        reward, scores = self.rewards[name], self._scores(name, leaf, batch.prompts)
        value = reward.aggregation(scores)
        if not value.requires_grad:
            raise ValueError(
                f"reward {name!r} ({type(reward.scorer).__name__}) gives its images no gradient: optimise a reward model "
                "that does (one that reasons, or a judge, may be distilled into one), or hold this one out"
            )
        _check_finite(f"reward {name!r}", value, batch.keys)
        loss = reward.loss(value).sum()
        sums = {"loss": loss.detach(), name: value.detach().sum()}
        looks = self.image_norms_every and int(self.batches) % self.image_norms_every == 0
        for dimension, mean in zip(reward.dimensions, scores.mean.sum(0), strict=True):
            sums[f"{name}/{dimension}"] = mean.detach()
            if looks:
                (slope,) = torch.autograd.grad(mean, leaf, retain_graph=True)
                sums[f"image_gradient/{name}/{dimension}"] = slope.flatten(1).norm(dim=1).sum()
        return torch.autograd.grad(loss, leaf)[0], sums

    def _scores(self, name: str, images: Tensor, prompts: Sequence[str]) -> ScoreDistribution:
        """What a scorer says of images."""
        reward = self.scorers[name]
        try:
            return reward.scorer(images=images, prompts=prompts, dimensions=reward.dimensions)
        except ValueError as error:
            size = f"{images.shape[-1]} x {images.shape[-2]}"
            raise ValueError(f"{name!r} refuses the generator's images of {size} pixels: {error}") from None

    def _step(self, optimizer: Any, batch: PromptBatch) -> None:
        """Clip, look, step."""
        most = float("inf") if self.gradient_clip is None else self.gradient_clip
        norm = nn.utils.clip_grad_norm_(self._trained(), most)
        if not bool(norm.isfinite()):
            optimizer.zero_grad()
            raise ValueError(
                f"the gradient of the batch {batch.keys[0]}, ... is not finite ({float(norm)}): the weights are as they were; "
                "lower the learning rate, or let fewer steps carry gradient"
            )
        optimizer.step()
        optimizer.zero_grad()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.log("train/gradient_norm", norm)

    @torch.no_grad()
    def _measured(self, batch: PromptBatch, start: StartingGenerator | None = None) -> tuple[Tensor, Tensor]:
        """The columns ``(N * images, C)`` of the images of N prompts, and ``(N * images, 1)`` their drift from the start."""
        keys = [(key, number) for key in batch.keys for number in range(self.images)]
        prompts = [prompt for prompt in batch.prompts for _ in range(self.images)]
        pictures, columns, drifts = [], [], []
        for part in self._parts(len(prompts)):
            far: list[Tensor] = []

            def watch(latents: Tensor, velocity: Tensor, step: int, conditions: Any, far: list[Tensor] = far) -> None:
                far.append(self.start.distance(latents, velocity, step, conditions))

            sources = [source(self.seed, "validation", *key) for key in keys[part]]
            watched = None if start is None else watch
            images = self.generator.sample(prompts[part], sources, gradient_steps=self.generator.steps, watch=watched)
            images = _wide(images)
            pictures.append(images)
            scored = []
            for name, reward in self.scorers.items():
                scores = self._scores(name, images, prompts[part])
                scored += [reward.aggregation(scores)[:, None], scores.mean]
            columns.append(torch.cat([value.float() for value in scored], 1))
            if far:
                drifts.append(torch.stack(far).mean(0)[:, None].float())
        found = [torch.cat(columns)]
        if self.images > 1:
            together = torch.cat(pictures)
            apart = _diversity(together.reshape(-1, self.images, *together.shape[1:]))
            found.append(apart.repeat_interleave(self.images)[:, None].float())
        return torch.cat(found, 1), torch.cat(drifts) if drifts else found[0][:, :0]

    def _columns(self) -> list[str]:
        """What :meth:`_measured` gives for an image, but for the drift."""
        scored = [[name, *(f"{name}/{dimension}" for dimension in reward.dimensions)] for name, reward in self.scorers.items()]
        return [column for columns in scored for column in columns] + ["diversity"] * (self.images > 1)

    def _mean(self, table: Tensor) -> Tensor:
        """Of the rows of all processes."""
        sums = self.mean_over_processes(torch.cat([table.sum(0), table.new_tensor([len(table)])]))
        return sums[:-1] / sums[-1]

    def _parts(self, count: int) -> list[slice]:
        size = self.micro_batch or count
        return [slice(start, start + size) for start in range(0, count, size)]

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.generator.parameters() if p.requires_grad]

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        """Gradients stay in this process until the last backward pass of an update (DDP)."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None else block()


HELD_OUT = "held_out"


def _numbered(keys: Sequence[str]) -> list[tuple[str, int]]:
    """Each key, and how often it stood there before."""
    return [(key, keys[:i].count(key)) for i, key in enumerate(keys)]


def _shared(first: Reward, second: Reward) -> bool:
    """Whether two rewards ask one model."""
    parts = [reward.scorer.parameters() if isinstance(reward.scorer, nn.Module) else () for reward in (first, second)]
    return first.scorer is second.scorer or not {id(p) for p in parts[0]}.isdisjoint(id(p) for p in parts[1])


def _check_finite(what: str, values: Tensor, keys: Sequence[str]) -> None:
    """Raise a ValueError that names the first prompt whose values ``(B, ...)`` are not all finite."""
    bad = (~values.detach().isfinite().flatten(1 if values.dim() > 1 else 0)).reshape(len(values), -1).any(1).nonzero()
    if len(bad):
        raise ValueError(
            f"{what} of the prompt {keys[int(bad[0])]} is not finite: the weights are as they were; lower the learning rate, "
            "and look at the scorer's answer to this prompt"
        )


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _diversity(images: Tensor) -> Tensor:
    """``(N,)`` mean root mean square distance between two of the M images ``(N, M, 3, H, W)`` of a prompt."""
    first, second = torch.triu_indices(images.shape[1], images.shape[1], offset=1, device=images.device)
    return (images[:, first] - images[:, second]).square().flatten(2).mean(2).sqrt().mean(1)
