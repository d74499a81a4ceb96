"""Records made into tensors: one batch of images over several prompts, and the pairs to compare within each prompt."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor

from zr.data.annotation import aggregate
from zr.data.record import Record, decode
from zr.rubric import Scale

__all__ = ["AllPairs", "Batch", "ChosenPairs", "PairPolicy", "RandomPairs", "collate"]


@dataclass
class Batch:
    """N images of several prompts; K bins, D dimensions in the order of the scale, P pairs.

    Args:
        images: N uint8 tensors ``(3, H, W)`` in RGB; sizes may differ.
        prompts: N prompts.
        keys: N names ``RECORD.CANDIDATE``.
        prompt_index: ``(N,)`` int64, which prompt of the batch an image belongs to.
        scores: ``(N, D)`` annotators' common scores, in score units; NaN where unknown.
        known: ``(N, D)`` bool, where ``scores`` holds one.
        votes: ``(N, D, K)`` number of annotators per bin.
        teacher: ``(N, D, K)`` probabilities by the chosen labeller, all zero where it gave none; None without a labeller.
        texts: N mappings dimension -> target text; None when no image has any.
        pairs: ``(P, 2)`` int64 positions of two images of one prompt, in random order.
        pair_dimension: ``(P,)`` int64, the dimension in which they are compared.
        preference: ``(P,)`` share that prefers the first image: as annotated, else 1, 0.5 or 0 by the scores. None without
            a pair policy. A pair that comes from a choice alone may have unknown scores.
        chosen: ``(P,)`` bool, which pairs annotators compared directly; the others are known by their scores.
    """

    images: list[Tensor]
    prompts: list[str]
    keys: list[str]
    prompt_index: Tensor
    scores: Tensor
    known: Tensor
    votes: Tensor
    teacher: Tensor | None
    texts: list[dict[str, str]] | None
    pairs: Tensor
    pair_dimension: Tensor
    preference: Tensor | None
    chosen: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on ``device``; Lightning calls this."""
        target = torch.device(device)
        return self._map(lambda tensor: tensor.to(target, non_blocking=target.type == "cuda"))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; a DataLoader with ``pin_memory=True`` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        moved: dict[str, Any] = {"images": [f(image) for image in self.images]}
        for entry in fields(self):
            part = getattr(self, entry.name)
            if isinstance(part, Tensor):
                moved[entry.name] = f(part)
        return replace(self, **moved)

    def select(self, pairs: Sequence[int]) -> Batch:
        """The batch of some of its pairs: with the images that they compare, and those images' prompts, only.

        Args:
            pairs: positions in ``self.pairs``, in the order wanted; one may stand there several times.

        Raises:
            ValueError: no pair.
        """
        if not len(pairs):
            raise ValueError("select needs at least one pair")
        chosen = torch.tensor(pairs, dtype=torch.int64)
        kept = sorted({image for pair in self.pairs[chosen].tolist() for image in pair})
        prompts = sorted({int(self.prompt_index[i]) for i in kept})
        images = torch.tensor(kept)
        return replace(
            self,
            images=[self.images[i] for i in kept],
            prompts=[self.prompts[i] for i in kept],
            keys=[self.keys[i] for i in kept],
            prompt_index=torch.searchsorted(torch.tensor(prompts), self.prompt_index[images]),
            scores=self.scores[images],
            known=self.known[images],
            votes=self.votes[images],
            teacher=None if self.teacher is None else self.teacher[images],
            texts=None if self.texts is None else [self.texts[i] for i in kept],
            pairs=torch.searchsorted(images, self.pairs[chosen]),
            pair_dimension=self.pair_dimension[chosen],
            preference=None if self.preference is None else self.preference[chosen],
            chosen=self.chosen[chosen],
        )

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """One batch of several, in order; prompts and pairs keep their images.

        Raises:
            ValueError: no batch.
        """
        if not batches:
            raise ValueError("join needs at least one batch")
        if len(batches) == 1:
            return batches[0]
        prompts, images, prompt_index, pairs = 0, 0, [], []
        for one in batches:
            prompt_index.append(one.prompt_index + prompts)
            pairs.append(one.pairs + images)
            prompts += int(one.prompt_index[-1]) + 1
            images += len(one.images)
        texts = [text for one in batches for text in one.texts or [{} for _ in one.images]]
        return cls(
            images=[image for one in batches for image in one.images],
            prompts=[prompt for one in batches for prompt in one.prompts],
            keys=[key for one in batches for key in one.keys],
            prompt_index=torch.cat(prompt_index),
            scores=torch.cat([one.scores for one in batches]),
            known=torch.cat([one.known for one in batches]),
            votes=torch.cat([one.votes for one in batches]),
            teacher=_cat([one.teacher for one in batches]),
            texts=texts if any(texts) else None,
            pairs=torch.cat(pairs),
            pair_dimension=torch.cat([one.pair_dimension for one in batches]),
            preference=_cat([one.preference for one in batches]),
            chosen=torch.cat([one.chosen for one in batches]),
        )


