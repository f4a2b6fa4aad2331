"""Compile segments: ordinary internal requests whose prompt is one segment."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.request.hints import compile_hints

logger = logging.getLogger(__name__)

Generate = Callable[[GenerateReqInput], AsyncIterator[Any]]


@dataclasses.dataclass(frozen=True)
class CompileItem:
    """One path to compute: token ids, and the namespace to keep it in.

    ``segment`` is false for the plain text that opens a prompt: it is computed
    and cached as SGLang's ordinary prefix. ``seams`` as in ``compile_hints``.
    """

    ids: tuple[int, ...]
    salt: str | None
    extra_key: str | None
    lora_path: str | None
    segment: bool = True
    seams: tuple[int, ...] = ()


def _batches(items: Sequence[CompileItem]) -> list[list[CompileItem]]:
    """Items that may share one SGLang batch request: same adapter."""
    batches: dict[tuple[str | None, str | None], list[CompileItem]] = {}
    for item in items:
        batches.setdefault((item.extra_key, item.lora_path), []).append(item)
    return list(batches.values())


class Compiler:
    """Compiles what is asked for, each item once however many requests wait.

    Args:
        generate: SGLang's own ``generate_request``, bound, unhooked.
    """

    def __init__(self, generate: Generate):
        self._generate = generate
        self._running: dict[CompileItem, asyncio.Future[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def compile(self, items: Sequence[CompileItem]) -> list[int | BaseException]:
        """Compile all items, the new ones in one batch.

        Returns:
            For each item the number of tokens computed for it, 0 where another
            call or an earlier item has it computed; or the exception that ended
            it: a link goes on without a segment that failed.
        """
        new = [item for item in dict.fromkeys(items) if item not in self._running]
        if new:
            loop = asyncio.get_running_loop()
            for item in new:
                self._running[item] = loop.create_future()
            # Tasks of their own: a client that leaves must not take the
            # segments others wait for with it.
            for batch in _batches(new):
                task = loop.create_task(self._run(batch))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        waits = [asyncio.shield(self._running[item]) for item in items]
        results = await asyncio.gather(*waits, return_exceptions=True)
        ours = set(new)
        made: list[int | BaseException] = []
        for item, result in zip(items, results, strict=True):
            counted = isinstance(result, BaseException) or item in ours
            made.append(result if counted else 0)
            ours.discard(item)
        return made

    async def _run(self, items: list[CompileItem]) -> None:
        batch = GenerateReqInput(
            input_ids=[list(item.ids) for item in items],
            sampling_params=[{"max_new_tokens": 0, "temperature": 0} for _ in items],
            cache_salt=[item.salt or "" for item in items],
            extra_key=items[0].extra_key,
            lora_path=items[0].lora_path,
            kv_hints=[compile_hints(item.seams) if item.segment else None for item in items],
        )
        try:
            outputs = await anext(self._generate(batch))
            for item, output in zip(items, outputs, strict=True):
                meta = output["meta_info"]
                self._running[item].set_result(meta["prompt_tokens"] - meta["cached_tokens"])
        except Exception as error:
            logger.warning("sglang_pic: compiling %d segments failed: %s", len(items), error)
            for item in items:
                self._running[item].set_exception(error)
                # Consumed here: a client that left will not ask for it.
                self._running[item].exception()
        finally:
            for item in items:
                self._running.pop(item).cancel()
