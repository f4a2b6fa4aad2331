"""What runs between SGLang's processes being up and the server's first request."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

from sglang.srt.entrypoints.http_server import get_global_state
from sglang.srt.runtime_context import get_model

from sglang_pic.server.funnel import funnel_of

Lifespan = Callable[[Any], Any]

LISTEN_TIMEOUT_S = 10.0


def canary_first(lifespan: Lifespan) -> Lifespan:
    """An application's lifespan with the canary in front of it: behind it SGLang
    calls its own server, which must listen by then. One of several tokenizer workers has
    a manager only when its lifespan has begun, and asks then."""

    @contextlib.asynccontextmanager
    async def asking(app: Any) -> AsyncIterator[Any]:
        if not getattr(app, "is_single_tokenizer_mode", False):
            async with lifespan(app) as state:
                await _settle()
                yield state
            return
        await _settle()
        url = app.server_args.url()
        app.warmup_thread_kwargs["post_warmup_callback"] = lambda: wait_until_it_listens(url)
        async with lifespan(app) as state:
            yield state

    return asking


async def _settle() -> None:
    """Without its weights a model says nothing; its first link waits instead."""
    if not get_model().checkpoint_engine_wait_weights_before_ready:
        funnel = funnel_of(get_global_state().tokenizer_manager)
        await funnel.guards.canary.settle()
        await funnel.documents.settle()


def wait_until_it_listens(url: str) -> None:
    """Return when something listens at a server's address, or nothing has for long.

    SGLang's last step of a start, ``POST /freeze_gc`` to itself, comes from a thread that
    is started before the server listens. Its warm-up waits for that; without one
    (``--skip-server-warmup``, or ``--pic-tenants``) the connection is refused, which is
    logged as a traceback, and the garbage collector stays as it is.
    """
    where = urlsplit(url)
    deadline = time.monotonic() + LISTEN_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((where.hostname, where.port)):
            return
        time.sleep(0.1)
