"""Both families under both wordings, and pictures of unequal sizes."""

import pytest
import torch
from plain import FAMILIES, build

from zr.data import shapes


@pytest.fixture(scope="package", params=FAMILIES)
def backbone(request):
    """Under the direct wording."""
    return build(request.param).eval()


@pytest.fixture(scope="package")
def thinker(backbone):
    """The same model under the reasoning wording."""
    return backbone.reworded(shapes.rubric(reasoning=True))


@pytest.fixture
def pictures():
    """Three ``(3, H, W)`` uint8 pictures: 48 x 48, 64 x 48 and 48 x 64."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in ((48, 48), (64, 48), (48, 64))
    ]
