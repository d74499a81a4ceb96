"""Annotated images: records, shards, batches and the Lightning data module. The only room that reads bytes.

The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zr.data.annotation import Aggregate as Aggregate
    from zr.data.annotation import aggregate as aggregate
    from zr.data.batch import AllPairs as AllPairs
    from zr.data.batch import Batch as Batch
    from zr.data.batch import PairPolicy as PairPolicy
    from zr.data.batch import collate as collate
    from zr.data.module import ScoreData as ScoreData
    from zr.data.record import Annotation as Annotation
    from zr.data.record import Candidate as Candidate
    from zr.data.record import LabelledDistribution as LabelledDistribution
    from zr.data.record import Record as Record
    from zr.data.shards import Index as Index
    from zr.data.shards import read_shards as read_shards
    from zr.data.shards import write_shards as write_shards

_HOME = {
    "Aggregate": "annotation",
    "AllPairs": "batch",
    "Annotation": "record",
    "Batch": "batch",
    "Candidate": "record",
    "Index": "shards",
    "LabelledDistribution": "record",
    "PairPolicy": "batch",
    "Record": "record",
    "ScoreData": "module",
    "aggregate": "annotation",
    "collate": "batch",
    "read_shards": "shards",
    "write_shards": "shards",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"zr.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'zr.data' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")


def __dir__() -> list[str]:
    return sorted(_HOME)
