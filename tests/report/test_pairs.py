"""The page of pairs: what a browser is handed. How it behaves in one is tested with `zr gsb`."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from zr.report import Pair, inline, render_pairs

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!-- <script>",
    "\"' onmouseover='alert(1)'",
    "{{ data }} {% include 'x' %} ${x} &lt;b&gt; \\u003c",
    "\u202egnp.exe\u202c \x00 \ud800 \u2028",
)
PICTURE = inline(torch.zeros(3, 8, 8, dtype=torch.uint8))


class Reader(HTMLParser):
    """Elements, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.inside = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def shown(image):
    """The pixels of a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2])))


@pytest.mark.parametrize("text", HOSTILE)
def test_users_text_is_text_and_nothing_else(text):
    plain, hostile = (Reader(render_pairs([Pair("1", t, PICTURE, PICTURE)], [t])) for t in ("name", text))
    assert [(tag, sorted(attrs)) for tag, attrs in hostile.elements] == [(tag, sorted(attrs)) for tag, attrs in plain.elements]
    assert hostile.scripts[1] == plain.scripts[1]
    data = json.loads(hostile.scripts[0])
    assert data["dimensions"] == [text]
    assert not set(data["pairs"][0]["prompt"] + data["asked"][text]) & set("\u202e\u202c\x00\ud800\u2028")
    if text.isprintable():
        assert data["pairs"][0]["prompt"] == data["asked"][text] == text


def test_only_the_pages_own_script_runs_and_nothing_is_fetched():
    text = render_pairs([Pair("1", "a cube", PICTURE, PICTURE)])
    reader = Reader(text)
    (policy,) = [attrs["content"] for _, attrs in reader.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    own = base64.b64encode(hashlib.sha256(reader.scripts[1].encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{own}'"
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "data:")
    assert rules["base-uri"] == rules["form-action"] == "'none'"
    assert [attrs for tag, attrs in reader.elements if tag == "script"] == [{"type": "application/json", "id": "pairs"}, {}]
    assert not {tag for tag, _ in reader.elements} & {"link", "iframe", "object", "embed", "base", "form"}
    assert not [name for _, attrs in reader.elements for name in attrs if name.startswith("on") or name in ("src", "href")]
    assert not re.findall(r"https?://|url\(|@import", text)


def test_pixels_are_kept_and_only_they():
    image = torch.randint(0, 256, (3, 40, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(np.asarray(shown(inline(image))), image.permute(1, 2, 0).numpy())
    smooth = torch.linspace(0, 255, 2048).byte().expand(3, 600, 2048)
    large = shown(inline(smooth))
    assert large.size == (1024, 300)
    assert np.abs(np.asarray(large, np.float64)[150, :, 0] - np.linspace(0, 255, 1024)).max() < 6
    assert not {"exif", "icc_profile", "xmp"} & set(large.info)


def test_a_page_is_known_by_its_pairs_and_questions():
    def page(ids, dimensions):
        return json.loads(Reader(render_pairs([Pair(i, "x", PICTURE, PICTURE) for i in ids], dimensions)).scripts[0])["page"]

    assert page("ab", ["x"]) == page("ab", ["x"])
    assert len({page("ab", ["x"]), page("ba", ["x"]), page("ac", ["x"]), page("ab", ["y"]), page("ab", ["x", "y"])}) == 5


def test_what_is_refused():
    pair = Pair("1", "x", PICTURE, PICTURE)
    with pytest.raises(ValueError, match="at least one pair"):
        render_pairs([])
    with pytest.raises(ValueError, match="at least one pair, and none twice, got 2"):
        render_pairs([pair, pair])
    with pytest.raises(ValueError, match="at least one dimension"):
        render_pairs([pair], [])
