"""``pic``, and whose cache it is, in fields of a chat request that gateways let through.

A gateway that knows chat requests, as SGLang's router does, sends on the fields that it
knows. Of those, ``metadata`` (text by name) and ``chat_template_kwargs`` (anything) are a
client's to fill.
"""

from __future__ import annotations

from typing import Any

import orjson

from sglang_pic.errors import PicRequestError

HOLDERS = ("metadata", "chat_template_kwargs")
PIC, SALT = "pic", "pic_salt"


def unpack(body: dict[str, Any]) -> None:
    """Move what a gateway let through to where a client without one writes it, in place.

    Under the name of ``pic``, an object or the text of one is ours; another value there is
    a client's own.

    Raises:
        PicRequestError: it is malformed, or given twice.
    """
    for name in HOLDERS:
        holder = body.get(name)
        if not isinstance(holder, dict):
            continue
        pic = _object(holder.get(PIC), f"{name}.{PIC}")
        if pic is not None:
            if body.get(PIC) is not None:
                raise PicRequestError(f"{name}.{PIC}", "is there twice")
            del holder[PIC]
            body[PIC] = pic
        salt = holder.pop(SALT, None)
        if salt is not None:
            if not isinstance(salt, str):
                raise PicRequestError(f"{name}.{SALT}", f"must be text, got {salt!r:.80}")
            if body.get("cache_salt") not in (None, salt):
                raise PicRequestError(f"{name}.{SALT}", "differs from cache_salt")
            body["cache_salt"] = salt
        if not holder:
            del body[name]


def _object(value: Any, field: str) -> dict[str, Any] | None:
    if isinstance(value, dict):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return None
    try:
        pic = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise PicRequestError(field, f"is no JSON object: {error}") from error
    assert isinstance(pic, dict)
    return pic
