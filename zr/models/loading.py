"""Saved models read again: folders, runs, names on the hub, and plain vision-language models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from zr.models.adapters import merge_adapters as merge
from zr.models.aggregation import ScaleStatistics
from zr.models.backbones.vlm import VLMBackbone
from zr.models.calibration import Calibration
from zr.models.comparison import ComparisonReward
from zr.models.heads import Head, ScoreTokenHead
from zr.models.policy import Policy, SamplingRule
from zr.models.reward import (
    ABOUT,
    CALIBRATED_STATISTICS,
    CALIBRATION,
    FORMAT,
    RUN_MODEL,
    STATISTICS,
    ReasoningReward,
    RewardModel,
    own_tensors,
)
from zr.rubric import Rubric
from zr.version import __version__

__all__ = ["load", "model_folder", "scale_statistics"]

READ = ["*.json", "*.yaml", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""Files of a model on the hub that are fetched: no code, and nothing that would have to be unpickled."""


def load(
    source: str | Path,
    head: Callable[..., Head] | None = None,
    rubric: Rubric | str | Path | None = None,
    revision: str | None = None,
    merge_adapters: bool = False,
    budget: int | None = None,
    calibrated: bool = False,
    **options: Any,
) -> RewardModel:
    """Load a model: what ``save_pretrained`` wrote, or a plain vision-language model to be asked under a rubric.

    Args:
        source: a model's folder, a run's folder that holds one, or the name of either kind of model on the hub (ORG/NAME).
        head: your own class of heads; needed only where the folder names a class outside ``zr``. It is called as the saved
            head was built: with the backbone and the keywords of its ``config()``.
        rubric: for a saved model, another wording of its scale. A plain vision-language model needs one, for example
            ``"zr:direct"``: it is then asked for score tokens, zero-shot.
        revision: branch, tag or commit on the hub.
        merge_adapters: fold LoRA adapters into the weights: equal scores, at the base model's speed.
        budget: most tokens of one pass; see :class:`~zr.models.RewardModel`.
        calibrated: let every answer go through the calibration that is kept with the model; without it the model answers by
            itself, as in training, and what it saves has no calibration. Its statistics are then those of calibrated scores.
        options: how the backbone is loaded: ``dtype``, and for vision-language models ``device_map``,
            ``attn_implementation``, ``quantization_config``, ...; see its ``from_pretrained``.

    Returns:
        The model, in evaluation mode; a :class:`~zr.models.ReasoningReward` or :class:`~zr.models.ComparisonReward` where one
        was saved.

    Raises:
        FileNotFoundError: no model there, or none with a calibration where one is asked for.
        ValueError: a file that is no safetensors, a newer format, a changed scale, weights that do not fit, a class outside
            ``zr``; a plain model without a rubric; a calibration of another scale, or for another wording.
    """
    asked = Rubric.load(rubric) if isinstance(rubric, str | Path) else rubric
    folder = model_folder(source, revision)
    if calibrated and not (folder / CALIBRATION).is_file():
        raise FileNotFoundError(f"{source} holds no {CALIBRATION}: fit one (zr calibrate {source} SHARDS --save true)")
    if not (folder / ABOUT).is_file():
        if asked is None:
            raise ValueError(
                f"{source} is a plain model that zr did not save: name the rubric that it shall be asked under, for example "
                f"zr.load({str(source)!r}, rubric='zr:direct'), or --rubric zr:direct for zr score"
            )
        backbone = VLMBackbone.from_pretrained(source, asked, revision=revision, **options)
        if merge_adapters:
            merge(backbone.model)
        return RewardModel(backbone, (head or ScoreTokenHead)(backbone), asked, budget=budget).eval()
    pickles = [p.name for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}]
    if pickles:
        raise ValueError(f"{folder} holds {pickles[0]}, which could run code when loaded: only safetensors are read; remove it")
    about = _about(folder)
    saved = Rubric.load(folder / "rubric.yaml")
    if saved.scale_id != about["scale_id"]:
        raise ValueError(f"{folder}/rubric.yaml has scale {saved.scale_id}, the model learned scale {about['scale_id']}")
    asked = asked or saved
    if asked.scale_id != saved.scale_id:
        raise ValueError(f"the rubric has scale {asked.scale_id}, the model in {folder} learned scale {saved.scale_id}")
    if calibrated and asked.wording != saved.wording:
        raise ValueError(f"the calibration in {folder} is of answers to the saved wording: leave out rubric, or calibrated")
    calibration = Calibration.load(folder / CALIBRATION) if calibrated else None
    try:
        backbone = _class(about["backbone"], folder).from_pretrained(folder / "backbone", asked, **options)
        measured = folder / (CALIBRATED_STATISTICS if calibrated else STATISTICS)
        statistics = ScaleStatistics.load(measured) if measured.is_file() else None
        if merge_adapters and isinstance(backbone, VLMBackbone):
            merge(backbone.model)
        if "reasoning" in about:
            policy = Policy(backbone, **about["head_config"])
            return _reasoning(about["reasoning"], policy, statistics, budget, calibration).eval()
        built = _head(folder, head or _class(about["head"], folder), about["head_config"], backbone)
    except SafetensorError as error:
        raise ValueError(f"{folder} holds a damaged safetensors file ({error}): copy or save the model again") from None
    if "comparison" in about:
        return ComparisonReward(backbone, built, asked, budget).eval()
    return RewardModel(backbone, built, asked, statistics, budget, calibration).eval()


