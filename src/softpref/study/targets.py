"""The paper's tables and figures as grids of runs: plain data."""

from __future__ import annotations

from collections.abc import Mapping

from softpref.study.grid import Target
from softpref.study.pictures import (
    describe_examples,
    draw_bound,
    draw_clean_sizes,
    draw_map_and_labels,
    draw_progress,
    draw_weights,
)
from softpref.study.readings import examples, implicit_weights, label_curves, learned_map
from softpref.study.scorers import SCORERS

ALL_METHODS = (
    "dpo", "gdpo", "cdpo", "rdpo", "perpcorrect", "mspo_static", "mspo", "evidence", "oracle",
)  # fmt: skip
ROBUST_METHODS = (*ALL_METHODS, "ipo", "dr_dpo", "sympo", "holder_dpo", "ropo", "re_po")
NOISE_RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
AUDIT_METRICS = ("label_auroc", "average_precision", "ece", "noise_rate_error")


def _by_noise(rows: Mapping[str, str]) -> dict[tuple[str, float], str]:
    return {
        (method, rate): number
        for method, numbers in rows.items()
        for rate, number in zip(NOISE_RATES, numbers.split(), strict=True)
    }


TARGETS = {
    "table1": Target(
        "Methods by noise rate (Table 1)",
        "method", "noise_rate", {"method": ALL_METHODS, "noise_rate": NOISE_RATES},
        _by_noise({
            "dpo": "97.2±0.4 92.5±0.6 82.6±1.1 68.5±1.5 53.2±2.0",
            "gdpo": "97.6±0.3 97.2±0.4 95.5±0.5 94.3±0.6 91.2±0.9",
            "cdpo": "97.4±0.3 96.0±0.5 90.9±0.8 83.2±1.0 65.6±1.8",
            "rdpo": "97.2±0.4 96.7±0.4 95.2±0.6 93.9±0.7 90.5±1.0",
            "perpcorrect": "97.9±0.3 97.5±0.3 96.2±0.5 95.5±0.5 94.9±0.6",
            "mspo": "98.4±0.2 97.9±0.2 96.6±0.4 96.3±0.4 96.1±0.5",
        }),
    ),
    "table2": Target(
        "Methods by noise rate, with a smaller model (Table 2)",
        "method", "noise_rate",
        {"method": ALL_METHODS, "noise_rate": NOISE_RATES, "model_size": ("small",)},
        _by_noise({
            "dpo": "96.5±0.5 93.2±0.7 85.6±1.0 73.1±1.4 55.0±1.9",
            "gdpo": "97.1±0.4 97.5±0.4 96.1±0.5 94.5±0.7 85.4±1.2",
            "cdpo": "97.6±0.3 97.2±0.4 92.6±0.8 81.1±1.2 66.7±1.8",
            "rdpo": "97.0±0.4 96.5±0.5 95.7±0.6 93.3±0.8 84.6±1.3",
            "perpcorrect": "98.2±0.3 98.2±0.3 97.1±0.4 96.7±0.5 96.4±0.5",
            "mspo": "98.9±0.2 98.4±0.2 98.0±0.3 97.5±0.4 97.3±0.4",
        }),
        paper_model="Phi-2",
    ),
    "table3": Target(
        "What learning and the dynamic signal add (Table 3)",
        "method", "noise_rate",
        {"method": ("perpcorrect", "mspo_static", "mspo"), "noise_rate": (0.3,)},
        {("perpcorrect", 0.3): "95.5±0.5", ("mspo_static", 0.3): "95.9±0.4",
         ("mspo", 0.3): "96.3±0.4"},
    ),
    "table4": Target(
        "Flips that depend on difficulty (Table 4)",
        "method", "noise_kind",
        {"method": ALL_METHODS, "noise_kind": ("difficulty",), "noise_rate": (0.25,)},
        {("dpo", "difficulty"): "61.3±1.8", ("cdpo", "difficulty"): "75.8±1.2",
         ("perpcorrect", "difficulty"): "93.1±0.7", ("mspo", "difficulty"): "95.2±0.5"},
    ),
    "table6": Target(
        "MSPO against PerpCorrect, head to head (Table 6)",
        "noise_rate", "rival",
        {"noise_rate": (0.0, 0.2, 0.4), "method": ("mspo",), "rival": ("perpcorrect",)},
        {(0.0, "perpcorrect"): "51.2±1.5", (0.2, "perpcorrect"): "58.6±2.1",
         (0.4, "perpcorrect"): "64.3±2.5"},
        metrics=("rival_win_rate",),
    ),
    "table7": Target(
        "MSPO with noise in the clean set (Table 7)",
        "clean_noise_rate", "method",
        {"clean_noise_rate": (0.0, 0.05, 0.1, 0.15), "method": ("mspo",), "noise_rate": (0.3,)},
        {(0.0, "mspo"): "96.3±0.4", (0.05, "mspo"): "95.8±0.5", (0.1, "mspo"): "95.1±0.6",
         (0.15, "mspo"): "94.2±0.8"},
    ),
    "fig3": Target(
        "What the meta-learner has learned (Figure 3)",
        "method", "noise_rate", {"method": ("mspo",), "noise_rate": (0.4,)},
        reading=learned_map, picture=draw_map_and_labels,
    ),
    "fig4": Target(
        "Win rate and labels on the way (Figure 4)",
        "method", "noise_rate",
        {"method": ("dpo", "perpcorrect", "mspo"), "noise_rate": (0.3,), "measure_every": (10,)},
        reading=label_curves, picture=draw_progress,
    ),
    "fig5": Target(
        "MSPO by the size of the clean set (Figure 5)",
        "clean_pairs", "method",
        {"clean_pairs": (50, 100, 150, 200), "method": ("mspo",), "noise_rate": (0.3,)},
        picture=draw_clean_sizes,
    ),
    "cases": Target(
        "The best correction and the worst failure (Tables 8 and 9)",
        "method", "noise_rate", {"method": ("mspo",), "noise_rate": (0.3,)},
        metrics=(), reading=examples, text=describe_examples,
    ),
    "weights": Target(
        "How hard each pair pulls, by its PPLDiff (Appendix B.1)",
        "method", "noise_rate", {"method": ("mspo",), "noise_rate": (0.4,)},
        metrics=(), reading=implicit_weights, picture=draw_weights,
    ),
    "bound": Target(
        "DPO's loss on the clean set and held out, by the size of the clean set (Appendix B.2)",
        "clean_pairs", "method",
        {"clean_pairs": (50, 100, 150, 200), "method": ("mspo",), "noise_rate": (0.3,)},
        metrics=("clean_loss", "held_out_loss"), picture=draw_bound,
    ),
    "sft_data": Target(
        "What SFT has seen of the training pairs",
        "method", "sft_data",
        {"method": ("dpo", "perpcorrect", "mspo_static", "mspo", "oracle"),
         "sft_data": ("disjoint", "clean_chosen", "noisy_chosen"), "noise_rate": (0.4,)},
    ),
    "official": Target(
        "PerpCorrect by threshold and its authors' way",
        "method", "perpcorrect_mode",
        {"method": ("perpcorrect",), "perpcorrect_mode": ("threshold", "official"),
         "noise_rate": (0.4,)},
    ),
    "audit": Target(
        "Ways to tell which labels are wrong",
        "scorer", "noise_rate",
        {"method": ("mspo",), "scorer": tuple(SCORERS), "noise_rate": (0.1, 0.2, 0.3, 0.4)},
        metrics=AUDIT_METRICS,
    ),
    "audit_difficulty": Target(
        "Ways to tell which labels are wrong, where hard pairs are flipped more often",
        "scorer", "noise_kind",
        {"method": ("mspo",), "scorer": tuple(SCORERS), "noise_kind": ("difficulty",),
         "noise_rate": (0.25,)},
        metrics=AUDIT_METRICS,
    ),
    "robust": Target(
        "Every method by noise rate, against DPO",
        "method", "noise_rate", {"method": ROBUST_METHODS, "noise_rate": (0.0, 0.2, 0.4)},
        baseline="dpo",
    ),
    "robust_difficulty": Target(
        "Every method, where hard pairs are flipped more often, against DPO",
        "method", "noise_kind",
        {"method": ROBUST_METHODS, "noise_kind": ("difficulty",), "noise_rate": (0.25,)},
        baseline="dpo",
    ),
    "rates": Target(
        "cDPO and rDPO with the noise rate estimated and given",
        "method", "noise_rate_source",
        {"method": ("cdpo", "rdpo"), "noise_rate_source": ("estimated", "given"),
         "noise_rate": (0.4,)},
    ),
}  # fmt: skip
"""Targets of `softpref study`."""
