"""What a user should know of pairs that are used all the same, or left out for their length."""

import itertools
import logging
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from softpref.data.bad_rows import BadRow, BadRows, in_words, place
from softpref.data.messages import Text, texts_of

logger = logging.getLogger(__name__)


class Remarks:
    """What a user should know of pairs that are used, or left out for their length alone."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.too_long: list[BadRow] = []
        self._name = name
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._control = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        self._left_out: list[tuple[str, int]] = []
        self._controlled: list[tuple[str, int, str]] = []

    def see(self, source: str, row: int, responses: Sequence[Text], *, left_out: bool) -> None:
        """Note a pair that is kept, by its file and its row's number."""
        if left_out:
            self._left_out.append((source, row))
        for text in itertools.chain.from_iterable(map(texts_of, responses)):
            if found := self._control.search(text):
                self._controlled.append((source, row, found[0]))
                break

    def leave_out(self, bad: BadRows, row: int, reason: str, source: str) -> None:
        """Leave out a row for its length alone."""
        self.too_long.append(bad.leave_out(row, reason, source))

    def say(self, total: int) -> None:
        """Say it, a line a kind."""
        if self.too_long:
            logger.warning("%s: %d of %d pairs are left out: %s", self._name, len(self.too_long),
                           total, in_words(self.too_long))  # fmt: skip
        if self._left_out:
            logger.warning("%s: the chat template leaves out text of the responses in %d of %d "
                           "pairs (such as thoughts), first in %s", self._name,
                           len(self._left_out), total,
                           place(*self._left_out[0]))  # fmt: skip
        if self._controlled:
            source, row, token = self._controlled[0]
            logger.warning("%s: responses hold control tokens of the tokenizer in %d of %d pairs, "
                           "first %r in %s", self._name, len(self._controlled), total, token,
                           place(source, row))  # fmt: skip
