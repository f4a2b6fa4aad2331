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
from sglang_pic.forest.checkpoints import CHECKPOINT
from sglang_pic.forest.forest import Forest
from sglang_pic.forest.nodes import PREFIX, SEGMENT, TURN
from sglang_pic.forest.segments import SegmentRecord
from sglang_pic.link.policy import floor_to
from sglang_pic.manage import documents


def _find(forest: Forest, segment: str, tenant: str | None) -> SegmentRecord:
    record = forest.segments.record(segment, tenant)
    if record is None:
        raise PicRefused(404, "no such segment", "id")
    return record


def _need(forest: Forest, record: SegmentRecord) -> Need:
    return Need(
        kv=floor_to(record.tokens, forest.pages.page_size) * forest.cost.kv_bytes,
        state=forest.carried.nbytes_of(record.id),
    )


def card(forest: Forest, record: SegmentRecord) -> dict[str, Any]:
    """One segment for the operator; ``last_use`` and ``compiled`` are ticks of the
    forest's logical clock, ``value`` its place in the eviction order."""
    need = _need(forest, record)
    return {
        "id": record.id,
        "tokens": record.tokens,
        "held": floor_to(record.tokens, forest.pages.page_size),
        "hits": record.hits,
        "compiled": record.compiled,
        "last_use": record.last_use,
        "kv_bytes": need.kv,
        "state_bytes": need.state,
        "pinned": record.id in forest.pins,
        "value": forest.holder.value(record),
    }


def get(forest: Forest, segment: str, tenant: str | None) -> dict[str, Any]:
    """Card of one segment.

    Raises:
        PicRefused: 404.
    """
    return card(forest, _find(forest, segment, tenant))


def list_all(forest: Forest, tenant: str | None) -> list[dict[str, Any]]:
    """Cards of all, the last used first."""
    return [card(forest, record) for record in forest.segments.records(tenant)]


def held(forest: Forest, segments: Sequence[str], tenant: str | None) -> list[bool]:
    """Which of these are held, as far as they have pages."""
    return [forest.segments.holds(segment, tenant) for segment in segments]


def name(forest: Forest, segments: Sequence[str], tenant: str | None, seam: int) -> list[bool]:
    """Which of these are held with all that a link of this seam width needs. They need
    no compile, and count as compiled by name."""
    made = []
    for segment in segments:
        record = forest.segments.record(segment, tenant)
        ready = record is not None and forest.holder.is_ready(record, seam)
        if record is not None and ready:
            forest.holder.name(record)
        made.append(ready)
    return made


def pin(
    forest: Forest, segment: str, tenant: str | None, *, lasting: bool = False
) -> dict[str, Any]:
    """Keep a segment, its states too, until it is unpinned; ``lasting``: with a store, by
    the server that comes after this one too.

    Raises:
        PicRefused: 404; 507 over a quota.
    """
    record = _find(forest, segment, tenant)
    try:
        forest.pins.add(
            segment, record.salt, _need(forest, record), lambda: forest.holder.lock(record)
        )
    except PicRefused:
        forest.holder.refused["quota"] += 1
        raise
    forest.store.pinned(segment, lasting=lasting)
    return card(forest, record)


def unpin(forest: Forest, segment: str, tenant: str | None) -> dict[str, Any]:
    """Let a segment go again when it is worth least.

    Raises:
        PicRefused: 404.
    """
    record = _find(forest, segment, tenant)
    forest.pins.remove(segment)
    forest.store.pinned(segment, lasting=False)
    return card(forest, record)


def delete(forest: Forest, segment: str, tenant: str | None) -> dict[str, Any]:
    """Forget a segment and free what no other one needs of it.

    Raises:
        PicRefused: 404; 409 while it is pinned or in use.
    """
    record = _find(forest, segment, tenant)
    if segment in forest.pins:
        raise PicRefused(409, "the segment is pinned", "id")
    if forest.holder.is_in_use(record):
        raise PicRefused(409, "the segment is in use", "id")
    forest.store.deleted(segment)
    freed = forest.holder.delete(segment) + forest.assembly.forget_segment(segment)
    return {"id": segment, "freed_tokens": freed}


