"""Where every request passes: around ``TokenizerManager.generate_request``.

A request without ``pic`` fields goes straight on, unless segments are found in it. The
life of one with segments, six functions of six modules:

1. ``resolve.Resolver.resolve``: its body is token ids and spans; or
   ``finding.Finding.search``: some are found that it does not name;
2. ``guards.Guards.settled``: whether anything is linked now, and by which policy;
3. ``asking.Asking.ask``: what of it has to be compiled first;
4. ``compiler.Compiler.compile``: that is compiled;
5. ``send.set_link``: the scheduler gets it as a link;
6. ``answers.tidy``: its report is put in order.

One whose segments a trained encoder reads lives in ``encoded_life`` instead of 3 to 5.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.runtime_context import get_memory, get_parallel, get_schedule

from sglang_pic.config import EXACT, IDLE, OFF, PAYS, PicConfig
from sglang_pic.link.policy import ENCODE, floor_to
from sglang_pic.server import stored
from sglang_pic.server.answers import (
    interleaved,
    leaving,
    noted,
    samples_of,
    tidy,
    unmarked,
)
from sglang_pic.server.asking import Asking, Generate
from sglang_pic.server.binding import bind
from sglang_pic.server.bounds import check_samples
from sglang_pic.server.cold import Cold
from sglang_pic.server.commands import command
from sglang_pic.server.companions import Companions, Maker, WhenAsked, WhenIdle
from sglang_pic.server.compiler import Compiler, Job
from sglang_pic.server.documents import Documents, NoDocuments
from sglang_pic.server.encoded_life import Fetches
from sglang_pic.server.encoding import Job as EncodeJob
from sglang_pic.server.exchange import Exchange, current, noting
from sglang_pic.server.fetching import Fetching, FromStore, NoStore
from sglang_pic.server.finding import Finding, Found
from sglang_pic.server.guards import Guards
from sglang_pic.server.guests import Inviting, Nobody, Own, Shipped
from sglang_pic.server.lending import Lending, server_of
from sglang_pic.server.life import Lives, Prompt
from sglang_pic.server.peers import FromPeers
from sglang_pic.server.placing import LeastWork, OneRank
from sglang_pic.server.public import check_public
from sglang_pic.server.queue import FairQueue
from sglang_pic.server.resolve import Resolver, is_list_of_one
from sglang_pic.server.roster import roster_of
from sglang_pic.server.send import is_batch, split
from sglang_pic.server.stored import Item, Kind
from sglang_pic.server.urgency import urgency
from sglang_pic.server.waited import NOTHING, Waited
from sglang_pic.server.waiting import Waiting
from sglang_pic.server.wanted import Wanted
from sglang_pic.server.with_encoder import WithEncoder

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
        if isinstance(pic, dict) and is_list_of_one(obj):
            pic = [pic]
        found = _found(manager, obj, exchange, pic)
    if found is not None:
        if exchange is not None:
            exchange.pic, exchange.salt = pic or {}, obj.cache_salt
        outputs = funnel_of(manager).run(original, obj, request, pic, exchange, found)
        return noted(outputs, exchange, obj)
    if pic is None:
        return noted(unmarked(original(manager, obj, request)), exchange, obj)
    if exchange is not None:
        exchange.salt = obj.cache_salt
    return noted(funnel_of(manager).run(original, obj, request, pic, exchange), exchange, obj)


def _found(
    manager: Any, obj: GenerateReqInput, exchange: Exchange | None, pic: Any
) -> list[Found] | None:
    """What is found in each prompt of a request, if anything is linked.

    Raises:
        PicRequestError: its ``pic`` object is malformed.
    """
    if pic is None and exchange is not None:
        pic = exchange.find
    found = funnel_of(manager).finding.search(obj, exchange, pic)
    if found is None or any(one.segments for one in found):
        return found
    if samples_of(obj) == 1:
        # SGLang's own: it takes them, and tokenises no text again.
        ids = [one.ids for one in found]
        obj.input_ids = ids if is_batch(obj) else ids[0]
    return None


def abort_request(manager: Any, rid: str = "", abort_all: bool = False) -> None:
    """After ``TokenizerManager.abort_request``: those that wait in the front end too."""
    funnel = _funnels.get(manager)
    if funnel is not None:
        funnel.waiting.abort(rid, abort_all)


class Funnel:
    """The parts of one tokenizer manager's front, and a request's way through them.

    Attributes:
        config: the server's settings.
        context: its compile context, whole pages.
    """

    def __init__(self, manager: Any):
        self._manager = manager
        self.config = PicConfig.from_env()
        context = self.config.compile_context
        page = get_schedule().page_size
        self.context = tuple(context[: floor_to(len(context), page)])
        self.resolver = Resolver(manager, self.config.link_defaults)
        self.wanted = Wanted(self.context, self.config)
        unhooked = type(manager).generate_request.__wrapped__
        urgency_of = functools.partial(urgency, manager)
        fetching = self._fetching()
        queue = self._queue()
        self.compiler = Compiler(
            lambda obj: unhooked(manager, obj), queue, urgency_of, page, fetching
        )
        self.lending = Lending(manager, self.compiler, max(1, queue.most // 2))
        self.waiting = Waiting(manager, urgency_of)
        self.guards = Guards(manager, self.config, self.context, unhooked)
        asking = Asking(manager, self.wanted)
        has_companies = self.config.company != "off"
        self.maker = Maker(
            self.compiler if has_companies else None,
            lambda: manager.max_req_input_len - 1,
            self._inviting() if has_companies else Nobody(),
            self.config.company_seam,
        )
        companions: Companions = WhenAsked()
        if has_companies and self.config.company_when == IDLE:
            shortest = max(self.config.min_segment, page)
            companions = WhenIdle(self.maker, shortest, lambda: not manager.rid_to_state)
        cold = Cold(self.compiler, fetching.busiest, allowed=self.config.cold == EXACT)
        self.documents = self._documents(urgency_of)
        self.finding = Finding(
            self.config,
            self.resolver,
            self.wanted,
            self.compiler,
            lambda: not manager.rid_to_state,
            lambda: self.guards.gate.reason is None,
        )
        ranks = get_parallel().dp_size
        self.lives = Lives(
            manager,
            self.config,
            self.wanted,
            asking,
            self.compiler,
            self.waiting,
            cold,
            companions,
            LeastWork(ranks) if ranks > 1 else OneRank(),
            fetching,
        )

    def _fetching(self) -> Fetching:
        """Where segments come from that are not held."""
        config, manager = self.config, self._manager
        if config.store is None:
            return NoStore()

        def tenant_of(space: str) -> str:
            return space.removeprefix(self.wanted.space(None))

        store = self._from_store(
            stored.Segments(tenant_of, len(self.context), get_parallel().dp_size)
        )
        if config.peers is None:
            return store
        args = manager.server_args
        key = args.admin_api_key or args.api_key
        return FromPeers(
            store,
            roster_of(config.peers, key),
            server_of(manager),
            lambda: self.lending.waiting(),
            key,
            config.peer_timeout_s,
            tenant_of,
            len(self.context),
        )

    def _from_store(self, kind: Kind[Item]) -> FromStore[Item]:
        """Asks this server's schedulers for what the store has of one kind."""
        manager, config = self._manager, self.config
        return FromStore(
            functools.partial(command, manager),
            kind,
            lambda: manager.max_req_input_len - 1,
            config.store_timeout_s,
            always=config.store_when != PAYS,
        )

    def _documents(self, urgency_of: Callable[[int | None], int]) -> Documents:
        """Prompts whose documents an encoder reads."""
        config = self.config
        if config.encoder is None:
            return NoDocuments()
        queue: FairQueue[EncodeJob] = FairQueue(
            config.compiles, config.tenant_compiles, config.compile_queue
        )
        send = functools.partial(command, self._manager)
        fetching: Fetches = NoStore()
        if config.store is not None:
            fetching = self._from_store(stored.Documents())
        return WithEncoder(
            self._manager, config, self.waiting, urgency_of, queue, send, fetching, self.guards
        )

    def _inviting(self) -> Inviting:
        """Nothing is touched by what a prompt does not contain, but where a tenant is one
        trust domain. Guests do a hybrid harm (docs/ideas/companies.md)."""
        config, tokenizer = self.config, self._manager.tokenizer
        if config.guests == OFF or mambaish_config(self._manager.model_config) is not None:
            return Nobody()
        shipped: Inviting = Shipped(tokenizer) if tokenizer is not None else Nobody()
        return Own(shipped) if config.company == "tenant" else shipped

    def _queue(self) -> FairQueue[Job]:
        """Compiles fill at most half of the places in SGLang's own queue."""
        config, limit = self.config, get_schedule().max_queued_requests
        most = config.compiles if limit is None else min(config.compiles, max(1, limit // 2))
        return FairQueue(most, config.tenant_compiles, config.compile_queue)

    async def run(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        pic: Any,
        exchange: Exchange | None,
        found: Sequence[Found] = (),
    ) -> AsyncGenerator[Any, None]:
        """Outputs of a request with ``pic`` fields, a report in each.

        Args:
            found: its segments, prompt by prompt, where any are looked for and some linked.
        """
        asked = [one.prompt for one in found] or self.resolver.resolve(obj, pic, exchange)
        await self.guards.canary.settle()
        prompts = [self.guards.settled(*one) for one in asked]
        for prompt in prompts:
            if prompt[1].options.mode == ENCODE:
                await self.documents.settle()
                self.documents.check(prompt)
        watching = self.guards.watching(obj, asked, prompts)
        waited = [NOTHING] * len(prompts)
        samples = samples_of(obj)
        if is_batch(obj):
            outputs = self._batch(generate, obj, request, prompts, waited)
        else:
            outputs = self._live(generate, obj, request, prompts[0], waited, 0)
        counted: set[int] = set()
        async with contextlib.aclosing(outputs):
            async for out in outputs:
                out = tidy(out, exchange, counted, waited, samples, found)
                watching.see(out)
                yield out

    def _live(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        prompt: Prompt,
        waited: list[Waited],
        index: int,
    ) -> AsyncGenerator[Any, None]:
        """One prompt, by what its segments are to be."""
        encodes = prompt[1].options.mode == ENCODE
        live = self.documents.live if encodes else self.lives.live
        return live(generate, obj, request, prompt, waited, index)

    async def _batch(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        prompts: Sequence[Prompt],
        waited: list[Waited],
    ) -> AsyncGenerator[Any, None]:
        """A batch: each of its prompts by itself; all answers in one list, or as they come."""
        lives = [
            self._live(generate, one, request, prompts[i], waited, i)
            for i, one in enumerate(split(obj))
        ]
        if obj.stream:
            async with contextlib.aclosing(interleaved(lives, samples_of(obj))) as outputs:
                async for out in outputs:
                    yield out
            return
        answers = await self._manager._collect_batch_responses(lives)
        yield [one for out in answers for one in (out if isinstance(out, list) else [out])]
