"""Where every request passes: around ``TokenizerManager.generate_request``.

A request without ``pic`` fields goes straight on. One with them becomes token
ids plus spans, its missing segments are compiled, and it is sent to the
scheduler as a link.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.runtime_context import get_memory, get_schedule

from sglang_pic.config import PicConfig
from sglang_pic.link.policy import AUTO, floor_to
from sglang_pic.request.base import LinkRequest
from sglang_pic.server.answers import (
    Answered,
    handed_back,
    interleaved,
    leaving,
    noted,
    samples_of,
    tidy,
    unmarked,
)
from sglang_pic.server.audit import Audit
from sglang_pic.server.binding import bind
from sglang_pic.server.bounds import check_samples
from sglang_pic.server.calibrate import Calibration
from sglang_pic.server.canary import Canary, Model
from sglang_pic.server.commands import command
from sglang_pic.server.compiler import Compiler, Job
from sglang_pic.server.exchange import Exchange, current, noting
from sglang_pic.server.gate import Gate
from sglang_pic.server.public import check_public
from sglang_pic.server.queue import FairQueue
from sglang_pic.server.resolve import Resolver, is_list_of_one
from sglang_pic.server.send import is_batch, set_link, split
from sglang_pic.server.waited import NOTHING, Waited
from sglang_pic.server.waiting import EndedError, Waiting, ended
from sglang_pic.server.wanted import Wanted, caller_of, rank_of

_funnels: weakref.WeakKeyDictionary[Any, Funnel] = weakref.WeakKeyDictionary()


def is_enabled() -> bool:
    """Whether this server runs on our tree cache."""
    return get_memory().radix_cache_backend == "pic"


def funnel_of(manager: Any) -> Funnel:
    """The funnel of a tokenizer manager, made on first use."""
    funnel = _funnels.get(manager)
    if funnel is None:
        funnel = _funnels[manager] = Funnel(manager)
    return funnel


def generate_request(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any = None
) -> AsyncGenerator[Any, None]:
    """Around ``TokenizerManager.generate_request``."""
    if not isinstance(obj, GenerateReqInput) or not is_enabled():
        bind(obj)
        return original(manager, obj, request)
    exchange = current.get()
    with noting(exchange), leaving(obj):
        check_samples(obj)
        bind(obj)
        pic = check_public(obj)
    if exchange is not None and exchange.pic is not None:
        pic = exchange.pic
    if pic is None:
        return noted(unmarked(original(manager, obj, request)), exchange, obj)
    if exchange is not None:
        exchange.salt = obj.cache_salt
    if isinstance(pic, dict) and is_list_of_one(obj):
        pic = [pic]
    return noted(funnel_of(manager).run(original, obj, request, pic, exchange), exchange, obj)


def abort_request(manager: Any, rid: str = "", abort_all: bool = False) -> None:
    """After ``TokenizerManager.abort_request``: those that wait in the front end too."""
    funnel = _funnels.get(manager)
    if funnel is not None:
        funnel.waiting.abort(rid, abort_all)


class Funnel:
    """Turns requests with ``pic`` fields into links, for one tokenizer manager."""

    def __init__(self, manager: Any):
        self._manager = manager
        self.config = PicConfig.from_env()
        context = self.config.compile_context
        page = get_schedule().page_size
        self.context = tuple(context[: floor_to(len(context), page)])
        self.resolver = Resolver(manager, self.config.link_defaults)
        self.wanted = Wanted(self.context, self.config)
        self._is_hybrid = mambaish_config(manager.model_config) is not None
        unhooked = type(manager).generate_request.__wrapped__
        self.compiler = Compiler(
            lambda obj: unhooked(manager, obj), self._queue(), self.urgency, page
        )
        self.waiting = Waiting(manager, self.urgency)
        self.gate = Gate()

        async def generate(obj: GenerateReqInput) -> Any:
            return await anext(unhooked(manager, obj))

        async def flush(salt: str) -> None:
            await command(manager, "flush", cache_salt=salt)

        self.calibration = Calibration(generate)
        self.audit = Audit(
            generate, flush, lambda: not manager.rid_to_state, self.config, self.gate
        )
        self.canary = Canary(
            generate, functools.partial(command, manager), self._model, self.config, self.gate
        )

    def _queue(self) -> FairQueue[Job]:
        """Compiles fill at most half of the places in SGLang's own queue."""
        config, limit = self.config, get_schedule().max_queued_requests
        most = config.compiles if limit is None else min(config.compiles, max(1, limit // 2))
        return FairQueue(most, config.tenant_compiles, config.compile_queue)

    def urgency(self, priority: int | None) -> int:
        """Of a request's priority, the lowest goes first, as SGLang schedules it."""
        schedule = get_schedule()
        if not schedule.enable_priority_scheduling:
            return 0
        if priority is None:
            priority = self._manager.default_priority_value
        if priority is None:
            return sys.maxsize
        return priority if schedule.schedule_low_priority_values_first else -priority

    async def run(
        self,
        original: Callable[..., AsyncGenerator[Any, None]],
        obj: GenerateReqInput,
        request: Any,
        pic: Any,
        exchange: Exchange | None,
    ) -> AsyncGenerator[Any, None]:
        """Compile what is missing, link, and tidy the report in every output."""
        asked = self.resolver.resolve(obj, pic, exchange)
        await self.canary.settle()
        prompts = [self.settled(*one) for one in asked]
        calibration = self.calibration if self._is_hybrid else None
        usual = self.config.link_defaults
        answered = Answered(calibration, self.audit, usual, obj, asked, prompts)
        waited = [NOTHING] * len(prompts)
        samples = samples_of(obj)
        if is_batch(obj):
            outputs = self._batch(original, obj, request, prompts, waited)
        else:
            outputs = self._prompt(original, obj, request, prompts, waited, 0)
        counted: set[int] = set()
        async with contextlib.aclosing(outputs):
            async for out in outputs:
                out = tidy(out, exchange, counted, waited, samples)
                answered.see(out)
                yield out

    async def _batch(
        self,
        original: Callable[..., AsyncGenerator[Any, None]],
        obj: GenerateReqInput,
        request: Any,
        prompts: Sequence[tuple[list[int], LinkRequest]],
        waited: list[Waited],
    ) -> AsyncGenerator[Any, None]:
        """A batch: each of its prompts by itself; all answers in one list, or as they come."""
        lives = [
            self._prompt(original, one, request, prompts, waited, i)
            for i, one in enumerate(split(obj))
        ]
        if obj.stream:
            async with contextlib.aclosing(interleaved(lives, samples_of(obj))) as outputs:
                async for out in outputs:
                    yield out
            return
        answers = await self._manager._collect_batch_responses(lives)
        yield [one for out in answers for one in (out if isinstance(out, list) else [out])]

    async def _prompt(
        self,
        original: Callable[..., AsyncGenerator[Any, None]],
        obj: GenerateReqInput,
        request: Any,
        prompts: Sequence[tuple[list[int], LinkRequest]],
        waited: list[Waited],
        index: int,
    ) -> AsyncGenerator[Any, None]:
        """The life of one prompt: ask what is missing, wait for it, run. ``waited`` is
        told before the first output."""
        ids, link = prompts[index]
        with self.waiting.stay(obj) as stay:
            outputs, missing = await self._ask(original, obj, request, ids, link)
            if missing:
                work = self._compile(obj, ids, link, missing)
                try:
                    waited[index] = await self.waiting.until(stay, obj, request, work)
                except Exception as error:
                    samples = samples_of(obj)
                    if samples > 1:
                        # Its endpoint looks for what SGLang would have made of it.
                        obj.normalize_batch_and_arguments()
                    if not isinstance(error, EndedError):
                        raise
                    outputs = ended(error, samples, stream=obj.stream)
                else:
                    set_link(obj, ids, link, strict=False)
                    outputs = original(self._manager, obj, request)
        async with contextlib.aclosing(outputs):
            async for out in outputs:
                yield out

    async def _ask(
        self,
        original: Callable[..., AsyncGenerator[Any, None]],
        obj: GenerateReqInput,
        request: Any,
        ids: list[int],
        link: LinkRequest,
    ) -> tuple[AsyncGenerator[Any, None], Sequence[int]]:
        """Outputs of a prompt, or what has to be compiled first.

        A strict link is the question, and where nothing is missing already runs. Of
        several samples each would come back: there a command asks.
        """
        if samples_of(obj) == 1:
            set_link(obj, ids, link, strict=True)
            return await handed_back(original(self._manager, obj, request))
        missing = await self._missing(obj, ids, link) if self.wanted.links(link) else []
        set_link(obj, ids, link, strict=False)
        return original(self._manager, obj, request), missing

    async def _missing(
        self, obj: GenerateReqInput, ids: list[int], link: LinkRequest
    ) -> Sequence[int]:
        """What the rank that the request names does not hold; without a name, what none
        of them does."""
        ranks = await command(
            self._manager,
            "missing",
            ids=ids,
            link=link,
            cache_salt=obj.cache_salt,
            extra_key=obj.extra_key,
            lora_path=obj.lora_path,
            rank=rank_of(obj),
        )
        return [i for i in ranks[0]["missing"] if all(i in rank["missing"] for rank in ranks)]

    async def _compile(
        self, obj: GenerateReqInput, ids: list[int], link: LinkRequest, missing: Sequence[int]
    ) -> Waited:
        """Compile what is missing, as far as there is time."""
        start = time.monotonic()
        made = await self.compiler.compile(
            self.wanted.items(obj, ids, link, missing),
            caller_of(obj),
            timeout_s=self.config.compile_timeout_s,
            limit_s=self.config.compile_limit_s,
        )
        return Waited(missing, made, time.monotonic() - start)

    def settled(self, ids: list[int], link: LinkRequest) -> tuple[list[int], LinkRequest]:
        """Settle the state policy, and whether anything is linked now."""
        options = link.options
        if options.state == AUTO:
            options = dataclasses.replace(options, state=self.calibration.policy)
        return ids, dataclasses.replace(link, options=options, off=self.gate.reason)

    def _model(self) -> Model:
        config = self._manager.model_config
        return Model(
            vocabulary=config.vocab_size,
            longest=self._manager.max_req_input_len,
            page=get_schedule().page_size,
            context=self.context,
        )
