"""Conversations as the text that a model's chat template makes of them."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from softpref.data.messages import Text
from softpref.data.readers import RowError
from softpref.errors import UsageError, first_line


def render(
    text: Text, tokenizer: PreTrainedTokenizerBase, context: Mapping[str, Any], *, open_turn: bool
) -> str:
    """Return text as it is, and messages as the chat template has them.

    Args:
        text: Text or messages.
        tokenizer: Whose template it is.
        context: What the template is given beside the messages.
        open_turn: Whether the assistant's turn is opened at the end.

    Raises:
        UsageError: There is no template, or one that no conversation can be put through.
        RowError: The template refuses these messages.
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
    except Exception as error:  # a template is a program of the model's author: it may raise all
        first = first_line(error)
        name = tokenizer.name_or_path or "the model"
        if _is_no_template(tokenizer.chat_template, error):
            raise UsageError(
                f"{name}: its chat template cannot be read ({first}); repair chat_template.jinja, "
                "or chat_template in tokenizer_config.json."
            ) from None
        raise RowError(f"the chat template of {name} refuses the conversation: {first}") from error


def _is_no_template(template: Any, error: Exception) -> bool:
    """Return whether not even jinja can read the template, whatever the messages."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return not isinstance(template, str | dict) or "TemplateSyntaxError" in kinds
