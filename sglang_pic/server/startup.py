"""The canary is asked while the server starts, before it listens."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from sglang.srt.entrypoints.http_server import get_global_state
from sglang.srt.runtime_context import get_model

from sglang_pic.server.funnel import funnel_of

Lifespan = Callable[[Any], Any]


def canary_first(lifespan: Lifespan) -> Lifespan:
    """An application's lifespan with the canary in front of it: behind it SGLang
    calls its own server, which must listen by then."""

    @contextlib.asynccontextmanager
    async def asking(app: Any) -> AsyncIterator[Any]:
        # Without its weights a model says nothing; its first link waits instead.
        if not get_model().checkpoint_engine_wait_weights_before_ready:
            await funnel_of(get_global_state().tokenizer_manager).canary.settle()
        async with lifespan(app) as state:
            yield state

    return asking
