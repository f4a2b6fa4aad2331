"""Save what is compiled, or encoded, to the operator's store, and load it again."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.srt.utils.json_response import orjson_response

from sglang_pic.server.routes.base import Answer, Tenant, pic_router, tell

router = pic_router()


class Save(Tenant):
    """Which segments and documents to save; all of the tenant's if ``ids`` is null."""

    ids: list[Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]] | None = None


class Saved(Answer):
    segments: int
    documents: int
    bytes: int = Field(description="of all files written")


class RefusedFile(Answer):
    file: str
    reason: str


class Restored(Answer):
    segments: int = Field(description="loaded")
    documents: int = Field(description="loaded")
    present: int = Field(description="held already")
    refused: list[RefusedFile] = Field(description="of these nothing was loaded")


DEFAULT_TENANT = Tenant()
ALL = Save()


@router.post("/save", response_model=Saved)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def save(body: Save = ALL) -> Any:
    """Write segments to ``--pic-store``; the scheduler waits meanwhile."""
    ranks = await tell("save", segments=body.ids, cache_salt=body.cache_salt)
    return orjson_response(
        {
            "segments": max(rank["segments"] for rank in ranks),
            "documents": max(rank["documents"] for rank in ranks),
            "bytes": sum(rank["bytes"] for rank in ranks),
        }
    )


@router.post("/restore", response_model=Restored)
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def restore(body: Tenant = DEFAULT_TENANT) -> Any:
    """Load a tenant's saved segments, as far as they fit; nothing is evicted for them."""
    ranks = await tell("restore", cache_salt=body.cache_salt)
    return orjson_response(
        {
            "segments": max(rank["segments"] for rank in ranks),
            "documents": max(rank["documents"] for rank in ranks),
            "present": max(rank["present"] for rank in ranks),
            "refused": [refused for rank in ranks for refused in rank["refused"]],
        }
    )
