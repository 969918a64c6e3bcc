"""Calls to an OpenAI-compatible server, whose failures are replies.

The `openai` package handles retries, backoff, jitter, `Retry-After` and timeouts.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softpref.errors import UsageError, require_package
from softpref.judging.account import Account
from softpref.judging.bounded import bounded_client
from softpref.judging.options import public_address
from softpref.judging.reply import Reply, read_completion

if TYPE_CHECKING:
    from openai import OpenAI

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
LONGEST_WAIT = 120.0
"""Seconds between two attempts of a call; `openai` ignores a longer `Retry-After`."""
HIDDEN = "[key]"
REDIRECTS = (301, 302, 303, 307, 308)

_UNSUPPORTED = re.compile(r"unsupported|not supported|instead|unrecognized|not permitted", re.I)
_NAMED = re.compile(r"['\"`](max_tokens|temperature|seed|reasoning_effort)['\"`]")


@dataclass(frozen=True)
class Server:
    """A model behind an OpenAI-compatible address.

    Attributes:
        model: its name there.
        base_url: the address; None for OpenAI's.
        api_key_env: the variable that holds the key; None for OpenAI's at its address, else none.
        timeout_s: maximum seconds of an attempt.
        max_retries: attempts after the first one.
        what: what asks, for messages.
        option: the option that selects the model, for messages.
        form: the option that changes what is sent, for messages.
    """

    model: str
    base_url: str | None
    api_key_env: str | None
    timeout_s: float
    max_retries: int
    what: str
    option: str
    form: str

    @property
    def address(self) -> str:
        """Its address without user, password and query."""
        return public_address(self.base_url or OPENAI)

    @property
    def key_variable(self) -> str | None:
        """The variable with the key; OpenAI's key is sent only to OpenAI."""
        return self.api_key_env or (None if self.base_url else OPENAI_KEY)


