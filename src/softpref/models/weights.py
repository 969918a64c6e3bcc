"""Weights in files: all that a config describes, in its shapes, and never pickled."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers.utils.hub import has_file
from transformers.utils.peft_utils import find_adapter_config_file

from softpref.errors import UsageError
from softpref.models.library_errors import in_one_sentence
from softpref.models.quantized import bits_text, quantization_of, quantized_as, settle_quantized
from softpref.quantization import Bits

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_NAMED = 3
"""Tensors that a message names; it counts the rest."""


def located(source: str) -> str:
    """Return where something local lies, in every working directory; hub ids stay as they are."""
    return str(Path(source).absolute()) if source and Path(source).exists() else source


def of_base(base: str, source: str) -> str:
    """Return words for the base model of the adapter in `source`."""
    return f"the adapter's base model {base} (named in {Path(source) / ADAPTER_CONFIG})"


def base_model(source: str, place: str) -> str | None:
    """Return what an adapter's base model is loaded from, None where `source` is no adapter.

    Raises:
        UsageError: its config is damaged, or names a directory that is not there.
    """
    with in_one_sentence(place, "its adapter_config.json cannot be read", source):
        if find_adapter_config_file(source) is None:
            return None
        base = str(PeftConfig.from_pretrained(source).base_model_name_or_path or "")
    if not Path(base or " ").exists() and not HUB_ID.fullmatch(base):
        raise UsageError(
            f"{place}: {of_base(base or '(none)', source)} is not there; put it there, or "
            "set base_model_name_or_path to its directory or hub id."
        )
    return located(base)


def load_whole(
    auto: Any, source: str, place: str, what: str, bits: Bits | None = None, **options: Any
) -> nn.Module:
    """Load a model by one of transformers' auto classes, refusing whatever is not in its files.

    With `bits` its linear layers are quantized while they are read.
    """
    with in_one_sentence(place, what, source):
        _refuse_pickles(source, "model.safetensors", place, what)
        in_shards = options.get("distributed_config") is not None
        options |= quantized_as(source, bits, options.get("dtype"), place, in_shards=in_shards)
        with _without_load_report():
            model, info = auto.from_pretrained(
                source, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,  # so that they are listed, refused below
            )  # fmt: skip
    if wrong := sorted(info["mismatched_keys"]):
        told = [f"{name} is {tuple(has)}, not {tuple(asked)}" for name, has, asked in wrong]
        raise UsageError(
            f"{place}: {_some(told)}: the weights in {source} do not fit the model that its "
            "config.json describes; give the directory as save_pretrained wrote it."
        )
    _refuse_missing(info["missing_keys"], source, place)
    _refuse_left_out(info["unexpected_keys"], model, source, place)
    settle_quantized(model)
    if quantization := quantization_of(model):
        logger.info("%s: linear layers in %s", place, bits_text(quantization))
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Hide transformers' table of tensors that do not fit: what is wrong gets one message, ours."""

    def is_other(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or "CONVERSION" in text  # to which an exception refers

    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(is_other)
    try:
        yield
    finally:
        loader.removeFilter(is_other)


def _refuse_missing(missing: Iterable[str], source: str, place: str) -> None:
    if missing := sorted(missing):
        raise UsageError(
            f"{place}: the weights in {source} lack {_some(missing)}, which the model of its "
            "config has and which would be random; give the complete directory of a model of this "
            "kind, as save_pretrained wrote it."
        )


def _refuse_left_out(names: Iterable[str], model: nn.Module, source: str, place: str) -> None:
    """Refuse tensors in the files that change what the model computes; say which others are left.

    Layers beyond the config's number change it, and a bias of a layer that has none; buffers of
    older versions and heads for other tasks do not.
    """
    modules = dict(model.named_modules())

    def changes(name: str) -> bool:
        above = [name[: dot.start()] for dot in re.finditer(r"\.", name)]  # a.b of a.b.c and so on
        beyond = any(
            isinstance(modules.get(stack), nn.ModuleList) and block not in modules
            for stack, block in pairwise(above)
        )
        owner = modules.get(above[-1]) if above else None
        return beyond or (owner is not None and name.rpartition(".")[2] in owner._parameters)

    left = sorted(names)
    if wrong := [name for name in left if changes(name)]:
        raise UsageError(
            f"{place}: the weights in {source} hold {_some(wrong)}, for which the model that "
            "config.json describes has no place: give the config.json that belongs to them."
        )
    if left:
        logger.warning("%s: %s do not belong to this model and are ignored", place, _some(left))


def with_adapter(policy: nn.Module, source: str, base: str, place: str) -> PeftModel:
    """Put an adapter on its base model, refusing tensors that it lacks or has too many.

    PEFT tells of some of the missing only. So the adapter is loaded a second time, over NaN: what
    is NaN after that is in no file.
    """
    what = "the adapter could not be loaded"
    with in_one_sentence(place, what, source):
        _refuse_pickles(source, ADAPTER_WEIGHTS, place, what)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            model = PeftModel.from_pretrained(policy, source, is_trainable=True)
        adapter = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        finite = [(name, p) for name, p in adapter if not p.isnan().any()]
        for _, parameter in finite:
            parameter.data.fill_(torch.nan)
        told = model.load_adapter(source, "default", is_trainable=True)
    _refuse_missing([name for name, p in finite if p.isnan().any()], source, place)
    if extra := sorted(told.unexpected_keys):
        raise UsageError(
            f"{place}: the weights in {source} hold {_some(extra)}, for which the adapter that its "
            f"{ADAPTER_CONFIG} describes has no place: give the one that belongs to them."
        )
    model.peft_config["default"].base_model_name_or_path = base
    cast(Any, model).name_or_path = source  # PEFT answers with the base model's
    return model


def _refuse_pickles(source: str, weights: str, place: str, what: str) -> None:
    """Refuse a directory without weights, or with pickles alone, which may run code when read."""
    directory, stem = Path(source), weights.removesuffix(".safetensors")
    index = directory / f"{weights}.index.json"
    shards = set()
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    pickled = sorted(name for name in shards if not name.endswith(".safetensors"))
    is_bare = directory.is_dir() and not index.is_file() and not (directory / weights).is_file()
    if is_bare:
        files = (path for path in directory.iterdir() if stem in path.name)
        pickled = sorted(path.name for path in files if path.suffix in PICKLED)
    if not directory.is_dir() and weights == ADAPTER_WEIGHTS and not has_file(source, weights):
        pickled = [f"{stem}.bin"]  # of a hub id, where PEFT would take it
    if pickled:
        raise UsageError(
            f"{place}: {directory / pickled[0]} is a pickle, which may run code when it is read, "
            "and there are no safetensors; convert it where it is trusted (load it in "
            "transformers, then save_pretrained)."
        )
    if is_bare:
        raise UsageError(
            f"{place}: {what} ({directory} holds no {weights}); give the complete directory."
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
