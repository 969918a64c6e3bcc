"""Pictures that are whole or not there, and the same bytes whenever they are drawn again."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from softpref.data.temporary import replacing


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as its path's ending says, PNG or SVG."""
    kind = path.suffix.removeprefix(".")
    dated = {"Date": None} if kind == "svg" else {}
    # By default an SVG holds the date, and ids that are drawn at random.
    with replacing(path) as partial, matplotlib.rc_context({"svg.hashsalt": "softpref"}):
        figure.savefig(partial, dpi=130, format=kind, metadata=dated)
