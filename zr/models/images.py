"""Pixels in, gradients kept: the forms in which a caller may hand over images, brought to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

__all__ = ["ImageInput", "as_image_lists"]

ImageInput = Tensor | Sequence[Image.Image | Tensor | Sequence[Image.Image | Tensor]] | None


def as_image_lists(images: ImageInput, count: int) -> list[list[Tensor]]:
    """Bring every accepted form to one list of images per sample.

    Args:
        images: float tensor ``(B, 3, H, W)`` in [0, 1], list of B images (PIL or ``(3, H, W)`` tensor), list of B lists of
            images (several per prompt), or None (text only). uint8 tensors are divided by 255; float tensors keep their
            gradient.
        count: B, the number of prompts.

    Returns:
        B lists of float tensors ``(3, H, W)`` in [0, 1].

    Raises:
        ValueError: a number of images that is not the number of prompts, a wrong shape, dtype or range; names the sample.

    Example:
        >>> lists = as_image_lists(torch.zeros(2, 3, 8, 8), count=2)
        >>> [len(sample) for sample in lists], tuple(lists[0][0].shape)
        ([1, 1], (3, 8, 8))
        >>> as_image_lists(None, count=2)
        [[], []]
    """
    if images is None:
        return [[] for _ in range(count)]
    if isinstance(images, Image.Image):
        raise ValueError("images is one PIL image: give a list with one image, or one list of images, per prompt")
    if len(images) != count:
        raise ValueError(f"{len(images)} images for {count} prompts: give one image, or one list of images, per prompt")
    samples = [list(sample) if isinstance(sample, Sequence) else [sample] for sample in images]
    return [[_as_tensor(image, index) for image in sample] for index, sample in enumerate(samples)]


def _as_tensor(image: Image.Image | Tensor, index: int) -> Tensor:
    if isinstance(image, Image.Image):
        image = pil_to_tensor(image.convert("RGB"))
    if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3:
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image {index}: a tensor (3, H, W) or a PIL image is needed, got {got}")
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise ValueError(f"image {index}: uint8 in [0, 255] or float in [0, 1] is needed, got {image.dtype}")
    low, high = image.detach().amin().item(), image.detach().amax().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(
            f"image {index}: float pixels must lie in [0, 1], got {low:g} to {high:g}; "
            "map [-1, 1] by (x + 1) / 2, pass [0, 255] as uint8"
        )
    return image
