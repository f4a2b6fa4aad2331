"""What this server compiles for its peers: never more than half of what it compiles at a time."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from sglang.srt.runtime_context import get_parallel

from sglang_pic.errors import PicRefused
from sglang_pic.metrics.front import counts
from sglang_pic.server.compiler import Compiler


def server_of(manager: Any) -> str:
    """By which a server knows itself among its peers."""
    args = manager.server_args
    return f"{socket.gethostname()} {args.host}:{args.port}"


class Lending:
    """Of one tokenizer manager.

    Args:
        manager: SGLang's.
        most: segments under way for peers.
    """

    def __init__(self, manager: Any, compiler: Compiler, most: int):
        self._manager = manager
        self._compiler = compiler
        self._most = most
        self._lent = 0

    async def waiting(self) -> int:
        """Tokens that wait to be computed, here and in SGLang's queues."""
        loads = await self._manager.get_loads()
        # A prompt runs on one rank: the least busy one will have it.
        queued = min((load.num_waiting_uncached_tokens for load in loads), default=0)
        return self._compiler.tokens_waiting // max(1, get_parallel().dp_size) + int(queued)

    @contextlib.contextmanager
    def lent(self, segments: int) -> Iterator[None]:
        """Around the compile of so many segments for a peer.

        Raises:
            PicRefused: 503, as many as may be are under way.
        """
        if self._lent and self._lent + segments > self._most:
            message = f"{self._lent} segments are compiled for others, at most {self._most} may be"
            raise PicRefused(HTTPStatus.SERVICE_UNAVAILABLE, message, "publish")
        self._lent += segments
        counts.lent += segments
        try:
            yield
        finally:
            self._lent -= segments
