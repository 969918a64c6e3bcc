"""Escape names for plots, LaTeX, Markdown and HTML."""

import html
import re
from collections.abc import Sequence

from softpref.terminal import printable

LONGEST = 60
"""Characters of a name in a plot or table."""
_LATEX = {mark: f"\\{mark}" for mark in "&%_#${}"} | {
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "±": r"$\pm$", "–": "--",
}  # fmt: skip
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")  # but not _ within a word


def shortened(name: str) -> str:
    """Return a name in one line of at most 60 characters, shortened in the middle."""
    line = _in_one_line(name)
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]}…{line[len(line) - half + 1 :]}"


def for_plot(name: str) -> str:
    """Return a name for matplotlib, which reads text between dollar signs as math."""
    return shortened(name).replace("$", r"\$")


def for_latex(text: str) -> str:
    """Return text escaped for LaTeX."""
    return _in_one_line(text).translate({ord(mark): escaped for mark, escaped in _LATEX.items()})


def for_markdown(text: str) -> str:
    """Return text escaped for Markdown, including table cells."""
    return _MARKDOWN.sub(r"\\\g<0>", _in_one_line(text))


def for_html(text: str) -> str:
    """Return text escaped for HTML, including attributes."""
    return html.escape(printable(text))


def pipes(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of plain text as a Markdown table; the first row is the header."""
    header, *body = (f"| {' | '.join(map(for_markdown, row))} |" for row in rows)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body]) + "\n"


def _in_one_line(text: str) -> str:
    return printable(" ".join(text.split("\n")).replace("\t", " "))
