"""The reward model that users deploy: a backbone, a head and a rubric; saved as one folder."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zr.models.aggregation import ScaleStatistics
from zr.models.backbones.vlm import VLMBackbone
from zr.models.calibration import Calibration
from zr.models.folders import written_whole
from zr.models.heads import Backbone, Head
from zr.models.images import ImageInput, as_image_lists
from zr.models.policy import Policy, SamplingRule
from zr.models.sharding import plain_class
from zr.rubric import Rubric
from zr.scores import ScoreDistribution
from zr.version import __version__

__all__ = ["ReasoningReward", "RewardModel", "compose", "keep_calibration", "own_tensors", "passes", "reasoning"]

FORMAT = 1
ABOUT = "reward.json"
STATISTICS = "statistics.json"
CALIBRATION = "calibration.json"
CALIBRATED_STATISTICS = "calibrated-statistics.json"
"""Calibrated scores lie elsewhere than the model's own, so they have statistics of their own."""
CARD_TITLE = "## Calibration"
RUN_MODEL = "model"
"""Folder inside a run's folder in which the run keeps its best model."""


class RewardModel(nn.Module):
    """Answers with a distribution over scores, per image and dimension; in one forward pass, or in as many as a budget allows.

    Args:
        backbone: gives features ``(B, D, H)``.
        head: maps them to logits ``(B, D, K)``.
        rubric: scale and wording; its scale must be the backbone's.
        statistics: where its scores lie on a reference set, to standardise them; see
            :func:`~zr.models.scorer.measure_scale`.
        budget: most tokens of one pass, padding included; None for one pass however many images there are. A sample beyond
            it gets a pass of its own. With gradients each pass is run again in the backward pass, so that one at a time is
            held. Processes that must take the same number of passes, as sharded models do, need None.
        calibration: what every answer goes through; None for the model's own distributions. Statistics are of the scores that
            come out of it. Training makes it a calibration of other weights: fit it last.

    Raises:
        ValueError: a rubric of another scale, a wording that is not the one that the backbone asks with, statistics of other
            dimensions, a budget below 1, a calibration of another scale.
    """

    use = "scores = model(images=[image], prompts=['what the image should show'])\nscores.mean, scores.stddev, scores.probs"
    """The lines of a model's card that show how it is called."""

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        rubric: Rubric,
        statistics: ScaleStatistics | None = None,
        budget: int | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        if rubric.scale_id != backbone.rubric.scale_id:
            raise ValueError(
                f"the backbone was built for dimensions {list(backbone.rubric.dimensions)} and bins "
                f"{backbone.rubric.bins}, the rubric has {list(rubric.dimensions)} and {rubric.bins}: use one rubric"
            )
        if rubric.wording != backbone.rubric.wording:
            raise ValueError("the backbone asks in another wording than the rubric's: pass backbone.reworded(rubric)")
        if budget is not None and budget < 1:
            raise ValueError(f"budget must be at least one token for a pass, or None, got {budget}")
        self.backbone: Any = backbone
        self.head = head
        self.rubric = rubric
        self.statistics = statistics
        self.budget = budget
        self.calibration = calibration

    @property
    def statistics(self) -> ScaleStatistics | None:
        """Mean and standard deviation of the expected score per dimension, or None where nobody measured them."""
        return self._statistics

    @statistics.setter
    def statistics(self, statistics: ScaleStatistics | None) -> None:
        if statistics is not None and statistics.dimensions != self.rubric.dimensions:
            raise ValueError(f"statistics of {statistics.dimensions} for a model of {self.rubric.dimensions}")
        self._statistics = statistics

    @property
    def calibration(self) -> Calibration | None:
        """What every answer goes through, or None; see :mod:`zr.models.calibration`."""
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        if calibration is not None:
            calibration.check(self.rubric)
        self._calibration = calibration

    def forward(self, images: ImageInput, prompts: Sequence[str], dimensions: Sequence[str] | None = None) -> ScoreDistribution:
        """Score images; see :class:`~zr.models.scorer.Scorer`.

        Raises:
            ValueError: an unknown dimension, images that do not fit the prompts, pixels out of range, NaN in the logits.
        """
        names = [self.rubric.dimensions[i] for i in self.rubric.index(dimensions)]
        if self.budget is None or isinstance(prompts, str) or len(prompts) < 2:
            logits, off_scale = self._answer(images, prompts, names)
            return self._calibrated(ScoreDistribution(logits, self.rubric.bins, off_scale=off_scale), names)
        lists = as_image_lists(images, len(prompts))
        rows = passes(self._tokens(lists, prompts, names), self.budget)
        parts = [self._pass([lists[i] for i in some], [prompts[i] for i in some], names, len(rows) > 1) for some in rows]
        order = torch.tensor([i for some in rows for i in some], device=parts[0][0].device).argsort()
        off = [off_scale for _, off_scale in parts if off_scale is not None]
        logits = torch.cat([logits for logits, _ in parts])[order]
        whole = ScoreDistribution(logits, self.rubric.bins, off_scale=torch.cat(off)[order] if off else None)
        return self._calibrated(whole, names)

    def standardised(self, scores: ScoreDistribution, dimensions: Sequence[str] | None = None) -> Tensor:
        """Expected scores ``(..., D)`` in standard deviations above the mean of the reference set.

        Args:
            scores: of this model.
            dimensions: their names; all for None.

        Raises:
            ValueError: no statistics, or not of these dimensions.
        """
        if self.statistics is None:
            raise ValueError("this model has no scale statistics: model.statistics = zr.models.measure_scale(model, batches)")
        return self.statistics.standardise(scores.mean, dimensions or self.rubric.dimensions)

    def _calibrated(self, scores: ScoreDistribution, names: Sequence[str]) -> ScoreDistribution:
        return scores if self.calibration is None else self.calibration(scores, names)

    def _tokens(self, images: ImageInput, prompts: Sequence[str], names: Sequence[str]) -> list[int]:
        """What each sample adds to a pass."""
        found: list[int] = self.backbone.tokens(images=images, prompts=prompts, dimensions=names)
        return found

    def _pass(
        self, images: ImageInput, prompts: Sequence[str], names: Sequence[str], again: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One pass of several, whose graph is built again when it is needed."""
        if not (again and torch.is_grad_enabled()):
            return self._answer(images, prompts, names)
        found: tuple[Tensor, Tensor | None] = checkpoint(self._answer, images, prompts, names, use_reentrant=False)
        return found

    def _answer(self, images: ImageInput, prompts: Sequence[str], names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Logits ``(B, D, K)``, and the probability outside the labels where the head tells it."""
        features = self.backbone.features(images=images, prompts=prompts, dimensions=names)
        index = torch.tensor([self.rubric.dimensions.index(name) for name in names], device=features.device)
        return self.head(features, index), self.head.off_scale(features)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a folder: the backbone in Hugging Face's layout, the head's safetensors, ``rubric.yaml``,
        scale statistics, calibration, a model card.

        The folder appears whole or not at all; a model that was there is replaced.

        Raises:
            FileExistsError: a folder that holds something else, which would be lost.
        """
        with written_whole(folder, ABOUT) as new:
            self._write(new)

    def _write(self, folder: Path) -> None:
        self.backbone.save_pretrained(folder / "backbone")
        self.rubric.save(folder / "rubric.yaml")
        kept = {name: tensor.detach().contiguous() for name, tensor in own_tensors(self.head, self.backbone).items()}
        if kept:
            save_file(kept, folder / "head.safetensors")
        if self.statistics is not None:
            self.statistics.save(folder / (STATISTICS if self.calibration is None else CALIBRATED_STATISTICS))
        if self.calibration is not None:
            self.calibration.save(folder / CALIBRATION)
        (folder / ABOUT).write_text(json.dumps(self._about(), indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(self._card(), encoding="utf-8")

    def _about(self) -> dict[str, Any]:
        head, backbone = plain_class(self.head), type(self.backbone)
        return {
            "format": FORMAT,
            "zr": __version__,
            "backbone": f"{backbone.__module__}:{backbone.__qualname__}",
            "head": f"{head.__module__}:{head.__qualname__}",
            "head_config": self.head.config(),
            "scale_id": self.rubric.scale_id,
        }

    def _card(self) -> str:
        bins = ", ".join(f"{b:g}" for b in self.rubric.bins)
        rows = [f"| {name} |" for name in self.rubric.dimensions]
        columns = ["dimension"]
        if self.statistics is not None:
            columns += ["mean", "standard deviation"]
            numbers = zip(self.statistics.mean, self.statistics.std, strict=True)
            rows = [f"{row} {mean:.3f} | {std:.3f} |" for row, (mean, std) in zip(rows, numbers, strict=True)]
        table = "\n".join([f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *rows])
        return (
            "---\nlibrary_name: zr\ntags: [reward-model, text-to-image]\n---\n\n# A zr reward model\n\n"
            f"It answers with a distribution over the scores {bins} for each dimension. Mean and standard deviation, where "
            f"they are given, are those of its expected scores over a reference set.\n\n{table}\n\n"
            f"```python\nimport zr\n\nmodel = zr.load('THIS FOLDER')\n{self.use}\n```\n\n"
            f"Backbone: `{type(self.backbone).__name__}` in `backbone/`, which its own library loads too; head: "
            f"`{plain_class(self.head).__name__}`; wording: `rubric.yaml`; scale `{self.rubric.scale_id}`. Written by zr "
            f"{__version__}.\n{'' if self.calibration is None else _section(self.calibration)}"
        )


class ReasoningReward(RewardModel):
    """A teacher as a scorer: it writes ``traces`` reasoning traces per question and answers with their mixture.

    Args:
        policy: the model that reasons.
        traces: how many traces are averaged.
        seed: of the sampling. A trace is drawn from (seed, prompt, dimension, trace number), so an image gets the same score
            alone and in any batch.
        rule: how traces are sampled.
        statistics: see :class:`RewardModel`.
        budget: see :class:`RewardModel`; every trace counts with its greatest length.
        calibration: see :class:`RewardModel`; it goes over the mixture.

    Raises:
        ValueError: fewer than one trace.

    Reference: Z-Reward (arXiv 2606.09076), eqs. (1), (2).
    """

    def __init__(
        self,
        policy: Policy,
        traces: int = 1,
        seed: int = 0,
        rule: SamplingRule | None = None,
        statistics: ScaleStatistics | None = None,
        budget: int | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__(policy.backbone, policy.head, policy.rubric, statistics, budget, calibration)
        if traces < 1:
            raise ValueError(f"traces must be at least 1, got {traces}")
        self.policy = policy
        self.traces = traces
        self.seed = seed
        self.rule = rule or SamplingRule()

    @torch.no_grad()
    def forward(self, images: ImageInput, prompts: Sequence[str], dimensions: Sequence[str] | None = None) -> ScoreDistribution:
        """Score images; see :class:`~zr.models.scorer.Scorer`. No gradient: the traces are sampled."""
        return super().forward(images, prompts, dimensions)

    def _tokens(self, images: ImageInput, prompts: Sequence[str], names: Sequence[str]) -> list[int]:
        written = len(names) * self.traces * self.rule.length
        return [tokens + written for tokens in super()._tokens(images, prompts, names)]

    def _answer(self, images: ImageInput, prompts: Sequence[str], names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        prefix = self.policy.backbone.encode(images, prompts)
        rollouts = self.policy.sample(
            prefix=prefix.fork(torch.arange(len(prompts)).repeat_interleave(len(names))),
            dimensions=list(names) * len(prompts),
            group_size=self.traces,
            rule=self.rule,
            seeds=[self._seed(p, name, trace) for p in prompts for name in names for trace in range(self.traces)],
        )
        logits = rollouts.logits.reshape(len(prompts), len(names), self.traces, -1)
        return ScoreDistribution(logits, self.rubric.bins).mixture(-1).logits, None

    def _seed(self, prompt: str, dimension: str, trace: int) -> int:
        """Of one trace: the same alone and in any batch, and shared by the images of a prompt, which are compared."""
        text = json.dumps([self.seed, prompt, dimension, trace])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    def _about(self) -> dict[str, Any]:
        return super()._about() | {"reasoning": {"traces": self.traces, "seed": self.seed, "rule": asdict(self.rule)}}


def passes(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Samples put together so that no pass, padded to its longest sample, has more tokens than the budget.

    Args:
        tokens: of each sample.
        budget: of a pass; a longer sample goes alone.

    Returns:
        Their positions, longest samples first, neighbours of about one length.

    Example:
        >>> passes([10, 50, 12, 9, 200], budget=60)
        [[4], [1], [2, 0, 3]]
    """
    found: list[list[int]] = []
    for index in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        if found and tokens[found[-1][0]] * (len(found[-1]) + 1) <= budget:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def compose(backbone: Backbone, head: Callable[[Backbone], Head]) -> RewardModel:
    """A reward model from a backbone and the kind of head that shall stand on it; the form that YAML files use.

    Args:
        backbone: built for a rubric.
        head: a class of heads, or anything that makes a head for a backbone.

    Returns:
        ``RewardModel(backbone, head(backbone), backbone.rubric)``.
    """
    return RewardModel(backbone, head(backbone), backbone.rubric)


def keep_calibration(calibration: Calibration, folder: str | Path) -> None:
    """Put a calibration into the folder of a saved model, and into its card; weights are not touched.

    Args:
        calibration: fitted for the model.
        folder: of the model. Statistics of an earlier calibration are removed.

    Raises:
        FileNotFoundError: no saved model there.
        ValueError: a model of another scale.
    """
    home = Path(folder)
    if not (home / ABOUT).is_file():
        raise FileNotFoundError(f"{home} holds no {ABOUT}: a calibration is kept with a model that zr saved")
    calibration.check(Rubric.load(home / "rubric.yaml"))
    card = home / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    text = re.sub(rf"\n{CARD_TITLE}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL).rstrip("\n")
    (home / CALIBRATED_STATISTICS).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".calibration-", dir=home) as staging:
        calibration.save(Path(staging, CALIBRATION))
        Path(staging, "card").write_text(f"{text}\n{_section(calibration)}", encoding="utf-8")
        Path(staging, CALIBRATION).replace(home / CALIBRATION)
        Path(staging, "card").replace(card)


def _section(calibration: Calibration) -> str:
    """Of the model card."""
    rows = "".join(f"| {name} | {numbers} |\n" for name, numbers in calibration.numbers().items())
    return (
        f"\n{CARD_TITLE}\n\nFitted on annotators' votes by `zr.models.{type(calibration).__name__}`, in `{CALIBRATION}`; "
        f"`zr.load('THIS FOLDER', calibrated=True)` applies it.\n\n| dimension | |\n|---|---|\n{rows}"
    )


def own_tensors(head: nn.Module, backbone: nn.Module) -> dict[str, Tensor]:
    """The part of a head's state that is not the backbone's: its output layer, for one, is saved there."""
    shared = {id(tensor) for tensor in backbone.state_dict(keep_vars=True).values()}
    return {name: tensor for name, tensor in head.state_dict(keep_vars=True).items() if id(tensor) not in shared}


def reasoning(model: RewardModel, rubric: Rubric, off_scale: bool = False, **options: Any) -> ReasoningReward:
    """The same vision-language model, asked to reason before it scores.

    Args:
        model: a reward model with a vision-language backbone.
        rubric: the reasoning wording of the same scale.
        off_scale: see :class:`~zr.models.policy.Policy`; a model that is saved remembers it.
        options: of :class:`ReasoningReward`.

    Raises:
        ValueError: a backbone that writes no text.
    """
    if not isinstance(model.backbone, VLMBackbone):
        raise ValueError(f"{type(model.backbone).__name__} writes no text: reasoning needs a vision-language backbone")
    return ReasoningReward(Policy(model.backbone.reworded(rubric), off_scale=off_scale), **options)
