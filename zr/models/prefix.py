"""Encode once, branch many: what all questions about a sample share, and the branches that grow from it.

``backbone.encode`` gives a prefix, ``prefix.fork(index)`` repeats or picks its rows, ``backbone.extend`` gives the hidden
states of suffixes. There are two kinds of prefix and one door: :class:`CachedPrefix` keeps the states of every layer (full
and linear attention), :class:`WholePrefix` keeps the inputs, so that ``extend`` runs whole sequences (any backbone). Nobody
above notices which one it holds.

A backward pass whose memory does not grow with the number of branches cuts the prefix::

    cut = prefix.cut()                                     # the same states, as leaves
    for part in parts:                                     # each graph ends at the leaves and is freed at once
        loss(backbone.extend(cut.fork(part.rows), part.suffixes)).backward()
    cut.replay_loss().backward()                           # what the leaves gathered goes on into model and pixels

Sampling, which writes token after token and needs no gradient, grows :mod:`zr.models.branches` in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

__all__ = ["BranchCache", "CachedPrefix", "LinearStates", "Prefix", "WholePrefix", "join", "pad_left", "pad_right"]


@dataclass(frozen=True)
class _Prefix(ABC):
    """What both kinds share: how a backward pass is cut in two. ``leaves`` are pairs of a tensor and its leaf copy."""

    leaves: list[tuple[Tensor, Tensor]] | None = field(default=None, kw_only=True, repr=False)

    def cut(self) -> Self:
        """The same prefix on leaf copies of what has a gradient: backward passes end there, and their gradients add up."""
        leaves: list[tuple[Tensor, Tensor]] = []

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            leaves.append((tensor, tensor.detach().requires_grad_()))
            return leaves[-1][1]

        return replace(self._map(leaf), leaves=leaves)

    def replay_loss(self) -> Tensor:
        """A scalar whose backward pass carries what the leaves gathered into model and pixels.

        It is the sum of the products of tensors and their gradients: a loss like any other to a gradient scaler or to a
        strategy's hooks. Its value means nothing. A prefix without gradients gives a zero without one.

        Raises:
            ValueError: a prefix that is not cut.
        """
        if self.leaves is None:
            raise ValueError("only a cut prefix has a replay loss: cut = prefix.cut(), extend it, then cut.replay_loss()")
        total = torch.zeros(())
        for tensor, leaf in self.leaves:
            if leaf.grad is not None:
                wide = torch.promote_types(tensor.dtype, torch.float32)
                total = total.to(tensor.device) + (tensor.to(wide) * leaf.grad).sum()
        return total

    @abstractmethod
    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """This prefix with ``function`` of each tensor that may have a gradient."""


@dataclass(frozen=True)
class WholePrefix(_Prefix):
    """The inputs of each row.

    Args:
        ids: one list of ids per row, image placeholders expanded.
        media: per row, what the family's processor made of its images, by the names of the model's arguments; empty for text
            only.
    """

    ids: list[list[int]]
    media: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.ids)

    def fork(self, index: Tensor) -> WholePrefix:
        """The rows at ``index (M,)``, repeated as often as they stand there."""
        rows = index.tolist()
        return WholePrefix([self.ids[i] for i in rows], [self.media[i] for i in rows])

    def _map(self, function: Callable[[Tensor], Tensor]) -> WholePrefix:
        return replace(self, media=[{name: function(tensor) for name, tensor in row.items()} for row in self.media])


@dataclass(frozen=True)
class CachedPrefix(_Prefix):
    """The states of every layer, after prompts that were padded on the left to one length P.

    Args:
        layers: per layer, for full attention keys and values ``(B, heads, P, size)``, for linear attention the last inputs of
            the convolution ``(B, channels, width)`` and the recurrent state ``(B, heads, key size, value size)``.
        linear: per layer, whether it is of linear attention.
        mask: ``(B, P)`` bool, True where a token stands.
        position: ``(B,)`` position id of the token that comes next.
    """

    layers: list[tuple[Tensor, Tensor]]
    linear: tuple[bool, ...]
    mask: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def fork(self, index: Tensor) -> CachedPrefix:
        """The rows at ``index (M,)``, repeated as often as they stand there; gradients add up in the shared row."""
        index = index.to(self.mask.device)
        forked = self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        return replace(
            forked, mask=self.mask.index_select(0, index), position=self.position.index_select(0, index), leaves=None
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> CachedPrefix:
        return replace(self, layers=[(function(first), function(second)) for first, second in self.layers])


Prefix = WholePrefix | CachedPrefix


def join(parts: Sequence[Prefix]) -> Prefix:
    """The rows of several prefixes of one kind, one after another; the states of shorter ones are padded on the left."""
    cached = [part for part in parts if isinstance(part, CachedPrefix)]
    if not cached:
        whole = [part for part in parts if isinstance(part, WholePrefix)]
        return WholePrefix([ids for part in whole for ids in part.ids], [media for part in whole for media in part.media])
    if len(cached) == 1:
        return cached[0]
    length = max(part.mask.shape[1] for part in cached)
    missing = [length - part.mask.shape[1] for part in cached]
    layers = []
    for is_linear, states in zip(cached[0].linear, zip(*(part.layers for part in cached), strict=True), strict=True):
        pads = [(0, 0, 0, 0) if is_linear else (0, 0, count, 0) for count in missing]
        first, second = (
            torch.cat([pad(state, around) for state, around in zip(kind, pads, strict=True)])
            for kind in zip(*states, strict=True)
        )
        layers.append((first, second))
    mask = torch.cat([pad(part.mask, (count, 0)) for part, count in zip(cached, missing, strict=True)])
    return CachedPrefix(layers, cached[0].linear, mask, torch.cat([part.position for part in cached]))


class BranchCache(Cache):  # type: ignore[misc]
    """What transformers' layers read and write in one forward pass over a prefix: the past is read only.

    The stock caches grow in place, which breaks gradients through linear attention, and they cannot meet activation
    checkpointing, whose second forward pass would write a second time. Here a layer's past stays what it was, what comes out is
    assigned, so a repeated forward pass reads and writes the same.

    Args:
        linear: per layer, whether it is of linear attention.
        past: per layer, the two states of :class:`CachedPrefix`; None for a pass over the prefix itself.
    """

    def __init__(self, linear: Sequence[bool], past: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        kinds = [LinearStates if is_linear else _Full for is_linear in linear]
        states: Sequence[tuple[Tensor, Tensor] | None] = past or [None] * len(kinds)
        super().__init__(layers=[kind(state) for kind, state in zip(kinds, states, strict=True)])

    def written(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer, its states after the pass."""
        return [layer.written for layer in self.layers]


