"""The life of one prompt: ask what is missing, wait until it is compiled, run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.config import PicConfig
from sglang_pic.request.base import LinkRequest
from sglang_pic.server.answers import most_tokens_of, report_of, samples_of
from sglang_pic.server.asking import Asking, Generate
from sglang_pic.server.cold import FIRST_TIME, Cold
from sglang_pic.server.companions import Companions
from sglang_pic.server.compiler import Compiler
from sglang_pic.server.fetching import Fetching
from sglang_pic.server.items import CompileItem
from sglang_pic.server.placing import Placing
from sglang_pic.server.send import set_link
from sglang_pic.server.waited import Waited
from sglang_pic.server.waiting import EndedError, Waiting, ended
from sglang_pic.server.wanted import Wanted, caller_of

Prompt = tuple[list[int], LinkRequest]


def _overlook(out: Any) -> None:
    pass


class Lives:
    """Lives of the prompts of one tokenizer manager."""

    def __init__(
        self,
        manager: Any,
        config: PicConfig,
        wanted: Wanted,
        asking: Asking,
        compiler: Compiler,
        waiting: Waiting,
        cold: Cold,
        companions: Companions,
        placing: Placing,
        fetching: Fetching,
    ):
        self._manager = manager
        self._config = config
        self._wanted = wanted
        self._asking = asking
        self._compiler = compiler
        self._waiting = waiting
        self._cold = cold
        self._companions = companions
        self._placing = placing
        self._fetching = fetching

    async def live(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        prompt: Prompt,
        waited: list[Waited],
        index: int,
    ) -> AsyncGenerator[Any, None]:
        """Outputs of a prompt. ``waited[index]`` is told before the first."""
        ids, link = prompt
        see: Callable[[Any], None] = _overlook
        with contextlib.ExitStack() as behind:
            if self._wanted.links(link):
                space = self._wanted.space(obj.cache_salt)
                behind.enter_context(self._placing.placed(obj, space, ids, link))
            with self._waiting.stay(obj) as stay:
                outputs, missing = await self._asking.ask(generate, obj, request, ids, link)
                items = self._wanted.items(obj, ids, link, missing)
                at_once = most_tokens_of(obj) != 0 and self._is_cheaper(ids, link, missing, items)
                if missing:
                    try:
                        if at_once and self._fetching.has_store:
                            known = self._fetching.known(items)
                            stored = await self._waiting.until(stay, obj, request, known)
                            rest = list(itertools.compress(items, (not one for one in stored)))
                            at_once = self._is_cheaper(ids, link, missing, rest)
                        if not at_once:
                            work = self._compile(obj, missing, items)
                            waited[index] = await self._waiting.until(stay, obj, request, work)
                    except Exception as error:
                        samples = samples_of(obj)
                        if samples > 1:
                            # Its endpoint looks for what SGLang would have made of it.
                            obj.normalize_batch_and_arguments()
                        if not isinstance(error, EndedError):
                            raise
                        outputs = ended(error, samples, stream=obj.stream)
                    else:
                        if at_once:
                            see = behind.enter_context(self._cold.answered(items, caller_of(obj)))
                        off = FIRST_TIME if at_once else link.off
                        set_link(obj, ids, dataclasses.replace(link, off=off), strict=False)
                        outputs = generate(self._manager, obj, request)
            report: Any = None
            async with contextlib.aclosing(outputs):
                async for out in outputs:
                    if report is None and (report := report_of(out)) is not None:
                        kind = self._wanted.kind(obj, ids, link)
                        self._companions.saw(kind, ids, link, report)
                    see(out)
                    yield out

    def _is_cheaper(
        self,
        ids: Sequence[int],
        link: LinkRequest,
        missing: Sequence[int],
        items: Sequence[CompileItem],
    ) -> bool:
        """Whether to answer at once a prompt that lacks ``missing``, of which ``items`` would
        have to be computed."""
        return bool(missing) and self._cold.is_cheaper(ids, link, missing, items)

    async def _compile(
        self, obj: GenerateReqInput, missing: Sequence[int], items: Sequence[CompileItem]
    ) -> Waited:
        """Compile what is missing, as far as there is time."""
        start = time.monotonic()
        made = await self._compiler.compile(
            items,
            caller_of(obj),
            timeout_s=self._config.compile_timeout_s,
            limit_s=self._config.compile_limit_s,
        )
        return Waited(missing, made, time.monotonic() - start)
