"""The reward model that users deploy: a backbone, a head and a rubric; saved and loaded as one folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zr.models.backbones.vlm import VLMBackbone
from zr.models.heads import Backbone, Head
from zr.models.images import ImageInput
from zr.models.policy import Policy, SamplingRule
from zr.rubric import Rubric
from zr.scores import ScoreDistribution
from zr.version import __version__

__all__ = ["ReasoningReward", "RewardModel", "Scorer", "compose", "load"]

FORMAT = 1
ABOUT = "reward.json"
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
        ValueError: a rubric of another scale, or a wording that is not the one that the backbone asks with.
    """

    def __init__(self, backbone: Backbone, head: Head, rubric: Rubric) -> None:
        super().__init__()
        if rubric.scale_id != backbone.rubric.scale_id:
            raise ValueError(
                f"the backbone was built for dimensions {list(backbone.rubric.dimensions)} and bins "
                f"{backbone.rubric.bins}, the rubric has {list(rubric.dimensions)} and {rubric.bins}: use one rubric"
            )
        if rubric.wording != backbone.rubric.wording:
            raise ValueError("the backbone asks in another wording than the rubric's: pass backbone.reworded(rubric)")
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
        features = self.backbone.features(images=images, prompts=prompts, dimensions=names)
        logits = self.head(features, torch.tensor(index, device=features.device))
        return ScoreDistribution(logits, self.rubric.bins, off_scale=self.head.off_scale(features))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a folder: the backbone in Hugging Face's layout, the head's safetensors, ``rubric.yaml``.

        The folder appears whole or not at all; a model that was there is replaced.

        Raises:
            FileExistsError: a folder that holds something else, which would be lost.
        """
        target = Path(folder).resolve()
        if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / ABOUT).is_file()):
            raise FileExistsError(f"{target} is there and holds no zr model: it would be lost, so choose another folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            self._write(staging / "new")
            if target.exists():
                target.rename(staging / "old")
            (staging / "new").rename(target)
        finally:
            if (staging / "old").exists() and not target.exists():
                (staging / "old").rename(target)
            shutil.rmtree(staging)

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        self.backbone.save_pretrained(folder / "backbone")
        self.rubric.save(folder / "rubric.yaml")
        kept = {name: tensor.detach().contiguous() for name, tensor in _own_tensors(self.head, self.backbone).items()}
        if kept:
            save_file(kept, folder / "head.safetensors")
        head, backbone = type(self.head), type(self.backbone)
        about = {
            "format": FORMAT,
            "zr": __version__,
            "backbone": f"{backbone.__module__}:{backbone.__qualname__}",
            "head": f"{head.__module__}:{head.__qualname__}",
            "head_config": self.head.config(),
            "scale_id": self.rubric.scale_id,
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(self._card(), encoding="utf-8")

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
        seed: of the sampling. A trace is drawn from (seed, prompt, dimension, trace number), so an image gets the same score
            alone and in any batch.
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
        prefix = self.policy.backbone.encode(images, prompts)
        rows = torch.arange(len(prompts)).repeat_interleave(len(names))
        rollouts = self.policy.sample(
            prefix=prefix.fork(rows),
            dimensions=names * len(prompts),
            group_size=self.traces,
            rule=self.rule,
            seeds=[self._seed(p, name, trace) for p in prompts for name in names for trace in range(self.traces)],
        )
        logits = rollouts.logits.reshape(len(prompts), len(names), self.traces, -1)
        return ScoreDistribution(logits, self.rubric.bins).mixture(-1)

    def _seed(self, prompt: str, dimension: str, trace: int) -> int:
        """Of one trace: the same alone and in any batch, and shared by the images of a prompt, which are compared."""
        text = json.dumps([self.seed, prompt, dimension, trace])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def compose(backbone: Backbone, head: Callable[[Backbone], Head]) -> RewardModel:
    """A reward model from a backbone and the kind of head that shall stand on it; the form that YAML files use.

    Args:
        backbone: built for a rubric.
        head: a class of heads, or anything that makes a head for a backbone.

    Returns:
        ``RewardModel(backbone, head(backbone), backbone.rubric)``.
    """
    return RewardModel(backbone, head(backbone), backbone.rubric)


def load(source: str | Path, head: Callable[..., Head] | None = None) -> RewardModel:
    """Load what ``save_pretrained`` wrote: a model's folder, or a run's folder that holds one.

    Args:
        source: the folder.
        head: your own class of heads; needed only where the folder names a class outside ``zr``. It is called as the saved
            head was built: with the backbone and the keywords of its ``config()``.

    Raises:
        FileNotFoundError: no model there.
        ValueError: a file that is no safetensors, a newer format, a changed scale, weights that do not fit, a class outside
            ``zr``.
    """
    folder = Path(source)
    folder = next((f for f in (folder, folder / RUN_MODEL) if (f / ABOUT).is_file()), folder)
    if not (folder / ABOUT).is_file():
        raise FileNotFoundError(f"{source} holds no model: neither {ABOUT} nor {RUN_MODEL}/{ABOUT} is there")
    pickles = [p.name for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}]
    if pickles:
        raise ValueError(f"{folder} holds {pickles[0]}, which could run code when loaded: only safetensors are read; remove it")
    about = _about(folder)
    rubric = Rubric.load(folder / "rubric.yaml")
    if rubric.scale_id != about["scale_id"]:
        raise ValueError(f"{folder}/rubric.yaml has scale {rubric.scale_id}, the model learned scale {about['scale_id']}")
    try:
        backbone = _class(about["backbone"], folder).from_pretrained(folder / "backbone", rubric)
        saved = load_file(folder / "head.safetensors") if (folder / "head.safetensors").is_file() else {}
    except SafetensorError as error:
        raise ValueError(f"{folder} holds a damaged safetensors file ({error}): copy or save the model again") from None
    built = (head or _class(about["head"], folder))(backbone, **about["head_config"])
    own = _own_tensors(built, backbone)
    shapes, found = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (own, saved))
    if shapes != found:
        raise ValueError(f"{folder}/head.safetensors does not fit {type(built).__name__}: it needs {shapes}, there is {found}")
    built.load_state_dict(saved, strict=False)
    return RewardModel(backbone, built, rubric).eval()


def _about(folder: Path) -> dict[str, Any]:
    """What a model's folder says about itself, checked."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}/{ABOUT} is not JSON ({error}): copy or save the model again") from None
    fields = {"format", "backbone", "head", "head_config", "scale_id"}
    if not isinstance(about, dict) or not fields <= set(about):
        raise ValueError(f"{folder}/{ABOUT} must be an object with {', '.join(sorted(fields))}: copy or save the model again")
    if about["format"] != FORMAT:
        raise ValueError(f"{folder} has format {about['format']}; this zr {__version__} reads format {FORMAT}")
    return about


