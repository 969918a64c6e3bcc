"""State dicts as tensors and JSON, so that no pickle is needed to keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

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
