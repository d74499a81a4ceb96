"""What `zr shards inspect` finds out: counts, agreement, the annotators, and what leaving some of them out would change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track
from torch import Tensor
from torchvision.transforms.functional import resize

from zr.data import AnnotatorAudit, Index, Item, Record, aggregate, audit, collect, krippendorff_alpha, read_shards, removal
from zr.data.annotation import ANONYMOUS, bin_position, interval, nominal, ordinal
from zr.data.record import decode
from zr.report import Card, Figure, Page, Section, Table, histograms
from zr.report.tables import UNDEFINED
from zr.rubric import Scale
from zr.version import __version__

__all__ = ["Survey", "page", "survey", "thumbnail"]

THUMBNAIL = 224  # pixels of the shorter side, to keep the page small
COUNTS = ("shards", "prompts", "images", "scores", "refined", "preferences", "distributions")


@dataclass(frozen=True)
class Survey:
    """What was read from shards.

    Args:
        folder: where they lie.
        dimensions: D names.
        bins: K scores.
        counts: by split, how many there are of each of ``COUNTS``.
        ratings: the annotators' scores; a record is named SPLIT/KEY.
        cards: pictures.
    """

    folder: Path
    dimensions: tuple[str, ...]
    bins: tuple[float, ...]
    counts: Mapping[str, Mapping[str, int]]
    ratings: Mapping[Item, Mapping[str, float]]
    cards: Sequence[Card]

    def votes(self, dimension: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """``(N, K)``: how often each score was given to each image."""
        rows = [
            np.bincount([bin_position(s, self.bins) for s in by.values()], minlength=len(self.bins))
            for item, by in self.ratings.items()
            if item.dimension == dimension
        ]
        return np.array(rows, dtype=np.float64).reshape(-1, len(self.bins))


def survey(folder: Path, split: str | None, pictures: int, seed: int = 0) -> Survey:
    """Read shards once, with a progress bar.

    Args:
        folder: of the shards.
        split: which split; None for all.
        pictures: number of pictures to keep.
        seed: of their choice.

    Raises:
        FileNotFoundError: no such folder, index, split or shard.
        ValueError: a damaged shard or record.
    """
    index = Index.load(folder)
    rng = np.random.default_rng(seed)
    counts: dict[str, Counter[str]] = {}
    ratings: dict[Item, dict[str, float]] = {}
    kept: list[tuple[str, Record]] = []
    seen = 0
    for name in [split] if split is not None else sorted(index.splits):
        shards = index.shards(name, index.scale)
        counts[name] = Counter(shards=len(shards))
        total = sum(shard.records for shard in shards)
        for record in track(read_shards(folder, name), description=name, total=total, transient=True):
            counts[name] += _count(record)
            for item, scores in collect([record]).items():
                ratings[item._replace(record=f"{name}/{item.record}")] = scores
            place = seen if seen < pictures else int(rng.integers(seen + 1))  # every record with the same chance
            if place < pictures:
                kept[place : place + 1] = [(name, record)]
            seen += 1
    cards = [_card(name, record, index.scale, rng) for name, record in kept]
    return Survey(folder, index.scale.dimensions, index.scale.bins, counts, ratings, cards)


def page(found: Survey, *, threshold: float, tolerance: float, reference: str | None) -> Page:
    """The summary: tables, histograms and pictures.

    Args:
        found: what was read.
        threshold: accuracy that admits an annotator.
        tolerance: scores that differ by no more are right, in score units.
        reference: annotator whose scores are the reference; None for the mean of an image's others.

    Raises:
        ValueError: the reference gave no score, a threshold outside [0, 1], a negative tolerance.
    """
    rows = _audit(found, threshold, tolerance, reference)
    refused = [row.annotator for row in rows if row.admitted is False]
    total: Counter[str] = sum((Counter(c) for c in found.counts.values()), Counter())
    people = {who for by in found.ratings.values() for who in by if not who.startswith(ANONYMOUS)}
    nameless = sum(who.startswith(ANONYMOUS) for by in found.ratings.values() for who in by)
    names = f": {', '.join(refused)}." if refused else "."
    lead = [
        f"{total['images']:,} images of {total['prompts']:,} prompts, with {total['scores']:,} scores by {len(people):,} "
        f"annotators{f'; {nameless:,} of the scores are anonymous: nobody is audited for them' if nameless else ''}.",
        f"{len(refused)} of {len(rows)} annotators would be refused for an accuracy below {threshold:.0%}{names}",
    ]
    against = "the mean of an image's other annotators" if reference is None else reference
    note = f"Accuracy: share of scores within {tolerance:g} of the reference ({against})."
    sections = [
        Section("What there is", tables=[_splits(found)]),
        Section("Agreement", tables=[_agreement(found)], figures=_histograms(found)),
        Section("Annotators", tables=[_annotators(rows, note)]),
    ]
    if refused:
        changes, finding = _changes(found, refused)
        lead.append(finding)
        sections.append(Section("What would change", tables=[changes]))
    if found.cards:
        sections.append(Section("Pictures", text="Drawn at random, one from a prompt.", cards=found.cards))
    facts = [
        ("folder", str(found.folder)),
        ("splits", ", ".join(found.counts)),
        ("bins", ", ".join(f"{score:g}" for score in found.bins)),
        ("threshold", f"{threshold:g}"),
        ("tolerance", f"{tolerance:g} score units"),
        ("reference", against),
        ("zr", __version__),
    ]
    return Page(f"Shards in {found.folder.resolve().name}", lead, sections, facts)


def _audit(found: Survey, threshold: float, tolerance: float, reference: str | None) -> list[AnnotatorAudit]:
    if reference is None:
        rows = audit(found.ratings, None, tolerance, threshold)
        return [row for row in rows if not row.annotator.startswith(ANONYMOUS)]
    told = {item: by[reference] for item, by in found.ratings.items() if reference in by}
    if not told:
        names = ", ".join(repr(who) for who in sorted({who for by in found.ratings.values() for who in by}))
        raise ValueError(f"--reference {reference!r} gave no score: the annotators are {names or 'none'}")
    rows = audit(found.ratings, told, tolerance, threshold)
    return [row for row in rows if row.annotator != reference and not row.annotator.startswith(ANONYMOUS)]


def _count(record: Record) -> Counter[str]:
    scores = [a for by_candidate in record.scores.values() for by in by_candidate.values() for a in by.values()]
    return Counter(
        prompts=1,
        images=len(record.candidates),
        scores=len(scores),
        refined=sum(a.refined for a in scores),
        preferences=sum(len(choices) for choices in record.preferences.values()),
        distributions=sum(len(by) for by_candidate in record.distributions.values() for by in by_candidate.values()),
    )


def _card(split: str, record: Record, scale: Scale, rng: np.random.Generator) -> Card:
    candidate = record.candidates[int(rng.integers(len(record.candidates)))]
    said = []
    for dimension in scale.dimensions:
        if by := record.scores.get(dimension, {}).get(candidate.id):
            scores = [annotation.score for annotation in by.values()]
            together = aggregate(scores, scale.bins).score
            said.append(f"{dimension} {together:.2f} ({_listed(scores)})")
    note = "; ".join(said) or "no score"
    title = f"{split}/{record.key}.{candidate.id}"
    return Card(record.prompt, (), thumbnail(decode(candidate, record.key)), title=title, note=note)


def _listed(scores: Sequence[float]) -> str:
    """Every score; of more than ten, how often each was given."""
    if len(scores) <= 10:
        return ", ".join(f"{score:g}" for score in sorted(scores))
    return ", ".join(f"{count} x {score:g}" for score, count in sorted(Counter(scores).items()))


def thumbnail(image: Tensor) -> Tensor:
    """An image for a page, shrunk to a shorter side of at most ``THUMBNAIL`` pixels."""
    if min(image.shape[1:]) <= THUMBNAIL:
        return image
    small: Tensor = resize(image, [THUMBNAIL], antialias=True)
    return small


def _splits(found: Survey) -> Table:
    rows = [(name, *(f"{counts.get(kind, 0):,}" for kind in COUNTS)) for name, counts in found.counts.items()]
    return Table("", ("split", *COUNTS), rows)


def _agreement(found: Survey) -> Table:
    rows = []
    for name in found.dimensions:
        votes = found.votes(name)
        given = votes.sum()
        mean = votes.sum(0) @ np.asarray(found.bins) / given if given else math.nan
        alphas = (krippendorff_alpha(votes, found.bins, distance) for distance in (nominal, ordinal, interval))
        each = given / len(votes) if len(votes) else math.nan
        rows.append((name, f"{len(votes):,}", f"{given:,.0f}", _text(each, ".1f"), _text(mean, ".2f"), *map(_text, alphas)))
    columns = ("dimension", "images", "scores", "per image", "mean", "nominal", "ordinal", "interval")
    note = (
        "Nominal, ordinal, interval: Krippendorff's alpha, of images with two scores or more; one is agreement, zero is chance."
    )
    return Table("", columns, rows, note)


def _histograms(found: Survey) -> list[Figure]:
    votes = {name: found.votes(name).sum(0).tolist() for name in found.dimensions}
    given = {name: counts for name, counts in votes.items() if sum(counts)}
    return [histograms(given, found.bins)] if given else []


def _annotators(rows: Sequence[AnnotatorAudit], note: str) -> Table:
    verdicts = {True: "admitted", False: "refused", None: "not audited"}
    lines = [
        (
            row.annotator,
            f"{row.scores:,}",
            f"{row.audited:,}",
            _text(row.accuracy),
            _text(row.bias, "+.2f"),
            _text(row.spread, ".2f"),
            verdicts[row.admitted],
        )
        for row in sorted(rows, key=lambda row: (math.isnan(row.accuracy), row.accuracy, row.annotator))
    ]
    return Table("", ("annotator", "scores", "audited", "accuracy", "bias", "spread", "verdict"), lines, note)


def _changes(found: Survey, refused: Sequence[str]) -> tuple[Table, str]:
    rows = []
    groups = [(name, [name]) for name in refused]
    if len(refused) > 1:
        groups.append(("all of them", list(refused)))
    for name, who in groups:
        after = removal(found.ratings, who, found.bins)
        rows.append(
            (
                name,
                f"{after.changed:,}",
                f"{after.lost:,}",
                f"{after.largest:.2f}",
                f"{after.flipped:,}",
                f"{after.tied:,}",
            )
        )
    at = after.largest_at
    where = f" ({at.dimension}, {at.record}.{at.candidate})" if at else ""
    finding = (
        f"Without them, {after.changed:,} of {after.scores:,} scores would change, by "
        f"{after.largest:.2f} at most{where}; "
        f"{after.lost:,} would be lost; {after.flipped:,} of {after.pairs:,} pairs would turn around."
    )
    columns = ("left out", "scores changed", "lost", "largest change", "pairs turned", "ties made or ended")
    return Table("", columns, rows, "Scores: aggregated ones, of an image in a dimension."), finding


def _text(number: float, form: str = ".3f") -> str:
    return UNDEFINED if math.isnan(number) else format(number, form)
