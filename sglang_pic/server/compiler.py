"""Compile segments: ordinary internal requests whose prompt is one segment."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.metrics.front import counts
from sglang_pic.request.internal import compile_hints

logger = logging.getLogger(__name__)

Generate = Callable[[GenerateReqInput], AsyncIterator[Any]]


@dataclasses.dataclass(frozen=True)
class CompileItem:
    """One path to compute: token ids, and the namespace to keep it in.

    ``segment`` is false for the plain text that opens a prompt: it is computed
    and cached as SGLang's ordinary prefix. ``seams`` and ``named`` as in
    ``compile_hints``.
    """

    ids: tuple[int, ...]
    salt: str | None
    extra_key: str | None
    lora_path: str | None
    segment: bool = True
    seams: tuple[int, ...] = ()
    named: bool = False


def _batches(items: Sequence[CompileItem]) -> list[list[CompileItem]]:
    """Items that may share one SGLang batch request: same adapter."""
    batches: dict[tuple[str | None, str | None], list[CompileItem]] = {}
    for item in items:
        batches.setdefault((item.extra_key, item.lora_path), []).append(item)
    return list(batches.values())


def compile_request(items: Sequence[CompileItem]) -> GenerateReqInput:
    """The internal request that compiles all of a batch."""
    return GenerateReqInput(
        input_ids=[list(item.ids) for item in items],
        sampling_params=[{"max_new_tokens": 0, "temperature": 0} for _ in items],
        cache_salt=[item.salt or "" for item in items],
        extra_key=items[0].extra_key,
        lora_path=items[0].lora_path,
        kv_hints=[
            compile_hints(item.seams, named=item.named) if item.segment else None for item in items
        ],
    )


def _result_of(wait: asyncio.Future[int]) -> int | BaseException:
    if not wait.done():
        return TimeoutError("still compiling")
    if wait.cancelled():
        return asyncio.CancelledError()
    return wait.exception() or wait.result()


class Compiler:
    """Compiles what is asked for, each item once however many requests wait.

    Args:
        generate: SGLang's own ``generate_request``, bound, unhooked.
        page_size: SGLang's.
    """

    def __init__(self, generate: Generate, page_size: int = 1):
        self._generate = generate
        self._page_size = page_size
        self._running: dict[CompileItem, asyncio.Future[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def compile(
        self, items: Sequence[CompileItem], *, timeout_s: float | None = None
    ) -> list[int | BaseException]:
        """Compile all items, the new ones in one batch.

        Args:
            timeout_s: how long to wait for them. What takes longer is compiled all
                the same, for whoever asks next.

        Returns:
            For each item the number of tokens computed for it, 0 where another
            call or an earlier item has it computed; or the exception that ended
            it or the wait: a link goes on without that segment.
        """
        new = [item for item in dict.fromkeys(items) if item not in self._running]
        if new:
            loop = asyncio.get_running_loop()
            counts.compiling += len(new)
            for item in new:
                self._running[item] = loop.create_future()
            # Tasks of their own: a client that leaves must not take the
            # segments others wait for with it.
            for batch in _batches(new):
                task = loop.create_task(self._run(batch))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        waits = [self._running[item] for item in items]
        if waits:
            await asyncio.wait(waits, timeout=timeout_s)
        results = [_result_of(wait) for wait in waits]
        late = len({item for item, wait in zip(items, waits, strict=True) if not wait.done()})
        if late:
            counts.compile_timeouts += late
            logger.warning(
                "sglang_pic: %d segments not compiled within %g s: not waited for", late, timeout_s
            )
        ours = set(new)
        made: list[int | BaseException] = []
        for item, result in zip(items, results, strict=True):
            counted = isinstance(result, BaseException) or item in ours
            made.append(result if counted else 0)
            ours.discard(item)
        return made

    async def _run(self, items: list[CompileItem]) -> None:
        batch = compile_request(items)
        start = time.perf_counter()
        try:
            outputs = await anext(self._generate(batch))
            metas = [output["meta_info"] for output in outputs]
            computed = [meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas]
            for item, tokens in zip(items, computed, strict=True):
                self._running[item].set_result(tokens)
        except Exception as error:
            logger.warning("sglang_pic: compiling %d segments failed: %s", len(items), error)
            counts.compile_failures += len(items)
            for item in items:
                self._running[item].set_exception(error)
                # Consumed here: a client that left will not ask for it.
                self._running[item].exception()
        else:
            of_segment = [item.segment for item in items]
            seconds = time.perf_counter() - start
            counts.observe_compile(computed, of_segment, seconds, self._page_size)
        finally:
            counts.compiling -= len(items)
            for item in items:
                self._running.pop(item).cancel()
