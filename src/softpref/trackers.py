"""The packages that `--report_to` needs, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from softpref.errors import UsageError, has_package
from softpref.options import did_you_mean

PACKAGES = {
    "azure_ml": ("azureml-core", "azureml"), "clearml": ("clearml",), "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",), "dagshub": ("dagshub",), "dvclive": ("dvclive",),
    "flyte": ("flytekit",), "kubeflow": (), "mlflow": ("mlflow",), "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",),
}  # fmt: skip
"""The package to install for a tracker, and others that do as well."""


def require_trackers(report_to: str | Sequence[str] | None) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        UsageError: the message names the package, or the trackers that there are.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in ("none", "all"):
            continue
        if name not in PACKAGES:
            raise UsageError(
                f"--report_to {name}: choose from {', '.join(PACKAGES)}"
                f"{did_you_mean(name, PACKAGES)}."
            )
        packages = PACKAGES[name]
        if packages and not any(map(has_package, packages)):
            raise UsageError(
                f"--report_to {name} needs the {packages[0]} package: pip install {packages[0]}."
            )
