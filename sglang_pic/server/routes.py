"""``/pic/*``: what a server can do, what its forest holds, and compile ahead."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import ORJSONResponse
from sglang.srt.entrypoints.http_server import get_global_state
from sglang.srt.managers.io_struct import SetInternalStateReq

from sglang_pic import __version__, timer
from sglang_pic.errors import PicRequestError
from sglang_pic.forest.keys import is_reserved, namespace, segment_id
from sglang_pic.link.policy import AUTO
from sglang_pic.request.fields import MAX_SEGMENTS
from sglang_pic.server.funnel import Funnel, funnel_of
from sglang_pic.sglang_hooks import TIMER_KEY

router = APIRouter(prefix="/pic")


@router.get("/info")
async def info() -> dict[str, Any]:
    """Version and settings; a client that finds this may send ``pic`` fields."""
    funnel = funnel_of(get_global_state().tokenizer_manager)
    settings = dataclasses.asdict(funnel.config)
    settings["compile_context"] = list(funnel.context)
    state = funnel.calibration.to_json() if funnel.config.state == AUTO else None
    return {"version": __version__, "config": settings, "state_calibration": state}


@router.get("/forest")
async def forest() -> Any:
    """The forest of each data-parallel rank: segments, pages, bytes, integrity."""
    states = await get_global_state().tokenizer_manager.get_internal_state()
    return [state.get("pic") for state in states]


@router.get("/timer")
async def read_timer() -> Any:
    """Own seconds and calls by stage, of this process and of each rank's scheduler."""
    states = await get_global_state().tokenizer_manager.get_internal_state()
    return {"front": timer.front.to_json(), "ranks": [one.get("pic_timer") for one in states]}


@router.post("/timer")
async def switch_timer(request: Request) -> Any:
    """Turn the timer on, from zero, or off. Body: ``{"on": bool}``."""
    try:
        body = await request.json()
    except ValueError as error:
        return _error(400, f"body: not JSON: {error}", "body")
    if not isinstance(body, dict) or set(body) != {"on"} or not isinstance(body["on"], bool):
        return _error(400, 'body: must be {"on": true} or {"on": false}', "on")
    command = SetInternalStateReq(server_args={TIMER_KEY: int(body["on"])})
    await get_global_state().tokenizer_manager.set_internal_state(command)
    if body["on"]:
        timer.front.start()
    else:
        timer.front.stop()
    return await read_timer()


@router.post("/compile")
async def compile_segments(request: Request) -> Any:
    """Compile segments ahead of their first use.

    Body: ``{"text": str | [str]}`` or ``{"input_ids": [int] | [[int]]}``, and
    optionally ``cache_salt`` and ``extra_key``. Answers with one entry a
    segment: its id, its length, and the tokens that had to be computed.
    """
    funnel = funnel_of(get_global_state().tokenizer_manager)
    try:
        try:
            body = await request.json()
        except ValueError as error:
            raise PicRequestError("body", f"not JSON: {error}") from error
        segments, salt, extra_key = _read_compile(body, funnel)
    except PicRequestError as error:
        return _error(400, str(error), error.field)
    items = [funnel.segment_item(ids, salt, extra_key) for ids in segments]
    results = await funnel.compiler.compile(items)
    failed = next((result for result in results if isinstance(result, BaseException)), None)
    if failed is not None:
        return _error(400 if isinstance(failed, ValueError) else 500, str(failed), "segments")
    space = namespace(funnel.context, salt)
    return {
        "segments": [
            {
                "id": segment_id(space, extra_key, ids),
                "tokens": len(ids),
                "tokens_computed": result,
            }
            for ids, result in zip(segments, results, strict=True)
        ]
    }


def _read_compile(body: Any, funnel: Funnel) -> tuple[list[list[int]], str | None, str | None]:
    if not isinstance(body, dict):
        raise PicRequestError("body", "must be an object")
    unknown = set(body) - {"text", "input_ids", "cache_salt", "extra_key"}
    if unknown:
        raise PicRequestError(min(unknown), "unknown field")
    if ("text" in body) == ("input_ids" in body):
        raise PicRequestError("text", "give either 'text' or 'input_ids'")
    for name in ("cache_salt", "extra_key"):
        if not isinstance(body.get(name), str | None):
            raise PicRequestError(name, f"must be a string, got {body[name]!r:.80}")
    if is_reserved(body.get("cache_salt")):
        raise PicRequestError("cache_salt", "this prefix is reserved for compiled segments")
    field = "text" if "text" in body else "input_ids"
    segments = _token_lists(body[field], field, funnel)
    if len(segments) > MAX_SEGMENTS:
        raise PicRequestError(field, f"at most {MAX_SEGMENTS} segments a request")
    shortest = funnel.config.min_segment
    for i, ids in enumerate(segments):
        if len(ids) < shortest:
            raise PicRequestError(
                f"{field}[{i}]", f"{len(ids)} tokens are fewer than the minimum of {shortest}"
            )
    return segments, body.get("cache_salt"), body.get("extra_key")


def _token_lists(value: Any, field: str, funnel: Funnel) -> list[list[int]]:
    if field == "text":
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise PicRequestError(field, "must be a string or a list of strings")
        return [funnel.encode_segment(text) for text in texts]
    lists = [value] if isinstance(value, list) and value and isinstance(value[0], int) else value
    if not isinstance(lists, list) or not lists:
        raise PicRequestError(field, "must be a list of token ids or a list of such lists")
    for i, ids in enumerate(lists):
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise PicRequestError(f"{field}[{i}]", "must be a list of token ids")
    return lists


def _error(status: int, message: str, field: str) -> ORJSONResponse:
    content = {"message": message, "type": "BadRequestError", "param": field, "code": status}
    return ORJSONResponse(status_code=status, content={"error": content})
