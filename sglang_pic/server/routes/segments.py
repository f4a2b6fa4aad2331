"""List, pin, unpin, delete: the segments that one tenant has compiled, or encoded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import Field
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.srt.utils.json_response import orjson_response

from sglang_pic.server.pins import Pins
from sglang_pic.server.routes.base import Answer, Tenant, pic_router, tell

MAX_TTL_S = 366 * 24 * 3600

router = pic_router()

Id = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
Asked = Annotated[Tenant, Query()]


class Pin(Tenant):
    """How long to pin a segment; for good if ``ttl_s`` is null."""

    ttl_s: Annotated[float, Field(gt=0, le=MAX_TTL_S)] | None = None


# A POST needs no body where nothing has to be said.
DEFAULT_TENANT = Tenant()
FOR_GOOD = Pin()


class Segment(Answer):
    """One segment; sizes are sums over the data-parallel ranks that hold it."""

    id: str
    tokens: int
    held: int = Field(description="tokens whose pages are cached")
    hits: int = Field(description="links that found pages of it")
    compiled: int = Field(description="when, on the server's logical clock")
    last_use: int = Field(description="when, on the same clock")
    kv_bytes: int = Field(description="of held tokens; shared pages count in each segment")
    state_bytes: int
    pinned: bool
    value: float = Field(description="the lowest is evicted first")
    ranks: int = Field(description="data-parallel ranks that hold it")


class Document(Answer):
    """One segment that an encoder has read."""

    id: str
    tokens: int
    bytes: int
    hits: int = Field(description="requests that have seen it")
    last_use: int = Field(description="when, on a clock that such requests advance")
    pinned: bool
    in_use: bool = Field(description="a request sees it: it stays")


class Segments(Answer):
    segments: list[Segment]
    documents: list[Document]


class Deleted(Answer):
    id: str
    freed_tokens: int


class Flushed(Answer):
    segments: int
    documents: int
    freed_tokens: int


async def _unpin(id: str, salt: str | None) -> Any:
    return merge(await tell("unpin", id=id, cache_salt=salt))


pins = Pins(_unpin)


def merge(cards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One segment, from what each rank says of it; a document is on one alone."""
    first, *others = cards
    if "in_use" in first:
        return first
    merged = {**first, "ranks": 1 + len(others)}
    for card in others:
        for name in ("hits", "kv_bytes", "state_bytes"):
            merged[name] += card[name]
        for name in ("held", "compiled", "last_use", "pinned", "value"):
            merged[name] = max(merged[name], card[name])
    return merged


@router.get("/segments", response_model=Segments)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def list_segments(asked: Asked) -> Any:
    """The tenant's segments, and encoded documents, the one used last first."""
    cards: dict[str, list[dict[str, Any]]] = {}
    ranks = await tell("list", cache_salt=asked.cache_salt)
    for rank in ranks:
        for card in rank["segments"]:
            cards.setdefault(card["id"], []).append(card)
    merged = sorted(map(merge, cards.values()), key=lambda card: -card["last_use"])
    documents = [card for rank in ranks for card in rank["documents"]]
    return orjson_response({"segments": merged, "documents": documents})


@router.get("/segments/{id}", response_model=Segment | Document)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def get_segment(id: Id, asked: Asked) -> Any:
    """One of the tenant's segments."""
    return orjson_response(merge(await tell("get", id=id, cache_salt=asked.cache_salt)))


@router.delete("/segments/{id}", response_model=Deleted)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def delete_segment(id: Id, asked: Asked) -> Any:
    """Forget a segment, unless it is pinned or a running request uses it."""
    ranks = await tell("delete", id=id, cache_salt=asked.cache_salt)
    return orjson_response({"id": id, "freed_tokens": sum(rank["freed_tokens"] for rank in ranks)})


@router.post("/segments/{id}/pin", response_model=Segment | Document)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def pin_segment(id: Id, body: Pin = FOR_GOOD) -> Any:
    """Keep a segment from eviction, until unpinned or for ``ttl_s`` seconds."""

    async def pin() -> dict[str, Any]:
        lasting = body.ttl_s is None
        return merge(await tell("pin", id=id, lasting=lasting, cache_salt=body.cache_salt))

    return orjson_response(await pins.pin(id, body.cache_salt, body.ttl_s, pin))


@router.post("/segments/{id}/unpin", response_model=Segment | Document)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def unpin_segment(id: Id, body: Tenant = DEFAULT_TENANT) -> Any:
    """Let a segment be evicted again."""
    return orjson_response(await pins.unpin(id, body.cache_salt))


@router.post("/flush", response_model=Flushed)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def flush(body: Tenant = DEFAULT_TENANT) -> Any:
    """Forget all of the tenant's segments, documents and ordinary prefixes that are neither
    pinned nor in use."""
    ranks = await tell("flush", cache_salt=body.cache_salt)
    names = ("segments", "documents", "freed_tokens")
    return orjson_response({name: sum(rank[name] for rank in ranks) for name in names})
