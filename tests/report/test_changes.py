import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from zr.report import Card, Change, Page, Section, render

BEFORE, AFTER = (
    torch.randint(0, 256, (3, 12, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
)
SCORES = {"realism": (2.5, 4.0), "alignment": (4.0, 3.875)}
HOSTILE = "<script>alert(1)</script> \u202e\" onload='x'"


def change(prompt: str = "a ring", name: str = "start", **changes) -> Change:
    sides = {"before": Card(prompt, (), BEFORE, name), "after": Card(prompt, (), AFTER, "improved"), "scores": SCORES}
    return Change(**sides | changes)


def shown(*changes: Change) -> str:
    return render(Page("t", [], [Section("s", changes=changes)]))


def test_both_pictures_are_shown_with_their_scores_in_order() -> None:
    text = shown(change(title="the largest gain"))
    images = [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    ]
    for image, tensor in zip(images, (BEFORE, AFTER), strict=True):
        assert np.array_equal(np.asarray(image), tensor.permute(1, 2, 0).numpy())
    plain = re.sub(r"<[^>]+>", " ", text[text.index("<h3>") :])
    words = " ".join(plain.split())
    assert words.startswith("Before and after start improved the largest gain a ring realism")
    numbers = re.findall(r"[+-]?\d\.\d\d", plain)
    assert numbers == ["2.50", "4.00", "+1.50", "4.00", "3.88", "-0.12"]
    assert "Before and after" not in shown()


def test_users_text_is_text_and_nothing_else() -> None:
    plain, hostile = (
        re.findall(r"<[a-z]+", shown(change(text, text, title=text, scores={text: (1.0, 2.0)}))) for text in ("name", HOSTILE)
    )
    assert plain == hostile
    text = shown(change(HOSTILE, HOSTILE, title=HOSTILE, scores={HOSTILE: (1.0, 2.0)}))
    assert "<script>" not in text
    assert "\u202e" not in text
    assert '" onload' not in text


def test_what_is_no_change_is_refused() -> None:
    with pytest.raises(ValueError, match="a change is of one prompt, got 'a ring' and 'a square'"):
        change(after=Card("a square", (), AFTER))
    with pytest.raises(ValueError, match="a change needs both images, 'a ring' lacks one"):
        change(before=Card("a ring", ()))
