"""Figures, written atomically and with reproducible bytes."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from softpref.data.temporary import replacing


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the path's extension."""
    kind = path.suffix.removeprefix(".")
    dated = {"Date": None} if kind == "svg" else {}
    # By default an SVG contains the date and random ids.
    with replacing(path) as partial, matplotlib.rc_context({"svg.hashsalt": "softpref"}):
        figure.savefig(partial, dpi=130, format=kind, metadata=dated)
