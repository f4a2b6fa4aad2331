"""Look inside: settings, the forest, numbers and times."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import Request, Response
from pydantic import Field
from sglang.srt.runtime_context import get_serving
from sglang.srt.utils.auth import AuthLevel, auth_level, decide_request_auth
from sglang.srt.utils.json_response import orjson_response

from sglang_pic import __version__, timer
from sglang_pic.link.policy import AUTO
from sglang_pic.metrics import front
from sglang_pic.server.funnel import funnel_of
from sglang_pic.server.lending import server_of
from sglang_pic.server.routes.base import Answer, Body, manager, pic_router, tell

router = pic_router()


# What a client needs to know to send ``pic`` fields.
_CLIENTS = ("seam", "policy", "mode", "min_segment", "compile_timeout_s", "state")


def _may_see_all(request: Request) -> bool:
    """Whether it could ask the other routes, too."""
    serving = get_serving()
    return decide_request_auth(
        method="GET",
        path="/pic/info",
        authorization_header=request.headers.get("Authorization"),
        api_key=serving.api_key,
        admin_api_key=serving.admin_api_key,
        auth_level=AuthLevel.ADMIN_OPTIONAL,
    ).allowed


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """Version and settings; a client that finds this may send ``pic`` fields.

    Where there is an admin's key, others see what they need for that.
    """
    funnel = funnel_of(manager())
    reason = funnel.guards.gate.reason
    settings = dataclasses.asdict(funnel.config)
    if not _may_see_all(request):
        return {
            "version": __version__,
            "config": {name: settings[name] for name in _CLIENTS},
            "linking": {"on": reason is None, "reason": reason},
            "encoder": funnel.documents.to_json(),
        }
    settings["compile_context"] = list(funnel.context)
    state = funnel.guards.calibration.to_json() if funnel.config.state == AUTO else None
    return {
        "version": __version__,
        "config": settings,
        "tokenize": dataclasses.asdict(funnel.resolver.usual),
        "linking": funnel.guards.gate.to_json(),
        "canary": funnel.guards.canary.verdict.to_json(),
        "state_calibration": state,
        "encoder": funnel.documents.to_json(),
    }


@router.get("/forest", response_model=list[dict[str, Any]])
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def forest() -> Any:
    """The forest of each data-parallel rank: segments, pages, bytes, integrity."""
    return orjson_response(await tell("forest"))


# -- numbers ------------------------------------------------------------------------


class KvBytes(Answer):
    """Bytes of the pool of KV."""

    capacity: int
    budget: int = Field(description="that segments may hold")
    segment: int = Field(description="held by segments compiled alone")
    company: int = Field(description="held by segments compiled in company")
    turn: int = Field(description="held by composed conversations")
    prefix: int = Field(description="held by ordinary prefixes")
    pinned: int
    free: int


class StateBytes(Answer):
    """Bytes of linear states; zeros in models without linear layers, but budget and pins of
    a server with an encoder, whose documents share them."""

    budget: int
    segment: int
    turn: int
    checkpoint: int = Field(description="held by checkpoints of ordinary prefixes")
    pinned: int


class Quota(Answer):
    pinned_share: float = Field(description="of each budget, that one tenant may pin")


class RankBudgets(Answer):
    kv: KvBytes
    state: StateBytes
    quota: Quota


class Budgets(Answer):
    ranks: list[RankBudgets]


class StoreStats(Answer):
    waiting_bytes: int = Field(description="copied, and not written yet")
    reading_bytes: int = Field(description="being read, or not yet in pages")
    written: int = Field(description="values that the store has taken")
    written_bytes: int
    present: int = Field(description="values that it had already")
    dropped: int = Field(description="values not written: too much waited")
    failed: dict[str, int] = Field(description="values that it did not take, by reason")


class EncoderCard(Answer):
    digest: str = Field(description="names its weights")
    cross_layers: list[int] = Field(description="of the model, that a cross block stands before")
    max_tokens: int = Field(description="of a document")
    bytes_per_token: int = Field(description="of what is kept of one")


class EncodedStats(Answer):
    encoder: EncoderCard | None
    documents: int = Field(description="held")
    bytes: int
    in_use: int = Field(description="documents that requests see now: they stay")
    budget: int = Field(description="bytes, shared with linear states")
    encoded: int = Field(description="documents read since start")
    encoded_tokens: int
    no_room: int = Field(description="of those, not kept")


class RankStats(RankBudgets):
    clock: int
    segments: int
    companies: int
    pins: int
    page_size: int
    refusal: str | None = Field(description="why this server does not link at all")
    checkpoints: dict[str, int] = Field(
        description="of ordinary prefixes: held; since start: placed, plans, tokens resumed "
        "and recomputed"
    )
    evicted: dict[str, int] = Field(description="since start: tokens, of states their number")
    refused: dict[str, int] = Field(description="since start, by what refused")
    store: StoreStats = Field(description="since start; zeros without a store")
    encoded: EncodedStats = Field(description="documents that a trained encoder has read")
    fallback_evictions: int
    faults: dict[str, int] = Field(description="contained since start, by place")


class Stats(Answer):
    front: dict[str, Any] = Field(description="answers, segments and compiles since start")
    ranks: list[RankStats]


@router.get("/budgets", response_model=Budgets)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def budgets() -> Any:
    """What each data-parallel rank may hold, and who holds how much of it."""
    return orjson_response({"ranks": await tell("budgets")})


@router.get("/stats", response_model=Stats)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def stats() -> Any:
    """Counters and sizes, of this process and of each rank."""
    return orjson_response({"front": front.counts.to_json(), "ranks": await tell("stats")})


class Load(Answer):
    server: str = Field(description="by which it knows itself among its peers")
    tokens: int = Field(description="that wait to be computed")


@router.get("/load", response_model=Load)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def load() -> Any:
    """How much waits here; peers ask."""
    tokens = await funnel_of(manager()).lending.waiting()
    return orjson_response({"server": server_of(manager()), "tokens": tokens})


# -- times --------------------------------------------------------------------------


class Switch(Body):
    on: bool


@router.get("/timer", response_model=dict[str, Any])
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def read_timer() -> Any:
    """Own seconds and calls by stage, of this process and of each rank's scheduler."""
    return await _timer(None)


@router.post("/timer", response_model=dict[str, Any])
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def switch_timer(body: Switch) -> Any:
    """Turn the timer on, from zero, or off."""
    return await _timer(body.on)


async def _timer(on: bool | None) -> Response:
    ranks = await tell("timer", on=on)
    if on is True:
        timer.front.start()
    elif on is False:
        timer.front.stop()
    return orjson_response({"front": timer.front.to_json(), "ranks": ranks})
