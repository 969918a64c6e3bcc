"""The report's charts: inline SVG, styled by the page's CSS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from softpref.markup import for_html

WIDTH, HEIGHT, LEFT, BOTTOM = 300, 170, 40, 24
_BINS = 40


def histogram(values: Sequence[float], title: str, caption: str) -> str:
    """Return a histogram with 40 bins of equal width."""
    low, high = np.quantile(values, [0.002, 0.998])
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(np.clip(values, low, high), _BINS, (low, high))
    most = int(counts.max())
    wide = (WIDTH - LEFT) / _BINS
    bars = "".join(
        f'<rect class="bar" x="{LEFT + i * wide:.1f}" width="{wide - 0.6:.1f}" '
        f'y="{_height(count / most):.1f}" height="{HEIGHT - BOTTOM - _height(count / most):.1f}"/>'
        for i, count in enumerate(counts.tolist())
        if count
    )
    ends = f"{low:.2f}", f"{(low + high) / 2:.2f}", f"{high:.2f}"
    return _figure(bars, ends, ("0", f"{most:,}"), title, caption)


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
    return _figure(ideal + dots, ("0", "0.5", "1"), ("0%", "100%"), title, caption)


def _height(share: float) -> float:
    return 10 + (HEIGHT - BOTTOM - 10) * (1 - share)


def _figure(drawn: str, across: Sequence[str], up: Sequence[str], title: str, caption: str) -> str:
    base = HEIGHT - BOTTOM
    below = "".join(
        f'<text x="{LEFT + i * (WIDTH - LEFT) / 2:.0f}" y="{HEIGHT - 6}" '
        f'text-anchor="{anchor}">{for_html(label)}</text>'
        for i, (label, anchor) in enumerate(zip(across, ("start", "middle", "end"), strict=True))
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
    return _framed(f"{axes}{drawn}{below}{beside}", title, title, caption)


def _framed(drawn: str, read_out: str, title: str, caption: str) -> str:
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{for_html(read_out)}">'
        f"{drawn}</svg>"
        f"<figcaption><strong>{for_html(title)}.</strong> {for_html(caption)}</figcaption></figure>"
    )
