"""Pictures as files."""

from __future__ import annotations

import os

from matplotlib.figure import Figure

from softpref.plots import save_figure


def test_a_picture_drawn_twice_has_the_same_bytes(tmp_path):
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        figure = Figure(figsize=(2, 2))
        axes = figure.subplots()
        axes.errorbar([0, 1], [0, 1], [0.1, 0.2], marker="o", label="x")
        axes.legend()
        save_figure(figure, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a.svg", "b.png", "b.svg"]
    for kind in ("svg", "png"):
        first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in "ab")
        assert first == second
    assert b"dc:date" not in (tmp_path / "a.svg").read_bytes()
