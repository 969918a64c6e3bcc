"""The demo's report: one static page without scripts and with inline images."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from softpref.markup import for_html

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; padding: .45rem .6rem; border-bottom: 1px solid #8886; }
td + td, th + th { font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; background: white; border-radius: 6px; }
@media (prefers-color-scheme: dark) { img { filter: invert(.93) hue-rotate(180deg); } }
@media (max-width: 30rem) { th, td { font-size: .85rem; padding: .35rem .3rem; } }
figure { margin: 2rem 0; }
figcaption { margin-top: .6rem; }
"""


def page(title: str, lead: str, table: str, figures: Sequence[str], end: str) -> str:
    """Return the page; `table` and `figures` are HTML, the other texts are plain."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{for_html(title)}</title>
<style>{STYLE}</style>
<main>
<h1>{for_html(title)}</h1>
<p>{for_html(lead)}</p>
{table}
{"".join(figures)}
<p>{for_html(end)}</p>
</main>
</html>
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of plain texts."""
    head = "".join(f'<th scope="col">{for_html(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{for_html(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def figure(path: Path, title: str, how_to_read: str) -> str:
    """Return an inline image with a paragraph on how to read it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{for_html(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption><strong>{for_html(title)}.</strong> {for_html(how_to_read)}</figcaption>"
        "</figure>"
    )
