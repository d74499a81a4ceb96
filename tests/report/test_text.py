import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from zr.report.text import plain


@given(st.text(st.characters(categories=None)))  # lone surrogates too
def test_nothing_invisible_is_left_and_nothing_visible_is_lost(text):
    shown = plain(text)
    shown.encode()
    assert not {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert not {c for c in shown if unicodedata.category(c) == "Cf"} - {"\u200c", "\u200d"}
    visible = [c for c in text if unicodedata.category(c)[0] in "LMNPS"]
    kept = iter(shown)
    assert all(c in kept for c in visible)  # in order


def test_ordinary_text_stays():
    for text in ("a red cube", "مكعب أحمر", "👩‍🚀 in space", "5 > 3 & 2 < 4", "naïve – “quoted”"):
        assert plain(text) == text


def test_line_breaks_and_tabs_become_spaces():
    assert plain("a\nb\tc\r\nd") == "a b c  d"
