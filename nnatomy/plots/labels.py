"""Any token as a label that can be read: what would be invisible is marked, and markup is shown as it is."""

from __future__ import annotations

import html
import re
import unicodedata

_MARKS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}
_JOINER = "\u200d"


def visible(text: str) -> str:
    """`text` with all of it to be seen: spaces at its ends, in runs and behind a | (between two tokens) as ·, ⏎, ⇥, U+200B.

    Example:
        >>> visible(" Paris"), visible(" a| b"), visible("\\n\\t"), visible("a b"), visible("a\\u202eb"), visible("")
        ('·Paris', '·a|·b', '⏎⇥', 'a b', 'aU+202Eb', '∅')
    """
    spaced = re.sub(r"^ +| +$| {2,}|(?<=\|) +", lambda run: "·" * len(run[0]), text)
    shown = "".join(_shown(spaced, i) for i in range(len(spaced)))
    return ("◌" + shown if shown and unicodedata.combining(shown[0]) else shown) or "∅"


def _shown(text: str, i: int) -> str:
    char = text[i]
    joins = char == _JOINER and 0 < i < len(text) - 1  # within an emoji of several
    if char == " " or joins or unicodedata.category(char) not in _INVISIBLE:
        return char
    return _MARKS.get(char, f"U+{ord(char):04X}")


def label(text: str, most: int | None = None) -> str:
    """`text` as plotly is to be given it: visible, cut to `most` columns, none of it markup or TeX."""
    shown = visible(text)
    if most is not None and width(shown) > most:
        while width(shown) >= most:
            shown = shown[:-1]
        shown += "…"
    if any(unicodedata.bidirectional(char) in ("R", "AL", "AN") for char in shown):
        shown = f"\u2068{shown}\u2069"  # isolated: it does not turn round the text beside it
    return html.escape(shown, quote=False).replace("$", "&#36;")


def lines(text: str) -> str:
    """Text of several lines as plotly is to be given it."""
    return "<br>".join(label(line) if line else "" for line in text.split("\n"))


def width(text: str) -> int:
    """How many columns of a fixed font it takes."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
