"""Messages about options as a Python caller reads them: arguments, not flags."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields

from softpref.errors import UsageError
from softpref.options import choices_of

_FLAG = re.compile(
    r"--(?P<name>[a-z]\w*)(?P<star>\*?)"
    r"(?: (?!--)(?P<value>[^\s,;)]*[^\s,;:.)])(?P<colon>:(?!\S))?)?"
)
_AS_IT_IS = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?|inf|nan|[A-Z]+")
"""Numbers, and placeholders such as N."""


@contextmanager
def named_as_arguments(*options: type, **names: str) -> Iterator[None]:
    """Reword a mistake's message for callers from Python: `--beta 0.1` becomes `beta=0.1`.

    Args:
        options: the dataclasses of the options.
        names: further flags and what the caller's arguments are called instead.
    """
    try:
        yield
    except UsageError as error:
        own = [field.name for each in options for field in fields(each)]
        arguments = dict(zip(own, own, strict=True)) | names
        choices = {choice for each in options for choice in choices_of(each)}
        error.args = (as_arguments(str(error), arguments, choices),)
        raise


def as_arguments(text: str, names: Mapping[str, str], choices: Collection[str]) -> str:
    """Return a text with flags named as arguments; other flags stay as they are.

    Args:
        text: with flags, `--beta 0.1` or `--clean FILE`.
        names: the argument of each flag.
        choices: words that are values wherever they follow a flag.
    """

    def argument(found: re.Match[str]) -> str:
        name, value, colon = found["name"], found["value"], found["colon"] or ""
        if found["star"] and any(each.startswith(name) for each in names):  # --lora_*
            return found[0].removeprefix("--")
        if name not in names:
            return found[0]
        if value is None:
            return names[name]
        if value in ("true", "false"):
            return f"{names[name]}={value.title()}{colon}"
        if _AS_IT_IS.fullmatch(value):
            return f"{names[name]}={value}{colon}"
        if value in choices or colon:
            return f'{names[name]}="{value}"{colon}'
        return f"{names[name]} {value}"  # the sentence's next word

    return _FLAG.sub(argument, text)
