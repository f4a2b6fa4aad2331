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
from sglang.srt.managers.kv_hints import KvHintsEnvelope
from sglang.srt.runtime_context import get_memory, get_schedule

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicRequestError
from sglang_pic.forest.keys import is_reserved, namespace
from sglang_pic.link.policy import AUTO, floor_to
from sglang_pic.request.base import OPENING, LinkRequest
from sglang_pic.request.fields import check_inside, check_length, parse_fields
from sglang_pic.request.hints import INTERNAL, LINK, PUBLIC, find_action, link_hints
from sglang_pic.request.tokenize import encode_marked
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
from sglang_pic.server.tenants import set_salt

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
    pic = exchange.pic if exchange is not None else _public_action(obj.kv_hints)
    _check_reserved(obj)
    if pic is None:
        return unmarked(original(manager, obj, request))
    return funnel_of(manager).run(original, obj, request, pic, exchange)


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _public_action(hints: Any) -> Any:
    found = [
        find_action(item, PUBLIC) for item in _each(hints) if isinstance(item, KvHintsEnvelope)
    ]
    if not any(item is not None for item in found):
        return None
    return found if isinstance(hints, list) else found[0]


def _check_reserved(obj: GenerateReqInput) -> None:
    if any(is_reserved(salt) for salt in _each(obj.cache_salt)):
        raise PicRequestError("cache_salt", "this prefix is reserved for compiled segments")
    for hints in _each(obj.kv_hints):
        if isinstance(hints, KvHintsEnvelope) and any(
            find_action(hints, action) is not None for action in INTERNAL
        ):
            raise PicRequestError("kv_hints", f"{', '.join(INTERNAL)} are internal; use 'pic'")


