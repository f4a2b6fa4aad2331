"""Compile segments ahead of their first use."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.srt.utils.json_response import orjson_response

from sglang_pic.errors import PicRefused, PicRequestError
from sglang_pic.forest.keys import namespace, segment_id
from sglang_pic.request.fields import MAX_SEGMENTS
from sglang_pic.request.tokenize import check_tokenizer
from sglang_pic.server.funnel import Funnel, funnel_of
from sglang_pic.server.routes.base import Answer, Tenant, manager, pic_router, tell
from sglang_pic.server.routes.prompts import TokenIds, check_prompt

router = pic_router()


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
    extra_key: str | None = Field(None, description="as in the requests that will link them")


class CompiledSegment(Answer):
    id: str
    tokens: int
    tokens_computed: int = Field(description="0 if it was there already")


class Compiled(Answer):
    segments: list[CompiledSegment]


@router.post("/compile", response_model=Compiled)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def compile_segments(body: CompileBody) -> Any:
    """Compile segments ahead of their first use; one entry a segment."""
    funnel = funnel_of(manager())
    segments = _read(body, funnel)
    salt, extra_key = body.cache_salt, body.extra_key
    lengths = [len(ids) for ids in segments]
    await tell("reserve", tokens=lengths, cache_salt=salt, extra_key=extra_key)
    items = [funnel.wanted.segment(ids, salt, extra_key, named=True) for ids in segments]
    results = await funnel.compiler.compile(items)
    failed = next((result for result in results if isinstance(result, BaseException)), None)
    if isinstance(failed, ValueError):
        raise PicRequestError("segments", str(failed)) from failed
    if failed is not None:
        raise PicRefused(500, str(failed), "segments") from failed
    space = namespace(funnel.context, salt)
    names = [segment_id(space, extra_key, ids) for ids in segments]
    ranks = await tell("held", segments=names, cache_salt=salt, extra_key=extra_key)
    for i, name in enumerate(names):
        if not any(rank["held"][i] for rank in ranks):
            raise PicRefused(507, f"compiled, and no room to keep it: {name}", f"segments[{i}]")
    return orjson_response(
        {
            "segments": [
                {
                    "id": name,
                    "tokens": len(ids),
                    "tokens_computed": result,
                }
                for name, ids, result in zip(names, segments, results, strict=True)
            ]
        }
    )


def _read(body: CompileBody, funnel: Funnel) -> list[list[int]]:
    """Token ids of every segment."""
    if (body.text is None) == (body.input_ids is None):
        raise PicRequestError("text", "give either 'text' or 'input_ids'")
    field = "input_ids" if body.text is None else "text"
    if body.text is not None:
        check_tokenizer(manager().tokenizer)
        segments = [funnel.resolver.segment(text) for text in body.text]
    else:
        segments = body.input_ids or []
    if not 0 < len(segments) <= MAX_SEGMENTS:
        raise PicRequestError(field, f"1 to {MAX_SEGMENTS} segments a request")
    model, shortest = manager().model_config, funnel.config.min_segment
    limit = model.context_len - len(funnel.context)
    for i, ids in enumerate(segments):
        if len(ids) < shortest:
            raise PicRequestError(
                f"{field}[{i}]", f"{len(ids)} tokens are fewer than the minimum of {shortest}"
            )
        check_prompt(ids, f"{field}[{i}]", limit=limit, vocabulary=model.vocab_size)
    return segments
