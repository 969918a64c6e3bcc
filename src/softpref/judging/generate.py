"""`softpref generate`: write a policy's responses to a file of prompts."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.data.bad_rows import place
from softpref.data.messages import template_context
from softpref.data.readers import RowError
from softpref.data.tokens import prompt_ids
from softpref.errors import UsageError
from softpref.judging.responses import Prompt, load_prompts, prompt_uid
from softpref.models.library_errors import COMPLETE, in_one_sentence
from softpref.models.loading import context_length, load_policy, load_tokenizer, on_accelerator
from softpref.models.reference import fingerprint_weights
from softpref.models.sampling import sample
from softpref.models.soundness import require_known_tokens, require_sound
from softpref.options import option, refuse_too_small, require
from softpref.places import file_to_write
from softpref.progress import Progress
from softpref.quantization import QuantizationOptions
from softpref.training.output import one_writer, write_lines, write_text

logger = logging.getLogger(__name__)

DEFAULT_LONGEST = 512
ROUND = 4
"""Batches of each of several processes in a round: responses differ in length, which evens out."""

PromptFormat = Literal["auto", "chat", "plain"]


@dataclass
class GenerateOptions(QuantizationOptions):
    """Options of `softpref generate`."""

    model: str = option(
        "Model or adapter: directory or hub id.", "", required=True, metavar="DIR|ID"
    )
    prompts: str = option(
        "File or hub id of rows with `prompt`, text or messages.", "", required=True, metavar="FILE"
    )
    output: str = option(
        "New JSONL file; the same command resumes after an interruption.",
        "",
        required=True,
        metavar="FILE",
    )
    limit: int | None = option("Use only the first N prompts; default: all.", least=1, group="data")
    samples: int = option("Responses per prompt.", 1, least=1)
    max_new_tokens: int | None = option(
        "Maximum tokens in a response; default: 512, or what the model's context leaves.", least=1
    )
    temperature: float | None = option(
        "Sample from softmax(logits / temperature); 0 is greedy; default: 0."
    )
    generation_config: Literal["plain", "model"] = option(
        "`plain`: use only the end-of-response ids of the model's generation_config; `model`: "
        "use all its settings, such as sampling and penalties, without --temperature.",
        "plain",
    )
    seed: int = option("Seed of sampling.", 0)
    batch_size: int = option("Prompts per batch.", 16, least=1, group="hardware")
    prompt_format: PromptFormat = option(
        "`chat`: a user turn in the model's chat template; `plain`: unchanged text; `auto`: "
        "messages with the template, text unchanged.",
        "auto",
    )
    bf16: bool = option("Run the model in bfloat16.", False, group="hardware")
    trust_remote_code: bool = option("Run code that comes with the model.", False)


def run_generate(options: GenerateOptions, ranks: Ranks = ALONE) -> None:
    """Write a row of `uid`, `prompt` and `response` for every prompt, in the prompts' order.

    Batches group prompts by length and have their own seeds, so that a resumed command gives the
    same responses as an uninterrupted one, and several processes, which share the batches, the same
    as one. The first of them writes. `OUTPUT.record.json` holds model, weights and settings.

    Raises:
        UsageError: an option or the model is missing or invalid, or a prompt does not fit.
    """
    _check(options)
    output = Path(options.output)
    prompts = load_prompts(options.prompts)[: options.limit]
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
    _draw(policy, tokenizer, short, replace(options, max_new_tokens=1), options.seed)
    drawing = _Drawing(on_accelerator(policy), tokenizer, ids, options, ranks)
    if not ranks.is_first:
        drawing.draw_along()
        return
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    record = asdict(options) | {"weights": fingerprint_weights(policy), "prompts_sha256": digest}
    record |= by_model
    output.parent.mkdir(parents=True, exist_ok=True)
    progress = Path(f"{output}.progress")
    with one_writer(output):
        _require_new(output)  # another command may have written it meanwhile
        responses = drawing.draw_all(record, progress)
        write_text(Path(f"{output}.record.json"), json.dumps(record, indent=1) + "\n")
        write_lines(output, _rows(prompts, responses))
        progress.unlink()
    total = options.samples * len(prompts)
    empty = sum(not response.strip() for of_sample in responses for response in of_sample)
    counts = f"{total} responses to {len(prompts)} prompts, {empty} of them empty"
    logger.info(f"{output}: {counts}; longest allowed: {options.max_new_tokens} tokens")


@dataclass(frozen=True)
class _Drawing:
    """Responses to be drawn, in batches that the processes deal among them."""

    policy: nn.Module
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[list[int]]
    options: GenerateOptions
    ranks: Ranks

    def draw_all(self, record: dict[str, Any], progress: Path) -> list[list[str]]:
        """Return a list of responses per sample, in the order of the prompts.

        Every round of batches is on disk before the next one starts.
        """
        done = resume_from(progress, record)
        self.ranks.from_first(json.dumps(len(done)))
        batches, samples = self._batches(), self.options.samples
        before = sum(len(members) for _, members in batches[: len(done)])
        bar = Progress("generating", samples * len(self.prompts), "response", done=before)
        with progress.open("a", encoding="utf-8") as file, bar:
            for drawn in self._rounds(len(done)):
                done += drawn
                file.writelines(json.dumps(responses) + "\n" for responses in drawn)
                file.flush()
                os.fsync(file.fileno())
                bar.update(sum(map(len, drawn)))
        found = [[""] * len(self.prompts) for _ in range(samples)]
        for (n, members), responses in zip(batches, done, strict=True):
            for i, response in zip(members, responses, strict=True):
                found[n][i] = response
        return found

    def draw_along(self) -> None:
        """Draw this process' share of what the first process writes."""
        for _ in self._rounds(json.loads(self.ranks.from_first())):
            pass

    def _rounds(self, done: int) -> Iterator[list[list[str]]]:
        """Draw the batches after the first `done`; yield those of one round, in their order.

        A batch has a seed of its own, whichever process draws it.
        """
        batches, ranks = self._batches(), self.ranks
        size = ranks.count * (ROUND if ranks.count > 1 else 1)
        for start in range(done, len(batches), size):
            numbers = range(start, min(start + size, len(batches)))
            mine = []
            for number in numbers[ranks.rank :: ranks.count]:
                prompts = [self.prompts[i] for i in batches[number][1]]
                seed = _seed(self.options.seed, number)
                mine.append(_draw(self.policy, self.tokenizer, prompts, self.options, seed))
            drawn: list[list[str]] = [[]] * len(numbers)
            for rank, text in enumerate(ranks.gather_text(json.dumps(mine))):
                drawn[rank :: ranks.count] = json.loads(text)
            yield drawn

    def _batches(self) -> list[tuple[int, list[int]]]:
        """Return every batch: the number of its sample, and the places of its prompts."""
        size = self.options.batch_size
        order = sorted(range(len(self.prompts)), key=lambda i: (len(self.prompts[i]), i))
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        return [(n, members) for n in range(self.options.samples) for members in groups]


