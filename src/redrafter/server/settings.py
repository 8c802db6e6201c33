"""What the person who runs a server may choose, and the limits of what a client may send."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from typing import Literal

from redrafter.errors import InvalidRequest

MAX_BODY = 8 * 2**20
"""bytes"""
MAX_HEADERS = 64 * 2**10
"""bytes of all names and values together"""
MAX_HEADER_LINES = 256
MAX_DEPTH = 64
"""nested arrays and objects in a body"""
MAX_MESSAGES = 2048
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_ANSWERS = 16
MAX_LOGPROBS = 20
MAX_BIASED = 1024
MAX_UNREAD = 1024
"""steps of a request that wait for its client to read; more of them end the request"""

Detail = Literal["none", "summary", "detailed"]


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Times are seconds. ``model_name``: what clients call the model; ``api_keys``: any of them opens every route."""

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    open_to_all: bool = False
    allowed_hosts: tuple[str, ...] = ()
    max_queue: int = 128
    request_metrics: Detail = "summary"
    vllm_names: bool = True
    drain: float = 30.0
    keep_alive: float = 15.0
    body_timeout: float = 30.0
    render_timeout: float = 10.0
    send_timeout: float = 60.0
    stall_timeout: float = 120.0
    """a step that takes longer makes /health fail"""

    def __post_init__(self) -> None:
        if not self.on_loopback and not self.api_keys and not self.open_to_all:
            raise InvalidRequest(
                f"host {self.host!r} is reachable from other machines and there is no API key: give --api-key-file, "
                "or --i-know-this-is-open to serve everybody"
            )
        if self.max_queue < 0:
            raise InvalidRequest(f"max_queue={self.max_queue} is not allowed: it must be 0 or more")

    def named(self, model_name: str) -> ServeSettings:
        return replace(self, model_name=model_name)

    @property
    def on_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names that a Host header may hold, without a port; None: any. On loopback it stops DNS rebinding."""
        if self.on_loopback:
            return frozenset({"127.0.0.1", "localhost", "[::1]", *self.allowed_hosts})
        return frozenset(self.allowed_hosts) or None
