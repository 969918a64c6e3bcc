"""The synthetic language: prompts with one right answer, a checker, and a tokenizer.

A prompt reads ``"sort : d a c b ="`` and its right answer ``"a b c d"``. Texts are plain strings of
space-separated words, so that pairs made of them are ordinary preference data.
"""

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

SYMBOLS = tuple("abcdefghijkl")
KINDS = ("sort", "reverse", "shift", "rotate")
LENGTHS = (5, 6)

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_MARKS = (":", "=")


def right_answer(prompt: str) -> str:
    """Return the right answer to a prompt.

    ``sort`` sorts the symbols alphabetically, ``reverse`` reverses them, ``shift`` replaces each by
    the next of the alphabet (the last by the first), ``rotate`` moves the first symbol to the end.

    Raises:
        ValueError: the text is not a prompt of this language.
    """
    match prompt.split():
        case [kind, ":", *symbols, "="] if symbols and set(symbols) <= set(SYMBOLS):
            pass
        case _:
            raise ValueError(f"not a prompt of the synthetic language: {prompt!r}")
    match kind:
        case "sort":
            answer = sorted(symbols)
        case "reverse":
            answer = symbols[::-1]
        case "shift":
            answer = [SYMBOLS[(SYMBOLS.index(s) + 1) % len(SYMBOLS)] for s in symbols]
        case "rotate":
            answer = symbols[1:] + symbols[:1]
        case _:
            raise ValueError(f"unknown kind {kind!r} of prompt: {prompt!r}; known: {KINDS}")
    return " ".join(answer)


def score(prompt: str, answer: str) -> float:
    """Return the share of correct symbols at their positions, in [0, 1].

    The denominator is the longer of the right and the given answer, so that missing and superfluous
    symbols both lower the score.
    """
    right, given = right_answer(prompt).split(), answer.split()
    in_place = sum(r == g for r, g in zip(right, given, strict=False))
    return in_place / max(len(right), len(given))


def prompts(random: Random, kinds: Sequence[str] = KINDS) -> Iterator[str]:
    """Yield distinct prompts without end; kind, length and symbols are uniform."""
    seen: set[str] = set()
    while True:
        symbols = random.choices(SYMBOLS, k=random.choice(LENGTHS))
        prompt = f"{random.choice(kinds)} : {' '.join(symbols)} ="
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


def corrupt(answer: str, error_rate: float, random: Random) -> str:
    """Return the answer with each symbol replaced, with probability `error_rate`, by another."""
    return " ".join(
        random.choice([other for other in SYMBOLS if other != symbol])
        if random.random() < error_rate
        else symbol
        for symbol in answer.split()
    )


def replace_by_habit(answer: str, habit: Mapping[str, str], rate: float, random: Random) -> str:
    """Return the answer with each symbol of `habit` replaced with probability `rate`."""
    return " ".join(
        habit[symbol] if symbol in habit and random.random() < rate else symbol
        for symbol in answer.split()
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the language; a response needs no leading space."""
    words = (*_SPECIAL, *_MARKS, *KINDS, *SYMBOLS)
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
