"""Stand-ins for the tests of text, llm and cli: tiny tokenizers and an engine that reads its tokens from a script."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redrafter.engine import Event, RequestStatistics
from redrafter.errors import InvalidRequest, NonFiniteLogits
from redrafter.llm import LLM
from redrafter.params import SamplingParams
from redrafter.text import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_level(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """256 bytes, two merges, two added tokens that are not special (one outside the byte alphabet), four special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate([*alphabet, "Ġt", "he", "Ġthe"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend, template)


def sentencepiece(template: str | None = TEMPLATE, strip: bool = True) -> PreTrainedTokenizerFast:
    """Pieces with a word mark, and bytes for what they lack; ``strip`` drops the first space as Llama 2 does."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁▁", "é", "你", "lo"]
    backend = Backend(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return _wrap(backend, template)


def metaspace() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "▁", "▁a", "b", "▁▁", "é", "你", "lo"]
    backend = Backend(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return _wrap(backend, None)


def _wrap(backend: Backend, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=SPECIAL[1:]
    )
    tokenizer.add_tokens(["née 你", "<tool>"])
    tokenizer.chat_template = template
    return tokenizer


class ScriptedEngine:
    """Answers every request with ``answer``, ``stride`` tokens a step of which all but the last were drafted."""

    speculative = True
    context_limit = 64

    def __init__(self, answer: Sequence[int], stride: int = 3, *, dtype: str = "float32", delay: float = 0.0) -> None:
        self.answer = list(answer)
        self.stride = stride
        self.delay = delay
        self.fail_after: int | None = None
        self.backend = SimpleNamespace(target=SimpleNamespace(dtype=f"torch.{dtype}"))
        self.plain: ScriptedEngine | None = None
        self.requests: dict[str, tuple[SamplingParams, RequestStatistics]] = {}
        self.cancelled: list[str] = []
        self.prompts: list[list[int]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def without_speculation(self) -> ScriptedEngine:
        self.plain = self.plain or ScriptedEngine(self.answer, 1)
        self.plain.speculative = False
        return self.plain

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if len(prompt_ids) >= self.context_limit:
            raise InvalidRequest(f"the prompt has {len(prompt_ids)} tokens and the context holds 64: shorten it")
        self.prompts.append(list(prompt_ids))
        self.requests[request_id] = (params, RequestStatistics(prompt_tokens=len(prompt_ids)))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.requests.pop(request_id, None)

    def step(self) -> list[Event]:
        time.sleep(self.delay)
        return [self._advance(request_id) for request_id in list(self.requests)]

    def _advance(self, request_id: str) -> Event:
        params, stats = self.requests[request_id]
        done = stats.answer_tokens
        if self.fail_after is not None and done >= self.fail_after:
            del self.requests[request_id]
            error = NonFiniteLogits(f"request {request_id!r}: the logits are not finite;\ntry --dtype float32")
            return Event(request_id, (), 0, "error", error, stats)
        tokens = self.answer[done : min(done + self.stride, params.max_new_tokens)]
        stats.answer_tokens += len(tokens)
        stats.steps += 1
        stats.seconds += 0.5
        if self.speculative:
            stats.drafted_steps += 1
            stats.accepted_at_depth = [stats.steps] * (self.stride - 1)
            stats.tree_nodes += 8
            stats.unmerged_tokens += 16
        reason = "length" if stats.answer_tokens == params.max_new_tokens else None
        reason = "stop" if reason is None and stats.answer_tokens == len(self.answer) else reason
        if reason is not None:
            del self.requests[request_id]
        return Event(request_id, tuple(tokens), min(self.stride - 1, len(tokens)), reason, None, stats)


class ScriptedLLM(LLM):
    def next_logits(self, token_ids: Sequence[int]) -> list[float]:
        """One point less for each id."""
        return [-float(token) for token in range(300)]


def scripted(
    answer: str = "", *, ids: Sequence[int] | None = None, stride: int = 3, prepare: Callable | None = None, **settings
) -> LLM:
    """An LLM whose engine answers with ``answer`` whatever it is asked."""
    tokenizer = Tokenizer(byte_level(), "tiny")
    engine = ScriptedEngine(tokenizer.encode(answer) if ids is None else ids, stride, **settings)
    if prepare is not None:
        prepare(engine)
    return ScriptedLLM(engine, tokenizer, model="tiny", drafter="scripted")  # type: ignore[arg-type]
