"""One training step: labellers, losses and exact gradients; needs torch and statistics alone."""

from softpref.algorithm.bilevel import meta_gradient
from softpref.algorithm.labeller import MetaLearner
from softpref.statistics.noise_rate import estimate_noise_rate

__all__ = ["MetaLearner", "estimate_noise_rate", "meta_gradient"]