class PairPolicy(Protocol):
    """Which images of one prompt are compared in one dimension."""

    def __call__(
        self, scores: Mapping[int, float], preferences: Sequence[tuple[int, int, float]], generator: random.Random
    ) -> list[tuple[int, int, float]]:
        """Choose the pairs. A policy named in YAML needs these very annotations: that is how it is recognised.

        Args:
            scores: candidate's position -> score, of those that have one.
            preferences: annotated choices ``(i, j, share that prefers i)``.
            generator: the source of randomness, seeded by seed, epoch, record and dimension.

        Returns:
            Pairs ``(i, j, share that prefers i)``. Their order of two is shuffled afterwards.
        """
        ...


class AllPairs:
    """Every pair with two scores, and every annotated choice, which overrules the scores.

    Args:
        minimum_gap: leave out pairs whose scores differ by less, in score units; a choice has no gap, and stays.
        ties: keep pairs of equal scores, and choices with a share of one half. Each loss takes those that it has a use for
            (:attr:`zr.losses.PairLoss.takes_ties`); without them a policy that draws a few pairs draws no tie.

    Example:
        >>> AllPairs(minimum_gap=1.0)({0: 5.0, 1: 4.5, 2: 3.0}, [(1, 0, 0.8)], random.Random(0))
        [(0, 2, 1.0), (1, 2, 1.0), (1, 0, 0.8)]
    """

    def __init__(self, minimum_gap: float = 0.0, ties: bool = True) -> None:
        if not minimum_gap >= 0.0:
            raise ValueError(f"minimum_gap must be at least 0, got {minimum_gap}")
        self.minimum_gap = minimum_gap
        self.ties = ties

    def __call__(
        self, scores: Mapping[int, float], preferences: Sequence[tuple[int, int, float]], generator: random.Random
    ) -> list[tuple[int, int, float]]:
        """See :class:`PairPolicy`."""
        chosen = {frozenset((i, j)) for i, j, _ in preferences}
        found = []
        for i, j in combinations(scores, 2):
            gap = scores[i] - scores[j]
            tie = abs(gap) < 1e-6
            if frozenset((i, j)) not in chosen and abs(gap) >= self.minimum_gap - 1e-6 and (self.ties or not tie):
                found.append((i, j, 0.5 if tie else float(gap > 0)))
        return found + [choice for choice in preferences if self.ties or choice[2] != 0.5]


class ChosenPairs:
    """Every annotated choice, and no pair of scores: to train on choices alone, and what evaluation is given.

    Example:
        >>> ChosenPairs()({0: 5.0, 1: 4.5, 2: 3.0}, [(1, 0, 0.8)], random.Random(0))
        [(1, 0, 0.8)]
    """

    def __call__(
        self, scores: Mapping[int, float], preferences: Sequence[tuple[int, int, float]], generator: random.Random
    ) -> list[tuple[int, int, float]]:
        """See :class:`PairPolicy`."""
        return list(preferences)


class RandomPairs:
    """At most ``count`` pairs of each prompt and dimension, drawn anew in every epoch.

    With many images per prompt the pairs grow by their square, and say little that a few of them do not.

    Args:
        count: how many; all where there are not more.
        among: the policy whose pairs are drawn from, which decides on gaps and ties; :class:`AllPairs` for None.

    Raises:
        ValueError: a count below one.

    Example:
        >>> scores = {i: float(i) for i in range(5)}
        >>> len(AllPairs()(scores, [], random.Random(0))), len(RandomPairs(3)(scores, [], random.Random(0)))
        (10, 3)
    """

    def __init__(self, count: int, among: PairPolicy | None = None) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}: for no pairs, give no pair policy")
        self.count = count
        self.among = among or AllPairs()

    def __call__(
        self, scores: Mapping[int, float], preferences: Sequence[tuple[int, int, float]], generator: random.Random
    ) -> list[tuple[int, int, float]]:
        """See :class:`PairPolicy`."""
        found = self.among(scores, preferences, generator)
        return generator.sample(found, min(self.count, len(found)))


