"""Warnings about tokenized pairs: too long, cut by the chat template, or with control tokens."""

import itertools
import logging
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from softpref.data.bad_rows import BadRow, BadRows, place, summarize_bad_rows
from softpref.data.messages import Text, texts_of

logger = logging.getLogger(__name__)


class Remarks:
    """Collects what to report about the pairs of a set, and logs one line for each kind."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.too_long: list[BadRow] = []
        self._name = name
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._control = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        self._dropped_text: list[tuple[str, int]] = []
        self._controlled: list[tuple[str, int, str]] = []

    def add(self, source: str, row: int, responses: Sequence[Text], *, drops_text: bool) -> None:
        """Record a kept pair by its file and row number."""
        if drops_text:
            self._dropped_text.append((source, row))
        for text in itertools.chain.from_iterable(map(texts_of, responses)):
            if found := self._control.search(text):
                self._controlled.append((source, row, found[0]))
                break

    def skip(self, bad: BadRows, row: int, reason: str, source: str) -> None:
        """Skip a row that is too long."""
        self.too_long.append(bad.skip(row, reason, source))

    def log(self, total: int) -> None:
        """Log the warnings about `total` pairs."""
        name, of_all = self._name, f"of {total} pairs"
        if self.too_long:
            reasons = summarize_bad_rows(self.too_long)
            logger.warning(f"{name}: {len(self.too_long)} {of_all} are dropped: {reasons}")
        if self._dropped_text:
            share, where = f"{len(self._dropped_text)} {of_all}", place(*self._dropped_text[0])
            logger.warning(
                f"{name}: the chat template drops response text in {share} (such as thoughts), "
                f"first in {where}"
            )
        if self._controlled:
            source, row, token = self._controlled[0]
            share = f"{len(self._controlled)} {of_all}, first {token!r} in {place(source, row)}"
            logger.warning(f"{name}: responses contain control tokens of the tokenizer in {share}")
