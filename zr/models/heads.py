"""Hidden state to bin logits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from zr.models.adapters import rows_of_output
from zr.models.sharding import inside, through
from zr.rubric import Rubric

__all__ = ["Backbone", "Head", "LinearHead", "OrdinalHead", "ScoreTokenHead", "ordinal_log_probs", "outside"]


class Backbone(Protocol):
    """What a head and a reward model need of a backbone, which is also an ``nn.Module``."""

    rubric: Rubric

    @property
    def hidden_size(self) -> int:
        """H, the width of the features."""

    def features(self, images: Any, prompts: Any, dimensions: Any) -> Tensor:
        """``(B, D, H)`` features; see :meth:`zr.models.backbones.vlm.VLMBackbone.features`."""

    def tokens(self, images: Any, prompts: Any, dimensions: Any) -> list[int]:
        """B numbers: the tokens that each sample adds to a pass of :meth:`features`, told without running the model."""


class Head(nn.Module):
    """``head(features (B, D, H), dimension_index (D,)) -> (B, D, K)`` float32 logits of the bins.

    A head that can tell the probability of the labels overrides :meth:`log_mass`; one with a constructor of its own
    overrides :meth:`config`, so that ``zr.load`` can build it again.
    """

    def forward(self, features: Tensor, dimension_index: Tensor) -> Tensor:
        """Logits of the bins."""
        raise TypeError(f"{type(self).__name__} must define forward(features, dimension_index)")

    def log_mass(self, features: Tensor) -> Tensor | None:
        """``(B, D)`` log-probability of the labels together, in nats, or None where there is no such thing or nobody asked."""
        return None

    def off_scale(self, features: Tensor) -> Tensor | None:
        """``(B, D)`` probability outside the labels, or None as :meth:`log_mass`."""
        found = self.log_mass(features)
        return None if found is None else outside(found)

    def config(self) -> dict[str, Any]:
        """Keyword arguments, besides the backbone, that build an equal head: plain values."""
        return {}


def outside(log_mass: Tensor) -> Tensor:
    """Probability outside the labels, whose log-probability together is ``log_mass``; not below 0, whatever the rounding.

    Example:
        >>> [round(p, 4) for p in outside(torch.tensor([0.25, 1.0]).log()).tolist()]
        [0.75, 0.0]
    """
    return log_mass.expm1().clamp_max(0.0).abs()


class ScoreTokenHead(Head):
    """The language model's own output layer, read at the labels' rows only, in float32; shared by all dimensions.

    An adapter of peft on the output layer is honoured, also one that is added after the head was built; see
    :func:`~zr.models.adapters.rows_of_output`.

    Args:
        backbone: a vision-language backbone; its wording gives the labels, its output layer the rows.
        off_scale: also compute the probability outside the labels, which needs the whole vocabulary.

    Raises:
        ValueError: a backbone that writes no text.

    Shape: features ``(B, D, H)`` -> logits ``(B, D, K)``.

    Reference: Z-Reward (arXiv 2606.09076), section on score decoding; Q-Align (arXiv 2312.17090).
    """

    def __init__(self, backbone: Any, off_scale: bool = False) -> None:
        super().__init__()
        if not hasattr(backbone, "output"):
            raise ValueError(
                f"{type(backbone).__name__} writes no text: score tokens and reasoning need a vision-language backbone; "
                "a LinearHead or an OrdinalHead stands on any"
            )
        self.output = backbone.output
        self.label_ids = list(backbone.prompts.label_ids)
        self.with_off_scale = off_scale
        self._backbone = (backbone,)  # in a tuple: no part of this module

    def forward(self, features: Tensor, dimension_index: Tensor) -> Tensor:
        """Logits of the labels' tokens."""
        self.output = self._backbone[0].output  # peft puts a wrapper in the layer's place
        return inside(self.output, lambda states: rows_of_output(self.output, self.label_ids, states), features)

    def log_mass(self, features: Tensor) -> Tensor | None:
        """``(B, D)`` log-probability that the next token is a label: finite, and with a gradient, however rare labels are."""
        if not self.with_off_scale:
            return None
        log_probs = through(self.output, features).float().log_softmax(-1)
        return log_probs[..., self.label_ids].logsumexp(-1)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"off_scale": self.with_off_scale}


