"""Encode once, branch many: what all questions about a sample share, and the branches that grow from it.

``backbone.encode`` gives a prefix, ``prefix.fork(index)`` repeats or picks its rows, ``backbone.extend`` gives the hidden
states of suffixes. There are two kinds of prefix and one door: :class:`CachedPrefix` keeps keys and values (full
attention), :class:`WholePrefix` keeps the inputs, so that ``extend`` runs whole sequences (any backbone). Nobody above
notices which one it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CachedPrefix", "Prefix", "WholePrefix", "pad_left", "pad_right"]


@dataclass(frozen=True)
class WholePrefix:
    """The inputs of each row: ids with the image placeholders expanded, and the row's images as the processor made them.

    Args:
        ids: one list of ids per row.
        pixels: per row, patches ``(P, C)`` of all its images, or None for text only.
        grids: per row, ``(n, 3)`` patch grids of its n images.
    """

    ids: list[list[int]]
    pixels: list[Tensor | None]
    grids: list[Tensor | None]

    def __len__(self) -> int:
        return len(self.ids)

    def fork(self, index: Tensor) -> WholePrefix:
        """The rows at ``index (M,)``, repeated as often as they stand there."""
        rows = index.tolist()
        return WholePrefix([self.ids[i] for i in rows], [self.pixels[i] for i in rows], [self.grids[i] for i in rows])


@dataclass(frozen=True)
class CachedPrefix:
    """Keys and values of every layer, left-padded to one length.

    Args:
        layers: per layer, keys and values ``(B, heads, P, size)``.
        mask: ``(B, P)`` bool, True where a token stands.
        position: ``(B,)`` position id of the token that comes next.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def fork(self, index: Tensor) -> CachedPrefix:
        """The rows at ``index (M,)``, repeated as often as they stand there; gradients add up in the shared row."""
        index = index.to(self.mask.device)
        layers = [(keys.index_select(0, index), values.index_select(0, index)) for keys, values in self.layers]
        return CachedPrefix(layers, self.mask.index_select(0, index), self.position.index_select(0, index))


Prefix = WholePrefix | CachedPrefix


def pad_right(rows: Sequence[Sequence[int]], value: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """``(M, T)`` int64 ids padded on the right, and the ``(M, T)`` bool mask of what is not padding."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long, device=device)
    sizes = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(length, device=device) < sizes[:, None]


def pad_left(rows: Sequence[Sequence[int]], value: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """``(M, T)`` int64 ids padded on the left, and the ``(M, T)`` bool mask of what is not padding."""
    ids, mask = pad_right([list(reversed(row)) for row in rows], value, device)
    return ids.flip(-1), mask.flip(-1)
