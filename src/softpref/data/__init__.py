"""From text to batches: sources, noise, tokens, batches."""

from softpref.data.batches import make_batch

__all__ = ["make_batch"]
