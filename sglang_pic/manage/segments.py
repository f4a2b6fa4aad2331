"""What an operator may ask of the segments of one tenant, and do with them.

A tenant is a cache salt. Every function sees that tenant's segments alone; an id
of another's is as unknown as one that never was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_pic.errors import PicRefused
from sglang_pic.faults import faults
from sglang_pic.forest.budget import Need
from sglang_pic.forest.cache import PicCache
from sglang_pic.forest.forest import SegmentRecord
from sglang_pic.forest.nodes import PREFIX, SEGMENT, TURN
from sglang_pic.link.policy import floor_to


def _find(cache: PicCache, segment: str, tenant: str | None) -> SegmentRecord:
    record = cache.forest.record(segment, tenant)
    if record is None:
        raise PicRefused(404, "no such segment", "id")
    return record


def _need(cache: PicCache, record: SegmentRecord) -> Need:
    return Need(
        kv=floor_to(record.tokens, cache.page_size) * cache.cost.kv_bytes,
        state=cache.state_bytes_of(record.id),
    )


def card(cache: PicCache, record: SegmentRecord) -> dict[str, Any]:
    """One segment for the operator; ``last_use`` and ``compiled`` are ticks of the
    forest's logical clock, ``value`` its place in the eviction order."""
    need = _need(cache, record)
    return {
        "id": record.id,
        "tokens": record.tokens,
        "held": floor_to(record.tokens, cache.page_size),
        "hits": record.hits,
        "compiled": record.compiled,
        "last_use": record.last_use,
        "kv_bytes": need.kv,
        "state_bytes": need.state,
        "pinned": record.id in cache.pins,
        "value": cache.forest.value(record),
    }


def get(cache: PicCache, segment: str, tenant: str | None) -> dict[str, Any]:
    """Card of one segment.

    Raises:
        PicRefused: 404.
    """
    return card(cache, _find(cache, segment, tenant))


def list_all(cache: PicCache, tenant: str | None) -> list[dict[str, Any]]:
    """Cards of all, the last used first."""
    return [card(cache, record) for record in cache.forest.records(tenant)]


def held(cache: PicCache, segments: Sequence[str], tenant: str | None) -> list[bool]:
    """Which of these are held, as far as they have pages."""
    return [cache.forest.holds(segment, tenant) for segment in segments]


def name(cache: PicCache, segments: Sequence[str], tenant: str | None, seam: int) -> list[bool]:
    """Which of these are held with all that a link of this seam width needs. They need
    no compile, and count as compiled by name."""
    made = []
    for segment in segments:
        record = cache.forest.record(segment, tenant)
        ready = record is not None and cache.is_ready(record, seam)
        if record is not None and ready:
            cache.forest.note_named(record)
        made.append(ready)
    return made


def pin(cache: PicCache, segment: str, tenant: str | None) -> dict[str, Any]:
    """Keep a segment, its states too, until it is unpinned.

    Raises:
        PicRefused: 404; 507 over a quota.
    """
    record = _find(cache, segment, tenant)
    try:
        cache.pins.add(segment, record.salt, _need(cache, record), lambda: cache.hold(record))
    except PicRefused:
        cache.refused["quota"] += 1
        raise
    return card(cache, record)


def unpin(cache: PicCache, segment: str, tenant: str | None) -> dict[str, Any]:
    """Let a segment go again when it is worth least.

    Raises:
        PicRefused: 404.
    """
    record = _find(cache, segment, tenant)
    cache.pins.remove(segment)
    return card(cache, record)


def delete(cache: PicCache, segment: str, tenant: str | None) -> dict[str, Any]:
    """Forget a segment and free what no other one needs of it.

    Raises:
        PicRefused: 404; 409 while it is pinned or in use.
    """
    record = _find(cache, segment, tenant)
    if segment in cache.pins:
        raise PicRefused(409, "the segment is pinned", "id")
    if cache.forest.is_in_use(record):
        raise PicRefused(409, "the segment is in use", "id")
    return {"id": segment, "freed_tokens": cache.forest.delete(segment)}


def flush(cache: PicCache, tenant: str | None) -> dict[str, int]:
    """Forget all segments, conversations and ordinary prefixes of a tenant that are
    neither in use nor pinned."""
    count = freed = 0
    for record in cache.forest.records(tenant):
        if record.id not in cache.pins and not cache.forest.is_in_use(record):
            freed += cache.forest.delete(record.id)
            count += 1
    return {"segments": count, "freed_tokens": freed + cache.free_rows(tenant)}


def reserve(cache: PicCache, tokens: Sequence[int]) -> dict[str, Any]:
    """Whether segments of these lengths could be held all at once.

    Raises:
        PicRefused: 507.
    """
    limit, pinned = cache.budgets.limit, cache.pins.held()
    pages = sum(floor_to(n, cache.page_size) for n in tokens)
    need = Need(pages * cache.cost.kv_bytes, len(tokens) * cache.usual_state_bytes)
    for name in ("kv", "state"):
        asked, room = getattr(need, name), getattr(limit, name) - getattr(pinned, name)
        if asked > room:
            cache.refused["budget"] += 1
            raise PicRefused(
                507, f"needs {asked} bytes of {name}, {room} are not pinned", "segments"
            )
    return {}


def budgets(cache: PicCache) -> dict[str, Any]:
    """Bytes by kind against the budgets."""
    nodes, limit, pinned = cache.order, cache.budgets.limit, cache.pins.held()
    each = cache.cost.kv_bytes
    pool = cache.token_to_kv_pool_allocator
    segment, turn = nodes.tokens[SEGMENT], nodes.tokens[TURN]
    return {
        "kv": {
            "capacity": pool.size * each,
            "budget": limit.kv,
            "segment": segment * each,
            "turn": turn * each,
            "prefix": max(0, cache.total_tokens() - segment - turn) * each,
            "pinned": pinned.kv,
            "free": pool.available_size() * each,
        },
        "state": {
            "budget": limit.state,
            "segment": cache.state_bytes(SEGMENT),
            "turn": cache.state_bytes(TURN),
            "pinned": pinned.state,
        },
        "quota": {"pinned_share": cache.config.pin_share},
    }


def stats(cache: PicCache) -> dict[str, Any]:
    """Counters and gauges of one scheduler, cheap enough to be polled."""
    nodes = cache.order
    return {
        "clock": cache.forest.clock,
        "segments": cache.forest.count,
        "pins": len(cache.pins),
        "page_size": cache.page_size,
        "refusal": cache.refusal,
        **budgets(cache),
        "evicted": {
            **{kind: nodes.evicted[kind] for kind in (SEGMENT, PREFIX, TURN)},
            "state": cache.states_evicted,
        },
        "refused": {
            "admission": cache.forest.on_probation_evicted,
            "budget": cache.refused["budget"],
            "quota": cache.refused["quota"],
        },
        "fallback_evictions": nodes.fallbacks,
        "faults": dict(faults.counts),
    }
