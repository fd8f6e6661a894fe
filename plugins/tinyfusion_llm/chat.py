"""Conversations as tokens, by a tokenizer's chat template, and which of them an assistant has written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tinyfusion_core.errors import UserError, first_line
from tinyfusion_llm.documents import check_text

MARKED = re.compile(r"{%-?\s*generation\s*-?%}")
"""How a template marks what an assistant writes."""

Message = dict[str, Any]
"""One turn: its `role` and `content`, and whatever else the template reads."""


def check_template(tokenizer: Any, name: str) -> str:
    """Return a tokenizer's chat template.

    Args:
        tokenizer: of transformers.
        name: its folder or id, for the message.

    Raises:
        UserError: it has none, or several.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise UserError(
            f"data.chat_field: the tokenizer {name} has no chat template; take that of the model's chat version, or "
            "put a chat_template.jinja beside it"
        )
    return template


def check_messages(value: Any, where: str) -> list[Message]:
    """Return a conversation.

    Args:
        value: what a row holds.
        where: the row and its field, to begin the message with.

    Raises:
        UserError: it is no list of turns, each a mapping with a role, or no assistant speaks.
    """
    turns: list[Any] = value if isinstance(value, list) and value else [None]
    if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns):
        raise UserError(f"{where} is no conversation: expected a list of turns, each with a 'role' and a 'content'")
    for turn in turns:
        if isinstance(turn.get("content"), str):
            check_text(turn["content"], where)
    if all(turn["role"] != "assistant" for turn in turns):
        raise UserError(f"{where}: no turn has the role 'assistant', so nothing would be learned; leave the row out")
    return turns


def encode_chat(tokenizer: Any, messages: Sequence[Message], where: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation, and ones for those that an assistant has written; as many of both.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: the turns.
        where: the row, to begin a message with.

    Raises:
        UserError: the template refuses the conversation, or does not let its turns be told apart.
    """

    def tokens(turns: Sequence[Message], **options: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(list(turns), return_dict=True, **options)
        except Exception as e:  # whatever a template raises
            raise UserError(f"{where}: the tokenizer's chat template refuses it ({first_line(e)})") from None

    if MARKED.search(tokenizer.chat_template):
        found = tokens(messages, return_assistant_tokens_mask=True)
        return found["input_ids"], found["assistant_masks"]
    whole: list[int] = tokens(messages)["input_ids"]
    counted = [0] * len(whole)
    for i, turn in enumerate(messages):
        if turn["role"] == "assistant":
            before: list[int] = tokens(messages[:i], add_generation_prompt=True)["input_ids"]
            after: list[int] = tokens(messages[: i + 1])["input_ids"]
            if whole[: len(after)] != after or after[: len(before)] != before:
                raise UserError(
                    f"{where}: the tokenizer's chat template writes turn {i + 1} otherwise when others follow, so it "
                    "cannot be told apart; put {% generation %} and {% endgeneration %} around an assistant's turn"
                )
            counted[len(before) : len(after)] = [1] * (len(after) - len(before))
    return whole, counted
