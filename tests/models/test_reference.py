"""The fingerprint under which what a model says of pairs is kept."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from softpref.models.reference import fingerprint_weights
from tests.tiny import tiny_model, with_lora


def test_a_fingerprint_knows_which_adapter_speaks_and_how_strongly():
    policy = with_lora(tiny_model())
    policy.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    found = {"default": fingerprint_weights(policy)}
    policy.set_adapter("other")
    found["other"] = fingerprint_weights(policy)
    policy.set_adapter("default")
    assert fingerprint_weights(policy) == found["default"]
    with policy.disable_adapter():
        found["disabled"] = fingerprint_weights(policy)
    assert fingerprint_weights(policy) == found["default"]
    layers = [layer for layer in policy.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.scaling["default"] *= 4
    found["stronger"] = fingerprint_weights(policy)
    assert len(set(found.values())) == len(found)
