"""Processes that share the scoring of one command, as torchrun or accelerate starts them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.errors import UsageError, first_line

logger = logging.getLogger(__name__)

LONGEST_SILENCE = timedelta(days=7)
"""How long processes wait for the first, which may ask a judge for hours; one that died ends it."""


@contextmanager
def joined_processes() -> Iterator[Ranks]:
    """Join the processes that a launcher started, and yield which of them this one is.

    Raises:
        UsageError: there are more processes than devices, or they cannot reach each other.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    try:
        distributed.init_process_group(_backend(), timeout=LONGEST_SILENCE)
    except (ValueError, distributed.DistError) as error:
        raise UsageError(
            f"the processes cannot join: {first_line(error)}; start them by torchrun."
        ) from error
    ranks = Ranks.here(torch.device("cpu"))
    logger.info("processes: %d, which share the scoring", ranks.count)
    yield ranks
    ranks.wait()  # NCCL's groups must end together
    distributed.destroy_process_group()  # not after an error, which others would see before it says


def _backend() -> str:
    """Return what processes talk by, and give this one a device of its own."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "gloo"
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if place >= count:
        raise UsageError(
            f"process {place} of this machine has no device: there are {count}; start at most so "
            "many processes (--nproc_per_node)."
        )
    torch.accelerator.set_device_index(place)
    return f"cpu:gloo,{device.type}:{distributed.get_default_backend_for_device(device)}"
