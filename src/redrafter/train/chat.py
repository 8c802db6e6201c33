"""The chat template around the user's text, found by rendering a sentinel: nothing about a template is hard-wired."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from redrafter.errors import UnsupportedModel

_SENTINEL = "\u2402sentinel\u2402"


class Frame(NamedTuple):
    """What stands before and after the user's text in a one-turn chat that is about to be answered."""

    before: str
    after: str

    def render(self, text: str) -> str:
        return self.before + text.strip() + self.after


def chat_frame(tokenizer: Any) -> Frame:
    message = [{"role": "user", "content": _SENTINEL}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    if rendered.count(_SENTINEL) != 1:
        found = rendered.count(_SENTINEL)
        raise UnsupportedModel(f"chat template: the user's text appears {found} times, not once; answer prompts only")
    return Frame(*rendered.split(_SENTINEL))


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
