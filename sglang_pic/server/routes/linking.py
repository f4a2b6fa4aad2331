"""Turn linking off, and on again after canary, audit or operator turned it off."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.srt.utils.json_response import orjson_response

from sglang_pic.server.funnel import funnel_of
from sglang_pic.server.gate import SWITCHED_OFF
from sglang_pic.server.routes.base import Answer, Body, manager, pic_router

router = pic_router()


class LinkingBody(Body):
    """Whether requests are linked from now on."""

    on: bool


class Linking(Answer):
    on: bool
    reason: str | None = Field(description="as in reports, while it is off")
    why: str | None = Field(description="the same in words")


@router.post("/linking", response_model=Linking)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def switch_linking(body: LinkingBody) -> Any:
    """Link requests, or answer all of them exactly."""
    gate = funnel_of(manager()).guards.gate
    if body.on:
        gate.open()
    else:
        gate.close(SWITCHED_OFF, "an operator switched it off")
    return orjson_response(gate.to_json())
