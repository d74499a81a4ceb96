"""Hidden state to bin logits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zr.rubric import Rubric

__all__ = ["Backbone", "Head", "LinearHead", "ScoreTokenHead"]


class Backbone(Protocol):
    """What a head and a reward model need of a backbone, which is also an ``nn.Module``."""

    rubric: Rubric

    @property
    def hidden_size(self) -> int:
        """H, the width of the features."""

    def features(self, images: Any, prompts: Any, dimensions: Any) -> Tensor:
        """``(B, D, H)`` features; see :meth:`zr.models.backbones.vlm.VLMBackbone.features`."""


class Head(nn.Module):
    """``head(features (B, D, H), dimension_index (D,)) -> (B, D, K)`` float32 logits of the bins.

    A head that can tell the probability outside the labels overrides :meth:`off_scale`; one with a constructor of its own
    overrides :meth:`config`, so that ``zr.load`` can build it again.
    """

    def forward(self, features: Tensor, dimension_index: Tensor) -> Tensor:
        """Logits of the bins."""
        raise TypeError(f"{type(self).__name__} must define forward(features, dimension_index)")

    def off_scale(self, features: Tensor) -> Tensor | None:
        """``(B, D)`` probability outside the labels, or None where there is no such thing or nobody asked."""
        return None

    def config(self) -> dict[str, Any]:
        """Keyword arguments, besides the backbone, that build an equal head: plain values."""
        return {}


class ScoreTokenHead(Head):
    """The language model's own output layer, read at the labels' rows only, in float32; shared by all dimensions.

    Args:
        backbone: a vision-language backbone; its wording gives the labels, its output layer the rows.
        off_scale: also compute the probability outside the labels, which needs the whole vocabulary.

    Shape: features ``(B, D, H)`` -> logits ``(B, D, K)``.

    Reference: Z-Reward (arXiv 2606.09076), section on score decoding; Q-Align (arXiv 2312.17090).
    """

    def __init__(self, backbone: Any, off_scale: bool = False) -> None:
        super().__init__()
        self.output = backbone.output
        self.label_ids = list(backbone.prompts.label_ids)
        self.with_off_scale = off_scale

    def forward(self, features: Tensor, dimension_index: Tensor) -> Tensor:
        """Logits of the labels' tokens."""
        rows = self.output.weight[self.label_ids].float()
        bias = None if self.output.bias is None else self.output.bias[self.label_ids].float()
        return nn.functional.linear(features.float(), rows, bias)

    def off_scale(self, features: Tensor) -> Tensor | None:
        """``(B, D)`` probability that the next token is no label."""
        if not self.with_off_scale:
            return None
        probs: Tensor = self.output(features).float().softmax(-1)
        return (1 - probs[..., self.label_ids].sum(-1)).clamp_min(0.0)

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
