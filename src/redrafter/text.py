"""Strings in, token ids out, and back: tokenizer, chat template, incremental detokenizer, stop strings.

The text of an answer is a pure function of its token ids: it does not depend on how many of them a step delivered.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from redrafter.errors import CorruptModel, InvalidRequest, UnsupportedModel

Message = Mapping[str, str]

# What a template can raise: its own errors and those of the Python operations the sandbox lets it do.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class Piece(NamedTuple):
    """A stretch of text and whether the drafter proposed the token that completed it."""

    text: str
    drafted: bool


class Tokenizer:
    """A model folder's tokenizer and chat template. Templates run in transformers' sandbox; no code is loaded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer, name)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a local folder. CorruptModel: no usable tokenizer there; UnsupportedModel: see ``TokenBytes``."""
        path = Path(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CorruptModel(
                f"no usable tokenizer in {path}: {reason}; put the model's tokenizer.json there"
            ) from error
        return cls(tokenizer, path.name)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw text, with the special tokens the model's tokenizer puts in front of one."""
        return list(self._tokenizer(_unicode(text), verbose=False)["input_ids"])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins."""
        return list(self._tokenizer(self.render(messages), add_special_tokens=False, verbose=False)["input_ids"])

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the text the model was trained on. InvalidRequest: no template, or it fails."""
        check_messages(messages)
        if not self.has_chat_template:
            raise InvalidRequest(
                f"{self.name} has no chat template: give a text instead of messages, or a model with a template"
            )
        plain = [dict(message) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except _TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidRequest(
                f"the chat template of {self.name} failed: {type(error).__name__}: {reason}; "
                "change the messages or use the raw prompt"
            ) from error
        return str(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` at once; what a ``Detokenizer`` gives in pieces."""
        detokenizer = self.detokenizer()
        return "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of so many times n characters has at least n tokens, roughly."""
        return max(map(len, self._tokenizer.get_vocab()))

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; a special one for its name, an id without a token for nothing."""
        return self._bytes(token) or str(self._tokenizer.convert_ids_to_tokens(token) or "").encode()

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self._bytes)


def check_messages(messages: Sequence[Message]) -> None:
    """InvalidRequest unless ``messages`` is a non-empty list of ``{"role": str, "content": str}``."""
    if not messages:
        raise InvalidRequest("the list of messages is empty: give at least one message")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise InvalidRequest(f"message {index} has {key}={value!r}: it must be a string; fix that message")
            _unicode(value)


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the prompt has {text[error.start]!r} at position {error.start}, which is no Unicode text: send UTF-8"
        ) from error
    return text


def _byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes bytes as characters: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _spaces_dropped(step: Mapping[str, Any]) -> int:
    """How many spaces in front of the first token of a text this decoder step drops."""
    if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
        return sys.maxsize
    return step["start"] if step["type"] == "Strip" and step["content"] == " " else 0


class TokenBytes:
    """Token id -> the bytes it stands for, for the two families of decoders that language models use.

    Byte-level BPE (GPT-2, Llama 3, Qwen, ...) and SentencePiece-style pieces with or without byte fallback (Llama 2,
    Gemma, Mistral, ...). Special tokens and ids without a token are empty. UnsupportedModel: any other decoder.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder or {"type": "none"}]
        kinds = {step["type"] for step in steps}
        self._backend: Any = backend
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._alphabet = _byte_of_character() if "ByteLevel" in kinds else None
        known = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        if not kinds <= known or (self._alphabet is None and not kinds & {"Replace", "Metaspace"}):
            raise UnsupportedModel(
                f"the tokenizer of {name} decodes with {', '.join(sorted(kinds))}: only byte-level and "
                "SentencePiece-style decoders are supported; use another model"
            )
        self._fallback = "ByteFallback" in kinds
        self._replace = [
            (step["pattern"]["String"], step["content"]) if step["type"] == "Replace" else (step["replacement"], " ")
            for step in steps
            if step["type"] in ("Replace", "Metaspace")
        ]
        self.first_spaces = max(map(_spaces_dropped, steps))
        self._cache: dict[int, bytes] = {}

    def __call__(self, token: int) -> bytes:
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._look_up(token)
        return found

    def _look_up(self, token: int) -> bytes:
        piece = None if token in self._special else self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._alphabet is not None:
            byte = [self._alphabet.get(character) for character in piece]
            # An added token may hold characters outside the alphabet; then it stands for itself.
            return piece.encode() if None in byte else bytes(b for b in byte if b is not None)
        if self._fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        for pattern, content in self._replace:
            piece = piece.replace(pattern, content)
        return piece.encode()


class Detokenizer:
    """Token ids -> text as it becomes certain, at a cost per token that does not grow with the answer.

    A character whose bytes are spread over several tokens comes out with the last of them. Bytes that are no UTF-8
    come out as U+FFFD, one for each maximal invalid part.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop = token_bytes.first_spaces

    def push(self, token: int) -> str:
        data = self._token_bytes(token)
        if self._drop and data:
            spaces = len(data) - len(data.lstrip(b" "))
            data = data[min(self._drop, spaces) :]
            self._drop = 0
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end of the answer: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Cuts the text before the first stop string to be completed, wherever tokens and steps begin and end.

    Of several completed by the same character the longest counts. Text is held back only while it could still be the
    beginning of a stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held: list[Piece] = []
        self.matched: str | None = None

    def push(self, piece: Piece) -> list[Piece]:
        """Pieces that are now certain to come before any stop string. Nothing more may be pushed after a match."""
        assert self.matched is None
        if not piece.text:
            return []
        if not self._stop:
            return [piece]
        self._held.append(piece)
        text = "".join(held.text for held in self._held)
        ends = [(start + len(stop), -len(stop), stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            end, _, self.matched = min(ends)
            return self._release(end - len(self.matched))
        return self._release(len(text) - self._possible(text))

    def flush(self) -> list[Piece]:
        """What was held back, once no more text can come."""
        rest = [] if self.matched is not None else self._held
        self._held = []
        return rest

    def _possible(self, text: str) -> int:
        """Length of the longest end of ``text`` that some stop string begins with."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)

    def _release(self, length: int) -> list[Piece]:
        released = []
        while self._held and length > 0:
            piece = self._held.pop(0)
            released.append(Piece(piece.text[:length], piece.drafted))
            if len(piece.text) > length:
                self._held.insert(0, Piece(piece.text[length:], piece.drafted))
            length -= len(piece.text)
        return released
