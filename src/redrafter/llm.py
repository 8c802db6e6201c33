"""The library's front door: ``LLM.from_pretrained(...)``, ``.generate(...)``, ``.stream(...)``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redrafter.algorithm.beam import no_beams
from redrafter.algorithm.tree import pack
from redrafter.errors import InvalidRequest
from redrafter.models import DEFAULT_MODEL, resolve, resolve_drafter
from redrafter.params import DecodeConfig, SamplingParams
from redrafter.reply import Chunk, Completion, Reply
from redrafter.text import Detokenizer, Message, Tokenizer

if TYPE_CHECKING:
    from redrafter.engine import Engine

__all__ = ["LLM", "Chunk", "Completion", "Prompt"]

Prompt = str | Sequence[Message]


class LLM:
    """A target, its drafter and its tokenizer. Not safe to use from several threads at once.

    A ``str`` prompt is one user message if the model has a chat template, and raw text if it has none or with
    ``raw=True``. A list of ``{"role": ..., "content": ...}`` is a conversation.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, model: str = "model", drafter: str | None = None):
        self.engine = engine
        self.tokenizer = tokenizer
        self.model = model
        self.drafter = drafter
        self._plain: Engine | None = None
        self._replies: dict[str, _Running] = {}
        self._numbers = itertools.count()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        drafter: str | Path = "auto",
        *,
        backend: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        max_context: int | None = None,
        max_batch: int = 8,
        config: DecodeConfig | None = None,
        threads: int | None = None,
        compile: bool = True,
        prompt_lookup: int = DecodeConfig.prompt_lookup,
        progress: Callable[[str], None] | None = None,
    ) -> LLM:
        """Find, check and load a model and its drafter.

        model: the default's name, a Hub id, a folder or a GGUF file. drafter: "auto" (the shipped one for this model,
        or none), "none", or a folder. backend: "auto" (MLX on Apple silicon, else torch), "torch" or "mlx". config:
        the beam shape; None lets the program pick it. compile: False keeps a GPU to torch's (MLX's) own eager
        operations. prompt_lookup: as in DecodeConfig, of the beam shapes that the program picks.
        progress: told in a few words what is being done.
        """
        from redrafter.load import load, pick_backend  # brings a backend: only when weights are really loaded

        tell = progress or _silent
        backend = pick_backend(backend)  # before anything is fetched for it
        files = resolve(str(model), progress=tell)
        drafter_path = resolve_drafter(str(drafter), files)
        tokenizer = Tokenizer.load(files.path)
        tell(f"loading {files.name}")
        engine = load(
            files,
            drafter_path,
            backend=backend,
            dtype=dtype,
            device=device,
            max_context=max_context,
            max_batch=max_batch,
            config=config,
            threads=threads,
            compile=compile,
            prompt_lookup=prompt_lookup,
        )
        return cls(engine, tokenizer, model=files.name, drafter=None if drafter_path is None else drafter_path.name)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        raw: bool = False,
        speculation: bool = True,
    ) -> list[Completion]:
        """Answer one prompt or several, in their order; one prompt gives a list of one.

        speculation=False is plain decoding by the same engine: the same tokens, one per step. A request that fails
        raises if it was the only one; among several it is a Completion whose ``error`` is set.
        """
        batch = _as_batch(prompts)
        settings = _as_settings(params, len(batch))
        prompt_ids = [self.encode(prompt, raw=raw) for prompt in batch]
        engine = self._engine(speculation)
        replies: list[_Running] = []
        try:
            for ids, setting in zip(prompt_ids, settings, strict=True):
                replies.append(self._open(engine, ids, setting))
            while any(reply.completion is None for reply in replies):
                self._step(engine)
        finally:
            for reply in replies:
                self._close(reply)
        completions = [reply.completion for reply in replies if reply.completion is not None]
        if len(completions) == 1 and completions[0].error is not None:
            raise completions[0].error
        return completions

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        speculation: bool = True,
    ) -> Iterator[Chunk]:
        """Answer one prompt, a chunk per step. Leaving the loop early (closing the iterator) cancels the request."""
        return self._stream(self.encode(prompt, raw=raw), params or SamplingParams(), self._engine(speculation))

    def _stream(self, prompt_ids: list[int], params: SamplingParams, engine: Engine) -> Iterator[Chunk]:
        reply = self._open(engine, prompt_ids, params)
        try:
            while reply.chunks or reply.completion is None:
                if reply.chunks:
                    yield reply.chunks.popleft()
                else:
                    self._step(engine)
        finally:
            self._close(reply)
        if reply.completion.error is not None:
            raise reply.completion.error

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """The prompt's token ids. InvalidRequest: empty, not Unicode, or the chat template does not take it."""
        if not isinstance(prompt, str):
            return self.tokenizer.encode_chat(prompt)
        if not prompt:
            raise InvalidRequest("the prompt is empty: give at least one character")
        if raw or not self.tokenizer.has_chat_template:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat([{"role": "user", "content": prompt}])

    @property
    def dtype(self) -> str:
        """What the target computes in: "float32", "bfloat16", ..."""
        target: Any = self.engine.backend.target
        return str(target.dtype).removeprefix("torch.")

    def next_logits(self, token_ids: Sequence[int]) -> list[float]:
        """The target's logits [V] for the token after these ids, by a pass over one row and before any setting.

        Only while no request runs: it uses the first row of the cache.
        """
        if self._replies:
            raise InvalidRequest(f"next_logits while {len(self._replies)} requests run: finish or close them first")
        backend = self.engine.backend
        root = backend.array([token_ids[-1]])
        backend.reserve(1, len(token_ids) + 1)
        backend.prefill(0, token_ids[:-1])
        tree = pack(backend.ops, no_beams(backend.ops, root), root, 1)
        logits_BNV, _ = backend.target.verify(tree, backend.array([len(token_ids) - 1]))
        return backend.host(logits_BNV[0, 0])

    def reuse_prefixes(self, reuse: bool) -> None:
        """Whether prompts take what they share with earlier ones from the cache. Off, each reads the whole of its
        prompt, so that a run's time does not depend on what ran before."""
        for engine in (self.engine, self._plain):
            if engine is not None:
                engine.prefix_reuse = reuse

    def _engine(self, speculation: bool) -> Engine:
        """The engine, or its plain twin; they share one cache, so only one of them may have requests."""
        if speculation:
            wanted, other = self.engine, self._plain
        else:
            self._plain = self._plain or self.engine.without_speculation()
            wanted, other = self._plain, self.engine
        if other is not wanted and any(reply.engine is other for reply in self._replies.values()):
            raise InvalidRequest(
                f"speculation={speculation} while a request with speculation={not speculation} runs: "
                "finish or close that one first"
            )
        return wanted

    def _open(self, engine: Engine, prompt_ids: list[int], params: SamplingParams) -> _Running:
        request_id = f"request-{next(self._numbers)}"
        reply = _Running(engine, request_id, prompt_ids, params, self.tokenizer.detokenizer())
        engine.add(request_id, prompt_ids, params)
        self._replies[request_id] = reply
        return reply

    def _close(self, reply: _Running) -> None:
        self._replies.pop(reply.request_id, None)
        if not reply.ended:
            reply.ended = True
            reply.engine.cancel(reply.request_id)

    def _step(self, engine: Engine) -> None:
        """One step of the engine; its events go to whichever reply they belong to."""
        for event in engine.step():
            reply = self._replies.get(event.request_id)
            if reply is not None:
                reply.push(event)
                if reply.completion is not None:
                    self._close(reply)


class _Running(Reply):
    """A reply and the engine that works on it."""

    def __init__(
        self,
        engine: Engine,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        detokenizer: Detokenizer,
    ) -> None:
        super().__init__(request_id, prompt_ids, params, detokenizer)
        self.engine = engine


def _silent(_: str) -> None:
    return None


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if not items:
        raise InvalidRequest("no prompt was given: pass a text, a list of messages, or a list of either")
    if all(isinstance(item, Mapping) for item in items):
        return [items]  # type: ignore[list-item]
    for index, item in enumerate(items):
        if isinstance(item, Mapping) or not isinstance(item, Sequence):
            raise InvalidRequest(f"prompt {index} is {item!r}: it must be a text or a list of messages")
    return items  # type: ignore[return-value]


def _as_settings(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} SamplingParams for {count} prompts: give one, or one for each")
    return list(params)
