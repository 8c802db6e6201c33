"""What the routes share: from a checked request to running answers, whichever route asked."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from redrafter.errors import InvalidRequest, Overloaded
from redrafter.llm import LLM
from redrafter.params import SamplingParams
from redrafter.server.answers import Answers
from redrafter.server.errors import ApiError, bad_request, overloaded, unavailable
from redrafter.server.metrics import Metrics
from redrafter.server.schemas import ChatRequest, Common, CompletionRequest
from redrafter.server.settings import ServeSettings
from redrafter.server.texts import Texts
from redrafter.server.worker import Job, Worker

MERGED = 4
"""characters that a tokenizer's normaliser may make one of"""
COLDEST = 1e-30
"""float32 cannot hold scores over a lower temperature; only the greedy choice is left of them long before"""
_FIELD = {"max_new_tokens": "max_tokens"}


@dataclass
class Service:
    """The model, its worker and what was chosen for them; one for each application."""

    llm: LLM
    settings: ServeSettings
    worker: Worker = field(init=False)
    metrics: Metrics = field(init=False)
    draining: bool = False
    unknown: set[str] = field(default_factory=set)
    """names of request fields that nobody knows, each logged once"""
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.worker = Worker(self.llm.engine, self.settings.max_queue)
        self.metrics = Metrics(self.settings.model_name, self.settings.vllm_names)
        self.metrics.gauge("num_requests_running", "Requests that decode", lambda: self.worker.load.running)
        self.metrics.gauge("num_requests_waiting", "Requests that wait or whose prompt is read", self._waiting)
        self.metrics.gauge("kv_cache_usage_perc", "Share of cache slots in use", lambda: self.worker.load.cache_share)
        self.texts = Texts()

    def _waiting(self) -> float:
        return max(self.worker.open_requests - self.worker.load.running, 0)

    @asynccontextmanager
    async def answers(
        self, request: ChatRequest | CompletionRequest, request_id: str, salt: str | None = None
    ) -> AsyncIterator[Answers]:
        """Running answers to ``request``; leaving the block frees what still runs. ApiError: it cannot be served."""
        if self.draining:
            raise unavailable("the server is shutting down: ask another one")
        self.check_model(request.model)
        prompt_ids = await self.prompt_ids(request)
        jobs = self._jobs(request, prompt_ids, request_id, salt)
        answers = Answers(self.worker, self.llm.tokenizer, jobs)
        try:
            await answers.start()
        except Overloaded as error:
            self.metrics.reject("queue_full")
            raise overloaded(str(error)) from error
        except ApiError as error:
            if error.code == "overloaded":
                self.metrics.reject("queue_full")
            raise
        except InvalidRequest as error:
            raise _as_bad_request(error) from error
        try:
            yield answers
        finally:
            answers.close()

    async def say_something(self) -> None:
        """One real token from the model. ApiError 503: it does not come."""
        limit = self.settings.render_timeout
        job = Job(f"health-{uuid.uuid4().hex}", [0], SamplingParams(max_new_tokens=1))
        answers = Answers(self.worker, self.llm.tokenizer, [job])
        try:
            async with asyncio.timeout(limit):
                await answers.start()
                await answers.finish()
        except TimeoutError as error:
            raise unavailable(f"the model gave no token within {limit:g} seconds") from error
        finally:
            answers.close()
        completion = answers.completions[0]
        if completion is not None and completion.error is not None:
            raise unavailable("the model failed on a test of one token: see the log") from completion.error

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here: use {self.settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def prompt_ids(self, request: ChatRequest | CompletionRequest) -> list[int]:
        """Tokens of the prompt, made off the event loop and within ``render_timeout``."""
        name = "messages" if isinstance(request, ChatRequest) else "prompt"
        if isinstance(request, ChatRequest):
            messages = [message.as_dict() for message in request.messages]
            self._check_size(sum(len(message["content"]) for message in messages), name)
            ids = await self._encode(lambda: self.llm.tokenizer.encode_chat(messages), name)
        else:
            prompt = request.prompt
            if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
                ids = [token for token in prompt if isinstance(token, int)]
            elif isinstance(prompt, list) and len(prompt) > 1:
                raise bad_request("prompt: only one prompt for each request is served; send several requests", name)
            else:
                text = prompt if isinstance(prompt, str) else str(prompt[0])
                self._check_size(len(text), name)
                ids = await self._encode(lambda: self.llm.tokenizer.encode(text), name)
        self._check_length(request, len(ids), name)
        self._check_ids(ids, name)
        self._check_ids(request.logit_bias or (), "logit_bias")
        return ids

    async def _encode(self, encode: Callable[[], list[int]], name: str) -> list[int]:
        limit = self.settings.render_timeout
        try:
            return await self.texts.run(encode, limit)
        except TimeoutError as error:
            raise unavailable(f"{name} took more than {limit:g} seconds to turn into tokens: shorten it") from error
        except InvalidRequest as error:
            raise bad_request(str(error), name) from error

    def _check_size(self, characters: int, name: str) -> None:
        """Refuse what is surely too long before time is spent on it; some normalisers drop or merge characters."""
        limit = self.llm.engine.context_limit
        if characters > MERGED * limit * self.llm.tokenizer.longest_token:
            raise bad_request(
                f"{name}: the prompt has {characters} characters, and the context holds {limit} tokens: shorten it",
                name,
                "context_length_exceeded",
            )

    def _check_length(self, request: Common, tokens: int, name: str) -> None:
        limit = self.llm.engine.context_limit
        wanted = asked_tokens(request) or 1
        if tokens + wanted > limit:
            field = name if tokens >= limit or asked_tokens(request) is None else "max_tokens"
            raise bad_request(
                f"{field}: the prompt has {tokens} tokens, {wanted} more were asked for, and the context holds "
                f"{limit}: shorten the prompt or ask for fewer",
                field,
                "context_length_exceeded",
            )

    def _check_ids(self, ids: Iterable[int], name: str) -> None:
        vocab = self.llm.engine.backend.target.vocab_size
        for token in ids:
            if not 0 <= token < vocab:
                raise bad_request(
                    f"{name}: token id {token} is not in the vocabulary: ids go from 0 to {vocab - 1}", name
                )

    def _jobs(self, request: Common, prompt_ids: list[int], request_id: str, salt: str | None) -> list[Job]:
        most = self.llm.engine.context_limit - len(prompt_ids)
        if (request.n or 1) > self.worker.capacity:
            raise bad_request(
                f"n={request.n}: this server holds {self.worker.capacity} answers at once: ask for fewer", "n"
            )
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**64
        try:
            return [
                Job(
                    f"{request_id}-{index}",
                    prompt_ids,
                    sampling_params(request, most, seed, index),
                    request.speculation is not False,
                    salt,
                )
                for index in range(request.n or 1)
            ]
        except InvalidRequest as error:
            raise _as_bad_request(error) from error


def asked_tokens(request: Common) -> int | None:
    return getattr(request, "max_completion_tokens", None) or request.max_tokens


def sampling_params(request: Common, most: int, seed: int, index: int) -> SamplingParams:
    """The engine's settings for one answer; what is absent has OpenAI's default (a temperature of 1 among them)."""
    stop = request.stop or ()
    temperature = _or(request.temperature, 1.0)
    return SamplingParams(
        temperature=0.0 if temperature < COLDEST else temperature,
        top_k=max(_or(request.top_k, 0), 0),
        top_p=_or(request.top_p, 1.0),
        min_p=_or(request.min_p, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=request.logit_bias or {},
        seed=seed,
        answer_index=index,
        max_new_tokens=asked_tokens(request) or most,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=wanted_logprobs(request),
    )


def wanted_logprobs(request: Common) -> int | None:
    """How many alternatives to tell of each token; None: no log-probabilities at all."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if not isinstance(request, ChatRequest) or not request.logprobs:
        if isinstance(request, ChatRequest) and request.top_logprobs:
            raise bad_request("top_logprobs is for answers with logprobs: set logprobs to true", "top_logprobs")
        return None
    return request.top_logprobs or 0


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _as_bad_request(error: InvalidRequest) -> ApiError:
    """The engine's words, with the field that they begin with as ``param``."""
    found = re.match(r"(\w+)=", str(error))
    return bad_request(str(error), _FIELD.get(found[1], found[1]) if found else None)
