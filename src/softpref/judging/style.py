"""Differences in style between two responses: length, headers, lists and bold text."""

from __future__ import annotations

import re

Style = tuple[float, float, float, float]

_CODE = re.compile(r"```[^`]*```")
_MARKS = (  # each in linear time, since a response may be an attack
    re.compile(r"^#{1,6}\s", re.MULTILINE),
    re.compile(r"^[^\S\n]*(?:\d+\.|[-*+])\s", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)


def style_difference(response: str, baseline: str) -> Style:
    """Return (a − b) / (a + b) for characters, headers, list items and bold texts.

    Arena's style control (Li et al. 2024, lmsys.org/blog/2024-08-28-style-control) with characters
    for tokens; the counts are those of `utils/add_markdown_info.py` in lmarena/arena-hard-auto.
    Code blocks contain no Markdown. A difference is 0 where both counts are 0.

    Args:
        response: a.
        baseline: b.
    """
    counts = zip(_counts(response), _counts(baseline), strict=True)
    length, headers, lists, bold = ((a - b) / (a + b) if a + b else 0.0 for a, b in counts)
    return length, headers, lists, bold


def _counts(text: str) -> list[int]:
    prose = _CODE.sub("", text)
    return [len(text), *(sum(1 for _ in marks.finditer(prose)) for marks in _MARKS)]
