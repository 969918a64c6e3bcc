"""Which responses a model was fine-tuned on: written by `sft`, read by `train` and `audit`.

The perplexity of a response that was an SFT target is lower than its quality justifies: PPLDiff
then reflects the fine-tuning data instead of the pair.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from softpref.data.messages import Text
from softpref.data.temporary import replacing
from softpref.errors import UsageError

SFT_TARGETS = "sft_targets.json"
_SIDES = ("chosen", "rejected")


def target_fingerprint(prompt: Text, response: Text) -> str:
    """Return the first 16 hex digits of the SHA-256 of a prompt and a response.

    Args:
        prompt: text, or messages with all their fields.
        response: likewise.
    """
    canonical = json.dumps([_contents(prompt), _contents(response)])
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def write_sft_targets(model_directory: str | Path, fingerprints: Iterable[str]) -> None:
    """Write the fingerprints of a model's SFT targets into its directory."""
    record = {"format": 1, "fingerprints": sorted(fingerprints)}
    path = Path(model_directory) / SFT_TARGETS
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=0), encoding="utf-8")


def count_sft_targets(model_directory: str, pairs: Dataset) -> int:
    """Return the number of pairs with a response among a model's SFT targets.

    Args:
        model_directory: directory of the model or adapter; without a record the result is 0.
        pairs: rows with prompt, chosen and rejected.

    Raises:
        UsageError: this version cannot read the record.
    """
    path = Path(model_directory) / SFT_TARGETS
    if not path.is_file():
        return 0
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != 1:
            raise ValueError
        targets = set(record["fingerprints"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not a list of SFT targets in format 1. Restore it, or delete it to continue "
            "without knowing which pairs the model was fine-tuned on."
        ) from error
    return sum(
        any(target_fingerprint(row["prompt"], row[side]) in targets for side in _SIDES)
        for row in pairs.select_columns(["prompt", *_SIDES])
    )


def _contents(text: Text) -> Any:
    if isinstance(text, str):
        return text
    plain = {"role", "content"}
    return [
        [message["role"], message["content"]] if message.keys() == plain else message
        for message in text
    ]