def scale_statistics(source: str | Path, revision: str | None = None, calibrated: bool = False) -> ScaleStatistics:
    """The scale statistics of a saved model, without its weights; the form in which YAML files hand them to an aggregation.

    Args:
        source: as :func:`load` takes it.
        revision: branch, tag or commit on the hub.
        calibrated: those of calibrated scores.

    Raises:
        FileNotFoundError: no model there, or one without statistics.
    """
    folder = model_folder(source, revision, weights=False)
    name = CALIBRATED_STATISTICS if calibrated else STATISTICS
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{source} holds no {name}: measure them (zr.models.measure_scale) and save the model")
    return ScaleStatistics.load(folder / name)


def model_folder(source: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """Where a model lies on this disk, fetched if need be; of a plain model on the hub, an empty folder or its cache."""
    folder = Path(source)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        try:
            found = Path(
                snapshot_download(str(source), revision=revision, allow_patterns=[ABOUT, STATISTICS, CALIBRATED_STATISTICS])
            )
            if weights and (found / ABOUT).is_file():
                snapshot_download(str(source), revision=revision, allow_patterns=READ)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(f"{source} is no folder here, and the hub did not give it: {reason}") from None
        return found
    found = next((f for f in (folder, folder / RUN_MODEL) if (f / ABOUT).is_file()), folder)
    if not (found / ABOUT).is_file() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no model: neither {ABOUT} nor {RUN_MODEL}/{ABOUT} is there")
    return found


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


def _head(folder: Path, kind: Callable[..., Head], config: dict[str, Any], backbone: Any) -> Head:
    """A head with its saved weights, on the backbone's device."""
    path = folder / "head.safetensors"
    saved = load_file(path, device=str(backbone.device)) if path.is_file() else {}
    built = kind(backbone, **config)
    own = own_tensors(built, backbone)
    shapes, found = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (own, saved))
    if shapes != found:
        raise ValueError(f"{folder}/head.safetensors does not fit {type(built).__name__}: it needs {shapes}, there is {found}")
    built.load_state_dict(saved, strict=False, assign=True)
    return built


def _reasoning(
    about: dict[str, Any],
    policy: Policy,
    statistics: ScaleStatistics | None,
    budget: int | None,
    calibration: Calibration | None,
) -> ReasoningReward:
    rule = SamplingRule(**about["rule"] | {"suppressed": tuple(about["rule"]["suppressed"])})
    return ReasoningReward(policy, about["traces"], about["seed"], rule, statistics, budget, calibration)


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
