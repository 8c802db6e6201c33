"""Many clients at once: streams held, connections dropped, short requests without end. Counts, no times."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx2

from tests.server.client import MESSAGES, chat, complete, dial, request_bytes
from tests.server.serving import Running

Tell = Callable[[str], None]
SEEDS = 8
"""different answers that the streams ask for"""


class Held(NamedTuple):
    """complete: streams that brought the whole answer that the request alone gets; at_once: most that were between
    their first and last chunk at one moment; running: most rows of the engine in use at once."""

    complete: int
    at_once: int
    running: int


def hold_streams(run: Running, count: int, tokens: int, tell: Tell) -> Held:
    """``count`` streams of ``tokens`` tokens each, begun together."""
    asked = [
        {"prompt": f"why {seed}?", "seed": seed, "max_tokens": tokens, "ignore_eos": True} for seed in range(SEEDS)
    ]
    alone = [complete(run.url, **body).json()["choices"][0]["text"] for body in asked]
    tell(f"{SEEDS} answers alone")
    held = asyncio.run(_streams(run, [asked[i % SEEDS] for i in range(count)], tell))
    right = sum(text == alone[i % SEEDS] for i, text in enumerate(held[0]))
    return Held(right, held[1], held[2])


async def _streams(run: Running, bodies: list[dict[str, Any]], tell: Tell) -> tuple[list[str], int, int]:
    open_now = at_once = running = 0

    async def one(client: httpx2.AsyncClient, body: dict[str, Any]) -> str:
        nonlocal open_now, at_once, running
        text, begun = "", False
        async with client.stream("POST", f"{run.url}/v1/completions", json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "choices" not in event:
                    return f"failed: {event}"
                text += event["choices"][0]["text"]
                if not begun:
                    begun, open_now = True, open_now + 1
                    at_once, running = max(at_once, open_now), max(running, run.service.worker.load.running)
                    if open_now % 64 == 0:
                        tell(f"{open_now} streams")
                running = max(running, run.service.worker.load.running)
        open_now -= begun
        return text

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as client:
        texts = await asyncio.gather(*(one(client, body) for body in bodies))
    return list(texts), at_once, running


def disconnect(run: Running, count: int, seed: int, tell: Tell) -> dict[str, int]:
    """``count`` clients that leave at a random moment, streams and whole answers, in the queue, the prompt or the
    answer. -> where they left, and what the server still holds for them afterwards."""
    started = time.monotonic()
    before = chat(run.url, max_tokens=40).json()["choices"]
    answered = time.monotonic() - started
    found: Counter[str] = Counter()
    lock = threading.Lock()

    def leave(index: int) -> None:
        rng = random.Random(seed * 1_000_003 + index)
        body = {
            "messages": MESSAGES * rng.randint(1, 8),
            "max_tokens": 100,
            "seed": index,
            "stream": rng.random() < 0.5,
        }
        with dial(run.url) as connection:
            data = request_bytes(body)
            connection.sendall(data if rng.random() < 0.9 else data[: rng.randrange(len(data))])
            connection.settimeout(rng.choice([0.001, 0.01, 0.05, 0.2, 5 * answered]))  # the last on a slow machine
            try:
                said = connection.recv(4096)
            except TimeoutError:
                said = b""
            if said and rng.random() < 0.5:
                time.sleep(rng.random() * 0.05)
        with lock:
            found["left after the first byte" if said else "left before any answer"] += 1
            if (done := sum(found.values())) % 100 == 0:
                tell(f"{done} clients left")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(count)))
    end = time.monotonic() + 30
    while (run.service.worker.open_requests or run.engine.has_work) and time.monotonic() < end:
        time.sleep(0.01)
    load = run.engine.load
    run.engine.check()
    leaked = run.service.worker.open_requests + len(run.service.worker._held) + load.running + load.waiting
    same = chat(run.url, max_tokens=40).json()["choices"] == before
    return {**found, "clients": count, "leaked": leaked, "next_answer_differs": int(not same)}


def short_requests(url: str, count: int, at_once: int, tell: Tell, first: int = 0) -> Counter[int]:
    """Requests of a few tokens, streams and whole ones, no two alike. -> how many of each status."""

    def ask(client: httpx2.Client, index: int) -> int:
        body = {"messages": [{"role": "user", "content": f"why {index}?"}], "seed": index, "max_tokens": 4}
        response = client.post(f"{url}/v1/chat/completions", json={**body, "stream": index % 2 == 0})
        return response.status_code

    statuses: Counter[int] = Counter()
    with httpx2.Client(timeout=120) as client, ThreadPoolExecutor(at_once) as pool:
        for number, status in enumerate(pool.map(lambda i: ask(client, i), range(first, first + count)), 1):
            statuses[status] += 1
            if number % 1000 == 0:
                tell(f"{first + number} requests, {dict(statuses)}")
    return statuses


class Gaps(NamedTuple):
    """What a long prompt did to the streams beside it.

    chunks: that its prompt was read in; most_between: most of them between two steps of the running streams; delay:
    the longest gap between two chunks of a stream while it was read, less the usual one, in times of the longest prompt
    chunk (they take longer the more text stands before them).
    """

    chunks: int
    most_between: int
    delay: float
    chunk_seconds: float
    usual_gap: float
    longest_gap: float


def long_prompt(run: Running, streams: int, prompt: list[int], tokens: int, tell: Tell) -> Gaps:
    """``streams`` streams run; then a request with ``prompt`` comes."""
    marks: list[tuple[str, float, float]] = []
    backend = run.engine.backend
    read, step = backend.prefill_chunk, backend.step

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            if name == "chunk":
                backend.synchronize()
            marks.append((name, began, time.perf_counter()))
            return result

        return call

    arrivals: list[list[float]] = [[] for _ in range(streams)]

    def listen(index: int) -> None:
        body = {"prompt": f"why {index}?", "seed": index, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        headers = {"X-Redrafter-Details": "1"}  # a chunk for every step, also for one whose text is not complete yet
        with httpx2.stream("POST", f"{run.url}/v1/completions", json=body, headers=headers, timeout=600) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    arrivals[index].append(time.perf_counter())

    backend.prefill_chunk, backend.step = timed("chunk", read), timed("step", step)  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(streams) as pool:
            heard = [pool.submit(listen, index) for index in range(streams)]
            while min(map(len, arrivals)) < 5:
                time.sleep(0.01)
                assert not any(one.done() for one in heard), "the streams ended before the prompt came"
            tell(f"{streams} streams run")
            marks.clear()
            began = time.perf_counter()
            answer = complete(run.url, prompt=prompt, max_tokens=1)
            ended = time.perf_counter()
            assert answer.status_code == 200, answer.text
            assert not any(one.done() for one in heard), "the streams ended before the prompt was read"
            tell(f"a prompt of {len(prompt)} tokens was read")
    finally:
        backend.prefill_chunk, backend.step = read, step  # type: ignore[method-assign]
    return _gaps(marks, arrivals, began, ended)


def _gaps(marks: list[tuple[str, float, float]], arrivals: list[list[float]], began: float, ended: float) -> Gaps:
    during = [mark for mark in marks if began <= mark[1] <= ended]
    between = most = 0
    for name, _, _ in during:
        between = between + 1 if name == "chunk" else 0
        most = max(most, between)
    chunks = sorted(end - begin for name, begin, end in during if name == "chunk")
    beside: list[float] = []
    usual: list[float] = []
    for times in arrivals:
        for before, after in itertools.pairwise(times):
            (beside if began <= after and before <= ended else usual).append(after - before)
    chunk, gap = chunks[-1], sorted(usual)[len(usual) // 2]
    return Gaps(len(chunks), most, (max(beside) - gap) / chunk, chunk, gap, max(beside))
