"""The paper: torch and the standard library, nothing else."""

from softpref.algorithm.bilevel import meta_gradient
from softpref.algorithm.labeller import MetaLearner

__all__ = ["MetaLearner", "meta_gradient"]
