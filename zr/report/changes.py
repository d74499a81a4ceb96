"""Changes: two pictures of one prompt side by side, and what a judge says of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zr.report.cards import Card

__all__ = ["Change"]


@dataclass(frozen=True)
class Change:
    """A picture before and after.

    Args:
        before: the earlier picture with its prompt; its title says whose it is. Judgements are not shown.
        after: the later one, of the same prompt.
        scores: by dimension, those of both, in score units.
        title: a short name.

    Raises:
        ValueError: two prompts, or no image.

    Example:
        >>> import torch
        >>> dark, light = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)
        >>> sides = Card("a red ring", (), dark, "start"), Card("a red ring", (), light, "improved")
        >>> Change(*sides, {"realism": (2.5, 4.0), "aesthetics": (4.0, 3.75)}).rows
        [('realism', '2.50', '4.00', '+1.50'), ('aesthetics', '4.00', '3.75', '-0.25')]
    """

    before: Card
    after: Card
    scores: Mapping[str, tuple[float, float]]
    title: str = ""

    def __post_init__(self) -> None:
        if self.before.prompt != self.after.prompt:
            raise ValueError(f"a change is of one prompt, got {self.before.prompt!r} and {self.after.prompt!r}")
        if self.before.image is None or self.after.image is None:
            raise ValueError(f"a change needs both images, {self.before.prompt!r} lacks one")

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """Of each dimension its name, both scores and their difference."""
        return [(name, f"{old:.2f}", f"{new:.2f}", f"{new - old:+.2f}") for name, (old, new) in self.scores.items()]
