"""Where every request passes: around ``TokenizerManager.generate_request``.

A request without ``pic`` fields goes straight on. One with them becomes token
ids plus spans, its missing segments are compiled, and it is sent to the
scheduler as a link.
"""

from __future__ import annotations

import dataclasses
import functools
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
    missing_of,
    parse_missing,
    samples_of,
    tidy,
    unmarked,
)
from sglang_pic.server.audit import Audit
from sglang_pic.server.calibrate import Calibration
from sglang_pic.server.canary import Canary, Model
from sglang_pic.server.commands import command
from sglang_pic.server.compiler import CompileItem, Compiler
from sglang_pic.server.exchange import Exchange, current
from sglang_pic.server.gate import Gate
from sglang_pic.server.public import check_public
from sglang_pic.server.resolve import Resolver
from sglang_pic.server.send import set_link, set_links
from sglang_pic.server.tenants import set_salt
from sglang_pic.server.wanted import Wanted

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
        return original(manager, obj, request)
    set_salt(obj)
    exchange = current.get()
    attached = check_public(obj)
    pic = exchange.pic if exchange is not None else attached
    if pic is None:
        return unmarked(original(manager, obj, request))
    return funnel_of(manager).run(original, obj, request, pic, exchange)


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
        self.compiler = Compiler(lambda obj: unhooked(manager, obj), page)
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
        counted: set[int] = set()
        if isinstance(pic, dict) and samples_of(obj) == 1:
            set_link(obj, *prompts[0], strict=True)
            outputs = original(self._manager, obj, request)
            missing = None
            try:
                async for out in outputs:
                    missing = missing_of(out)
                    if missing is not None:
                        break
                    out = tidy(out, exchange, counted)
                    answered.see(out)
                    yield out
            except ValueError as error:
                missing = parse_missing(str(error))
                if missing is None:
                    raise
            if missing is None:
                return
            await outputs.aclose()
            wanted = [self.wanted.items(obj, *prompts[0], only=missing)]
            set_link(obj, *prompts[0], strict=False)
        else:
            wanted = [
                self.wanted.items(obj, *prompt, only=None, index=i)
                for i, prompt in enumerate(prompts)
            ]
            set_links(obj, prompts)
        compiled = await self._compile(wanted)
        async for out in original(self._manager, obj, request):
            out = tidy(out, exchange, counted, compiled)
            answered.see(out)
            yield out

    async def _compile(self, wanted: Sequence[Sequence[CompileItem]]) -> list[int]:
        """Compile each prompt's items, all in one batch; tokens computed by prompt."""
        items = [item for items in wanted for item in items]
        timeout_s = self.config.compile_timeout_s
        results = iter(await self.compiler.compile(items, timeout_s=timeout_s))
        made = [[next(results) for _ in items] for items in wanted]
        return [sum(n for n in counts if isinstance(n, int)) for counts in made]

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