def _own_tensors(head: nn.Module, backbone: nn.Module) -> dict[str, Tensor]:
    """The part of a head's state that is not the backbone's: its output layer, for one, is saved there."""
    shared = {id(tensor) for tensor in backbone.state_dict(keep_vars=True).values()}
    return {name: tensor for name, tensor in head.state_dict(keep_vars=True).items() if id(tensor) not in shared}


def _class(path: str, folder: Path) -> Any:
    """The class that a folder names, from this package only: a folder must not choose what gets imported."""
    module, _, name = path.partition(":")
    if not module.startswith("zr."):
        raise ValueError(
            f"{folder} uses {path}, a class outside zr, which a folder may not choose: pass a head as load(..., head={name}), "
            "build a model with a backbone of your own by hand"
        )
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise ValueError(f"{folder} uses {path}, which this zr {__version__} does not have: a newer one may") from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{folder} uses {path}, which is no part of a model")
    return found


def reasoning(model: RewardModel, rubric: Rubric, **options: Any) -> ReasoningReward:
    """The same vision-language model, asked to reason before it scores.

    Args:
        model: a reward model with a vision-language backbone.
        rubric: the reasoning wording of the same scale.
        options: of :class:`ReasoningReward`.
    """
    backbone: VLMBackbone = model.backbone
    return ReasoningReward(Policy(backbone.reworded(rubric)), **options)
