"""The results of `softpref bench`: table, JSON and plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from softpref.bench.contestants import DPOS, M_FEW, MSPO, NAMES, Name
from softpref.bench.counting import StepCounts
from softpref.bench.timing import Quartiles, paired_ratio, quartiles
from softpref.bench.workload import TUNINGS, Workload
from softpref.models.loading import Tuning
from softpref.plots import save_figure

_HEADER = (
    "tuning", "dtype", "prompt + response, tokens", "m", "step", "seconds",
    "x TRL's default", "x TRL at its best", "x our DPO", "peak, MiB", "operations", "waits",
)  # fmt: skip
LEGEND = (
    "Seconds: median step without the optimizer. x: median (quartiles) of ratios within a round. "
    "Lengths are means. Peak: above the memory in use before the first step. Operations: those on "
    "tensors, without views. Waits: of the host for the device. m: clean batch / batch of {pairs} "
    "pairs. Trained weights are float32."
)
TUNING_LABELS: dict[Tuning, str] = {"lora": "LoRA r=16", "full": "full"}
_LABELS: dict[Name, str] = {
    "trl_default": "TRL DPO, its defaults",
    "trl_best": "TRL DPO at its best",
    "dpo": "softpref DPO",
    "mspo_m1/8": "softpref MSPO",
    "mspo_m1": "softpref MSPO",
    "double_backward": "softpref MSPO, double backward",
    "dpo_checkpointed": "softpref DPO, checkpointed",
    "graph_checkpointed": "softpref MSPO, graph, checkpointed",
    "recompute_checkpointed": "softpref MSPO, recompute, checkpointed",
}
WITHOUT_M: tuple[Name, ...] = ("trl_default", "trl_best", "dpo", "dpo_checkpointed")
M_LABELS: dict[Name, str] = {
    name: "1" if name == "mspo_m1" else "1/8" for name in NAMES if name not in WITHOUT_M
}
# Variants of MSPO at m = 1/8, and the baseline of each.
BASELINE_OF: dict[Name, Name] = {
    "double_backward": "dpo",
    "graph_checkpointed": "dpo_checkpointed",
    "recompute_checkpointed": "dpo_checkpointed",
}
COUNTED = (*DPOS, "mspo")
_COLOURS = ("#1f6f8b", "#c8553d")


@dataclass(frozen=True)
class Group:
    """Measurements of one tuning on one workload.

    Attributes:
        seconds: timed steps of a contestant by round; empty if its step did not fit in memory.
        peaks: peaks of a contestant by process, MiB; missing if not measured.
        counts: what one step asks of the device; missing if not counted.
        response_only_head: whether TRL at its best used its head for responses only.
    """

    tuning: Tuning
    workload: Workload
    seconds: dict[Name, list[float]]
    peaks: dict[Name, list[float]]
    counts: dict[Name, StepCounts]
    response_only_head: bool

    def time_ratio(self, ours: Name, theirs: Name) -> Quartiles | None:
        """Return the ratio of the step times of two contestants."""
        return paired_ratio(self.seconds.get(ours, []), self.seconds.get(theirs, []))

    def peak_ratio(self, ours: Name, theirs: Name) -> Quartiles | None:
        """Return the ratio of the peak memory of two contestants."""
        return paired_ratio(self.peaks.get(ours, []), self.peaks.get(theirs, []))


def rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Return the table, header first."""
    return [_HEADER, *(_row(group, name) for group in groups for name in group.seconds)]


def _row(group: Group, name: Name) -> tuple[str, ...]:
    label = _LABELS[name]
    if name == "trl_best":
        label += f" (response-only head: {'on' if group.response_only_head else 'off'})"
    seconds, peak = (quartiles(sample.get(name, [])) for sample in (group.seconds, group.peaks))
    ratios = (_ratio_text(group.time_ratio(name, other)) for other in DPOS)
    counts = group.counts.get(name)
    return (
        TUNING_LABELS[group.tuning],
        _dtype(group),
        str(group.workload.shape),
        M_LABELS.get(name, "-"),
        label,
        f"{seconds.median:.3f}" if seconds else "-",
        *ratios,
        f"{peak.median:.0f}" if peak else "-",
        f"{counts.operations:,}" if counts else "-",
        f"{counts.waits}" if counts else "-",
    )


