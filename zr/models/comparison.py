"""Two images in one question: is the first better than the second?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zr.models.backbones.vlm import VLMBackbone
from zr.models.heads import Backbone, Head, ScoreTokenHead
from zr.models.images import ImageInput, as_image_lists
from zr.models.reward import RewardModel
from zr.rubric import Rubric
from zr.scores import ScoreDistribution

__all__ = ["ComparisonReward", "comparing"]


class ComparisonReward(RewardModel):
    """Sees two images of a prompt together and says, per dimension, whether the first is better: its score is P(yes).

    A sample is a pair, in the order in which it is shown: ``model(images=[[a, b]], prompts=[p]).mean``. A model may lean to
    one of the two places, whatever stands there; :meth:`preference` asks in both orders.

    Args:
        backbone: gives features ``(B, D, H)`` of several images per prompt.
        head: maps them to logits ``(B, D, 2)``.
        rubric: its bins are 0, labelled for no, and 1, labelled for yes, as those of ``zr:yes_token``.
        budget: see :class:`RewardModel`.

    Raises:
        ValueError: other bins; see also :class:`RewardModel`.

    Reference: RewardDance (Wu et al., arXiv 2509.08826): the reward is the probability of a yes.
    """

    use = "model.preference([image], [other], prompts=['what both should show'])  # probability that image is better"

    def __init__(self, backbone: Backbone, head: Head, rubric: Rubric, budget: int | None = None) -> None:
        super().__init__(backbone, head, rubric, budget=budget)
        if rubric.bins != (0.0, 1.0):
            raise ValueError(f"a comparison answers no or yes: the bins must be 0 and 1 (see zr:yes_token), got {rubric.bins}")

    def forward(self, images: ImageInput, prompts: Sequence[str], dimensions: Sequence[str] | None = None) -> ScoreDistribution:
        """Compare the two images of each sample.

        Args:
            images: list of B pairs, the one shown first and the one shown second.
            prompts: B prompts.
            dimensions: D names of the rubric; all of them for None.

        Returns:
            Batch shape ``(B, D)``; its mean is the probability of yes, the first is better.

        Raises:
            ValueError: a sample that has not two images; see also :class:`RewardModel`.
        """
        pairs = as_image_lists(images, len(prompts))
        for index, pair in enumerate(pairs):
            if len(pair) != 2:
                raise ValueError(
                    f"sample {index} has {len(pair)} images: a comparison takes two, as in images=[[first, second], ...]"
                )
        return super().forward(pairs, prompts, dimensions)

    def both_orders(
        self,
        first: Sequence[Image.Image | Tensor],
        second: Sequence[Image.Image | Tensor],
        prompts: Sequence[str],
        dimensions: Sequence[str] | None = None,
    ) -> Tensor:
        """Probability that the first image is better, as either order of showing the two tells it.

        Args:
            first: B images.
            second: B images, of the same prompts.
            prompts: B prompts.
            dimensions: D names of the rubric; all of them for None.

        Returns:
            ``(2, B, D)``, with gradients: P(yes) with the first image shown first, and P(no) with it shown second.

        Raises:
            ValueError: numbers of images that are not the number of prompts; see also :meth:`forward`.
        """
        if not len(first) == len(second) == len(prompts):
            raise ValueError(f"{len(first)} first and {len(second)} second images for {len(prompts)} prompts: one each")
        pairs = [[a, b] for a, b in zip(first, second, strict=True)]
        yes = self(images=[*pairs, *(pair[::-1] for pair in pairs)], prompts=[*prompts, *prompts], dimensions=dimensions).mean
        told, turned = yes.chunk(2)
        return torch.stack([told, 1 - turned])

    def preference(
        self,
        first: Sequence[Image.Image | Tensor],
        second: Sequence[Image.Image | Tensor],
        prompts: Sequence[str],
        dimensions: Sequence[str] | None = None,
    ) -> Tensor:
        r"""Probability ``(B, D)`` that the first image is better, :math:`(P(yes \mid a, b) + 1 - P(yes \mid b, a)) / 2`.

        The preferences for (a, b) and for (b, a) sum to one. Arguments and errors as :meth:`both_orders`.

        Example:
            >>> from zr.data import shapes
            >>> from zr.models import ScoreTokenHead, compose, tiny_qwen3_vl
            >>> scorer = compose(tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary), ScoreTokenHead)
            >>> wording = {"system": "judge", "instructions": {"realism": "realism"}, "labels": ["A", "I"], "marker": " score"}
            >>> rubric = Rubric.from_dict({"scale": {"bins": [0, 1], "anchors": {"realism": {}}}, "wording": wording})
            >>> model = comparing(scorer, rubric).eval()
            >>> a, b = torch.rand(2, 3, 48, 48)
            >>> there, back = model.preference([a, b], [b, a], ["red ring"] * 2)
            >>> round((there + back).item(), 5)
            1.0
        """
        return self.both_orders(first, second, prompts, dimensions).mean(0)

    def _about(self) -> dict[str, Any]:
        return super()._about() | {"comparison": True}


def comparing(model: RewardModel, rubric: Rubric, budget: int | None = None) -> ComparisonReward:
    """The same vision-language model, shared and not copied, asked which of two images is better.

    Args:
        model: a reward model with a vision-language backbone, of any scale.
        rubric: what to compare, and how to ask; its bins are 0 and 1.
        budget: see :class:`~zr.models.RewardModel`.

    Raises:
        ValueError: a backbone that reads one image; see also :class:`ComparisonReward`.
    """
    own = model.backbone
    if not isinstance(own, VLMBackbone):
        raise ValueError(f"{type(own).__name__} reads one image: a comparison needs a vision-language backbone")
    backbone = VLMBackbone(own.model, own.processor, rubric, own.prompts.truncate)
    return ComparisonReward(backbone, ScoreTokenHead(backbone), rubric, budget)
