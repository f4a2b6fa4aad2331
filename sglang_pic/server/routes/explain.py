"""Foretell what a request would reuse, and why not more."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

from fastapi import Request
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.srt.utils.json_response import orjson_response

from sglang_pic.errors import PicRequestError
from sglang_pic.find.finder import Looked
from sglang_pic.forest.keys import document_id
from sglang_pic.link.encoded_report import make_encoded_report
from sglang_pic.link.policy import ENCODE
from sglang_pic.link.report import LinkReport
from sglang_pic.request.base import LinkRequest
from sglang_pic.server.answers import as_found
from sglang_pic.server.cut import cut
from sglang_pic.server.exchange import Exchange, carry
from sglang_pic.server.finding import Found
from sglang_pic.server.funnel import Funnel, funnel_of
from sglang_pic.server.reading import CHATS, GENERATE, read_request
from sglang_pic.server.routes.base import ExtraKey, Tenant, field_of, manager, pic_router, tell
from sglang_pic.server.routes.prompts import TokenIds, check_prompt

router = pic_router()
_ids = TypeAdapter(TokenIds)


class ExplainBody(Tenant):
    """A request to ``/generate``, ``/v1/completions`` or ``/v1/chat/completions`` with one
    prompt. What does not decide its link is ignored."""

    model_config = ConfigDict(extra="allow", strict=True)

    text: str | None = None
    input_ids: TokenIds | None = None
    prompt: Any = Field(None, description="as in /v1/completions")
    messages: list[dict[str, Any]] | None = Field(
        None, description="as in /v1/chat/completions, with what its template takes"
    )
    pic: dict[str, Any] | None = Field(None, description="as in the request")
    extra_key: ExtraKey = None
    lora_path: str | None = Field(None, description="the request's adapter")


@dataclasses.dataclass(frozen=True)
class ShownCut:
    """Where a prompt may be cut: tokens, the rule, how often what stands there has come
    again behind other tokens, and whether it is a segment of the link."""

    start: int
    end: int
    rule: str
    times: int
    linked: bool


@dataclasses.dataclass(frozen=True)
class Explanation(LinkReport):
    """The report that the request would get now; ``tokens_to_compile``, of missing
    segments, which are compiled, or encoded, first; and its ``cuts``, beside what it names.
    ``tokens_outside``: of ``mode: encode``, those in documents."""

    tokens_to_compile: int
    cuts: list[ShownCut]
    tokens_outside: int = 0


@router.post("/explain", response_model=Explanation)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def explain(body: ExplainBody, request: Request) -> Any:
    """Foretell what a request would reuse: nothing is compiled or counted as use.

    With several data-parallel ranks: on the one that would reuse least.
    """
    funnel = funnel_of(manager())
    if body.messages is None:
        obj, (ids, link), field, found = _read_plain(body, funnel)
    else:
        obj, (ids, link), found = await _read_chat(body, funnel, request.app)
        field = "messages"
    if found is not None and found.looked.linked:
        ids, link = found.prompt
    if link.options.mode == ENCODE:
        return orjson_response(await _encoded(obj, (ids, link), field, funnel))
    limit, vocabulary = manager().max_req_input_len, manager().model_config.vocab_size
    check_prompt(ids, field, limit=limit, vocabulary=vocabulary)
    ids, link = funnel.guards.settled(ids, link)
    ranks = await tell(
        "explain",
        ids=ids,
        link=link,
        cache_salt=obj.cache_salt,
        extra_key=obj.extra_key,
        lora_path=obj.lora_path,
    )
    told = min(ranks, key=lambda rank: rank["tokens_reused"])
    if found is not None and found.looked.linked:
        told = as_found(told, found.how)
    return orjson_response({**told, "cuts": [] if found is None else _shown(found.looked)})


async def _encoded(obj: Any, prompt: Read, field: str, funnel: Funnel) -> dict[str, Any]:
    """The same of a prompt whose segments an encoder reads."""
    funnel.documents.check(prompt)
    made = cut(prompt)
    limit, vocabulary = manager().max_req_input_len, manager().model_config.vocab_size
    check_prompt(made.row, field, limit=limit, vocabulary=vocabulary)
    if obj.lora_path is not None:
        raise PicRequestError("pic.mode", "not with encoded documents: adapter")
    names = [document_id(obj.cache_salt or None, one) for _, one in made.documents]
    (told,) = await tell(
        "foretell",
        ids=made.row,
        documents=names,
        cache_salt=obj.cache_salt,
        extra_key=obj.extra_key,
    )
    ids, link = prompt
    report = make_encoded_report(
        len(ids), link, names=names, cached=told["cached"], held=told["held"]
    )
    absent = {one for (_, one), held in zip(made.documents, told["held"], strict=True) if not held}
    return {
        **report.to_json(),
        "tokens_to_compile": sum(map(len, absent)),
        "cuts": [],
    }


def _shown(looked: Looked) -> list[dict[str, Any]]:
    linked = set(looked.linked)
    times = looked.times.tolist()
    return [
        {**cut._asdict(), "times": times[i], "linked": i in linked}
        for i, cut in enumerate(looked.cuts)
    ]


Read = tuple[list[int], LinkRequest]


def _read_plain(body: ExplainBody, funnel: Funnel) -> tuple[Any, Read, str, Found | None]:
    """The request, its prompt and link, the field that the prompt came in, and what is found
    in it, as if the body had come to ``/generate`` or ``/v1/completions``."""
    fields = {"text": body.text, "input_ids": body.input_ids, "prompt": _one_prompt(body.prompt)}
    given = {name: value for name, value in fields.items() if value is not None}
    pic = body.pic or {}
    if len(given) + ("parts" in pic) != 1 and not _empty_beside_parts(given, pic):
        raise PicRequestError("text", "give one of 'text', 'input_ids', 'prompt', 'pic.parts'")
    field = next(iter(given), "text")
    prompt = given.get(field)
    read: dict[str, Any] = {"text": None, "input_ids": None, "pic": pic}
    read["text" if isinstance(prompt, str) else "input_ids"] = prompt
    exchange = read_request(GENERATE, read, funnel.config.link_defaults)
    obj = GenerateReqInput(
        cache_salt=body.cache_salt, extra_key=body.extra_key, lora_path=body.lora_path
    )
    obj.text, obj.input_ids = read["text"], read["input_ids"]
    made = funnel.resolver.one(obj.text, obj.input_ids, exchange.pic)
    return obj, made, field, _found(obj, None, exchange.pic, funnel)


def _found(obj: Any, exchange: Exchange | None, pic: Any, funnel: Funnel) -> Found | None:
    found = funnel.finding.search(obj, exchange, pic, remember=False)
    return None if found is None else found[0]


def _one_prompt(prompt: Any) -> str | list[int] | None:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if prompt is None or isinstance(prompt, str):
        return prompt
    try:
        return _ids.validate_python(prompt, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise PicRequestError(field_of(("body", "prompt", *first["loc"])), first["msg"]) from error


def _empty_beside_parts(given: dict[str, Any], pic: dict[str, Any]) -> bool:
    return "parts" in pic and not any(given.values())


async def _read_chat(body: ExplainBody, funnel: Funnel, app: Any) -> tuple[Any, Read, Found | None]:
    """The same through SGLang's own chat serving, as its endpoint does it.

    Raises:
        PicRequestError: SGLang would refuse the request, or it carries no text alone.
    """
    chat = {name: getattr(body, name) for name in body.model_fields_set}
    exchange = read_request(CHATS[0], chat, funnel.config.link_defaults)
    try:
        asked = ChatCompletionRequest.model_validate(chat)
    except ValidationError as error:
        first = error.errors()[0]
        raise PicRequestError(_place(first["loc"], chat), first["msg"]) from error
    serving = app.state.openai_serving_chat
    problem = serving._validate_request(asked)
    if problem is not None:
        raise PicRequestError("messages", problem)
    with carry(exchange):
        try:
            # In a thread, as SGLang does: a long prompt takes its time.
            obj, _ = await asyncio.to_thread(serving._convert_to_internal_request, asked)
        except PicRequestError:
            raise
        except ValueError as error:
            raise PicRequestError("messages", str(error)) from error
    if obj.image_data or obj.video_data or obj.audio_data:
        raise PicRequestError("messages", "only what holds no images, audio or video is foretold")
    (read,) = funnel.resolver.resolve(obj, exchange.pic or {}, exchange)
    pic = exchange.find if exchange.marks is None else exchange.pic
    return obj, read, _found(obj, exchange, pic, funnel)


def _place(location: tuple[int | str, ...], value: Any) -> str:
    """Where in a body pydantic found a fault, without the names of the types it tried."""
    path: list[int | str] = []
    for step in location:
        with contextlib.suppress(LookupError, TypeError):
            value = value[step]
            path.append(step)
    return field_of(("body", *path))
