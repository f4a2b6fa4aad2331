"""Which other servers there are: those that the operator names, or a router's workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import urlsplit

from sglang_pic.errors import PicConfigError
from sglang_pic.server.asked import ask

logger = logging.getLogger(__name__)

ROUTER = "router+"
# How long a router's list of its workers holds, and how long it may take.
LIST_S, LIST_TIMEOUT_S = 10.0, 2.0
MOST_PEERS = 64


class Roster(Protocol):
    """Which other servers there are."""

    async def urls(self) -> Sequence[str]: ...


class Named:
    """Those that the operator has named."""

    def __init__(self, urls: Sequence[str]):
        self._urls = tuple(urls)

    async def urls(self) -> Sequence[str]:
        return self._urls


class OfRouter:
    """The workers of SGLang's router.

    Args:
        url: of the router.
        key: the operator's, or ``None``.
    """

    def __init__(self, url: str, key: str | None):
        self._url = url.rstrip("/")
        self._key = key
        self._known: tuple[str, ...] = ()
        self._told = float("-inf")

    async def urls(self) -> Sequence[str]:
        if time.monotonic() - self._told < LIST_S:
            return self._known
        # Who cannot be asked is not asked again at once.
        self._told = time.monotonic()
        told, status = await ask("GET", f"{self._url}/workers", self._key, LIST_TIMEOUT_S)
        try:
            found = [str(one["url"]) for one in told["workers"] if one.get("is_healthy", True)]
        except (KeyError, TypeError, AttributeError):
            logger.warning("sglang_pic: the router does not list its workers: %s", status)
            return self._known
        self._known = tuple(found[:MOST_PEERS])
        return self._known


def _named(address: str) -> list[str]:
    return [url.strip() for url in address.split(",") if url.strip()]


def check_peers(address: str) -> None:
    """Raise ``PicConfigError`` unless it names peers, or a router."""
    urls = _named(address.removeprefix(ROUTER))
    if not urls or len(urls) > (1 if address.startswith(ROUTER) else MOST_PEERS):
        raise PicConfigError(f"1 to {MOST_PEERS} addresses, or one router's: {address!r:.200}")
    for url in urls:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise PicConfigError(f"an address is http://HOST:PORT, got {url!r:.200}")


def roster_of(address: str, key: str | None) -> Roster:
    """Of ``--pic-peers``: ``URL,...``, or ``router+URL``."""
    if address.startswith(ROUTER):
        return OfRouter(address.removeprefix(ROUTER), key)
    return Named(_named(address))
