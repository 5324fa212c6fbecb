"""Connections to engines: without a limit of number or time, for an answer may take minutes, but noticed when they are dead.

A lost node closes no connection. So the kernel asks whether the other end is still there, and gives up after a minute.
"""

from __future__ import annotations

import socket
from typing import Any

import aiohttp

IDLE_SECONDS = 3.0
"""How long an unused connection to an engine is kept: vLLM 0.32 closes it after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), and a
request sent just then would fail."""
OWN_REQUEST = aiohttp.ClientTimeout(total=300)
"""Of a request of our own (a probe, a first chat, an adapter to load): an engine that has not answered by then hangs."""
_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
)


def open_session(auto_decompress: bool = True) -> aiohttp.ClientSession:
    """A session for engines. Close it at the end."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS, socket_factory=_watched_socket),
        auto_decompress=auto_decompress,
    )


def _watched_socket(address: tuple[Any, ...]) -> socket.socket:
    """address: as of getaddrinfo."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    for level, option, value in _ALIVE:
        made.setsockopt(level, option, value)
    return made
