"""Foretell what a request would reuse, and why not more."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import Field
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.srt.utils.json_response import orjson_response

from sglang_pic.errors import PicRequestError
from sglang_pic.link.report import LinkReport
from sglang_pic.request.base import LinkRequest
from sglang_pic.server.funnel import Funnel, funnel_of
from sglang_pic.server.reading import GENERATE, read_request
from sglang_pic.server.routes.base import Tenant, manager, pic_router, tell
from sglang_pic.server.routes.prompts import TokenIds, check_prompt

router = pic_router()


class ExplainBody(Tenant):
    """The fields of a ``/generate`` request with one prompt that decide its link."""

    text: str | None = None
    input_ids: TokenIds | None = None
    pic: dict[str, Any] = Field(default_factory=dict, description="as in /generate")
    extra_key: str | None = None
    lora_path: str | None = Field(None, description="the request's adapter")


@dataclasses.dataclass(frozen=True)
class Explanation(LinkReport):
    """The report that the request would get now, and ``tokens_to_compile``, of
    missing segments, which are compiled first."""

    tokens_to_compile: int


@router.post("/explain", response_model=Explanation)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def explain(body: ExplainBody) -> Any:
    """Foretell what a request would reuse: nothing is compiled or counted as use.

    With several data-parallel ranks: on the one that would reuse least.
    """
    ids, link = _read(body, funnel_of(manager()))
    ranks = await tell(
        "explain",
        ids=ids,
        link=link,
        cache_salt=body.cache_salt,
        extra_key=body.extra_key,
        lora_path=body.lora_path,
    )
    return orjson_response(min(ranks, key=lambda rank: rank["tokens_reused"]))


def _read(body: ExplainBody, funnel: Funnel) -> tuple[list[int], LinkRequest]:
    """The prompt and the link, as if the body had come to ``/generate``."""
    prompt: dict[str, Any] = {"text": body.text, "input_ids": body.input_ids, "pic": body.pic}
    exchange = read_request(GENERATE, prompt, funnel.config.link_defaults)
    text, input_ids = prompt["text"], prompt["input_ids"]
    if (text is None) == (input_ids is None):
        raise PicRequestError("text", "give one of 'text', 'input_ids' and 'pic.parts'")
    ids, link = funnel.settled(*funnel.resolver.one(text, input_ids, exchange.pic))
    check_prompt(
        ids,
        "text" if input_ids is None else "input_ids",
        limit=manager().max_req_input_len,
        vocabulary=manager().model_config.vocab_size,
    )
    return ids, link
