"""What a request reused, for a client that did not get to see its report."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import Field
from sglang.srt.utils.json_response import orjson_response

from sglang_pic.errors import PicRefused
from sglang_pic.server.binding import set_salt
from sglang_pic.server.reports import last_reports
from sglang_pic.server.routes.base import Answer, Tenant, pic_router

router = pic_router()


class Reported(Answer):
    id: str
    pic: dict[str, Any] = Field(description="the report, as in the answer")


@router.get("/report/{id}", response_model=Reported)
async def report(id: Annotated[str, Path()], asked: Annotated[Tenant, Query()]) -> Any:
    """The report of one of the last answers to this tenant, by the answer's id."""
    set_salt(asked)
    found = last_reports.find(asked.cache_salt, id)
    if found is None:
        raise PicRefused(404, f"no report of {id!r} is kept for this tenant", "id")
    return orjson_response({"id": id, "pic": found})
