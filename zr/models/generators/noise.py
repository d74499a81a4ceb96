"""Randomness that depends on what it is for, and on nothing else."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch

__all__ = ["source"]


def source(*what: Any) -> torch.Generator:
    """A source of randomness on the CPU, drawn from a seed and what it is for; so it is the same alone and in a batch.

    Args:
        what: a seed, and what names one image, such as the key of a prompt and a number; plain values, whose ``repr`` counts.

    Example:
        >>> first, again, other = (torch.randn(2, generator=source(0, key, 1)) for key in ("cat", "cat", "dog"))
        >>> torch.equal(first, again), torch.equal(first, other)
        (True, False)
    """
    return torch.Generator().manual_seed(int.from_bytes(blake2b(repr(what).encode(), digest_size=7).digest(), "big"))