class Client:
    """Makes calls, learns which parameters the server refuses, and keeps the key out of replies.

    Args:
        server: where to.
        account: what calls cost, and have cost so far.
        optional: parameters that are dropped for the run if the server refuses them.

    Raises:
        UsageError: the `openai` package or the key is missing.
    """

    def __init__(self, server: Server, account: Account, optional: Sequence[str] = ()) -> None:
        self.server = server
        self._account, self._optional = account, frozenset(optional)
        self.openai = _openai(server)
        if server.key_variable:
            who = f"{server.what} {server.model}"
            logger.info("%s: sends $%s to %s", who, server.key_variable, server.address)
        self._refused: set[str] = set()

    def body(self, parameters: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
        """Return the body of a request, with the parameters that the server takes."""
        limit = "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"
        body = {"model": self.server.model, **parameters, limit: max_tokens}
        return {name: value for name, value in body.items() if name not in self._refused}

    def call(
        self, parameters: Mapping[str, Any], max_tokens: int, bounds: tuple[int, int]
    ) -> Reply:
        """Make a call with its retries.

        Args:
            parameters: of the request, without model and maximum of tokens.
            max_tokens: of the reply.
            bounds: upper bounds of the billed tokens, for a call without a count.

        Raises:
            UsageError: the server refuses every call.
        """
        import openai

        body = self.body(parameters, max_tokens)
        try:
            reply = read_completion(self._create(body), bounds)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if self.learn(error.body, body):
                return self.call(parameters, max_tokens, bounds)
            return self._status(error.status_code)
        except openai.APIStatusError as error:
            return self._status(error.status_code)
        except (openai.APITimeoutError, TimeoutError):
            return Reply("", "timeout", billed=bounds)
        except openai.APIConnectionError as error:
            is_slow = isinstance(error.__cause__, TimeoutError)
            return Reply("", "timeout" if is_slow else "no connection", billed=bounds)
        except Exception:  # the body may have any shape, size or depth
            return Reply("", "broken reply", billed=bounds)
        self._account.has_answered = True
        return self.redacted_reply(reply)

    def _create(self, body: Mapping[str, Any]) -> Any:
        """Send a request to whichever of the two kinds of completions it is for."""
        if "messages" in body:
            return self.openai.chat.completions.create(**body)
        return self.openai.completions.create(**body)

    def learn(self, error: Any, body: Mapping[str, Any]) -> str | None:
        """Return the parameter that an error names, if a request can be repeated without it.

        Args:
            error: from the server, of any shape.
            body: of the request as it was sent.

        Raises:
            UsageError: the server does not take `reasoning_effort`.
        """
        name = _refused_parameter(error)
        if name not in body:
            return None
        if name == "reasoning_effort":
            raise UsageError(
                f"{self.server.address} refuses --reasoning_effort {body[name]}: give a level "
                "that the model knows, or remove it."
            )
        if name == "max_tokens" or name in self._optional:
            self._refused.add(name)
            return name
        return None

    def redacted_reply(self, reply: Reply) -> Reply:
        """Return a reply without the key."""
        return dataclasses.replace(reply, text=self.redacted(reply.text))

    def redacted(self, text: str) -> str:
        """Return text of the server without the key, which it may echo."""
        return text.replace(self.openai.api_key, HIDDEN) if self.server.key_variable else text

    def most_tokens(
        self, texts: Sequence[str], max_tokens: int, attempts: int | None = None
    ) -> tuple[int, int]:
        """Return a bound of the tokens of a call with all its attempts, one token per byte."""
        attempts = attempts or 1 + self.server.max_retries
        return attempts * sum(len(text.encode()) for text in texts), attempts * max_tokens

    def longest_call(self) -> float:
        """Return the maximum seconds of a call with all its retries."""
        retries = self.server.max_retries
        return (1 + retries) * self.server.timeout_s + retries * LONGEST_WAIT

    def _status(self, status: int) -> Reply:
        """Return the failure of one call; stop if the status concerns every call.

        The server's message is not repeated, since it may contain the key.
        """
        variable = self.server.key_variable
        without = "name the variable that holds the key with --api_key_env"
        remedies = {
            401: f"set {variable} to a valid key" if variable else without,
            403: f"the key in {variable} may not use this model" if variable else without,
            404: f"check --base_url (it ends in /v1) and {self.server.option}",
            422: f"try {self.server.form}",
        } | dict.fromkeys(REDIRECTS, "redirects are not followed: set --base_url to where it leads")
        if status == 401 or (status in remedies and not self._account.has_answered):
            raise UsageError(f"{self.server.address} answers {status}: {remedies[status]}.")
        return Reply("", f"status {status}")


def _refused_parameter(error: Any) -> str | None:
    """Return the parameter that a server's error names as one it does not take."""
    if not isinstance(error, dict):
        return None
    inner = error.get("error")
    error = inner if isinstance(inner, dict) else error
    message = error.get("message")
    message = message[:1000] if isinstance(message, str) else ""
    is_unknown = bool(_UNSUPPORTED.search(message)) or error.get("code") == "unsupported_parameter"
    if isinstance(param := error.get("param"), str):
        # A limit that is too large is refused by this parameter, too.
        return param if param != "max_tokens" or is_unknown else None
    named = _NAMED.search(message)
    return named[1] if named and is_unknown else None


def _openai(server: Server) -> OpenAI:
    require_package("openai", "judge", server.option)
    from openai import OpenAI

    variable = server.key_variable
    key = os.environ.get(variable, "").strip() if variable else "none"
    if not key and server.api_key_env:  # never print it: it may be a key, given by mistake
        raise UsageError(
            "--api_key_env: no such variable is set; give the name of the variable that holds the "
            "key, not the key."
        )
    if not key:
        raise UsageError(
            f"{variable} is not set: set it to the key, or name another variable with "
            "--api_key_env; for a server that needs no key, give --base_url."
        )
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{variable} is not a key: it has characters that no key contains.")
    timeout, retries = server.timeout_s, server.max_retries
    client = bounded_client(timeout)
    return OpenAI(
        api_key=key,
        base_url=server.base_url or OPENAI,
        timeout=timeout,
        max_retries=retries,
        http_client=client,
    )
