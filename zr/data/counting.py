"""What data modules know of the run that they feed: which epoch it is, and how far it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import lightning as L

__all__ = ["CountedData", "Counting"]


class Counting(TypedDict):
    """Two arguments of a loader: see :class:`zr.data.loader.ShardLoader`."""

    epoch: Callable[[int | None], int]
    processed: Callable[[], int | None]


class CountedData(L.LightningDataModule):
    """A data module whose training loader goes on where a run was stopped, and whose other loaders always begin anew."""

    def __init__(self) -> None:
        super().__init__()
        self._epochs = -1

    def counting(self, training: bool) -> Counting:
        """Who counts for a loader: the trainer; without one, in training, this module."""
        if training:
            return {"epoch": self._epoch, "processed": self._processed}
        return {"epoch": _first, "processed": _uncounted}

    def _epoch(self, asked: int | None) -> int:
        if self.trainer is not None:
            return self.trainer.current_epoch
        self._epochs = self._epochs + 1 if asked is None else asked
        return self._epochs

    def _processed(self) -> int | None:
        """Batches of this epoch that the trainer has worked through; the one that it is at is given already."""
        if self.trainer is None:
            return None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()
        return int(progress["current"]["processed"])


def _first(asked: int | None) -> int:
    return 0


def _uncounted() -> None:
    return None
