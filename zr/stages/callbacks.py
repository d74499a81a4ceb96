"""Lightning callbacks of this library."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image

from zr.models.policy import Policy
from zr.models.reward import RUN_MODEL
from zr.models.sharding import gathered
from zr.scores import ScoreDistribution
from zr.stages.scoring import ScoringStage
from zr.stages.teacher import Sampled, Teacher

__all__ = ["Alarm", "KeepBestModel", "WriteDistributions", "WriteRollouts"]


class KeepBestModel(L.Callback):
    """Writes the reward model into the run's folder whenever the monitored measure rises, so that ``zr.load(RUN)`` finds it.

    What is written is a deployable folder (safetensors), not a Lightning checkpoint. Without validation the model at the
    end of training is kept.

    Args:
        monitor: the logged measure that shall be high.
    """

    def __init__(self, monitor: str = "val/hpa") -> None:
        self.monitor = monitor
        self.best = float("-inf")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make sure that another run's model is not replaced.

        Raises:
            FileExistsError: the folder holds a model, and this run does not go on from a checkpoint.
        """
        model = run_folder(trainer) / RUN_MODEL
        if model.exists() and trainer.ckpt_path is None:
            raise FileExistsError(
                f"{model} holds the model of another run: choose another run folder (--run), remove that one, or go on "
                "from its checkpoint (--ckpt_path last)"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the model if it is the best so far.

        Raises:
            ValueError: the measure was not logged, or is NaN.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"KeepBestModel monitors {self.monitor!r}, but the stage logged {logged}")
        value = float(trainer.callback_metrics[self.monitor])
        if math.isnan(value):
            raise ValueError(
                f"{self.monitor} is NaN: nothing in the validation split measures it. HPA needs two images of one prompt with "
                "different scores or with a choice that is not one half, a correlation two scores that differ: add "
                "annotations, or let KeepBestModel monitor another measure"
            )
        if value > self.best:
            self.best = value
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the last model when nothing was validated."""
        if self.best == float("-inf"):
            self._save(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best = float(state_dict["best"])

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, ScoringStage):
            raise ValueError(f"KeepBestModel keeps reward models; {type(pl_module).__name__} has none")
        with gathered(pl_module.model, keep=trainer.is_global_zero):
            if trainer.is_global_zero:
                pl_module.model.save_pretrained(run_folder(trainer) / RUN_MODEL)


class WriteDistributions(L.Callback):
    """Writes what ``zr predict`` computes, one JSON line per image: its key and, per dimension, K probabilities.

    Args:
        path: the file; each process writes one of its own, with its rank before the ending when there are several.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the file anew."""
        self._file(trainer).parent.mkdir(parents=True, exist_ok=True)
        self._file(trainer).write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch's lines."""
        if not isinstance(pl_module, ScoringStage):
            raise ValueError(f"WriteDistributions writes what reward models predict; {type(pl_module).__name__} has none")
        names = pl_module.model.rubric.dimensions
        probs: torch.Tensor = outputs["probs"]
        with self._file(trainer).open("a", encoding="utf-8") as file:
            for key, row in zip(outputs["keys"], probs.tolist(), strict=True):
                file.write(json.dumps({"key": key, "probs": dict(zip(names, row, strict=True))}) + "\n")

    def _file(self, trainer: L.Trainer) -> Path:
        one = trainer.world_size == 1
        return self.path if one else self.path.with_suffix(f".{trainer.global_rank}{self.path.suffix}")


