"""`softpref generate`: responses of a policy to a file of prompts."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from softpref.data.sources import Text
from softpref.errors import UsageError
from softpref.evaluation.generate import sample
from softpref.judging.responses import load_prompts, prompt_uid
from softpref.judging.scored import on_accelerator
from softpref.options import option, require
from softpref.training.fit import require_texts_fit
from softpref.training.models import context_length, load_policy, load_tokenizer
from softpref.training.output import one_writer, write_lines, write_text
from softpref.training.reference import fingerprint_weights

logger = logging.getLogger(__name__)

DEFAULT_LONGEST = 512


@dataclass
class GenerateOptions:
    """Options of `softpref generate`."""

    model: str = option("Model or adapter: directory or hub id.", "")
    prompts: str = option("File or hub id of rows with `prompt`, text or messages.", "")
    output: str = option("New JSONL file; an interrupted command goes on with it.", "")
    limit: int | None = option("The first so many prompts; default: all.")
    samples: int = option("Responses to each prompt.", 1)
    max_new_tokens: int | None = option(
        "Longest response, tokens; default: 512, or what the model's context leaves."
    )
    temperature: float = option("Of sampling; 0 is greedy.", 0.0)
    seed: int = option("Seed of sampling.", 0)
    batch_size: int = option("Prompts a batch.", 16)
    prompt_format: Literal["auto", "chat", "plain"] = option(
        "`chat`: as a user's turn by the model's chat template; `plain`: as it stands; `auto`: "
        "messages by the template, text as it stands.",
        "auto",
    )
    bf16: bool = option("Run the model in bfloat16.", False)
    trust_remote_code: bool = option("Run code that comes with the model.", False)


def run_generate(options: GenerateOptions) -> None:
    """Write a row of `uid`, `prompt` and `response` for every prompt, in the prompts' order.

    Batches hold prompts of like length and have a seed each, so that an interrupted command gives
    what an undisturbed one would have. Beside the output stands `OUTPUT.record.json`: model,
    weights and settings.

    Raises:
        UsageError: an option is missing or wrong, there is no such model, or a prompt does not fit.
    """
    _check(options)
    output = Path(options.output)
    prompts = load_prompts(options.prompts)[: options.limit]
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    texts = [rendered(prompt, tokenizer, options) for prompt in prompts]
    policy = load_policy(
        options.model, trust_remote_code=options.trust_remote_code,
        dtype=torch.bfloat16 if options.bf16 else torch.float32,
    )  # fmt: skip
    require_texts_fit(policy, tokenizer, texts, options.prompts)
    options = replace(options, max_new_tokens=_room(texts, tokenizer, policy, options))
    record = _record(options, fingerprint_weights(policy), texts)
    output.parent.mkdir(parents=True, exist_ok=True)
    progress = Path(f"{output}.progress")
    with one_writer(progress):
        responses = _draw_all(on_accelerator(policy), tokenizer, texts, options, record, progress)
        write_text(Path(f"{output}.record.json"), json.dumps(record, indent=1) + "\n")
        write_lines(output, _rows(prompts, responses))
        progress.unlink()
    total = options.samples * len(prompts)
    empty = sum(not response.strip() for of_sample in responses for response in of_sample)
    logger.info("%s: %d responses to %d prompts, %d of them empty; longest allowed: %d tokens",
                output, total, len(prompts), empty, options.max_new_tokens)  # fmt: skip


def _draw_all(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    options: GenerateOptions,
    record: dict[str, Any],
    progress: Path,
) -> list[list[str]]:
    """Return a list of responses for every sample, each in the order of the texts.

    Every batch is on disk before the next begins.
    """
    done = resume_from(progress, record)
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    turns = [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]
    batches = [(n, members) for n in range(options.samples) for members in turns]
    bar = tqdm(desc="generating", total=len(batches), initial=len(done), unit="batch", disable=None)
    with progress.open("a", encoding="utf-8") as file, bar:
        for place, (_, members) in enumerate(batches[len(done) :], start=len(done)):
            responses = sample(
                policy, tokenizer, [texts[i] for i in members],
                max_new_tokens=cast(int, options.max_new_tokens), temperature=options.temperature,
                seed=_seed(options.seed, place), batch_size=options.batch_size,
            )  # fmt: skip
            done.append(responses)
            file.write(json.dumps(responses) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update()
    found = [[""] * len(texts) for _ in range(options.samples)]
    for (n, members), responses in zip(batches, done, strict=True):
        for i, response in zip(members, responses, strict=True):
            found[n][i] = response
    return found


def _rows(prompts: Sequence[Text], samples: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    seen: dict[str, int] = {}
    rows = []
    for i, prompt in enumerate(prompts):
        for responses in samples:
            name = prompt_uid(prompt, 0)
            uid = prompt_uid(prompt, seen.get(name, 0))
            seen[name] = seen.get(name, 0) + 1
            rows.append({"uid": uid, "prompt": prompt, "response": responses[i]})
    return rows


def rendered(prompt: Text, tokenizer: PreTrainedTokenizerBase, options: GenerateOptions) -> str:
    """Return the text that the policy goes on from; its BOS is left to the tokenizer.

    Raises:
        UsageError: a template is needed and there is none.
    """
    by_template = options.prompt_format == "chat" or not isinstance(prompt, str)
    if not by_template:
        return str(prompt)
    if options.prompt_format == "plain":
        raise UsageError("--prompt_format plain: the prompts are conversations; take auto or chat.")
    if tokenizer.chat_template is None:
        raise UsageError(
            f"--model {options.model}: its tokenizer has no chat template, which conversations "
            "and --prompt_format chat need."
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    bos = tokenizer.bos_token
    adds_bos = bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(bos)) if adds_bos else text


def _check(options: GenerateOptions) -> None:
    for name in ("model", "prompts", "output"):
        require(getattr(options, name), f"--{name}")
    if Path(options.output).suffix != ".jsonl":
        raise UsageError(f"--output {options.output}: name a .jsonl file.")
    if Path(options.output).exists():
        raise UsageError(
            f"--output {options.output}: is finished, or another file; choose a new one."
        )
    for name in ("samples", "max_new_tokens", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: must be at least 1.")
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit}: must be at least 1.")
    if not options.temperature >= 0:
        raise UsageError(f"--temperature {options.temperature}: must be at least 0.")
    if options.samples > 1 and options.temperature == 0:
        raise UsageError("--samples: greedy responses are all alike; set --temperature.")


def _room(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    policy: nn.Module,
    options: GenerateOptions,
) -> int:
    """Return how many tokens a response may have: as asked, or what the context leaves.

    Raises:
        UsageError: the context leaves none, or fewer than asked.
    """
    lengths = [len(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    longest, context = max(lengths), context_length(policy)
    asked = options.max_new_tokens
    room = context - longest
    if room < (asked or 1):
        remedy = f"give --max_new_tokens {room} or less" if room > 0 else "take it out"
        raise UsageError(
            f"{options.prompts}, prompt {lengths.index(longest) + 1}: has {longest} tokens, and "
            f"the model's context is {context}: {remedy}."
        )
    return asked or min(DEFAULT_LONGEST, room)


def _record(options: GenerateOptions, weights: str, texts: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(list(texts)).encode())
    return asdict(options) | {"weights": weights, "prompts_sha256": digest.hexdigest()}


def resume_from(progress: Path, record: dict[str, Any]) -> list[list[str]]:
    """Return the batches that an interrupted command has finished; start the file if there is none.

    Raises:
        UsageError: it was of other settings.
    """
    header = json.dumps(record) + "\n"
    if not progress.exists():
        write_text(progress, header)
        return []
    content = progress.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)  # a kill may have cut one
    if not lines or lines[0] != header.encode():
        raise UsageError(
            f"{progress}: was begun with other settings, another model or other prompts; take it "
            "away, or choose another --output."
        )
    try:
        done = [json.loads(line) for line in lines[1:]]
    except (ValueError, RecursionError):
        raise UsageError(f"{progress}: is damaged; take it away to begin anew.") from None
    progress.write_bytes(b"".join(lines))
    return done


def _seed(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:7])