def _draw(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    options: GenerateOptions,
    seed: int,
) -> list[str]:
    by_model = options.generation_config == "model"
    what = "its own settings do not work here" if by_model else "it generates nothing"
    remedy = "use --generation_config plain" if by_model else COMPLETE
    with in_one_sentence(f"--model {options.model}", what, options.model, remedy):
        return sample(
            policy,
            tokenizer,
            prompts,
            max_new_tokens=cast(int, options.max_new_tokens),
            temperature=options.temperature,
            seed=seed,
            batch_size=options.batch_size,
        )


def _rows(prompts: Sequence[Prompt], samples: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    seen: dict[str, int] = {}
    rows = []
    for i, given in enumerate(prompts):
        for responses in samples:
            name = prompt_uid(given.prompt, 0, given.context)
            uid = prompt_uid(given.prompt, seen.get(name, 0), given.context)
            seen[name] = seen.get(name, 0) + 1
            row = {"uid": uid, "prompt": given.prompt, **given.context, "response": responses[i]}
            rows.append(row)
    return rows


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
    prompt, where = given.prompt, place(source, given.row)
    if prompt_format == "plain" and not isinstance(prompt, str):
        raise UsageError("--prompt_format plain: the prompts are conversations; use auto or chat.")
    if prompt_format == "chat" and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str) and given.context:
        raise UsageError(
            f"{where}: has {' and '.join(given.context)}, which only a chat template reads; give "
            "--prompt_format chat, or remove them."
        )
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


def _check(options: GenerateOptions) -> None:
    require(options)
    options.bits()
    if Path(options.output).suffix != ".jsonl":
        raise UsageError(f"--output {options.output}: name a .jsonl file.")
    _require_new(file_to_write(options.output))
    refuse_too_small(options)
    temperature, by_model = options.temperature, options.generation_config == "model"
    if temperature is not None and by_model:
        raise UsageError("--temperature and --generation_config model: give one of them.")
    if temperature is not None and not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature {temperature}: must be at least 0, and finite.")
    if options.samples > 1 and not temperature and not by_model:
        raise UsageError("--samples: greedy responses are all alike; set --temperature.")


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


def resume_from(progress: Path, record: dict[str, Any]) -> list[list[str]]:
    """Return the batches that an interrupted command has finished; create the file if needed.

    Raises:
        UsageError: the file is damaged or belongs to other settings.
    """
    header = json.dumps(record) + "\n"
    if not progress.exists():
        write_text(progress, header)
        return []
    content = progress.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)  # a kill may cut the last
    if not lines or lines[0] != header.encode():
        raise UsageError(
            f"{progress}: was started with other settings, another model or other prompts; delete "
            "it, or choose another --output."
        )
    try:
        done = [json.loads(line) for line in lines[1:]]
    except (ValueError, RecursionError):
        raise UsageError(f"{progress}: is damaged; delete it to start over.") from None
    progress.write_bytes(b"".join(lines))
    return done


def _seed(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:7])
