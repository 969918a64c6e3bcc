"""`softpref generate`: write a policy's responses to a file of prompts."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from softpref import quantization
from softpref.algorithm.ranks import ALONE, Ranks
from softpref.data.bad_rows import place
from softpref.data.messages import template_context
from softpref.data.readers import RowError
from softpref.data.tokens import prompt_ids
from softpref.errors import UsageError
from softpref.judging.drawing import Drawing, draw
from softpref.judging.generate_options import GenerateOptions
from softpref.judging.options import check_address, check_prices
from softpref.judging.responses import (
    Prompt,
    PromptFormat,
    load_prompts,
    response_rows,
    text_to_continue,
)
from softpref.judging.served import Writer, orders_of, served_responses
from softpref.models.loading import context_length, load_policy, load_tokenizer, on_accelerator
from softpref.models.reference import fingerprint_weights
from softpref.models.soundness import require_known_tokens, require_sound
from softpref.options import refuse_too_small, require
from softpref.places import file_to_write
from softpref.training.output import one_writer, write_lines, write_text

logger = logging.getLogger(__name__)

DEFAULT_LONGEST = 512
PRICES = ("price_input", "price_output", "max_cost")
SERVER_OPTIONS = (
    "api_key_env",
    "concurrency",
    "timeout_s",
    "max_retries",
    *PRICES,
    "failed_as_empty",
)
LOCAL_OPTIONS = ("batch_size", "bf16", "trust_remote_code", *quantization.LOAD_IN)


def run_generate(options: GenerateOptions, ranks: Ranks = ALONE) -> None:
    """Write a row of `uid`, `prompt` and `response` for every prompt, in the prompts' order.

    Batches group prompts by length and have their own seeds, so that a resumed command gives the
    same responses as an uninterrupted one, and several processes, which share the batches, the same
    as one. The first of them writes. `OUTPUT.record.json` holds model, weights and settings.

    Raises:
        UsageError: an option or the model is missing or invalid, or a prompt does not fit.
    """
    _check(options, ranks.count)
    output = Path(options.output)
    prompts = load_prompts(options.prompts)[: options.limit]
    if options.base_url:
        _generate_there(prompts, options, output)
        return
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    ids = [
        ids_to_continue(prompt, options.prompts, tokenizer, options.prompt_format)
        for prompt in prompts
    ]
    policy = load_policy(
        options.model,
        trust_remote_code=options.trust_remote_code,
        dtype=torch.bfloat16 if options.bf16 else torch.float32,
        bits=options.bits(),
    )
    require_sound(policy)
    where = (f"{options.prompts}, prompt {number}" for number in itertools.count(1))
    require_known_tokens(policy, tokenizer, zip(where, ids, strict=False))
    by_model = _model_settings(policy, options)
    options = replace(
        options,
        max_new_tokens=_response_limit(ids, prompts, policy, options),
        temperature=None if by_model else options.temperature or 0.0,
    )
    # Refuse a model that cannot generate in batches before anything is written.
    short = [each[:1] for each in ids[: min(2, options.batch_size)]]
    draw(policy, tokenizer, short, replace(options, max_new_tokens=1), options.seed)
    drawing = Drawing(on_accelerator(policy), tokenizer, ids, options, ranks)
    if not ranks.is_first:
        drawing.draw_along()
        return
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    record = _record(options, "base_url", *SERVER_OPTIONS) | {
        "weights": fingerprint_weights(policy),
        "prompts_sha256": digest,
    }
    record |= by_model
    output.parent.mkdir(parents=True, exist_ok=True)
    progress = Path(f"{output}.progress")
    with one_writer(output):
        _require_new(output)  # another command may have written it meanwhile
        responses = drawing.draw_all(record, progress)
        _write(output, prompts, responses, record)
    logger.info(f"longest allowed: {options.max_new_tokens} tokens")


def _generate_there(prompts: Sequence[Prompt], options: GenerateOptions, output: Path) -> None:
    """Write the responses of a server."""
    by_server = options.generation_config == "model"
    options = replace(
        options,
        max_new_tokens=options.max_new_tokens or DEFAULT_LONGEST,
        temperature=None if by_server else options.temperature or 0.0,
    )
    asked = json.dumps([[given.prompt, given.context] for given in prompts])
    record = _record(options, *SERVER_OPTIONS, *LOCAL_OPTIONS) | {
        "prompts_sha256": hashlib.sha256(asked.encode()).hexdigest()
    }
    orders, writer = orders_of(prompts, options), Writer(options)
    with one_writer(output):
        _require_new(output)
        progress = Path(f"{output}.progress")
        responses, failures = served_responses(orders, writer, options, record, progress)
        _write(output, prompts, responses, record | {"failed_as_empty": failures})


def _record(options: GenerateOptions, *without: str) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name not in without}


def _write(
    output: Path,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    record: dict[str, Any],
) -> None:
    write_text(Path(f"{output}.record.json"), json.dumps(record, indent=1) + "\n")
    write_lines(output, response_rows(prompts, responses))
    Path(f"{output}.progress").unlink()
    total = sum(map(len, responses))
    empty = sum(not response.strip() for of_sample in responses for response in of_sample)
    logger.info(f"{output}: {total} responses to {len(prompts)} prompts, {empty} of them empty")


def ids_to_continue(
    given: Prompt,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat = "auto",
) -> list[int]:
    """Return the token ids that a policy continues to answer a prompt of the file `source`.

    Raises:
        UsageError: the prompt cannot be tokenized, or has no token.
    """
    where = place(source, given.row)
    prompt = text_to_continue(given, source, prompt_format)
    try:
        ids = prompt_ids(prompt, tokenizer, template_context(given.context))
    except RowError as error:
        raise UsageError(f"{where}: {error}; fix or remove it.") from error
    if not ids:
        raise UsageError(f"{where}: the prompt has no token; remove it.")
    return ids


def _model_settings(policy: nn.Module, options: GenerateOptions) -> dict[str, Any]:
    """Return the model's own settings for the record, if they are used.

    Raises:
        UsageError: they are greedy, and several samples are requested.
    """
    if options.generation_config == "plain":
        return {}
    own = cast(GenerationConfig, policy.generation_config)
    if options.samples > 1 and not own.do_sample:
        raise UsageError(
            "--samples: greedy responses are all alike, and the model's own generation_config does "
            "not set do_sample; give --temperature without --generation_config model."
        )
    settings: dict[str, Any] = json.loads(own.to_json_string())
    logger.info(f"sampling with the model's own generation_config: {settings}")
    return {"model_generation_config": settings}


def _check(options: GenerateOptions, processes: int) -> None:
    require(options)
    options.bits()
    if Path(options.output).suffix != ".jsonl":
        raise UsageError(f"--output {options.output}: name a .jsonl file.")
    _require_new(file_to_write(options.output))
    refuse_too_small(options)
    _check_place(options)
    if options.base_url and processes > 1:
        raise UsageError(
            f"--base_url: one process asks the server, and {processes} were started; start the "
            "command without torchrun, and raise --concurrency."
        )
    temperature, by_model = options.temperature, options.generation_config == "model"
    if temperature is not None and by_model:
        raise UsageError("--temperature and --generation_config model: give one of them.")
    if temperature is not None and not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature {temperature}: must be at least 0, and finite.")
    if options.samples > 1 and not temperature and not by_model:
        raise UsageError("--samples: greedy responses are all alike; set --temperature.")


def _check_place(options: GenerateOptions) -> None:
    """Refuse options of a server without one, and options of a model here with one."""
    is_there = options.base_url is not None
    for name in LOCAL_OPTIONS if is_there else SERVER_OPTIONS:
        if getattr(options, name) != getattr(GenerateOptions, name):
            remedy = "remove it; the server decides" if is_there else "add --base_url, or remove it"
            without = "" if is_there else "out"
            raise UsageError(f"--{name}: has no effect with{without} --base_url; {remedy}.")
    if options.base_url is not None:
        check_address(options.base_url)
    check_prices(*(getattr(options, name) for name in PRICES))
    if not 0 < options.timeout_s < math.inf:
        raise UsageError(f"--timeout_s {options.timeout_s}: must be a positive finite number.")


def _require_new(output: Path) -> None:
    if output.exists():
        raise UsageError(f"--output {output}: exists already; choose a new file.")


def _response_limit(
    ids: Sequence[list[int]], prompts: Sequence[Prompt], policy: nn.Module, options: GenerateOptions
) -> int:
    """Return the maximum tokens of a response: as requested, or what the context leaves.

    Raises:
        UsageError: the context leaves none, or fewer than requested.
    """
    most = max(range(len(ids)), key=lambda i: len(ids[i]))
    longest, context = len(ids[most]), context_length(policy)
    asked = options.max_new_tokens
    room = context - longest
    if room < (asked or 1):
        remedy = f"give --max_new_tokens {room} or less" if room > 0 else "remove it"
        raise UsageError(
            f"{place(options.prompts, prompts[most].row)}: the prompt has {longest} tokens, and "
            f"the model's context is {context}: {remedy}."
        )
    return asked or min(DEFAULT_LONGEST, room)
