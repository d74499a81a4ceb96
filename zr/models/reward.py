"""The reward model that users deploy: a backbone, a head and a rubric; saved and loaded as one folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zr.models.backbones.vlm import VLMBackbone
from zr.models.heads import Backbone, Head
from zr.models.images import ImageInput
from zr.models.policy import Policy, SamplingRule
from zr.rubric import Rubric
from zr.scores import ScoreDistribution
from zr.version import __version__

__all__ = ["ReasoningReward", "RewardModel", "Scorer", "compose", "load"]

FORMAT = 1
RUN_MODEL = "model"
"""Folder inside a run's folder in which the run keeps its best model."""


class Scorer(Protocol):
    """Whatever scores images: reward models, reasoning teachers, judges."""

    rubric: Rubric

    def __call__(
        self, images: ImageInput, prompts: Sequence[str], dimensions: Sequence[str] | None = None
    ) -> ScoreDistribution:
        """Score B images.

        Args:
            images: float tensor ``(B, 3, H, W)`` in [0, 1], list of B images (PIL or tensor), list of B lists, or None.
            prompts: B prompts.
            dimensions: D names of the rubric; all of them for None.

        Returns:
            A distribution of batch shape ``(B, D)``.
        """


class RewardModel(nn.Module):
    """Answers in one forward pass with a distribution over scores, per image and dimension.

    Args:
        backbone: gives features ``(B, D, H)``.
        head: maps them to logits ``(B, D, K)``.
        rubric: scale and wording; its scale must be the backbone's.

    Raises:
        ValueError: a rubric of another scale.
    """

    def __init__(self, backbone: Backbone, head: Head, rubric: Rubric) -> None:
        super().__init__()
        if rubric.scale_id != backbone.rubric.scale_id:
            raise ValueError(
                f"the backbone was built for dimensions {list(backbone.rubric.dimensions)} and bins "
                f"{backbone.rubric.bins}, the rubric has {list(rubric.dimensions)} and {rubric.bins}: use one rubric"
            )
        self.backbone: Any = backbone
        self.head = head
        self.rubric = rubric

    def forward(self, images: ImageInput, prompts: Sequence[str], dimensions: Sequence[str] | None = None) -> ScoreDistribution:
        """Score images; see :class:`Scorer`.

        Raises:
            ValueError: an unknown dimension, images that do not fit the prompts, pixels out of range, NaN in the logits.
        """
        index = self.rubric.index(dimensions)
        names = [self.rubric.dimensions[i] for i in index]
        features = self.backbone.features(images=images, prompts=list(prompts), dimensions=names)
        logits = self.head(features, torch.tensor(index, device=features.device))
        return ScoreDistribution(logits, self.rubric.bins, off_scale=self.head.off_scale(features))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a folder: the backbone in Hugging Face's layout, the head's safetensors, ``rubric.yaml``.

        The folder appears whole or not at all; one that was there is replaced.
        """
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        staging.chmod(0o755)
        self.backbone.save_pretrained(staging / "backbone")
        self.rubric.save(staging / "rubric.yaml")
        kept = {name: tensor.contiguous() for name, tensor in self.head.state_dict().items() if not name.startswith("output.")}
        if kept:
            save_file(kept, staging / "head.safetensors")
        head, backbone = type(self.head), type(self.backbone)
        about = {
            "format": FORMAT,
            "zr": __version__,
            "backbone": f"{backbone.__module__}:{backbone.__qualname__}",
            "head": f"{head.__module__}:{head.__qualname__}",
            "head_config": self.head.config(),
            "scale_id": self.rubric.scale_id,
        }
        (staging / "reward.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(self._card(), encoding="utf-8")
        old = target.with_name(f".{target.name}-old-{os.getpid()}")
        if target.exists():
            target.rename(old)
        staging.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _card(self) -> str:
        dimensions = "\n".join(f"- {name}" for name in self.rubric.dimensions)
        bins = ", ".join(f"{b:g}" for b in self.rubric.bins)
        return (
            "---\nlibrary_name: zr\ntags: [reward-model, text-to-image]\n---\n\n# A zr reward model\n\n"
            f"It answers with a distribution over the scores {bins} for each dimension:\n\n{dimensions}\n\n"
            "```python\nimport zr\n\nmodel = zr.load('THIS FOLDER')\n"
            "scores = model(images=[image], prompts=['what the image should show'])\n"
            "scores.mean, scores.stddev, scores.probs\n```\n"
        )


class ReasoningReward(nn.Module):
    """A teacher as a scorer: it writes ``traces`` reasoning traces per question and answers with their mixture.

    Args:
        policy: the model that reasons.
        traces: how many traces are averaged.
        seed: of the sampling; the same call gives the same scores.
        rule: how traces are sampled.

    Reference: Z-Reward (arXiv 2606.09076), eqs. (1), (2).
    """

    def __init__(self, policy: Policy, traces: int = 1, seed: int = 0, rule: SamplingRule | None = None) -> None:
        super().__init__()
        if traces < 1:
            raise ValueError(f"traces must be at least 1, got {traces}")
        self.policy = policy
        self.rubric = policy.rubric
        self.traces = traces
        self.seed = seed
        self.rule = rule or SamplingRule()

    @torch.no_grad()
    def forward(self, images: ImageInput, prompts: Sequence[str], dimensions: Sequence[str] | None = None) -> ScoreDistribution:
        """Score images; see :class:`Scorer`. No gradient: the traces are sampled."""
        names = [self.rubric.dimensions[i] for i in self.rubric.index(dimensions)]
        prefix = self.policy.backbone.encode(images, list(prompts))
        rows = torch.arange(len(prompts)).repeat_interleave(len(names))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            rollouts = self.policy.sample(
                prefix=prefix.fork(rows), dimensions=names * len(prompts), group_size=self.traces, rule=self.rule
            )
        logits = rollouts.logits.reshape(len(prompts), len(names), self.traces, -1)
        return ScoreDistribution(logits, self.rubric.bins).mixture(-1)


def compose(backbone: Backbone, head: Callable[[Backbone], Head]) -> RewardModel:
    """A reward model from a backbone and the kind of head that shall stand on it; the form that YAML files use.

    Args:
        backbone: built for a rubric.
        head: a class of heads, or anything that makes a head for a backbone.

    Returns:
        ``RewardModel(backbone, head(backbone), backbone.rubric)``.
    """
    return RewardModel(backbone, head(backbone), backbone.rubric)


def load(source: str | Path, head: Head | None = None) -> RewardModel:
    """Load what ``save_pretrained`` wrote: a model's folder, or a run's folder that holds one.

    Args:
        source: the folder.
        head: a head of your own class, with any weights; needed only where the folder names a class outside ``zr``.

    Raises:
        FileNotFoundError: no model there.
        ValueError: a file that is no safetensors, a newer format, weights that do not fit, a head class outside ``zr``.
    """
    folder = Path(source)
    folder = next((f for f in (folder, folder / RUN_MODEL) if (f / "reward.json").is_file()), folder)
    if not (folder / "reward.json").is_file():
        raise FileNotFoundError(f"{source} holds no model: neither reward.json nor {RUN_MODEL}/reward.json is there")
    pickles = [p.name for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}]
    if pickles:
        raise ValueError(f"{folder} holds {pickles[0]}, which could run code when loaded: only safetensors are read; remove it")
    about = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {about.get('format')}; this zr {__version__} reads format {FORMAT}")
    rubric = Rubric.load(folder / "rubric.yaml")
    backbone = _class(about["backbone"], folder).from_pretrained(folder / "backbone", rubric)
    if head is None:
        head = _class(about["head"], folder)(backbone, **about["head_config"])
    if (folder / "head.safetensors").is_file():
        missing, unexpected = head.load_state_dict(load_file(folder / "head.safetensors"), strict=False)
        missing = [name for name in missing if not name.startswith("output.")]
        if missing or unexpected:
            raise ValueError(
                f"{folder}/head.safetensors does not fit {type(head).__name__}: missing {missing}, extra {unexpected}"
            )
    return RewardModel(backbone, head, rubric).eval()


def _class(path: str, folder: Path) -> Any:
    """The class that a folder names, from this package only: a folder must not choose what gets imported."""
    module, _, name = path.partition(":")
    if not module.startswith("zr."):
        raise ValueError(f"{folder} uses {path}, a class outside zr: build it yourself and pass it as load(..., head=...)")
    return getattr(import_module(module), name)


def reasoning(model: RewardModel, rubric: Rubric, **options: Any) -> ReasoningReward:
    """The same vision-language model, asked to reason before it scores.

    Args:
        model: a reward model with a vision-language backbone.
        rubric: the reasoning wording of the same scale.
        options: of :class:`ReasoningReward`.
    """
    backbone: VLMBackbone = model.backbone
    return ReasoningReward(Policy(backbone.reworded(rubric)), **options)