class Alarm(L.Callback):
    """Warns when a logged measure goes where a run has gone wrong; and stops the run, if asked to.

    One warning each time that the measure crosses the line. Measures named ``val/...`` are looked at after each validation,
    others after each training batch. NaN is beyond any line.

    Args:
        monitor: the logged measure, the same on all processes.
        above: the line that it shall not be above.
        below: the line that it shall not be below.
        patience: times in a row beyond a line before the alarm goes off.
        stop: end the training then.

    Raises:
        ValueError: no line, a patience below 1; while training, a measure that was not logged.
    """

    def __init__(
        self, monitor: str, above: float | None = None, below: float | None = None, patience: int = 1, stop: bool = False
    ) -> None:
        if (above is None and below is None) or patience < 1:
            raise ValueError(
                f"an alarm for {monitor} needs a line, above or below, and a patience of at least 1, "
                f"got {above}, {below} and {patience}"
            )
        self.monitor = monitor
        self.above = math.inf if above is None else above
        self.below = -math.inf if below is None else below
        self.patience = patience
        self.stop = stop
        self.beyond = 0

    @property
    def state_key(self) -> str:
        """A run may have several alarms."""
        return self._generate_state_key(monitor=self.monitor, above=self.above, below=self.below)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at a measure of training."""
        if not self.monitor.startswith("val/"):
            self._look(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at a measure of validation."""
        if self.monitor.startswith("val/") and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know."""
        return {"beyond": self.beyond}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.beyond = int(state_dict["beyond"])

    def _look(self, trainer: L.Trainer) -> None:
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"Alarm monitors {self.monitor!r}, but the stage logged {logged}")
        value = float(trainer.callback_metrics[self.monitor])
        self.beyond = 0 if self.below <= value <= self.above else self.beyond + 1
        if self.beyond == self.patience:
            if trainer.is_global_zero:
                end = "the run ends here" if self.stop else "look at the rollouts before going on"
                line = f"outside [{self.below:g}, {self.above:g}]"
                warnings.warn(f"step {trainer.global_step}: {self.monitor} is {value:g}, {line}: {end}", stacklevel=2)
            trainer.should_stop = trainer.should_stop or self.stop


class WriteRollouts(L.Callback):
    """Writes some of a teacher's rollouts for people: ``RUN/rollouts/BATCH.json``, and beside it the images as PNG.

    Args:
        every: sampled batches from one writing to the next; the first batch is written too.
        count: pairs of a batch, from its first on; each with all its rollouts.

    Raises:
        ValueError: a number below 1; in training, a stage that samples nothing.
    """

    def __init__(self, every: int = 100, count: int = 1) -> None:
        if every < 1 or count < 1:
            raise ValueError(f"every and count must be at least 1, got {every} and {count}")
        self.every = every
        self.count = count

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, when it is time."""
        if not isinstance(pl_module, Teacher) or pl_module.sampled is None:
            raise ValueError(f"WriteRollouts writes what a Teacher samples; {type(pl_module).__name__} samples nothing")
        done = int(pl_module.batches) - 1
        if done % self.every or not trainer.is_global_zero:
            return
        folder = run_folder(trainer) / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        given, found = pl_module.sampled.batch, []
        for number, ((first, second), d) in enumerate(
            zip(given.pairs[: self.count].tolist(), given.pair_dimension.tolist(), strict=False)
        ):
            for side, image in enumerate((first, second)):
                name = f"{done:06d}-{number}-{'ab'[side]}.png"
                Image.fromarray(given.images[image].permute(1, 2, 0).cpu().numpy()).save(folder / name)
                about = {
                    "key": given.keys[image],
                    "image": name,
                    "prompt": given.prompts[image],
                    "dimension": pl_module.policy.rubric.dimensions[d],
                    "annotated": float(given.scores[image, d]),
                }
                group = slice((2 * number + side) * pl_module.group_size, (2 * number + side + 1) * pl_module.group_size)
                found.append(about | {"rollouts": _told(pl_module.policy, pl_module.sampled, group)})
        text = json.dumps(found, indent=2, ensure_ascii=False)
        (folder / f"{done:06d}.json").write_text(text + "\n", encoding="utf-8")


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of a run; logs and checkpoints lie in it too."""
    return Path(trainer.default_root_dir)


def _told(policy: Policy, sampled: Sampled, part: slice) -> list[dict[str, Any]]:
    """Some rollouts as plain values."""
    rollouts = sampled.rollouts.select(part)
    scores = ScoreDistribution(rollouts.logits, policy.rubric.bins)
    bins = [f"{b:g}" for b in policy.rubric.bins]
    told: list[dict[str, Any]] = []
    for i, text in enumerate(policy.texts(rollouts)):
        probs = [round(p, 4) for p in scores.probs[i].tolist()]
        one = {"text": text, "forced": bool(rollouts.forced[i]), "expected": round(float(scores.mean[i]), 4)}
        told.append(one | {"distribution": dict(zip(bins, probs, strict=True))})
        if sampled.credit is not None:
            mine = sampled.credit.select(part)
            told[-1] |= {"reward": float(mine.reward[i]), "advantage": float(mine.advantage[i])}
    return told
