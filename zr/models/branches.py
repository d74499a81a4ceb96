"""Branches of a prefix that are written on in place, token after token and without a gradient, as sampling does.

A prefix is a value: what grows from it is a new one, which costs a copy of the whole past at every token. Branches are copied
once and then own their states. A row that has ended waits behind those that go on, so that these stand together::

    branches = branch(prefix, index, room)
    while len(branches):
        hidden = backbone.grow(branches, tokens)           # of the rows that go on, in the order of branches.going
        came = branches.leave(ended)                       # the others stand where came says they stood
    branches.gather()                                      # all of them, in the order of branches.order
    hidden = backbone.grow(branches, suffixes)             # the last time, so of any lengths
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from zr.models.prefix import CachedPrefix, LinearStates, Prefix, WholePrefix

__all__ = ["Branches", "CachedBranches", "WholeBranches", "branch"]

ROOM = 128
"""Tokens that buffers of keys and values have room for at first; the room doubles whenever it is used up."""


def branch(prefix: Prefix, index: Tensor, room: int) -> CachedBranches | WholeBranches:
    """Copies of the rows at ``index (M,)``, to be written on by at most ``room`` tokens; the prefix stays what it is."""
    return CachedBranches(prefix, index, room) if isinstance(prefix, CachedPrefix) else WholeBranches(prefix, index)


class Branches(ABC):
    """Which rows go on and where they stand.

    Args:
        count: M rows.

    Attributes:
        order: the row that stands in each of M places; those that go on come first.
        gathered: whether all have been called for a last suffix.
    """

    def __init__(self, count: int) -> None:
        self.order = list(range(count))
        self.gathered = False
        self._count = count

    def __len__(self) -> int:
        """How many go on."""
        return self._count

    @property
    def going(self) -> list[int]:
        """The rows that go on, as they stand."""
        return self.order[: self._count]

    def leave(self, places: Sequence[int]) -> list[int]:
        """Let the rows at ``places`` wait.

        Each of them changes places with the last one that goes on, so that few are moved.

        Returns:
            Where those that go on stood before, in the order in which they stand now.
        """
        came, count = list(range(self._count)), self._count
        for place in sorted(places, reverse=True):
            count -= 1
            came[place], came[count] = came[count], came[place]
        self.order[: self._count] = [self.order[place] for place in came]
        self._move(came, count)
        self._count = count
        return came[:count]

    def gather(self) -> None:
        """Call all rows, for a last suffix."""
        self._recall()
        self._count, self.gathered = len(self.order), True

    @abstractmethod
    def _move(self, came: Sequence[int], count: int) -> None:
        """Put the rows that went on where they stand now; from place ``count`` on they wait."""

    @abstractmethod
    def _recall(self) -> None:
        """Nobody waits."""


class WholeBranches(Branches):
    """What has been written in each row, and its images.

    Args:
        prefix: what the rows grow from.
        index: ``(M,)`` rows of it.
    """

    def __init__(self, prefix: WholePrefix, index: Tensor) -> None:
        super().__init__(len(index))
        self._rows = prefix.fork(index)

    @property
    def rows(self) -> WholePrefix:
        """Those that go on."""
        return self._rows.fork(torch.arange(len(self)))

    def write(self, suffix_ids: Sequence[Sequence[int]]) -> None:
        """Put a suffix behind each row that goes on."""
        for place, suffix in enumerate(suffix_ids):
            self._rows.ids[place] = [*self._rows.ids[place], *suffix]

    def _move(self, came: Sequence[int], count: int) -> None:
        self._rows = self._rows.fork(torch.tensor([*came, *range(len(came), len(self.order))]))

    def _recall(self) -> None:
        pass


class CachedBranches(Branches):
    """States of every layer, in a cache that a forward pass of transformers writes on.

    Args:
        prefix: what the rows grow from.
        index: ``(M,)`` rows of it.
        room: most tokens that will be written.
    """

    @torch.no_grad()
    def __init__(self, prefix: CachedPrefix, index: Tensor, room: int) -> None:
        super().__init__(len(index))
        kinds = [_Replaced if is_linear else _Roomy for is_linear in prefix.linear]
        self.cache = Cache(layers=[kind(states, index, room) for kind, states in zip(kinds, prefix.layers, strict=True)])
        self._mask, self._position = _rows(prefix.mask, index), _rows(prefix.position, index)

    def write(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Count a suffix of the rows that go on as written.

        Args:
            mask: ``(n, T)`` bool of the suffix, False at padding.

        Returns:
            ``(n, P + T)`` bool mask of all that has been written, and the ``(n,)`` position id of the suffix.
        """
        count, width = mask.shape
        self._mask = pad(self._mask, (0, width))
        self._mask[:count, -width:] = mask
        position = self._position[:count].clone()
        self._position[:count] += width
        return self._mask[:count], position

    def _move(self, came: Sequence[int], count: int) -> None:
        moved = [place for place, origin in enumerate(came) if place != origin]
        to, origin = torch.tensor(moved, dtype=torch.long), torch.tensor([came[place] for place in moved], dtype=torch.long)
        _put(self._mask, to, origin)
        _put(self._position, to, origin)
        for layer in self.cache.layers:
            layer.move(to, origin, count)

    def _recall(self) -> None:
        for layer in self.cache.layers:
            layer.recall()


