"""What the routes share: how bodies are read, errors told, and commands sent."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError
from sglang.srt.entrypoints.http_server import ORJSONRoute, get_global_state
from sglang.srt.utils.json_response import orjson_response

from sglang_pic.errors import PicRefused, PicRequestError
from sglang_pic.forest.keys import check_salt
from sglang_pic.server.commands import command

# -- bodies and answers -----------------------------------------------------------


class Body(BaseModel):
    """What a client sends: no unknown field, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Answer(BaseModel):
    """What it gets. Routes send plain JSON: these say what it looks like."""

    model_config = ConfigDict(extra="forbid")


def _allowed(value: str | None, info: ValidationInfo) -> str | None:
    field = str(info.field_name)
    try:
        check_salt(value, field)
    except PicRequestError as error:
        raise PydanticCustomError("salt", "{problem}", {"problem": error.problem}) from error
    return value


Salt = Annotated[
    str | None,
    AfterValidator(_allowed),
    Field(description="the tenant, as in the requests that link its segments"),
]
ExtraKey = Annotated[
    str | None,
    AfterValidator(_allowed),
    Field(description="as in the requests that link the segments"),
]


class Tenant(Body):
    """Whose segments a request is about."""

    cache_salt: Salt = None


# -- errors -------------------------------------------------------------------------


class Problem(Answer):
    message: str
    type: str
    param: str = Field(description="the field at fault, for example pic.segments[3].end")
    code: int = Field(description="the HTTP status")


class Refusal(Answer):
    """Any answer but 200, except what SGLang itself refuses (401, 405)."""

    error: Problem


def _refuse(status: int, message: str, field: str) -> Response:
    name = HTTPStatus(status).phrase.replace(" ", "").removesuffix("Error") + "Error"
    content = {"message": message, "type": name, "param": field, "code": status}
    return orjson_response({"error": content}, status)


def field_of(location: tuple[int | str, ...]) -> str:
    """``("body", "input_ids", 0)`` as ``input_ids[0]``; the whole of it as ``body``."""
    place, *path = location
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return name.removeprefix(".") or str(place)


def _named(error: RequestValidationError) -> PicRequestError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return PicRequestError("body", f"not JSON: {first['ctx']['error']}")
    return PicRequestError(field_of(first["loc"]), first["msg"])


class PicRoute(ORJSONRoute):
    """A route whose errors are JSON that names the field at fault."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_refusals(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                named = _named(error)
                return _refuse(400, str(named), named.field)
            except PicRequestError as error:
                return _refuse(400, str(error), error.field)
            except PicRefused as refused:
                return _refuse(refused.status, refused.message, refused.field)

        return handle_refusals


def pic_router() -> APIRouter:
    """A router of ``/pic`` with these manners."""
    return APIRouter(
        prefix="/pic",
        route_class=PicRoute,
        tags=["pic"],
        responses={"default": {"model": Refusal, "description": "Refused"}},
    )


# -- the server behind --------------------------------------------------------------


def manager() -> Any:
    """SGLang's tokenizer manager."""
    return get_global_state().tokenizer_manager


async def tell(do: str, **fields: Any) -> list[Any]:
    """Send a command to the schedulers, see ``server.commands.command``."""
    try:
        return await command(manager(), do, **fields)
    except ValueError as error:
        # Of such a request all else has been checked.
        if fields.get("lora_path") is None or isinstance(error, PicRequestError):
            raise
        raise PicRequestError("lora_path", str(error)) from error
