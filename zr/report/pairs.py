"""Pairs of pictures to judge blindly, as one HTML file that needs nothing else and keeps the answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from importlib.resources import files

from markupsafe import Markup
from PIL import Image
from torch import Tensor

from zr.report.page import template
from zr.report.text import plain

__all__ = ["OVERALL", "Pair", "inline", "render_pairs"]

OVERALL = "overall"
"""What is asked where no dimension is named."""

EXACT = 256  # pixels of the longer side up to which a picture is kept as it is
LARGEST = 1024  # larger ones are shrunk, to keep the file small
QUALITY = 90  # of WebP, above EXACT
CRISP = 128  # pictures up to this side are shown with their pixels visible


@dataclass(frozen=True)
class Pair:
    """Two pictures of a prompt, in the places where they are shown.

    Args:
        id: what the answer is known by; it must not tell which picture is whose.
        prompt: what they shall show.
        left: a data URI, by :func:`inline`.
        right: likewise.
    """

    id: str
    prompt: str
    left: str
    right: str


def inline(image: Tensor) -> str:
    """A picture as a data URI: PNG up to a longer side of 256 pixels, above that WebP, shrunk to 1024 pixels.

    Nothing but the pixels is kept, so the file that it came from cannot tell whose it is.

    Args:
        image: ``(3, H, W)`` uint8.

    Example:
        >>> import torch
        >>> inline(torch.zeros(3, 8, 8, dtype=torch.uint8))[:22], inline(torch.zeros(3, 8, 300, dtype=torch.uint8))[:23]
        ('data:image/png;base64,', 'data:image/webp;base64,')
    """
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    exact = max(picture.size) <= EXACT
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if exact:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.save(buffer, format="WEBP", quality=QUALITY)
    return f"data:image/{'png' if exact else 'webp'};base64," + base64.b64encode(buffer.getvalue()).decode()


def render_pairs(pairs: Sequence[Pair], dimensions: Sequence[str] = (OVERALL,)) -> str:
    """A page that shows one pair after another, in the order given, and asks which picture is better.

    It needs no network and no server. Answers are kept in the browser, so that a reload goes on, and saved as JSON Lines with
    ``page``, ``pair``, ``dimension``, ``answer`` (left, same or right) and ``person``. Prompts are data: they are escaped, and
    their invisible controls are written out (:func:`zr.report.text.plain`).

    Args:
        pairs: to show; no id twice.
        dimensions: what is asked of each pair, one question for each.

    Raises:
        ValueError: no pair, an id that repeats, no dimension or one that repeats.

    Example:
        >>> import torch
        >>> picture = inline(torch.zeros(3, 8, 8, dtype=torch.uint8))
        >>> "</script><img" in render_pairs([Pair("3f", "</script><img onerror=alert(1)>", picture, picture)])
        False
    """
    ids = [pair.id for pair in pairs]
    for what, names in (("pair", ids), ("dimension", dimensions)):
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a page needs at least one {what}, and none twice, got {len(names)}")
    script = files("zr.report").joinpath("pairs.js").read_text(encoding="utf-8")
    data = {
        "page": blake2b(repr((ids, list(dimensions))).encode(), digest_size=8).hexdigest(),
        "dimensions": list(dimensions),
        "asked": {name: "" if name == OVERALL else plain(name) for name in dimensions},
        "pairs": [vars(pair) | {"prompt": plain(pair.prompt)} for pair in pairs],
        "crisp": CRISP,
    }
    allowed = "sha256-" + base64.b64encode(sha256(script.encode()).digest()).decode()
    return template("pairs.html").render(data=data, script=Markup(script), allowed=allowed)
