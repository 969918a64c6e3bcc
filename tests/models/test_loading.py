"""Where models are put, whatever device torch was built for."""

from __future__ import annotations

import torch
from torch import nn

from softpref.models.loading import on_accelerator


def test_a_device_that_torch_was_built_for_but_is_not_there_is_not_used(monkeypatch):
    """A CUDA build of torch names CUDA on a machine that has none."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert on_accelerator(nn.Linear(2, 2)).weight.device.type == "cpu"