def _ratio_text(ratio: Quartiles | None) -> str:
    return f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})" if ratio else "-"


def runs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the `runs` of the JSON: one for every shape and m, with LoRA and full tuning."""
    shapes = dict.fromkeys(group.workload.shape for group in groups)
    records = []
    for shape in shapes:
        by_tuning = {group.tuning: group for group in groups if group.workload.shape == shape}
        for m in MSPO:
            record = {"shape": asdict(shape), "m": m, "dtype": _dtype(by_tuning["lora"])}
            records.append(record | {name: _figures(by_tuning[name], m) for name in TUNINGS})
    return records


def _figures(group: Group, m: float) -> dict[str, Any]:
    """Return the ratios and medians of one tuning, shape and m; None if not measured."""
    mspo, is_few = MSPO[m], m == M_FEW
    others = (*BASELINE_OF, "dpo_checkpointed") if is_few else ()
    names: dict[str, Name] = {name: name for name in (*DPOS, *others)} | {"mspo": mspo}
    ratios = {
        "mspo_vs_trl_default": group.time_ratio(mspo, "trl_default"),
        "mspo_vs_trl_best": group.time_ratio(mspo, "trl_best"),
        "mspo_vs_dpo": group.time_ratio(mspo, "dpo"),
        "dpo_vs_trl_default": group.time_ratio("dpo", "trl_default"),
        "memory_mspo_vs_dpo": group.peak_ratio(mspo, "dpo"),
    }
    for name, base in BASELINE_OF.items():
        ratios[f"{name}_vs_{base}"] = group.time_ratio(name, base) if is_few else None
        if base == "dpo_checkpointed":
            ratios[f"memory_{name}_vs_{base}"] = group.peak_ratio(name, base) if is_few else None
    seconds = {key: quartiles(group.seconds.get(name, [])) for key, name in names.items()}
    peaks = {key: quartiles(group.peaks.get(name, [])) for key, name in names.items()}
    counts = {key: group.counts.get(name) for key, name in names.items() if key in COUNTED}
    return {
        **{key: ratio and asdict(ratio) for key, ratio in ratios.items()},
        "seconds": {key: found and found.median for key, found in seconds.items()},
        "peak_mib": {key: found and found.median for key, found in peaks.items()},
        "operations": {key: found and found.operations for key, found in counts.items()},
        "waits": {key: found and found.waits for key, found in counts.items()},
        "trl_best_response_only_head": group.response_only_head,
    }


def draw_step_times(groups: Sequence[Group], path: Path) -> None:
    """Draw step times relative to TRL's default, with one panel per tuning.

    Args:
        groups: the measurements.
        path: a PNG.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(1, len(TUNINGS), sharey=True)
    for axes, tuning in zip(panels, TUNINGS, strict=True):
        selected = [group for group in groups if group.tuning == tuning]
        height = 0.8 / len(selected)
        for i, (group, colour) in enumerate(zip(selected, _COLOURS, strict=False)):
            for place, name in enumerate(NAMES):
                ratio = group.time_ratio(name, "trl_default")
                if ratio is None:
                    continue
                spread = [[ratio.median - ratio.q1], [ratio.q3 - ratio.median]]
                label = f"{group.workload.shape} tokens" if place == 0 else None
                bar = place + i * height, ratio.median, height
                axes.barh(*bar, xerr=spread, color=colour, label=label)
        axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        title = f"{TUNING_LABELS[tuning]}, {_dtype(selected[0])}"
        axes.set(title=title, xlabel="step time / step time of TRL's default")
    ticks = [_LABELS[name] + (f", m = {m}" if (m := M_LABELS.get(name)) else "") for name in NAMES]
    panels[0].set_yticks([place + 0.2 for place in range(len(NAMES))], ticks)
    panels[0].invert_yaxis()
    entries = panels[0].get_legend_handles_labels()
    legend = figure.legend(*entries, loc="outside lower center", ncols=2, frameon=False)
    legend.set_title("prompt + response")
    save_figure(figure, path)


def _dtype(group: Group) -> str:
    return str(group.workload.dtype).removeprefix("torch.")
