"""Align language models on preference pairs whose labels cannot be trusted."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softpref.auditing.audit import audit
    from softpref.training.config import MSPOConfig
    from softpref.training.trainer import MSPOTrainer

__all__ = ["MSPOConfig", "MSPOTrainer", "__version__", "audit"]

__version__: str


def __getattr__(name: str) -> Any:
    # Importing the trainer takes seconds; `softpref.algorithm` and --help do without it.
    if name == "MSPOTrainer":
        from softpref.training.trainer import MSPOTrainer

        return MSPOTrainer
    if name == "MSPOConfig":
        from softpref.training.config import MSPOConfig

        return MSPOConfig
    if name == "audit":
        from softpref.auditing.audit import audit

        return audit
    if name == "__version__":
        from importlib.metadata import version

        return version("softpref")
    raise AttributeError(f"module 'softpref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