def collate(
    records: Sequence[Record],
    scale: Scale,
    pairs: PairPolicy | None = None,
    labeller: str | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> Batch:
    """Decode and aggregate validated records into one batch.

    Args:
        records: at least one; see :meth:`zr.data.Record.validate`.
        scale: gives the order of the dimensions and the bins.
        pairs: which images to compare; None for no pairs.
        labeller: whose distributions become ``teacher``; None for none.
        seed: of the order within pairs and of the policy's choices, together with ``epoch`` and the record's key; so a
            record gives the same pairs in whatever batch it stands.
        epoch: see ``seed``.

    Raises:
        ValueError: no record, an image that cannot be decoded, a record that is not annotated and without distribution by
            ``labeller``, or with distributions by others only; the message names record and candidate.

    Example:
        >>> import io, zr
        >>> from PIL import Image
        >>> from zr.data import Annotation, Candidate, Record
        >>> Image.new("RGB", (8, 6)).save(file := io.BytesIO(), "PNG")
        >>> a, b = (Candidate(name, file.getvalue()) for name in "ab")
        >>> given = {"realism": {"a": {"ann": Annotation(2.0)}, "b": {"ann": Annotation(4.5), "bob": Annotation(4.0)}}}
        >>> record = Record("p1", "night", (a, b), scores=given)
        >>> batch = collate([record], zr.Rubric.load("zr:direct").scale, pairs=AllPairs())
        >>> batch.keys, batch.scores[:, 1].tolist(), batch.known.sum().item()
        (['p1.a', 'p1.b'], [2.0, 4.25], 2)
        >>> batch.pairs.tolist(), batch.preference.tolist()         # b is the better one
        ([[1, 0]], [1.0])
    """
    return Batch.join([_one(record, scale, pairs, labeller, f"{seed} {epoch} {record.key}") for record in records])


def _one(record: Record, scale: Scale, policy: PairPolicy | None, labeller: str | None, seed: str) -> Batch:
    count, dimensions, bins = len(record.candidates), len(scale.dimensions), len(scale.bins)
    # plain numbers until all are there: a tensor's cost is in its making
    score = [[math.nan] * dimensions for _ in range(count)]
    votes, teacher = ([[[0.0] * bins] * dimensions for _ in range(count)] for _ in range(2))
    found: list[tuple[int, int, int, float, bool]] = []
    position = {candidate.id: i for i, candidate in enumerate(record.candidates)}
    labelled = False
    for d, dimension in enumerate(scale.dimensions):
        known: dict[int, float] = {}
        for name, by_annotator in record.scores.get(dimension, {}).items():
            if by_annotator:
                together = aggregate([annotation.score for annotation in by_annotator.values()], scale.bins)
                i = position[name]
                known[i] = score[i][d] = together.score
                votes[i][d] = [float(number) for number in together.votes]
        for name, by_labeller in record.distributions.get(dimension, {}).items():
            if labeller is not None and labeller in by_labeller:
                teacher[position[name]][d] = list(by_labeller[labeller].probs)
                labelled = True
        if policy is not None and (len(known) > 1 or dimension in record.preferences):
            generator = random.Random(f"{seed} {dimension}")  # text seeds are hashed alike in every process
            choices = [(position[a], position[b], share) for a, b, share in record.preferences.get(dimension, ())]
            compared = {frozenset(choice[:2]) for choice in choices}
            for i, j, share in policy(dict(sorted(known.items())), choices, generator):
                chosen = frozenset((i, j)) in compared
                found.append((i, j, d, share, chosen) if generator.random() < 0.5 else (j, i, d, 1.0 - share, chosen))
    annotated = any(record.scores.values()) or any(record.preferences.values())
    if labeller is not None and not labelled and (record.distributions or not annotated):
        there = sorted({who for by in record.distributions.values() for given in by.values() for who in given})
        raise ValueError(
            f"record {record.key!r} has no distribution by labeller {labeller!r} (labellers: {', '.join(there) or 'none'}): "
            "label the split first, or name another labeller"
        )
    texts = [{d: by[c.id] for d, by in record.texts.items() if c.id in by} for c in record.candidates]
    scores = torch.tensor(score)
    return Batch(
        images=[decode(candidate, record.key) for candidate in record.candidates],
        prompts=[record.prompt] * count,
        keys=[f"{record.key}.{candidate.id}" for candidate in record.candidates],
        prompt_index=torch.zeros(count, dtype=torch.int64),
        scores=scores,
        known=~scores.isnan(),
        votes=torch.tensor(votes),
        teacher=None if labeller is None else torch.tensor(teacher),
        texts=texts if any(texts) else None,
        pairs=torch.tensor([pair[:2] for pair in found], dtype=torch.int64).reshape(-1, 2),
        pair_dimension=torch.tensor([pair[2] for pair in found], dtype=torch.int64),
        preference=None if policy is None else torch.tensor([pair[3] for pair in found], dtype=torch.float32),
        chosen=torch.tensor([pair[4] for pair in found], dtype=torch.bool),
    )


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None
