"""Annotated images: records, shards, batches and the Lightning data module. The only room that reads bytes.

The names below are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zr._lazy import lazy

if TYPE_CHECKING:
    from zr.data.annotation import Aggregate as Aggregate
    from zr.data.annotation import AnnotatorAudit as AnnotatorAudit
    from zr.data.annotation import Item as Item
    from zr.data.annotation import Removal as Removal
    from zr.data.annotation import aggregate as aggregate
    from zr.data.annotation import audit as audit
    from zr.data.annotation import collect as collect
    from zr.data.annotation import krippendorff_alpha as krippendorff_alpha
    from zr.data.annotation import removal as removal
    from zr.data.batch import AllPairs as AllPairs
    from zr.data.batch import Batch as Batch
    from zr.data.batch import ChosenPairs as ChosenPairs
    from zr.data.batch import PairPolicy as PairPolicy
    from zr.data.batch import RandomPairs as RandomPairs
    from zr.data.batch import collate as collate
    from zr.data.labelling import LabelBatch as LabelBatch
    from zr.data.labelling import LabelData as LabelData
    from zr.data.labels import LabelledFolder as LabelledFolder
    from zr.data.module import ScoreData as ScoreData
    from zr.data.prompts import PromptBatch as PromptBatch
    from zr.data.prompts import PromptData as PromptData
    from zr.data.prompts import read_prompts as read_prompts
    from zr.data.record import Annotation as Annotation
    from zr.data.record import Candidate as Candidate
    from zr.data.record import LabelledDistribution as LabelledDistribution
    from zr.data.record import Reasoning as Reasoning
    from zr.data.record import Record as Record
    from zr.data.shards import Index as Index
    from zr.data.shards import read_shards as read_shards
    from zr.data.shards import write_shards as write_shards
    from zr.data.sources.hpdv3 import HPDv3 as HPDv3
    from zr.data.sources.imagereward import ImageRewardDB as ImageRewardDB
    from zr.data.sources.koniq import KonIQ as KonIQ

_HOME = {
    "Aggregate": "annotation",
    "AllPairs": "batch",
    "Annotation": "record",
    "AnnotatorAudit": "annotation",
    "Batch": "batch",
    "Candidate": "record",
    "ChosenPairs": "batch",
    "HPDv3": "sources.hpdv3",
    "ImageRewardDB": "sources.imagereward",
    "Index": "shards",
    "Item": "annotation",
    "KonIQ": "sources.koniq",
    "LabelBatch": "labelling",
    "LabelData": "labelling",
    "LabelledDistribution": "record",
    "LabelledFolder": "labels",
    "PairPolicy": "batch",
    "PromptBatch": "prompts",
    "PromptData": "prompts",
    "RandomPairs": "batch",
    "Reasoning": "record",
    "Record": "record",
    "Removal": "annotation",
    "ScoreData": "module",
    "aggregate": "annotation",
    "audit": "annotation",
    "collate": "batch",
    "collect": "annotation",
    "krippendorff_alpha": "annotation",
    "read_prompts": "prompts",
    "read_shards": "shards",
    "removal": "annotation",
    "write_shards": "shards",
}

__all__ = sorted(_HOME)


__getattr__, __dir__ = lazy(__name__, _HOME)
