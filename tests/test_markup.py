"""Hostile names in plots, tables and pages."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure

from softpref.judging.rates import Agreement, JudgedRate
from softpref.judging.report import Contest, draw_win_rates, rates_latex, rates_markdown
from softpref.markup import LONGEST, for_html, for_latex, for_markdown, for_plot, pipes, shortened
from softpref.statistics.people_rate import PeopleRate
from softpref.study.report import table
from softpref.terminal import printable
from softpref.training.finished import model_card
from tests.test_terminal import assert_harmless

NAMES = (
    r"$x_1$ and $\frac{", r"\$5", "$", r"a\b\\", "a|b", r"a\|b", "<script>alert(1)</script>",
    "**bold** _it_ `c` [l](u) ![i](u) &lt; ~~s~~", r"\input{x} 50% #1 & ^~{}", "two\nlines\tand",
    "\x1b[2J\x00\u202e\ud800", "x" * 5000, "snake_case", "",
)  # fmt: skip


def rate() -> JudgedRate:
    half = (0.4, 0.6)
    return JudgedRate(
        asked=10, wins=5, losses=5, strong_wins=2, strong_losses=1, ties=0,
        flipped=0, failed=0, rate=0.5, interval=half,
        clustered_interval=half, bounds=half, length_controlled=0.5,
        length_controlled_interval=half, style_controlled=0.5,
        style_controlled_interval=half, length_difference=0.0, first_share=0.5,
    )  # fmt: skip


def unescaped(cell: str) -> str:
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell)


@pytest.mark.parametrize("name", NAMES)
def test_a_plot_shows_a_name_as_it_is(name):
    text = Figure().text(0, 0, for_plot(name))
    assert not is_math_text(text.get_text())
    assert text._preprocess_math(text.get_text()) == (shortened(name), False)


@pytest.mark.parametrize("name", NAMES)
def test_every_table_keeps_its_shape_whatever_a_method_is_called(name):
    rates = {Contest(name, None, 0): rate(), Contest(name, name + "?", 0): rate()}
    half = (0.4, 0.6)
    found = PeopleRate(9, 4, 4, 1, 0.5, half, 0.5, half, 0.4, 12.0, 4.0)
    people = dict(zip(rates, (found, None), strict=True))
    agreements = {name: None, name + "!": Agreement(0.5, (0.1, 0.9), 10)}
    page = rates_markdown(rates, people, None, agreements)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)(?:\\\\)*\|", row)[1:-1] for row in rows]
    assert [len(row) for row in cells] == [15] * 3 + [15] * 3 + [5] * 4 + [10] * 4 + [4] * 4
    assert unescaped(cells[2][0].strip()).startswith(shortened(name).strip()[:20])
    assert_harmless(page)
    assert "<script>" not in page.replace(r"\<", "")
    lines = rates_latex(rates).splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body] == [5, 5]
    assert not re.search(r"(?<!\\)[$%#_^~]", "".join(body).replace(r"$\pm$", ""))
    assert max(map(len, body)) < 15 * LONGEST


def test_a_picture_of_hostile_names_is_drawn(tmp_path):
    draw_win_rates({Contest(name, None, 0): rate() for name in NAMES}).savefig(
        tmp_path / "rates.svg"
    )


def test_latex_knows_every_mark():
    assert for_latex("\\a{b}_c^d~e%f&g#h$i<j>") == (
        r"\textbackslash{}a\{b\}\_c\textasciicircum{}d\textasciitilde{}e\%f\&g\#h\$i"
        r"\textless{}j\textgreater{}"
    )


def test_markdown_leaves_plain_names_alone():
    assert for_markdown("mspo_static-v2 (run 1), 61.2 ± 1.3%") == (
        "mspo_static-v2 (run 1), 61.2 ± 1.3%"
    )
    assert for_markdown(r"_a_ |<b>* \ `") == r"\_a\_ \|\<b\>\* \\ \`"
    assert pipes([("a|b", "c"), ("d\ne", "f")]) == "| a\\|b | c |\n|---|---|\n| d e | f |\n"


def test_long_names_keep_both_ends():
    short = shortened("start" + "x" * 5000 + "end")
    assert len(short) == LONGEST
    assert short.startswith("start")
    assert short.endswith("end")
    assert "…" in short
    assert shortened("y" * LONGEST) == "y" * LONGEST


@pytest.mark.parametrize("name", NAMES)
def test_html_shows_a_name_as_text(name):
    class Texts(HTMLParser):
        tags, texts = 0, ""

        def handle_starttag(self, tag, attrs):
            self.tags += 1

        def handle_data(self, data):
            self.texts += data

    found = Texts()
    found.feed(table([name], [[name]]))
    assert found.tags == 7  # table, thead, tr, th, tbody, tr, td
    assert_harmless(for_html(name))
    assert found.texts == 2 * printable(name)


def test_a_model_card_takes_any_name():
    record = {
        "method": "dpo", "source": "s", "files": {"model": "a/**b**|<i>"}, "noise_rate": None,
        "noise_rate_source": "estimated", "steps": 1, "versions": {"softpref": "0"},
        "options": {"tuning": "lora", "recipe": "r", "beta": 0.1, "label_pairs": True},
        "clean_pairs": "none given",
        "data": {"train": {"pairs": 2, "sources": [
            {"pairs": 1, "source": "x/a|b.jsonl", "noise_rate": None}]}},
    }  # fmt: skip
    card = model_card(record)
    assert r"# \*\*b\*\*\|\<i\> aligned with dpo" in card
    assert r"| of the 1 from a\|b.jsonl |" in card
