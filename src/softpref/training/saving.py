"""A model as it is saved: with its generation config, and in shards; all in safetensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import GenerationConfig, TrainingArguments

from softpref.algorithm.gradients.shards import is_sharded, laid_out_as, local, without_shards
from softpref.errors import UsageError
from softpref.models.weights import load_whole
from softpref.training.states import JSON, tensor_paths

SHARDS = "shards"
"""Of a checkpoint: where every process writes its shards of weights and optimizer state."""


def save_model(
    model: nn.Module,
    directory: Path,
    state_dict: dict[str, Any] | None = None,
    *,
    writes: bool = True,
) -> None:
    """Save a model or adapter, its generation config as it is.

    Trained shards are gathered: then all processes call this, and one of them `writes`.

    transformers refuses one that sets, say, a temperature without do_sample, as many published
    models have it. It does so at the end of a run, once the trainer has aligned a token id in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model_with_saving: Any = model
    own = vars(model).get("generation_config")  # an adapter has none of its own, and saves none
    if own is None:
        model_with_saving.save_pretrained(directory, writes, state_dict=state_dict)
        return
    try:
        model_with_saving.generation_config = GenerationConfig()
        model_with_saving.save_pretrained(directory, writes, state_dict=state_dict)
    finally:
        model_with_saving.generation_config = own
    if writes:
        own.to_json_file(directory / "generation_config.json", use_diff=True)


@contextmanager
def allow_sharded_save(policy: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Let a Trainer be made of a sharded base, though it is to save its optimizer's state too.

    transformers refuses, for the state of shards is in shards. An adapter's is whole, and
    `save_shards` saves what is not.
    """
    asked_for = args.save_only_model
    args.save_only_model |= is_sharded(policy)
    try:
        yield
    finally:
        args.save_only_model = asked_for


def save_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write those tensors that are in shards, each process its own, in torch's distributed format.

    The rest is of rank 0, which writes it as ever.
    """
    whole_ones = without_shards(tensors)
    shards = {name: each.detach() for name, each in tensors.items() if name not in whole_ones}
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    save(shards, storage_writer=writer)


def load_saved(saved: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a checkpoint's tensors into those given, whole or in shards there and here.

    Args:
        saved: the checkpoint.
        tensors: by the names they have there.
    """
    where = saved / SHARDS if (saved / SHARDS).is_dir() else saved
    into = {name: tensor.detach() for name, tensor in tensors.items()}
    reader = HuggingFaceStorageReader(str(where))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process it is
        load(into, storage_reader=reader, no_dist=not distributed.is_initialized())


def load_weights(saved: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights into a model, whole or in shards there and here.

    `save_pretrained` gives some weights the names that they are published under, and cuts fused
    experts apart. Then transformers first loads a second model, which fuses them again.

    Raises:
        UsageError: a weight is missing.
    """
    shards = saved / SHARDS
    own = _detached(model)
    names: set[str] = set()
    for file in (shards if shards.is_dir() else saved).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    missing = sorted(dict(model.named_parameters()).keys() - names)
    if not missing:
        load_saved(saved, {name: own[name] for name in own.keys() & names})
        return
    if shards.is_dir():
        raise UsageError(
            f"{shards}: cannot be loaded, there is no {missing[0]}: the checkpoint was written by "
            "another version of transformers, which has other names for weights. Resume with that "
            "version, or start a new run with another output_dir."
        )
    known: Any = model
    layout = {"distributed_config": known.config.distributed_config} if is_sharded(model) else {}
    what = "cannot be loaded"
    again = load_whole(type(model), str(saved), str(saved), what, dtype=known.dtype, **layout)
    for name, tensor in _detached(again).items():
        local(own[name]).copy_(local(tensor))


def _detached(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers; of tied ones the first."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors}


def in_layout_of(
    parameters: Sequence[Tensor], tensors: dict[str, Tensor], values: dict[str, JSON], saved: Path
) -> dict[str, Tensor]:
    """Return an optimizer's saved tensors in the shards, or whole, as its parameters are here.

    Args:
        parameters: the optimizer's, in its order.
        tensors: those of its state that rank 0 saved, whole.
        values: the rest of its state, which names all tensors.
        saved: the checkpoint, from whose shards the others are read.
    """
    found = dict(tensors)
    missing = {}
    for path in tensor_paths(values):
        _, number, *_ = path.split(".")
        parameter = parameters[int(number)]
        if path not in found:
            missing[path] = found[path] = torch.empty_like(parameter)
        elif found[path].shape == parameter.shape:
            found[path] = laid_out_as(parameter, found[path].to(parameter.device))
    if missing:
        load_saved(saved, missing)
    return found
