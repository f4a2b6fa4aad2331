"""What a client may attach to a request, told from what is internal."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.kv_hints import KvHintsEnvelope, decode_kv_hints_envelope

from sglang_pic.errors import PicRequestError
from sglang_pic.forest.keys import check_salt
from sglang_pic.request.hints import PUBLIC, find_action
from sglang_pic.request.internal import FAMILY


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_public(obj: GenerateReqInput) -> Any:
    """Read what came by ``kv_hints``, as objects or as plain JSON.

    Returns:
        The ``pic`` object, a list of them where hints came as a list (``None`` for
        each that has none), or ``None``. The request's hints are objects from then on.

    Raises:
        PicRequestError: hints are malformed, or hold what only our own front may
            send; a salt or key is reserved or unreadable.
    """
    for field in ("cache_salt", "extra_key"):
        for value in _each(getattr(obj, field)):
            check_salt(value, field)
    if not obj.kv_hints:
        return None
    hints = [_read(item) for item in _each(obj.kv_hints)]
    obj.kv_hints = hints if isinstance(obj.kv_hints, list) else hints[0]
    found = [find_action(item, PUBLIC) for item in hints]
    if all(item is None for item in found):
        return None
    return found if isinstance(obj.kv_hints, list) else found[0]


def _read(item: Any) -> KvHintsEnvelope | None:
    if not item:
        return None
    try:
        hints = decode_kv_hints_envelope(item)
    except (ValueError, RecursionError) as error:
        raise PicRequestError("kv_hints", str(error)) from error
    for action in hints.actions:
        if action.action_type.startswith(FAMILY):
            raise PicRequestError(
                "kv_hints", f"{action.action_type!r:.80} is internal; use {PUBLIC!r}"
            )
    return hints