class Funnel:
    """Turns requests with ``pic`` fields into links, for one tokenizer manager."""

    def __init__(self, manager: Any):
        self._manager = manager
        self.config = PicConfig.from_env()
        context = self.config.compile_context
        page = get_schedule().page_size
        self.context = tuple(context[: floor_to(len(context), page)])
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
        asked = self._resolve(obj, pic, exchange)
        await self.canary.settle()
        prompts = [self._settled(*one) for one in asked]
        calibration = self.calibration if self._is_hybrid else None
        usual = self.config.link_defaults
        answered = Answered(calibration, self.audit, usual, obj, asked, prompts)
        counted: set[int] = set()
        if isinstance(pic, dict) and samples_of(obj) == 1:
            _set_link(obj, *prompts[0], strict=True)
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
            wanted = [self._items(obj, *prompts[0], only=missing)]
            _set_link(obj, *prompts[0], strict=False)
        else:
            wanted = [
                self._items(obj, *prompt, only=None, index=i) for i, prompt in enumerate(prompts)
            ]
            _set_links(obj, prompts)
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

    # -- what a request leaves to us --------------------------------------------------

    def prompt(
        self, text: str | None, ids: list[int] | None, pic: Any
    ) -> tuple[list[int], LinkRequest]:
        """Token ids and link of one prompt, as a request would be linked now.

        Raises:
            PicRequestError: it is malformed.
        """
        return self._settled(*self._resolve_one(text, ids, pic))

    def _settled(self, ids: list[int], link: LinkRequest) -> tuple[list[int], LinkRequest]:
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

    # -- to the internal form ---------------------------------------------------

    def _resolve(
        self, obj: GenerateReqInput, pic: Any, exchange: Exchange | None
    ) -> list[tuple[list[int], LinkRequest]]:
        """Token ids and link of every prompt of the request."""
        if exchange is not None and exchange.marks is not None:
            return [self._resolve_chat(obj, pic, exchange)]
        batched = isinstance(obj.text, list) or (
            isinstance(obj.input_ids, list)
            and bool(obj.input_ids)
            and isinstance(obj.input_ids[0], list)
        )
        if not batched:
            if isinstance(pic, list):
                raise PicRequestError("pic", "must be one object, the request has one prompt")
            return [self._resolve_one(obj.text, obj.input_ids, pic)]
        texts = obj.text if obj.text is not None else [None] * len(obj.input_ids)
        ids = obj.input_ids if obj.input_ids is not None else [None] * len(obj.text)
        if not isinstance(pic, list) or len(pic) != len(texts):
            raise PicRequestError("pic", f"must be a list of {len(texts)} objects, one a prompt")
        if obj.stream:
            raise PicRequestError("pic", "a batch cannot be streamed; send its prompts one by one")
        return [self._resolve_one(*one) for one in zip(texts, ids, pic, strict=True)]

    def _resolve_one(
        self, text: str | None, ids: list[int] | None, pic: Any
    ) -> tuple[list[int], LinkRequest]:
        fields = parse_fields(pic or {}, self.config.link_defaults)
        if ids is not None:
            check_inside(fields.ranges, len(ids), "tokens")
            return list(ids), LinkRequest(fields.ranges, fields.options)
        if text is None:
            raise PicRequestError("pic", "needs a prompt given as text or as token ids")
        check_length(text, self._manager.model_config.context_len, "text")
        check_inside(fields.ranges, len(text), "characters")
        ids, spans = encode_marked(
            self._manager.tokenizer, text, fields.ranges, rule=fields.tokenize
        )
        return ids, LinkRequest(spans, fields.options)

    def _resolve_chat(
        self, obj: GenerateReqInput, pic: Any, exchange: Exchange
    ) -> tuple[list[int], LinkRequest]:
        fields = parse_fields(
            {key: value for key, value in pic.items() if key != "segments"},
            self.config.link_defaults,
        )
        assert exchange.marks is not None
        if exchange.ids is not None:
            ids = list(obj.input_ids or [])
            if ids[: len(exchange.ids)] != exchange.ids:
                raise PicRequestError("messages", "the prompt was changed behind the template")
            return ids, LinkRequest(exchange.spans, fields.options)
        if not isinstance(obj.text, str):
            raise PicRequestError("messages", "this model's chat encoding cannot carry segments")
        text, ranges = exchange.marks.cut(obj.text)
        ids, spans = encode_marked(self._manager.tokenizer, text, ranges, rule=fields.tokenize)
        return ids, LinkRequest(spans, fields.options)

    # -- what to compile ----------------------------------------------------------

    def _items(
        self,
        obj: GenerateReqInput,
        ids: list[int],
        link: LinkRequest,
        *,
        only: Sequence[int] | None,
        index: int = 0,
    ) -> list[CompileItem]:
        """Segments (and the opening text) of the request's prompt number
        ``index``, or those of them in ``only``."""
        options = link.options
        if not options.link or link.is_exact or options.policy == "full":
            return []
        salt, extra_key, lora = (
            value[index] if isinstance(value, list) else value
            for value in (obj.cache_salt, obj.extra_key, obj.lora_path)
        )
        items = []
        opening = link.spans[0].start if link.spans else 0
        if OPENING in only if only is not None else opening >= self.config.min_segment:
            items.append(CompileItem(tuple(ids[:opening]), salt, extra_key, lora, segment=False))
        for i, span in enumerate(link.spans):
            short = span.end - span.start < self.config.min_segment
            if i in only if only is not None else not short:
                segment = ids[span.start : span.end]
                seam = 0 if options.policy == "none" else options.seam
                items.append(self.segment_item(segment, salt, extra_key, lora, seam=seam))
        return items

    def encode_segment(self, text: str) -> list[int]:
        """Token ids of a segment given as text, as a prompt's piece would get them.

        Raises:
            PicRequestError: the text cannot fit the model's context.
        """
        check_length(text, self._manager.model_config.context_len, "text")
        return self._manager.tokenizer(text, add_special_tokens=False)["input_ids"]

    def segment_item(
        self,
        ids: Sequence[int],
        salt: str | None,
        extra_key: str | None,
        lora: str | None = None,
        *,
        seam: int | None = None,
        named: bool = False,
    ) -> CompileItem:
        """The internal request that compiles one segment for one tenant, in a
        hybrid for links of one seam width: the server's own by default."""
        space = namespace(self.context, salt)
        seams = (self.config.seam if seam is None else seam,)
        return CompileItem((*self.context, *ids), space, extra_key, lora, seams=seams, named=named)


def _other_actions(hints: Any) -> list[Any]:
    if not isinstance(hints, KvHintsEnvelope):
        return []
    return [action for action in hints.actions if action.action_type not in (PUBLIC, LINK)]


def _hints(obj_hints: Any, link: LinkRequest) -> KvHintsEnvelope:
    made = link_hints(link)
    made.actions.extend(_other_actions(obj_hints))
    return made


# In place: SGLang's endpoints keep the object, to abort it if its client leaves.


def _set_link(obj: GenerateReqInput, ids: list[int], link: LinkRequest, *, strict: bool) -> None:
    """Give the request its prompt and link in internal form."""
    obj.text, obj.input_ids = None, list(ids)
    obj.kv_hints = _hints(obj.kv_hints, dataclasses.replace(link, strict=strict))


def _set_links(obj: GenerateReqInput, prompts: list[tuple[list[int], LinkRequest]]) -> None:
    """The same for a batch, or for several samples of one prompt."""
    single = not (isinstance(obj.text, list) or isinstance((obj.input_ids or [0])[0], list))
    hints = obj.kv_hints if isinstance(obj.kv_hints, list) else [obj.kv_hints] * len(prompts)
    made = [
        _hints(own, dataclasses.replace(link, strict=False))
        for own, (_, link) in zip(hints, prompts, strict=True)
    ]
    ids = [list(ids) for ids, _ in prompts]
    obj.text = None
    obj.input_ids, obj.kv_hints = (ids[0], made[0]) if single else (ids, made)
