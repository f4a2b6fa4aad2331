"""One other server of the same model, and how it is asked to compile a segment.

It writes what it has compiled into the store that both read; only a word about it comes
back over HTTP. Nothing here raises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from http import HTTPStatus

from sglang_pic.metrics.front import counts
from sglang_pic.server.asked import ask
from sglang_pic.server.sources import BackOff

logger = logging.getLogger(__name__)

# How long what a peer says of its load holds, and how long it may take to say it.
LOAD_S, LOAD_TIMEOUT_S = 1.0, 0.5
# Why a peer has not compiled a segment.
BUSY, FAILED, LATE = "peer_busy", "peer_failed", "peer_late"


class Peer:
    """One peer.

    Args:
        url: of the server.
        key: the operator's, that it asks for, or ``None``.
        timeout_s: how long a compile may take, until its value is written.

    Attributes:
        load: tokens that wait there: what it last said, and what it was given since.
        server: its own name for itself, once it has answered.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float):
        self.url = url.rstrip("/")
        self.load = 0
        self.server: str | None = None
        self.back_off = BackOff()
        self._key = key
        self._timeout_s = timeout_s
        self._told = float("-inf")

    @property
    def is_known(self) -> bool:
        """Whether what it last said of its load still holds."""
        return time.monotonic() - self._told < LOAD_S

    async def look(self) -> None:
        """Ask for its load, unless what it said still holds."""
        if self.is_known or self.back_off.is_on:
            return
        told, _ = await ask("GET", f"{self.url}/pic/load", self._key, LOAD_TIMEOUT_S)
        server, tokens = told.get("server"), told.get("tokens")
        if isinstance(server, str) and type(tokens) is int and tokens >= 0:
            self.server, self.load, self._told = server, tokens, time.monotonic()
            return
        self.failed("does not tell its load")

    async def compile(
        self, ids: Sequence[int], *, salt: str | None, seam: int, no_logs: bool
    ) -> str | None:
        """Have it compile a segment and write its value; why not, if it does not.

        Args:
            ids: of the segment, without a compile context.
        """
        body = {
            "input_ids": list(ids),
            "cache_salt": salt,
            "seam": seam,
            "no_logs": no_logs,
            "publish": True,
        }
        told, status = await ask(
            "POST", f"{self.url}/pic/compile", self._key, self._timeout_s, json=body
        )
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            return BUSY
        segments = told.get("segments")
        if status == HTTPStatus.OK and isinstance(segments, list) and len(segments) == 1:
            return None
        self.failed(f"does not compile: {status} {told!r:.300}")
        return LATE if status == HTTPStatus.GATEWAY_TIMEOUT else FAILED

    def worked(self) -> None:
        """What it compiled is held here."""
        self.back_off.worked()

    def failed(self, what: str) -> None:
        """It has not done what it should."""
        if self.back_off.failed():
            counts.observe_back_off(self.url)
            logger.warning(
                "sglang_pic: the peer %s is left alone for a while: it %s", self.url, what
            )
