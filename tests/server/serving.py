"""A real server in a thread, over the tiny random model that tests of the library use."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import torch

from redrafter import LLM, DecodeConfig
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.load import TorchBackend, make_target
from redrafter.engine import Engine
from redrafter.server.run import BACKLOG, Server, bind, make_server
from redrafter.server.settings import ServeSettings
from redrafter.text import Tokenizer
from tests import fakes
from tests.tiny import drafter_config, make_model

VOCAB = 280
SHAPE = DecodeConfig(beam_width=3, branching=3, draft_length=3, tree_size=10)


def tiny_llm(*, drafter: bool = True, context: int = 256, max_batch: int = 4, eos_ids: tuple[int, ...] = ()) -> LLM:
    """The same weights every time, so that two of them answer alike."""
    torch.manual_seed(3)
    config = drafter_config(vocab_size=VOCAB)
    target = make_target(make_model("llama", vocab_size=VOCAB), config.feature_layers)
    backend = TorchBackend(target, Drafter(config) if drafter else None, context, eos_ids=list(eos_ids))
    name = "tiny-drafter" if drafter else None
    return LLM(Engine(backend, SHAPE, max_batch), Tokenizer(fakes.byte_level(), "tiny"), model="tiny", drafter=name)


@dataclass
class Running:
    """A server that runs, and what a test may look at from outside."""

    url: str
    server: Server
    llm: LLM
    thread: threading.Thread

    @property
    def service(self) -> Any:
        return self.server._service

    @property
    def engine(self) -> Engine:
        """The engine that the worker owns: look only while no request runs."""
        return self.service.worker._engine

    def stop(self) -> None:
        """As SIGTERM does; returns when the server has ended."""
        loop = self.server.loop
        if self.thread.is_alive():
            loop.call_soon_threadsafe(self.server.shut_down)
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextmanager
def running(llm: LLM | None = None, **settings: Any) -> Iterator[Running]:
    """A uvicorn server at a free port. ``settings``: those of ``ServeSettings``."""
    llm = tiny_llm() if llm is None else llm
    chosen = ServeSettings(**{"model_name": "tiny", "port": 0, "drain": 5.0, **settings})
    listener = bind(chosen)
    listener.listen(BACKLOG)
    server = _InThread(make_server(llm, chosen))
    thread = threading.Thread(target=server.run, args=(listener,), daemon=True)
    thread.start()
    assert server.ready.wait(30)
    run = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", server.server, llm, thread)
    try:
        yield run
    finally:
        run.stop()


class _InThread:
    """Runs a server in a thread, where signal handlers cannot be set."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.ready = threading.Event()

    def run(self, listener: Any) -> None:
        asyncio.run(self._serve(listener))

    async def _serve(self, listener: Any) -> None:
        self.server.loop = asyncio.get_running_loop()
        serving = asyncio.ensure_future(self.server._serve(sockets=[listener]))
        while not self.server.started and not serving.done():
            await asyncio.sleep(0.005)
        self.ready.set()
        await serving


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def text_threads() -> int:
    """Threads that turn texts into tokens, of all servers."""
    return sum(thread.name == "redrafter-text" for thread in threading.enumerate())


def idle(run: Running) -> bool:
    return run.service.worker.open_requests == 0 and not run.engine.has_work


def metrics(run: Running) -> str:
    return httpx2.get(run.url + "/metrics").text
