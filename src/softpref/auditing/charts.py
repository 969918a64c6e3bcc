"""The report's charts: inline SVG, styled by the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from softpref.markup import for_html

WIDTH, HEIGHT, LEFT, BOTTOM = 300, 170, 40, 24
_BINS = 40
_ANCHORS: Mapping[float, str] = {0: "start", 1: "end"}
_CROWDED = 0.15
"""Share of the axis within which a label at its end would touch the one at the turn."""


def histogram(
    values: Sequence[float],
    turn: float,
    title: str,
    caption: str,
    within: tuple[float, float] | None = None,
) -> str:
    """Return a histogram with a marked value, on which no bin lies astride.

    Args:
        values: what is counted.
        turn: the value that separates the two sides of the caption.
        title: a name.
        caption: what the two sides mean.
        within: ends of the axis; by default it covers `turn` and all but the 0.4% outermost values.
    """
    low, high = within or _span(values, turn)
    wide = (high - low) / _BINS
    first, last = round((low - turn) / wide, 6), round((high - turn) / wide, 6)
    edges = turn + wide * np.arange(math.floor(first), math.ceil(last) + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    most, step = int(counts.max()), (WIDTH - LEFT) / len(counts)
    drawn = "".join(
        f'<rect class="bar" x="{LEFT + i * step:.1f}" width="{step - 0.6:.1f}" '
        f'y="{_height(count / most):.1f}" height="{HEIGHT - BOTTOM - _height(count / most):.1f}"/>'
        for i, count in enumerate(counts.tolist())
        if count
    )
    turn_at = -math.floor(first) / len(counts)
    x = LEFT + turn_at * (WIDTH - LEFT)
    line = f'<line class="ideal" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{HEIGHT - BOTTOM + 6}"/>'
    ends = {0: f"{edges[0]:.3g}", 1: f"{edges[-1]:.3g}"}
    across = {at: label for at, label in ends.items() if abs(at - turn_at) > _CROWDED}
    below = int((np.asarray(values) < turn).sum())
    return _figure(
        drawn + line,
        across | {turn_at: f"{turn:g}"},
        ("0", f"{most:,}"),
        f"{title}: {below:,} of {len(values):,} pairs are below {turn:g}",
        title,
        caption,
    )


def _span(values: Sequence[float], turn: float) -> tuple[float, float]:
    low, high = (float(end) for end in np.quantile(values, [0.002, 0.998]))
    low, high = min(low, turn), max(high, turn)
    return (low, high) if low < high else (turn - 0.5, turn + 0.5)


def bars(values: Mapping[str, float], title: str, caption: str) -> str:
    """Return a bar chart with the name and number of each value above its bar."""
    most = max(values.values()) or 1.0
    step = max(HEIGHT / len(values), 24)
    drawn = "".join(
        f'<text x="0" y="{i * step + 14:.0f}">{for_html(name)} {value:.2f}</text>'
        f'<rect class="bar" x="0" y="{i * step + 20:.0f}" width="{WIDTH * value / most:.1f}" '
        f'height="{min(step - 22, 16):.1f}"/>'
        for i, (name, value) in enumerate(values.items())
    )
    numbers = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
    return _framed(drawn, f"{title}: {numbers}", title, caption)


def reliability_curve(bins: Sequence[dict[str, float]], title: str, caption: str) -> str:
    """Return a plot of the share of right labels against the stated probability by bin."""
    ends = f'x1="{LEFT}" y1="{_height(0):.1f}" x2="{WIDTH}" y2="{_height(1):.1f}"'
    ideal = f'<line class="ideal" {ends}/>'
    dots = "".join(
        f'<circle class="dot" r="4" cx="{LEFT + one["stated"] * (WIDTH - LEFT):.1f}" '
        f'cy="{_height(one["right"]):.1f}"/>'
        for one in bins
    )
    numbers = ", ".join(f"stated {one['stated']:.0%} right {one['right']:.0%}" for one in bins)
    across = {0: "0%", 0.5: "50%", 1: "100%"}
    return _figure(ideal + dots, across, ("0%", "100%"), f"{title}: {numbers}", title, caption)


def _height(share: float) -> float:
    return 10 + (HEIGHT - BOTTOM - 10) * (1 - share)


def _figure(
    drawn: str,
    across: Mapping[float, str],
    up: Sequence[str],
    read_out: str,
    title: str,
    caption: str,
) -> str:
    """Return a chart with axes; `across` names shares of the horizontal axis."""
    base = HEIGHT - BOTTOM
    below = "".join(
        f'<text x="{LEFT + share * (WIDTH - LEFT):.0f}" y="{HEIGHT - 6}" '
        f'text-anchor="{_ANCHORS.get(share, "middle")}">{for_html(label)}</text>'
        for share, label in across.items()
    )
    beside = "".join(
        f'<text x="{LEFT - 5}" y="{_height(share) + 4:.0f}" text-anchor="end">'
        f"{for_html(label)}</text>"
        for label, share in zip(up, (0, 1), strict=True)
    )
    axes = (
        f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH}" y2="{base}"/>'
        f'<line class="axis" x1="{LEFT}" y1="10" x2="{LEFT}" y2="{base}"/>'
    )
    return _framed(f"{axes}{drawn}{below}{beside}", read_out, title, caption)


def _framed(drawn: str, read_out: str, title: str, caption: str) -> str:
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{for_html(read_out)}">'
        f"{drawn}</svg>"
        f"<figcaption><strong>{for_html(title)}.</strong> {for_html(caption)}</figcaption></figure>"
    )
