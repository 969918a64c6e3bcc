"""`softpref merge`: a run's adapter merged into its base, as a plain model of transformers."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from softpref.data.fingerprints import SFT_TARGETS
from softpref.errors import UsageError
from softpref.hub import CARD
from softpref.markup import for_markdown, shortened
from softpref.models.library_errors import in_one_sentence
from softpref.models.loading import load_policy, read_tokenizer
from softpref.models.quantized import RUN_RECORD
from softpref.models.weights import ADAPTER_CONFIG, base_model, located
from softpref.options import option, refuse_unknown_choices, require
from softpref.training.finished import read_record
from softpref.training.output import appearing_together, new_directory, one_writer, write_text
from softpref.training.saving import save_model
from softpref.training.seals import defect, write_manifest

logger = logging.getLogger(__name__)

LAST = "config.json"
"""Is renamed last: without it no library takes the directory for a model."""
_NOT_MERGED = "use it as it is, with peft and its base model"


@dataclass
class MergeOptions:
    """Options of `softpref merge`."""

    run: str = option(
        "A finished run of train or sft that trained an adapter.", "", required=True, metavar="DIR"
    )
    output: str = option("New directory for the model.", "", required=True, metavar="DIR")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "Type of the merged weights; default: the base model's.", group="output"
    )
    trust_remote_code: bool = option("Run code that comes with the model.", False, group="other")


def run_merge(options: MergeOptions) -> None:
    """Write a run's base model with the adapter merged into its weights.

    Tokenizer, chat template, model card and `run.json` come along; `manifest.json` seals them.

    Raises:
        UsageError: the run is not finished or has no adapter, its adapter cannot be merged, or the
            output exists; nothing was written.
    """
    require(options)
    refuse_unknown_choices(options)
    run, place = Path(options.run), f"--run {options.run}"
    _require_adapter(run, place)
    output = new_directory(options.output)
    base = str(base_model(options.run, place))
    tokenizer = read_tokenizer(options.run, place, trust_remote_code=options.trust_remote_code)
    model = _merged(options, place, base)
    dtype = str(model.dtype).removeprefix("torch.")
    with one_writer(output), appearing_together(new_directory(options.output), LAST) as home:
        save_model(model, home)
        tokenizer.save_pretrained(home)
        _write_records(run, home, base, dtype)
        files = (path for path in home.rglob("*") if path.is_file() and path.name != CARD)
        write_manifest(home, {path.relative_to(home).as_posix(): path for path in files})
    logger.info(f"written: {output}, {base} with the adapter of {run} merged, {dtype}")


def _require_adapter(run: Path, place: str) -> None:
    """Refuse anything but a finished run with an adapter."""
    is_train, is_sft = ((run / name).is_file() for name in (RUN_RECORD, SFT_TARGETS))
    reason = defect(run) if is_train or not is_sft else None
    if not (reason or is_train or is_sft):  # such as an audit's output
        reason = f"it has no {RUN_RECORD}"
    if reason:
        raise UsageError(
            f"{place}: not a finished run: {reason}. Give the unchanged --output of a finished "
            "softpref train or sft."
        )
    if not (run / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{place}: trained all weights, so the directory is a plain model already; use it as "
            "it is."
        )
    with in_one_sentence(place, f"its {ADAPTER_CONFIG} cannot be read", str(run)):
        config = PeftConfig.from_pretrained(str(run))
    if config.is_prompt_learning:
        kind = PeftType(config.peft_type).value
        raise UsageError(f"{place}: its adapter cannot be merged ({kind}); {_NOT_MERGED}.")


def _merged(options: MergeOptions, place: str, base: str) -> Any:
    """Return the base model with the adapter in its weights.

    A sum is rounded once, to the coarser of the base's type and the one asked for.
    """
    policy = cast(
        PeftModel,
        load_policy(
            options.run, trust_remote_code=options.trust_remote_code, dtype="auto", option="--run"
        ),
    )
    config: Any = policy.get_base_model().config
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"{place}: its base model {base} is stored in quantized form, which an adapter cannot "
            f"be merged into: set base_model_name_or_path in {Path(options.run) / ADAPTER_CONFIG} "
            "to the model in full precision."
        )
    own: torch.dtype = cast(Any, policy.get_base_model()).dtype
    asked = getattr(torch, options.dtype) if options.dtype else own
    finer = torch.promote_types(own, asked)
    if finer != own:
        policy.to(finer)
    _give_head_its_own_weights(policy)
    with in_one_sentence(place, "its adapter cannot be merged", options.run, _NOT_MERGED):
        merged = policy.merge_and_unload(safe_merge=True)
    if asked != finer:
        cast(Any, merged).to(asked)
        _require_finite(merged, str(options.dtype))
    return merged


def _require_finite(model: nn.Module, dtype: str) -> None:
    """Refuse weights that are too large for the type that was asked for."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UsageError(
                f"--dtype {dtype}: {name} holds numbers beyond its range; choose bfloat16 or "
                "float32."
            )


def _give_head_its_own_weights(policy: PeftModel) -> None:
    """Untie the output head from the embedding if the adapter changes one of them alone."""
    base: Any = policy.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not any(isinstance(layer, BaseTunerLayer) for layer in (embedding, head)):
        return
    embedding, head = (getattr(layer, "base_layer", layer) for layer in (embedding, head))
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        base.config.get_text_config().tie_word_embeddings = False
        base.config.tie_word_embeddings = False


def _write_records(run: Path, home: Path, base: str, dtype: str) -> None:
    """Write what is known of the run, and that it was merged."""
    if (run / SFT_TARGETS).is_file():
        write_text(home / SFT_TARGETS, (run / SFT_TARGETS).read_text(encoding="utf-8"))
    if (run / CARD).is_file():
        card = (run / CARD).read_text(encoding="utf-8")
        write_text(home / CARD, merged_card(card, base, dtype))
    if (run / RUN_RECORD).is_file():
        merged = {"run": located(str(run)), "base": located(base), "dtype": dtype}
        record = read_record(run) | {"merged": merged, "quantization": None}
        write_text(home / RUN_RECORD, json.dumps(record, indent=2) + "\n")


def merged_card(card: str, base: str, dtype: str) -> str:
    """Return a run's card for its merged model, with a line on what was merged."""
    card = re.sub(r"^library_name: peft$", "library_name: transformers", card, count=1, flags=re.M)
    name = for_markdown(shortened(Path(base).name))
    return (
        f"{card.rstrip()}\n\nThe adapter is merged into {name}: these are complete weights, in "
        f"{dtype}. Labels and metrics stay with the run.\n"
    )
