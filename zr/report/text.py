"""Text that users wrote, made harmless to look at; escaping for a language (HTML, Markdown) comes after it."""

from __future__ import annotations

import unicodedata

__all__ = ["plain"]

JOINERS = "\u200c\u200d"  # part of words in several scripts, and of emoji
SPACES = "\n\t\r"


def plain(text: str) -> str:
    r"""The text with every invisible control written out, so that it changes neither the reading order nor the terminal.

    Control and format characters (escape sequences, bidirectional overrides, tags), separators of lines and paragraphs,
    lone surrogates and code points that are no characters become ``\u{HEX}``. Line breaks and tabs become spaces.

    Example:
        >>> print(plain("red\x1b[31m \u202egnir\nblue"))
        red\u{1b}[31m \u{202e}gnir blue
    """
    return "".join(" " if c in SPACES else f"\\u{{{ord(c):x}}}" if _hidden(c) else c for c in text)


def _hidden(character: str) -> bool:
    if ord(character) & 0xFFFE == 0xFFFE:
        return True
    return character not in JOINERS and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
