"""Models whose linear layers bitsandbytes holds in 4 or 8 bits.

They must compute the same function in every pass: of a row whatever else is in its batch, in
training and evaluation, on any processor. bitsandbytes' own layers do not, so they are settled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from softpref.errors import UsageError, require_package
from softpref.quantization import Bits

logger = logging.getLogger(__name__)

BITSANDBYTES = "bitsandbytes"
RUN_RECORD, _OF_BASE = "run.json", "quantization.json"
_WHOLE = "full precision"


def quantized_as(
    source: str, bits: Bits | None, dtype: torch.dtype | None, place: str, *, in_shards: bool
) -> dict[str, Any]:
    """Return what `from_pretrained` is to be given for a model in so many bits.

    A checkpoint that bitsandbytes has quantized already is loaded as it is.

    Args:
        source: a directory or hub id.
        bits: that were asked for.
        dtype: to compute in, float32 by default.
        place: option and path, for messages.
        in_shards: whether the model is to lie in shards.

    Raises:
        UsageError: the checkpoint is quantized already, otherwise than asked for, or is to be
            sharded; or bitsandbytes is not installed.
    """
    own: Any = PretrainedConfig.get_config_dict(source)[0].get("quantization_config")
    on_device = {"device_map": {"": _here()}}
    if own and in_shards:
        raise UsageError(
            f"{place}: is quantized, and --shard shards no packed weights: leave --shard out,"
            " or give the checkpoint that it was made from."
        )
    if own:
        _refuse_other(own, bits, place)
        return on_device if own.get("quant_method") == BITSANDBYTES else {}
    if not bits:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # 4.13 bits a weight instead of 4.5 (QLoRA)
        bnb_4bit_compute_dtype=dtype or torch.float32,
    )
    return on_device | {"quantization_config": config}


def _refuse_other(own: dict[str, Any], bits: Bits | None, place: str) -> None:
    method = own.get("quant_method")
    if method == BITSANDBYTES:
        require_package(BITSANDBYTES, "quantized", f"{place}, a quantized checkpoint,")
    if bits and not own.get(f"load_in_{bits}bit"):
        raise UsageError(
            f"{place}: is quantized already, in {bits_text(own)}: leave load_in_{bits}bit out, or "
            "give the checkpoint that it was made from."
        )


def _here() -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def quantization_of(policy: nn.Module) -> dict[str, Any] | None:
    """Return how a model is quantized, as its config.json says it, None where it is not."""
    own: Any = getattr(cast(Any, policy).config, "quantization_config", None)
    return own.to_dict() if hasattr(own, "to_dict") else own


def bits_text(quantization: dict[str, Any]) -> str:
    """Return what a config's quantization is called."""
    if quantization.get("load_in_4bit"):
        return f"4 bits ({quantization.get('bnb_4bit_quant_type', '').upper()})"
    return "8 bits" if quantization.get("load_in_8bit") else f"{quantization.get('quant_method')}"


def record_quantization(policy: nn.Module, directory: Path) -> None:
    """Write beside an adapter how its base was quantized, if it was; a run's record says it too."""
    if quantization := quantization_of(policy):
        path = directory / _OF_BASE
        path.write_text(json.dumps({"quantization": quantization}) + "\n", encoding="utf-8")


def warn_of_other_base(policy: nn.Module, source: str, place: str) -> None:
    """Warn if an adapter's base is quantized otherwise than the one it was trained over."""
    records = (Path(source) / name for name in (RUN_RECORD, _OF_BASE))
    record = next((each for each in records if each.is_file()), None)
    if record is None:
        return
    then = json.loads(record.read_text(encoding="utf-8")).get("quantization")
    trained, own = (bits_text(each) if each else _WHOLE for each in (then, quantization_of(policy)))
    if trained != own:
        logger.warning(
            f"warning: {place}: the adapter was trained over a base in {trained}, and this base is "
            f"in {own}: answers differ a little"
        )


def require_name(model: nn.Module | str, bits: Bits | None) -> None:
    """Refuse bits for a model that is loaded already.

    Raises:
        UsageError: they are asked for, and the model is no name.
    """
    if bits and not isinstance(model, str):
        raise UsageError(
            f"--load_in_{bits}bit: the model is loaded already: give its directory or hub id, or "
            "load it with a BitsAndBytesConfig."
        )


def refuse_to_train_all(policy: nn.Module, remedy: str = "--tuning lora") -> None:
    """Refuse a quantized model whose own weights are to train.

    Raises:
        UsageError: it is one.
    """
    if quantization_of(policy):
        raise UsageError(
            f"the model is quantized, and packed weights cannot train: give {remedy}, or the "
            "checkpoint that it was made from."
        )


def settle_quantized(policy: nn.Module) -> None:
    """Let a model's quantized layers compute one function, in the precision of its embedding.

    On some CPUs 4-bit layers round their constants and lose their gradient in evaluation; they are
    kept from that. 8-bit layers round activations too, by the largest of a whole batch; here their
    weights alone are rounded.
    """
    dtype = cast(Any, policy).get_input_embeddings().weight.dtype
    for layer in _quantized_layers(policy):
        if hasattr(layer.weight, "quant_state"):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.support_avx512bf16_for_cpu = False
        else:
            layer.forward = MethodType(_by_8_bit_weights, layer)


def is_settled(policy: nn.Module) -> bool:
    """Return whether no 8-bit layer rounds activations."""
    layers = _quantized_layers(policy)
    return all(
        hasattr(each.weight, "quant_state")
        or getattr(each.forward, "__func__", None) is _by_8_bit_weights
        for each in layers
    )


def _quantized_layers(policy: nn.Module) -> Iterator[Any]:
    for layer in policy.modules():
        weight = vars(layer)["_parameters"].get("weight")
        if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
            yield layer


def _by_8_bit_weights(self: Any, x: Tensor) -> Tensor:
    """Compute a `Linear8bitLt` in the input's precision."""
    if self.weight.CB is not None:
        self.init_8bit_state()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    product = _Product.apply(x, self.state.CB, self.state.SCB)
    return product if self.bias is None else product + self.bias.to(product)


class _Product(torch.autograd.Function):
    """x Wᵀ of int8 rows (out, in) with their scales (out,); W is made anew in each pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(rows, scales)
        return x @ _matrix(rows, scales, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *by_output: Tensor) -> tuple[Tensor, None, None]:
        (by,) = by_output
        rows, scales = ctx.saved_tensors
        return by @ _matrix(rows, scales, by.dtype), None, None


def _matrix(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype) * (scales / 127).to(dtype)[:, None]


def quantization_constants(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and numbers that packed weights are multiplied by, which are no parameters."""
    names = {layer: name for name, layer in policy.named_modules()}
    for layer in _quantized_layers(policy):
        weight, name = layer.weight, names[layer]
        state = getattr(weight, "quant_state", None)
        if state is not None:
            for key, value in state.as_dict().items():
                if isinstance(value, Tensor):
                    yield f"{name}.{key}", value
        else:
            scales = getattr(weight, "SCB", None)  # the layer's own once it has run
            yield f"{name}.SCB", layer.state.SCB if scales is None else scales
