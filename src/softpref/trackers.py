"""The packages that `--report_to` needs, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from softpref.errors import UsageError, has_package
from softpref.options import did_you_mean

TRACKERS = {
    "azure_ml": (),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""A tracker's package and others that serve; transformers checks those that have none here."""


def chosen_trackers(report_to: str | Sequence[str] | None) -> list[str]:
    """Return the names of trackers, after checking that their packages are installed.

    Raises:
        UsageError: the message names the package, or the trackers that there are.
    """
    given = [report_to] if isinstance(report_to, str) else report_to or ()
    names = [name for name in given if name != "none"]
    for name in names:
        if name == "all":
            continue
        if name not in TRACKERS:
            raise UsageError(
                f"--report_to {name}: choose from {', '.join(TRACKERS)}"
                f"{did_you_mean(name, TRACKERS)}."
            )
        packages = TRACKERS[name]
        if packages and not any(map(has_package, packages)):
            raise UsageError(
                f"--report_to {name} needs the {packages[0]} package: pip install {packages[0]}."
            )
    return names
