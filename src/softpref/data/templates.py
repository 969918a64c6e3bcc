"""Render conversations by a model's chat template."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from softpref.data.messages import Text
from softpref.data.readers import RowError
from softpref.errors import UsageError, first_line


def render(
    text: Text, tokenizer: PreTrainedTokenizerBase, context: Mapping[str, Any], *, open_turn: bool
) -> str:
    """Return text unchanged, and messages rendered by the chat template.

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
    try:
        return str(
            tokenizer.apply_chat_template(
                text, add_generation_prompt=open_turn, tokenize=False, **context
            )
        )
    except Exception as error:  # a template is third-party code and may raise anything
        first = first_line(error)
        name = tokenizer.name_or_path or "the model"
        if _is_unparsable(tokenizer.chat_template, error):
            raise UsageError(
                f"{name}: its chat template cannot be read ({first}); repair chat_template.jinja, "
                "or chat_template in tokenizer_config.json."
            ) from None
        raise RowError(f"the chat template of {name} rejects the conversation: {first}") from error


def _is_unparsable(template: Any, error: Exception) -> bool:
    """Return whether the template itself is invalid, whatever the messages."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return not isinstance(template, str | dict) or "TemplateSyntaxError" in kinds
