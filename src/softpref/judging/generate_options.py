"""Options of `softpref generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from softpref.judging.responses import PromptFormat
from softpref.options import option
from softpref.quantization import QuantizationOptions


@dataclass
class GenerateOptions(QuantizationOptions):
    """Options of `softpref generate`."""

    model: str = option(
        "Model or adapter: directory or hub id; with --base_url, the model's name there.",
        "",
        required=True,
        metavar="DIR|ID|NAME",
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
    base_url: str | None = option(
        "Address of an OpenAI-compatible server that runs the model (vLLM, SGLang, `transformers "
        "serve`), up to /v1; default: none, the model is loaded here.",
        group="server",
        metavar="URL",
    )
    api_key_env: str | None = option(
        "The environment variable with the server's key, its only source; default: no key.",
        group="server",
        metavar="VARIABLE",
    )
    concurrency: int = option("Maximum concurrent calls.", 8, least=1, group="server")
    timeout_s: float = option("Maximum seconds of one attempt of a call.", 300.0, group="server")
    max_retries: int = option(
        "Retries of a call after 429, 5xx, a timeout or a broken connection.",
        6,
        least=0,
        group="server",
    )
    price_input: float | None = option(
        "Dollars per million input tokens of the server.", least=0, group="server"
    )
    price_output: float | None = option(
        "Dollars per million output tokens of the server.", least=0, group="server"
    )
    max_cost: float | None = option(
        "Maximum dollars for this output; a call that could exceed it is not made.",
        least=0,
        group="server",
    )
    failed_as_empty: bool = option(
        "Write an empty response where a call failed, instead of asking for it again by the same "
        "command.",
        False,
        group="server",
    )
