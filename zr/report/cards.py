"""Cards: an image, its prompt, and the model's distribution over scores beside the annotators' votes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from zr.report.text import plain
from zr.scores import ScoreDistribution

__all__ = ["Bar", "Card", "Judgement", "cards"]

LARGEST = 512  # pixels of the longer side, to keep the file small
CRISP = 128  # images up to this side are shown with their pixels visible
FULL = 0.5  # probability that fills the height of a chart; a chart with a higher one shrinks to fit
LABELS = 10  # most bin labels that fit below a chart


@dataclass(frozen=True)
class Bar:
    """One bin of a chart.

    Args:
        label: the bin's score; empty where the labels would not fit.
        share: probability by the model.
        voted: share of the annotators, or None without votes.
        height: of the model's bar, in percent of the chart.
        voted_height: of the annotators' bar.
    """

    label: str
    share: float
    voted: float | None
    height: float
    voted_height: float


@dataclass(frozen=True)
class Judgement:
    """What a model, and perhaps annotators, say about one image in one dimension.

    Args:
        dimension: name.
        prediction: of batch shape ``()``.
        votes: ``(K,)`` number of annotators per bin, or None; all zeros count as None.
        score: the annotators' mean, in score units, or None.

    Raises:
        ValueError: a prediction with batch dimensions, votes that do not fit the bins or are negative.

    Example:
        >>> q = ScoreDistribution(torch.tensor([0.1, 0.3, 0.6]).log(), bins=(1.0, 3.0, 5.0))
        >>> judgement = Judgement("realism", q, votes=torch.tensor([0, 1, 3]), score=4.5)
        >>> judgement.mean, judgement.sd, judgement.annotated
        ('4.00', '1.34', '4.50')
        >>> judgement.description
        'realism: expected score 4.00, standard deviation 1.34; annotators 4.50. Model: 1: 0.10, 3: 0.30, 5: 0.60. Annotators: 1: 0.00, 3: 0.25, 5: 0.75.'
    """  # noqa: E501

    dimension: str
    prediction: ScoreDistribution
    votes: Tensor | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        bins = len(self.prediction.bins)
        if self.prediction.batch_shape != ():
            raise ValueError(f"a judgement is of one image in one dimension, got {self.prediction}: index it first")
        if self.votes is not None and (self.votes.shape != (bins,) or bool((self.votes < 0).any())):
            raise ValueError(f"votes must be ({bins},) counts, one per bin, got {self.votes.tolist()}")

    @property
    def mean(self) -> str:
        """Expected score, two decimals."""
        return f"{self.prediction.mean.item():.2f}"

    @property
    def sd(self) -> str:
        """Standard deviation, two decimals."""
        return f"{self.prediction.stddev.item():.2f}"

    @property
    def annotated(self) -> str:
        """The annotators' mean, two decimals; empty where there is none."""
        return "" if self.score is None or self.score != self.score else f"{self.score:.2f}"

    @property
    def bars(self) -> list[Bar]:
        """One for each bin, lowest first."""
        shares = self.prediction.probs.detach().tolist()
        voted = self._voted()
        bins = self.prediction.bins.tolist()
        full = max(FULL, *shares, *(voted or ()))
        step = -(-len(bins) // LABELS)
        return [
            Bar(
                label=f"{score:g}" if index % step == 0 else "",
                share=share,
                voted=None if voted is None else voted[index],
                height=100 * share / full,
                voted_height=0.0 if voted is None else 100 * voted[index] / full,
            )
            for index, (score, share) in enumerate(zip(bins, shares, strict=True))
        ]

    @property
    def spread(self) -> tuple[float, float, float]:
        """Places of mean - sd, mean + sd and mean, in percent of the chart's width."""
        mean, sd = self.prediction.mean.item(), self.prediction.stddev.item()
        return self._place(mean - sd), self._place(mean + sd), self._place(mean)

    @property
    def annotated_place(self) -> float | None:
        """Place of the annotators' mean, in percent of the chart's width."""
        return self._place(float(self.score or 0.0)) if self.annotated else None

    @property
    def description(self) -> str:
        """The chart in words, for a screen reader."""
        bins = [f"{score:g}" for score in self.prediction.bins.tolist()]
        said = f"; annotators {self.annotated}" if self.annotated else ""
        text = f"{self.dimension}: expected score {self.mean}, standard deviation {self.sd}{said}. Model: "
        text += ", ".join(f"{b}: {p:.2f}" for b, p in zip(bins, self.prediction.probs.tolist(), strict=True)) + "."
        if (voted := self._voted()) is not None:
            text += " Annotators: " + ", ".join(f"{b}: {p:.2f}" for b, p in zip(bins, voted, strict=True)) + "."
        return text

    def _voted(self) -> list[float] | None:
        if self.votes is None or not bool(self.votes.sum() > 0):
            return None
        shares: list[float] = (self.votes.double() / self.votes.double().sum()).tolist()
        return shares

    def _place(self, score: float) -> float:
        """Bins stand at equal distances, so a score between two uneven ones stands at its share of the way."""
        bins = self.prediction.bins.tolist()
        way = 0.0
        for low, high in pairwise(bins):
            way += min(max((score - low) / (high - low), 0.0), 1.0)
        return 100 * (way + 0.5) / len(bins)


@dataclass(frozen=True)
class Card:
    """An image and what is said about it.

    Args:
        prompt: what the image was asked to show.
        judgements: one for each dimension; none for a picture that no model has seen.
        image: ``(3, H, W)`` uint8 RGB, or None.
        title: a short name, such as the image's key.
        note: one line below.

    Raises:
        ValueError: an image of another shape or dtype.
    """

    prompt: str
    judgements: Sequence[Judgement]
    image: Tensor | None = None
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        image = self.image
        if image is not None and (image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8):
            raise ValueError(f"a card's image must be (3, H, W) uint8, got {tuple(image.shape)} {image.dtype}")

    @property
    def data_uri(self) -> str:
        """The image as a PNG in a data URI, shrunk to a longer side of at most 512 pixels; empty without one."""
        if self.image is None:
            return ""
        picture = Image.fromarray(self.image.permute(1, 2, 0).contiguous().cpu().numpy())
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    @property
    def crisp(self) -> bool:
        """Whether the image is small enough to be enlarged with its pixels visible."""
        return self.image is not None and max(self.image.shape[1:]) <= CRISP

    @property
    def text(self) -> str:
        """The prompt without invisible controls, for attributes."""
        return plain(self.prompt)


def cards(
    prediction: ScoreDistribution,
    prompts: Sequence[str],
    dimensions: Sequence[str],
    *,
    images: Sequence[Tensor] | None = None,
    votes: Tensor | None = None,
    scores: Tensor | None = None,
    titles: Sequence[str] | None = None,
) -> list[Card]:
    """One card for each of N images.

    Args:
        prediction: batch shape ``(N, D)``.
        prompts: N texts.
        dimensions: D names.
        images: N uint8 tensors ``(3, H, W)``, or None.
        votes: ``(N, D, K)`` annotators per bin, or None.
        scores: ``(N, D)`` annotators' means; NaN where unknown; or None.
        titles: N short names, or None.

    Raises:
        ValueError: numbers of images, prompts, dimensions, votes or scores that differ.

    Example:
        >>> q = ScoreDistribution(torch.zeros(1, 2, 3), bins=(1.0, 3.0, 5.0))
        >>> card, = cards(q, ["a red cube"], ["alignment", "realism"])
        >>> [(judgement.dimension, judgement.mean) for judgement in card.judgements]
        [('alignment', '3.00'), ('realism', '3.00')]
    """
    shape = (len(prompts), len(dimensions))
    for name, found, needed in (
        ("prediction", tuple(prediction.batch_shape), shape),
        ("images", None if images is None else (len(images),), shape[:1]),
        ("votes", None if votes is None else tuple(votes.shape), (*shape, len(prediction.bins))),
        ("scores", None if scores is None else tuple(scores.shape), shape),
        ("titles", None if titles is None else (len(titles),), shape[:1]),
    ):
        if found is not None and found != needed:
            raise ValueError(f"{name} must be {needed} for {shape[0]} prompts and {shape[1]} dimensions, got {found}")
    return [
        Card(
            prompt=prompt,
            judgements=[
                Judgement(
                    name,
                    prediction[n, d],
                    votes=None if votes is None else votes[n, d],
                    score=None if scores is None else float(scores[n, d]),
                )
                for d, name in enumerate(dimensions)
            ],
            image=None if images is None else images[n],
            title="" if titles is None else titles[n],
        )
        for n, prompt in enumerate(prompts)
    ]
