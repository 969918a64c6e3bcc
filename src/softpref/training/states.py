"""State dicts as tensors and JSON, so that no pickle is needed to keep them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"


def state_to_tensors(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Split the state dict of any torch optimizer into tensors and JSON.

    Tensors, tuples and dicts with keys other than text are marked in the JSON by a one-key dict
    (`$tensor`, `$tuple`, `$items`), so that `tensors_to_state` gives back the same types.

    Args:
        state_dict: nested dicts, lists and tuples of tensors and plain values.

    Returns:
        The tensors themselves, by their path in the state dict, and all the rest.

    Raises:
        TypeError: a value is neither a tensor nor expressible in JSON; the message has its path.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: str) -> JSON:
        match value:
            case Tensor() if path not in tensors:
                tensors[path] = value
                return {"$tensor": path}
            case dict() if all(isinstance(key, str) and key[:1] != "$" for key in value):
                return {k: encode(v, f"{path}.{k}") for k, v in value.items()}
            case dict():
                return {"$items": [[k, encode(v, f"{path}.{k}")] for k, v in value.items()]}
            case tuple():
                return {"$tuple": encode(list(value), path)}
            case list():
                return [encode(item, f"{path}.{i}") for i, item in enumerate(value)]
            case None | bool() | int() | float() | str():
                return value
        raise TypeError(f"{path}: a {type(value).__name__} cannot be saved as tensors and JSON")

    return tensors, {key: encode(value, key) for key, value in state_dict.items()}


def tensor_paths(values: JSON) -> Iterator[str]:
    """Yield the paths of all tensors that a state dict's JSON names."""
    match values:
        case {"$tensor": str(path)}:
            yield path
        case dict():
            for value in values.values():
                yield from tensor_paths(value)
        case list():
            for value in values:
                yield from tensor_paths(value)


def tensors_to_state(tensors: Mapping[str, Tensor], values: Mapping[str, JSON]) -> dict[str, Any]:
    """Undo `state_to_tensors`, for `Optimizer.load_state_dict`."""

    def decode(value: Any) -> Any:
        match value:
            case {"$tensor": path}:
                return tensors[path]
            case {"$items": pairs}:
                return {key: decode(item) for key, item in pairs}
            case {"$tuple": items}:
                return tuple(decode(item) for item in items)
            case dict():
                return {key: decode(item) for key, item in value.items()}
            case list():
                return [decode(item) for item in value]
        return value

    return {key: decode(value) for key, value in values.items()}


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's global generators, and of a device's."""
    algorithm, keys, *position = cast(tuple[Any, ...], np.random.get_state())
    state = {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *position),
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Undo `random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if device.type in state.keys() - {"cpu"}:
        torch.get_device_module(device).set_rng_state(state[device.type])


def write_state(
    directory: Path, name: str, tensors: dict[str, Tensor], values: dict[str, JSON]
) -> None:
    """Write NAME.json, and NAME.safetensors where there are tensors."""
    (directory / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    if tensors:
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(stored, directory / f"{name}.safetensors")


def read_state(directory: Path, name: str) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Return what `write_state` wrote."""
    path = directory / f"{name}.safetensors"
    values = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
    return (load_file(path) if path.exists() else {}), values