def flush(forest: Forest, tenant: str | None) -> dict[str, int]:
    """Forget all segments, documents, conversations and ordinary prefixes of a tenant that
    are neither in use nor pinned."""
    count = freed = 0
    for record in forest.segments.records(tenant):
        if record.id not in forest.pins and not forest.holder.is_in_use(record):
            forest.store.deleted(record.id)
            freed += forest.holder.delete(record.id)
            count += 1
    freed += forest.assembly.forget_tenant(forest.segments.namespace(tenant))
    return {
        "segments": count,
        "documents": documents.flush(forest, tenant),
        "freed_tokens": freed + forest.free_rows(tenant),
    }


def reserve(forest: Forest, tokens: Sequence[int]) -> dict[str, Any]:
    """Whether segments of these lengths could be held all at once.

    Raises:
        PicRefused: 507.
    """
    limit, pinned = forest.budgets.limit, forest.pins.held()
    pages = sum(floor_to(n, forest.pages.page_size) for n in tokens)
    need = Need(pages * forest.cost.kv_bytes, len(tokens) * forest.carried.usual_nbytes)
    for name in ("kv", "state"):
        asked, room = getattr(need, name), getattr(limit, name) - getattr(pinned, name)
        if asked > room:
            forest.holder.refused["budget"] += 1
            raise PicRefused(
                507, f"needs {asked} bytes of {name}, {room} are not pinned", "segments"
            )
    return {}


def budgets(forest: Forest) -> dict[str, Any]:
    """Bytes by kind against the budgets."""
    limit, pinned = forest.budgets.limit, forest.pins.held()
    each = forest.cost.kv_bytes
    pool = forest.cache.token_to_kv_pool_allocator
    linked = forest.pages.tokens
    turn = min(forest.nodes.tokens[TURN], linked)
    company = min(forest.companies.tokens, linked - turn)
    return {
        "kv": {
            "capacity": pool.size * each,
            "budget": limit.kv,
            "segment": (linked - turn - company) * each,
            "company": company * each,
            "turn": turn * each,
            "prefix": (forest.total_tokens - linked) * each,
            "pinned": pinned.kv,
            "free": pool.available_size() * each,
        },
        "state": {
            "budget": limit.state,
            "segment": forest.carried.nbytes_of_kind(SEGMENT),
            "turn": forest.carried.nbytes_of_kind(TURN),
            "checkpoint": forest.carried.nbytes_of_kind(CHECKPOINT),
            "pinned": pinned.state,
        },
        "quota": {"pinned_share": forest.config.pin_share},
    }


def stats(forest: Forest) -> dict[str, Any]:
    """Counters and gauges of one scheduler, cheap enough to be polled."""
    nodes = forest.nodes
    return {
        "clock": forest.segments.clock,
        "segments": forest.segments.count,
        "companies": forest.companies.count,
        "pins": len(forest.pins),
        "page_size": forest.pages.page_size,
        "refusal": forest.refusal,
        "checkpoints": forest.checkpoints.counts().to_json(),
        **budgets(forest),
        "evicted": {
            **{kind: nodes.evicted[kind] for kind in (SEGMENT, PREFIX, TURN)},
            "state": forest.kept.evicted,
        },
        "refused": {
            "admission": forest.segments.on_probation_evicted,
            "budget": forest.holder.refused["budget"],
            "quota": forest.holder.refused["quota"],
            "company": forest.assembly.refused,
        },
        "store": forest.store.stats(),
        "encoded": forest.encoded.to_json(),
        "fallback_evictions": nodes.fallbacks,
        "faults": dict(faults.counts),
    }