class _Full(DynamicLayer):  # type: ignore[misc]
    """Keys and values."""

    def __init__(self, past: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        if past is not None:
            self.lazy_initialization(*past)
            self.keys, self.values = past
        self.written: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the past and of this pass."""
        self.written = (key_states, value_states)
        if self.is_initialized:
            self.written = (torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2))
        return self.written


class LinearStates(LinearAttentionCacheLayerMixin):  # type: ignore[misc]
    """Inputs of the convolution and recurrent state of one layer, of which the past is read only.

    Args:
        past: both, ``(B, channels, width)`` and ``(B, heads, key size, value size)``; None for a pass over the prefix itself.
    """

    def __init__(self, past: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.record_past = True  # else single tokens go through a kernel that writes into the past
        if past is not None:
            self.conv_states[0], self.recurrent_states[0] = past
            self.has_previous_state[0] = True
        self._conv: Tensor
        self.written: tuple[Tensor, Tensor]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to allocate."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Inputs of the convolution, past ones first."""
        width = conv_kernel_size or conv_states.shape[-1]
        if self.has_previous_state[0]:
            conv_states = torch.cat([self.conv_states[0], conv_states], dim=-1)
        missing = max(0, width - conv_states.shape[-1])
        self._conv = pad(conv_states, (missing, 0))[..., -width:]
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """The recurrent state after this pass."""
        self.written = (self._conv, recurrent_states)
        return recurrent_states


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
