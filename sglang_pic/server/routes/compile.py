"""Compile segments ahead of their first use."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.srt.utils.json_response import orjson_response

from sglang_pic.errors import PicRefused, PicRequestError
from sglang_pic.forest.keys import company_id, document_id, namespace, segment_id
from sglang_pic.link.policy import ENCODE
from sglang_pic.request.commands import UNWRITTEN, WRITTEN
from sglang_pic.request.fields import MAX_SEAM, MAX_SEGMENTS
from sglang_pic.request.tokenize import check_tokenizer
from sglang_pic.server.compiler import QUEUE_FULL, Caller, Made
from sglang_pic.server.fetching import FIRST_S, MOST_S
from sglang_pic.server.funnel import Funnel, funnel_of
from sglang_pic.server.routes.base import Answer, ExtraKey, Tenant, manager, pic_router, tell
from sglang_pic.server.routes.prompts import TokenIds, check_prompt

router = pic_router()

# How long the store may take.
PUBLISH_S = 60.0


def _as_texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_lists(value: Any) -> Any:
    is_one = isinstance(value, list) and value and not isinstance(value[0], list)
    return [value] if is_one else value


Texts = Annotated[
    list[str],
    Field(fail_fast=True),
    BeforeValidator(_as_texts, json_schema_input_type=str | list[str]),
]
TokenLists = Annotated[
    list[TokenIds],
    Field(fail_fast=True),
    BeforeValidator(_as_lists, json_schema_input_type=list[int] | list[list[int]]),
]


class CompileBody(Tenant):
    """Segments, as ``text`` or as ``input_ids``: one, or a list of them."""

    text: Texts | None = None
    input_ids: TokenLists | None = None
    extra_key: ExtraKey = None
    lora_path: str | None = Field(None, description="the adapter of those requests")
    company: bool = Field(
        False, description="compile them in each other's company too, for prompts that name all"
    )
    opening: str | TokenIds | None = Field(
        None, description="of `company`: what stands in front of the first, as the server sees it"
    )
    seam: int | None = Field(
        None,
        description="of the links that will use them, the server's own by default; "
        "a hybrid keeps states of each width",
        ge=0,
        le=MAX_SEAM,
    )
    publish: bool = Field(
        False, description="for a peer: compile here, and answer when the store has them"
    )
    no_logs: bool = Field(False, description="log no token of them")
    mode: Literal["encode"] | None = Field(
        None, description="`encode`: have the server's encoder read them, as in such requests"
    )


class CompiledSegment(Answer):
    id: str
    tokens: int
    tokens_computed: int = Field(description="0 if it was there already")


class CompiledCompany(Answer):
    segments: list[str] = Field(description="ids")
    guests: int = Field(description="passages in front of a segment left without company")
    tokens_computed: int = Field(description="in both orders, or behind guests")


class Compiled(Answer):
    segments: list[CompiledSegment]
    companies: list[CompiledCompany] = Field(description="none unless asked for")


@router.post("/compile", response_model=Compiled)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def compile_segments(body: CompileBody) -> Any:
    """Compile, or encode, segments ahead of their first use; one entry a segment."""
    funnel = funnel_of(manager())
    if body.mode == ENCODE:
        return await _encode(body, funnel)
    if body.company:
        funnel.maker.check()
    elif body.opening is not None:
        raise PicRequestError("opening", "is of segments compiled in 'company'")
    _check_publish(body, funnel)
    segments = _read(body, funnel)
    _check_segments(segments, body, funnel)
    with funnel.lending.lent(len(segments)) if body.publish else contextlib.nullcontext():
        return await _compiled(body, funnel, segments)


async def _compiled(body: CompileBody, funnel: Funnel, segments: Sequence[list[int]]) -> Any:
    salt, extra_key, lora_path = body.cache_salt, body.extra_key, body.lora_path
    key = await _key(body)
    lengths = [len(ids) for ids in segments]
    await tell("reserve", tokens=lengths, cache_salt=salt, extra_key=extra_key)
    space = namespace(funnel.context, salt)
    names = [segment_id(space, key, ids) for ids in segments]
    # On every rank, since nobody knows on which the links will run.
    seam = funnel.config.seam if body.seam is None else body.seam
    ranks = await tell("name", segments=names, seam=seam, cache_salt=salt)
    absent = [
        (i, at) for i in range(len(names)) for at, rank in enumerate(ranks) if not rank["held"][i]
    ]
    items = [
        funnel.wanted.segment(
            segments[i],
            salt,
            extra_key,
            lora_path,
            seam=seam,
            named=True,
            rank=at if len(ranks) > 1 else None,
            here=body.publish,
        )
        for i, at in absent
    ]
    made = await funnel.compiler.compile(items, Caller(salt, no_logs=body.no_logs))
    computed = [0] * len(names)
    for (i, _), one in zip(absent, made, strict=True):
        _check(one, f"segments[{i}]")
        computed[i] += one.tokens
    ranks = await tell("held", segments=names, cache_salt=salt)
    for i, name in enumerate(names):
        if not any(rank["held"][i] for rank in ranks):
            raise PicRefused(507, f"compiled, and no room to keep it: {name}", f"segments[{i}]")
    if body.publish:
        await _publish(names, salt)
    companies: list[dict[str, Any]] = []
    if body.company:
        companies = await _companies(body, funnel, segments, names, key, len(ranks))
    return orjson_response(
        {
            "segments": [
                {
                    "id": name,
                    "tokens": len(ids),
                    "tokens_computed": computed[i],
                }
                for i, (name, ids) in enumerate(zip(names, segments, strict=True))
            ],
            "companies": companies,
        }
    )


# What links alone have.
_OF_LINKS = ("extra_key", "lora_path", "company", "opening", "seam")


async def _encode(body: CompileBody, funnel: Funnel) -> Any:
    """Encode documents; those that are held count as asked for by name from now on."""
    for field in _OF_LINKS:
        if getattr(body, field) not in (None, False):
            raise PicRequestError(field, "means nothing to encoded documents")
    _check_publish(body, funnel)
    salt, field = body.cache_salt, _field(body)
    documents = [tuple(ids) for ids in _read(body, funnel)]
    for i, ids in enumerate(documents):
        if not ids:
            raise PicRequestError(f"{field}[{i}]", "must not be empty")
    by_field = {f"{field}[{i}]": ids for i, ids in enumerate(documents)}
    funnel.documents.check_documents(by_field, field)
    names = [document_id(salt or None, ids) for ids in documents]
    (told,) = await tell("name", segments=names, seam=funnel.config.seam, cache_salt=salt)
    absent = [i for i, held in enumerate(told["held"]) if not held]
    caller = Caller(salt or None, no_logs=body.no_logs)
    made = await funnel.documents.make([documents[i] for i in absent], caller)
    if made is None:
        raise PicRefused(503, "too many documents wait to be encoded", field)
    computed = dict(zip(absent, made, strict=True))
    (kept,) = await tell("held", segments=names, cache_salt=salt)
    for i, name in enumerate(names):
        if not kept["held"][i]:
            raise PicRefused(507, f"no room to keep it: {name}", f"segments[{i}]")
    if body.publish:
        await _publish(names, salt)
    return orjson_response(
        {
            "segments": [
                {"id": name, "tokens": len(ids), "tokens_computed": computed.get(i, 0)}
                for i, (name, ids) in enumerate(zip(names, documents, strict=True))
            ],
            "companies": [],
        }
    )


async def _publish(names: Sequence[str], salt: str | None) -> None:
    """Return when the store has these segments.

    Raises:
        PicRefused: 507, it does not take one; 504, it takes too long.
    """
    end, pause = time.monotonic() + PUBLISH_S, FIRST_S
    left, begin = dict(enumerate(names)), True
    while time.monotonic() < end:
        asked = list(left.values())
        ranks = await tell("publish", segments=asked, begin=begin, cache_salt=salt)
        begin = False
        for at, i in enumerate(list(left)):
            # Of data-parallel ranks one is enough.
            found = [rank["segments"][at] for rank in ranks]
            if all(one["state"] == UNWRITTEN for one in found):
                raise PicRefused(507, f"not in the store: {found[0]['reason']}", f"segments[{i}]")
            if any(one["state"] == WRITTEN for one in found):
                del left[i]
        if not left:
            return
        await asyncio.sleep(pause)
        pause = min(MOST_S, 1.5 * pause)
    raise PicRefused(504, f"not in the store after {PUBLISH_S:g} s", "publish")


def _check(made: Made, field: str) -> None:
    """Raise what a compile ended with, unless it went well."""
    if isinstance(made.error, ValueError):
        raise PicRequestError(field, str(made.error)) from made.error
    if made.error is not None:
        raise PicRefused(500, str(made.error), field) from made.error
    if made.outcome == QUEUE_FULL:
        raise PicRefused(503, "too many segments wait to be compiled", field)


async def _companies(
    body: CompileBody,
    funnel: Funnel,
    segments: Sequence[list[int]],
    names: Sequence[str],
    key: str | None,
    ranks: int,
) -> list[dict[str, Any]]:
    """Compile segments in company, as many companies as it takes, on every rank."""
    opening = body.opening or []
    if isinstance(opening, str):
        check_tokenizer(manager().tokenizer, "opening", "token ids")
        opening = funnel.resolver.opening(opening)
    if opening:
        model = manager().model_config
        check_prompt(opening, "opening", limit=model.context_len, vocabulary=model.vocab_size)
    kind = funnel.wanted.kind_of(opening, body.cache_salt, body.extra_key, body.lora_path)
    distinct = dict(zip(names, segments, strict=True))
    ids = {tuple(tokens): name for name, tokens in distinct.items()}
    caller = Caller(body.cache_salt, no_logs=body.no_logs)
    companies = funnel.maker.companies_of(kind, list(ids))
    covered = {member for company in companies for member in company.members}
    rest = [member for member in ids if member not in covered]
    among = [funnel.maker.among_guests(kind, member) for member in rest]
    companies += [company for company in among if company is not None]
    made = []
    for company in companies:
        orders: list[Made] = []
        for rank in range(ranks):
            where = dataclasses.replace(kind, rank=rank if ranks > 1 else None)
            there = dataclasses.replace(company, kind=where)
            orders += await funnel.maker.make(there, caller)
        made.append((company, orders))
    for _, orders in made:
        for order in orders:
            _check(order, "company")
    ids_of = [
        company_id(
            kind.space,
            key or "",
            opening,
            [ids[member] for member in company.members],
            [segment_id(kind.space, key, guest) for guest in company.guests.texts],
        )
        for company, _ in made
    ]
    told = await tell("companies", companies=ids_of, cache_salt=body.cache_salt)
    if not all(any(rank["held"][i] for rank in told) for i in range(len(made))):
        raise PicRefused(507, "compiled, and no room to keep it", "company")
    return [
        {
            "segments": [ids[member] for member in company.members],
            "guests": len(company.guests.texts),
            "tokens_computed": sum(order.tokens for order in orders),
        }
        for company, orders in made
    ]


async def _key(body: CompileBody) -> str | None:
    """What SGLang keeps such requests' prefixes apart by, beside the salt."""
    if body.lora_path is None:
        return body.extra_key
    ranks = await tell("key", extra_key=body.extra_key, lora_path=body.lora_path)
    key: str | None = ranks[0]["extra_key"]
    return key