class LinearHead(Head):
    """One linear map per dimension, from features to bin logits.

    Args:
        backbone: gives the width of the features, and by its rubric the number of dimensions and bins.

    Shape: features ``(B, D, H)`` -> logits ``(B, D, K)``.

    Example:
        >>> from types import SimpleNamespace
        >>> head = LinearHead(SimpleNamespace(hidden_size=8, rubric=Rubric.load("zr:direct")))
        >>> head(torch.zeros(2, 3, 8), torch.tensor([0, 1, 3])).shape
        torch.Size([2, 3, 9])
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        dimensions, bins, width = len(backbone.rubric.dimensions), len(backbone.rubric.bins), backbone.hidden_size
        self.weight = nn.Parameter(torch.empty(dimensions, bins, width))
        self.bias = nn.Parameter(torch.zeros(dimensions, bins))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, features: Tensor, dimension_index: Tensor) -> Tensor:
        """Logits by the weights of each dimension."""
        weight, bias = self.weight[dimension_index].float(), self.bias[dimension_index].float()
        return torch.einsum("bdh,dkh->bdk", features.float(), weight) + bias


def ordinal_log_probs(scalar: Tensor, first: Tensor, gaps: Tensor) -> Tensor:
    r"""Log-probabilities of K ordered bins from one scalar: :math:`P(\text{bin} > k) = \sigma(z - t_k)`.

    The thresholds :math:`t_1 < \dots < t_{K-1}` are ``first`` and, each ``softplus(gap)`` further, the others. The probability
    of a bin is the difference of two sigmoids, which is a product, so that nothing cancels however far z is:
    :math:`\sigma(a) - \sigma(b) = \sigma(a) \, \sigma(-b) \, (1 - e^{b - a})`, whose last factor is :math:`\sigma(gap)`.

    Args:
        scalar: ``(...)``, z.
        first: ``(...)``, :math:`t_1`; broadcasts with ``scalar``.
        gaps: ``(..., K - 2)``, any real numbers.

    Returns:
        ``(..., K)``, whose exponentials sum to one. The mean over ascending bins rises with the scalar, strictly.

    Reference: McCullagh 1980, Regression models for ordinal data (cumulative logits).

    Example:
        >>> z = torch.tensor([0.0, 2.0])
        >>> ordinal_log_probs(z, torch.tensor(0.0), torch.empty(0)).exp()         # two bins: one sigmoid
        tensor([[0.5000, 0.5000],
                [0.1192, 0.8808]])
        >>> ordinal_log_probs(z, torch.tensor(-1.0), torch.tensor([1.8546])).exp()       # thresholds -1 and 1
        tensor([[0.2689, 0.4621, 0.2689],
                [0.0474, 0.2215, 0.7311]])
    """
    thresholds = torch.cat([first[..., None], first[..., None] + softplus(gaps).cumsum(-1)], dim=-1)
    distance = scalar[..., None] - thresholds
    above, below = logsigmoid(distance), logsigmoid(-distance)
    between = logsigmoid(gaps).expand(*distance.shape[:-1], -1)
    inner = above[..., :-1] + below[..., 1:] + between
    return torch.cat([below[..., :1], inner, above[..., -1:]], dim=-1)


class OrdinalHead(Head):
    """One scalar per dimension, and ordered thresholds that make a distribution over the bins of it.

    The head of scalar reward models (ImageReward, PickScore, HPS) that answers with a distribution all the same: its mean
    rises with the scalar, so whatever order the scalar gives is the order of the scores. It can say how sure it is only by
    where the scalar stands between the thresholds: two peaks are beyond it.

    Args:
        backbone: gives the width of the features, and by its rubric the number of dimensions and bins.

    Shape: features ``(B, D, H)`` -> logits ``(B, D, K)``, which are log-probabilities by :func:`ordinal_log_probs`. A scalar of
    zero starts with equal bins.

    Example:
        >>> from types import SimpleNamespace
        >>> head = OrdinalHead(SimpleNamespace(hidden_size=8, rubric=Rubric.load("zr:direct")))
        >>> head(torch.zeros(1, 2, 8), torch.tensor([0, 3])).exp()[0, 1].mul(9).round().tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        dimensions, bins, width = len(backbone.rubric.dimensions), len(backbone.rubric.bins), backbone.hidden_size
        equal = torch.logit(torch.arange(1, bins, dtype=torch.float64) / bins)
        self.weight = nn.Parameter(torch.empty(dimensions, width))
        self.first = nn.Parameter(equal[:1].float().repeat(dimensions))
        self.gaps = nn.Parameter(equal.diff().expm1().log().float().repeat(dimensions, 1))
        nn.init.normal_(self.weight, std=width**-0.5)

    def scalar(self, features: Tensor, dimension_index: Tensor) -> Tensor:
        """``(B, D)`` scalars: without unit, comparable within a dimension."""
        return torch.einsum("bdh,dh->bd", features.float(), self.weight[dimension_index].float())

    def forward(self, features: Tensor, dimension_index: Tensor) -> Tensor:
        """Log-probabilities of the bins."""
        first, gaps = self.first[dimension_index].float(), self.gaps[dimension_index].float()
        return ordinal_log_probs(self.scalar(features, dimension_index), first, gaps)
