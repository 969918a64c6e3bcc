"""Names in plots, LaTeX, Markdown and HTML: they show as they are, whatever they hold."""

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
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")  # not the _ within a word


def shortened(name: str) -> str:
    """Return a name in one line of at most 60 characters, its middle an ellipsis if need be."""
    line = _in_one_line(name)
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]}…{line[len(line) - half + 1 :]}"


def for_plot(name: str) -> str:
    """Return a name for matplotlib, which takes what is between two dollars for mathematics."""
    return shortened(name).replace("$", r"\$")


def for_latex(text: str) -> str:
    """Return text as LaTeX has it."""
    return _in_one_line(text).translate({ord(mark): words for mark, words in _LATEX.items()})


def for_markdown(text: str) -> str:
    """Return text as Markdown has it, for a table's cell as well."""
    return _MARKDOWN.sub(r"\\\g<0>", _in_one_line(text))


def for_html(text: str) -> str:
    """Return text as HTML has it, in an attribute as well."""
    return html.escape(printable(text))


def pipes(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of plain texts as a Markdown table, the first its head."""
    head, *body = (f"| {' | '.join(map(for_markdown, row))} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def _in_one_line(text: str) -> str:
    return printable(" ".join(text.split("\n")).replace("\t", " "))
