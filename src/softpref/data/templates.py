"""Render conversations by a model's chat template."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from softpref.data.messages import Message, Text, texts_of
from softpref.data.readers import RowError
from softpref.errors import UsageError, first_line


def render(
    text: Text, tokenizer: PreTrainedTokenizerBase, context: Mapping[str, Any], *, open_turn: bool
) -> str:
    """Return text unchanged, and messages rendered by the chat template.

    To a template that reads only text, content in parts is given as the parts' text.

    Args:
        text: Text or messages.
        tokenizer: The tokenizer with the template.
        context: Further arguments of the template.
        open_turn: Whether to open the assistant's turn at the end.

    Raises:
        UsageError: There is no template, or it cannot be parsed.
        RowError: The template rejects these messages.
    """
    if isinstance(text, str):
        return text
    if tokenizer.chat_template is None:
        raise UsageError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, but there are "
            "conversations. Use a chat model, or give prompts and responses as text."
        )

    def rendered(messages: list[Message]) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=open_turn, tokenize=False, **context
            )
        )

    try:
        whole = rendered(text)
        plain = _without_unread_parts(text, whole)
        return whole if plain == text else rendered(plain)
    except Exception as error:  # a template is third-party code and may raise anything
        first = first_line(error)
        name = tokenizer.name_or_path or "the model"
        if _is_unparsable(tokenizer.chat_template, error):
            raise UsageError(
                f"{name}: its chat template cannot be read ({first}); repair chat_template.jinja, "
                "or chat_template in tokenizer_config.json."
            ) from None
        raise RowError(f"the chat template of {name} rejects the conversation: {first}") from error


def _without_unread_parts(messages: list[Message], rendered: str) -> list[Message]:
    """Return the messages with text for the parts that stand in the rendering as a Python list."""
    return [
        message | {"content": "".join(texts_of([{"content": parts}]))}
        if isinstance(parts := message.get("content"), list) and parts and str(parts) in rendered
        else message
        for message in messages
    ]


def _is_unparsable(template: Any, error: Exception) -> bool:
    """Return whether the template itself is invalid, whatever the messages."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return not isinstance(template, str | dict) or "TemplateSyntaxError" in kinds
