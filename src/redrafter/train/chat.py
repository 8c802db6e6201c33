"""The chat template around what is said: rendered by the tokenizer, its parts found by a sentinel."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from jinja2 import TemplateError

from redrafter.errors import InvalidRequest, UnsupportedModel
from redrafter.train.prompts import Message

_SENTINEL = "\u2402sentinel\u2402"


class Frame(NamedTuple):
    """What stands before and after the user's text in a one-turn chat that is about to be answered."""

    before: str
    after: str

    def render(self, text: str) -> str:
        return self.before + text.strip() + self.after


def chat_frame(tokenizer: Any) -> Frame:
    """Of a model without a chat template: texts are continued, from the token that starts a text."""
    if not tokenizer.chat_template:
        return Frame(tokenizer.bos_token or tokenizer.eos_token or "", "")
    rendered = render(tokenizer, [{"role": "user", "content": _SENTINEL}])
    if rendered.count(_SENTINEL) != 1:
        found = rendered.count(_SENTINEL)
        raise UnsupportedModel(f"chat template: the user's text appears {found} times, not once; answer prompts only")
    return Frame(*rendered.split(_SENTINEL))


def render(tokenizer: Any, messages: list[Message]) -> str:
    """The text that the answer to the last message follows: so the loss mask is what comes after it."""
    if not tokenizer.chat_template:
        return chat_frame(tokenizer).render("\n\n".join(m["content"].strip() for m in messages))
    stripped = [m | {"content": m["content"].strip()} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(stripped, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise InvalidRequest(
            f"the chat template refuses turns of {roles} ({error}); change or drop that record"
        ) from error


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of rendered chats: the template already wrote every special token."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def end_ids(tokenizer: Any, model_config: Any) -> set[int]:
    """The tokens that end a turn: the tokenizer's and the model configuration's."""
    ids = model_config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return {i for i in (*listed, tokenizer.eos_token_id) if i is not None}


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big")


def is_heldout(text: str, one_in: int = 50) -> bool:
    """2 % of the prompts, by their hash: a copy of a prompt is on the same side everywhere."""
    return digest(text) % one_in == 0
