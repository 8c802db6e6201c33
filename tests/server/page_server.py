"""The page over a server that plays recorded events: what it was asked and how it answers are plain attributes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from redrafter.server.page import page

# One step: the pieces with what was drafted, and the tree with its accepted nodes.
Step = tuple[Sequence[tuple[str, bool]], dict[str, Any] | None]

TREE = {
    "tokens": [" sky", " is", " looks", " blue", " clear", " because", "\n"],
    "parent": [-1, 0, 0, 1, 1, 3, 3],
    "accepted": [0, 1, 3],
}
STEPS: list[Step] = [
    ([("The", False)], None),
    ([(" sky", False)], {"tokens": ["The"], "parent": [-1], "accepted": [0]}),
    ([(" is", True), (" blue", True), (" today", False)], TREE),
    ([(".", False)], TREE),
]


@dataclass
class Play:
    """status other than 200 refuses chats; ``key``: what the server wants; ``break_off``: end without [DONE]."""

    steps: list[Step] = field(default_factory=lambda: list(STEPS))
    plain_text: str | None = None
    status: int = 200
    words: str = "these words"
    headers: dict[str, str] = field(default_factory=dict)
    key: str | None = None
    delay: float = 0.0
    plain_delay: float = 0.0
    break_off: bool = False
    last: Any = None
    """an event after the steps, whatever it is"""
    details: bool = True
    drafter: str | None = "tiny-drafter"
    asked: list[dict[str, Any]] = field(default_factory=list)
    disconnects: int = 0
    url: str = ""

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The stream's chunks; without speculation each step is one token, as in plain decoding."""
        steps = self.steps
        if not body.get("speculation", True):
            pieces = [text for spans, _ in steps for text, _ in spans] if self.plain_text is None else self.plain_text
            steps = [([(text, False)], None) for text in pieces]
        tokens = 0
        for spans, tree in steps:
            time.sleep(self.delay if body.get("speculation", True) else self.plain_delay)
            tokens += len(spans)
            text = "".join(piece for piece, _ in spans)
            event: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
            if self.details:
                nodes = len(tree["tokens"]) if tree else 1
                step = {"accepted": len(spans) - 1, "nodes": nodes, "seconds": 0.01}
                event["redrafter"] = {"spans": [list(span) for span in spans], "step": step, "tree": tree}
            yield event
        if self.last is not None:
            yield self.last
        if self.break_off:
            return
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        yield {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens}}


@contextmanager
def playing(play: Play) -> Iterator[Play]:
    """Serve ``play`` at a free port of this machine; ``play.url`` says where."""

    class Handler(_Handler):
        server_play = play

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    play.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield play
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_play: Play

    def do_GET(self) -> None:
        if self.path == "/":
            html, policy = page()
            self._send(200, html.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})
        elif self.path == "/v1/redrafter/info":
            info = {"model": "tiny", "drafter": self.server_play.drafter, "config": {}, "version": "9.9"}
            self._refused() or self._json(200, info)
        elif self.path == "/v1/models":
            self._refused() or self._json(200, {"data": [{"id": "tiny"}]})
        else:
            self._json(404, {"error": {"message": f"no {self.path} here"}})

    def do_POST(self) -> None:
        play = self.server_play
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        play.asked.append(body)
        if play.status != 200:
            self._json(play.status, {"error": {"message": play.words}}, play.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in play.events(body):
                self.wfile.write(f": keep-alive\n\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
            if not play.break_off:
                self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            play.disconnects += 1

    def _refused(self) -> bool:
        wanted = self.server_play.key
        if wanted is None or self.headers.get("Authorization") == f"Bearer {wanted}":
            return False
        self._json(401, {"error": {"message": "no valid API key"}})
        return True

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers or {})

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