class _Roomy(DynamicLayer):  # type: ignore[misc]
    """Keys and values in buffers ``(M, heads, capacity, size)``; what nobody wrote is zero, so that a mask can hide it."""

    def __init__(self, past: tuple[Tensor, Tensor], index: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(*past)
        self.keys, self.values = (pad(_rows(state, index), (0, 0, 0, min(room, ROOM))) for state in past)
        self._room, self._start, self._length = room, past[0].shape[-2], past[0].shape[-2]

    def get_seq_length(self) -> int:
        """Tokens written."""
        return self._length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the past and of this pass, in the rows that go on."""
        count, start, capacity = len(key_states), self._length, self.keys.shape[-2]
        self._length += key_states.shape[-2]
        if self._length > capacity:
            spare = capacity - self._start
            more = max(min(spare, self._room - spare), self._length - capacity)
            self.keys, self.values = (pad(buffer, (0, 0, 0, more)) for buffer in (self.keys, self.values))
        self.keys[:count, :, start : self._length] = key_states
        self.values[:count, :, start : self._length] = value_states
        return self.keys[:count, :, : self._length], self.values[:count, :, : self._length]

    def move(self, to: Tensor, origin: Tensor, count: int) -> None:
        """Put the rows at ``origin`` where ``to`` says."""
        for buffer in (self.keys, self.values):
            _put(buffer[:, :, : self._length], to, origin)

    def recall(self) -> None:
        """Nobody has gone."""


class _Replaced(LinearStates):
    """Inputs of the convolution and recurrent state of the rows that go on; those of the others wait."""

    def __init__(self, past: tuple[Tensor, Tensor], index: Tensor, room: int) -> None:
        super().__init__((_rows(past[0], index), _rows(past[1], index)))
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """The recurrent state after this pass, from which the next one starts."""
        super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        self.conv_states[0], self.recurrent_states[0] = self.written
        return recurrent_states

    def move(self, to: Tensor, origin: Tensor, count: int) -> None:
        """Put the rows at ``origin`` where ``to`` says; from place ``count`` on they wait."""
        states = self.conv_states[0], self.recurrent_states[0]
        for state in states:
            _put(state, to, origin)
        self._waiting.append((states[0][count:].clone(), states[1][count:].clone()))
        self.conv_states[0], self.recurrent_states[0] = states[0][:count], states[1][:count]

    def recall(self) -> None:
        """All rows; who left last stands in front of who had left before."""
        parts = [(self.conv_states[0], self.recurrent_states[0]), *reversed(self._waiting)]
        self.conv_states[0], self.recurrent_states[0] = (torch.cat(states) for states in zip(*parts, strict=True))
        self._waiting.clear()


def _rows(state: Tensor, index: Tensor) -> Tensor:
    return state.index_select(0, index.to(state.device))


def _put(state: Tensor, to: Tensor, origin: Tensor) -> None:
    state.index_copy_(0, to.to(state.device), _rows(state, origin))