def _check_publish(body: CompileBody, funnel: Funnel) -> None:
    if body.publish and funnel.config.store is None:
        raise PicRefused(409, "the server was started without --pic-store", "publish")


def _field(body: CompileBody) -> str:
    return "input_ids" if body.text is None else "text"


def _read(body: CompileBody, funnel: Funnel) -> list[list[int]]:
    """Token ids of every segment."""
    if (body.text is None) == (body.input_ids is None):
        raise PicRequestError("text", "give either 'text' or 'input_ids'")
    if body.text is not None:
        check_tokenizer(manager().tokenizer)
        segments = [funnel.resolver.segment(text) for text in body.text]
    else:
        segments = body.input_ids or []
    if not 0 < len(segments) <= MAX_SEGMENTS:
        raise PicRequestError(_field(body), f"1 to {MAX_SEGMENTS} segments a request")
    return segments


def _check_segments(segments: Sequence[list[int]], body: CompileBody, funnel: Funnel) -> None:
    """Raise ``PicRequestError`` for what cannot be compiled."""
    field = _field(body)
    model, shortest = manager().model_config, funnel.config.min_segment
    limit = model.context_len - len(funnel.context)
    for i, ids in enumerate(segments):
        if len(ids) < shortest:
            raise PicRequestError(
                f"{field}[{i}]", f"{len(ids)} tokens are fewer than the minimum of {shortest}"
            )
        check_prompt(ids, f"{field}[{i}]", limit=limit, vocabulary=model.vocab_size)
