"""Align language models on preference pairs whose labels cannot be trusted."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softpref.auditing.audit import audit
    from softpref.training.config import MSPOConfig
    from softpref.training.trainer import MSPOTrainer

__all__ = ["MSPOConfig", "MSPOTrainer", "__version__", "audit"]
_HOMES = {
    "MSPOConfig": "softpref.training.config",
    "MSPOTrainer": "softpref.training.trainer",
    "audit": "softpref.auditing.audit",
}

__version__: str


def __getattr__(name: str) -> Any:
    # Importing the trainer takes seconds; `softpref.algorithm` and --help do without it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("softpref")
    raise AttributeError(f"module 'softpref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
