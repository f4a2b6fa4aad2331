"""What a client may attach to a request, told from what is internal."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.kv_hints import KvHintsEnvelope

from sglang_pic.errors import PicRequestError
from sglang_pic.forest.keys import is_reserved
from sglang_pic.request.hints import INTERNAL, PUBLIC, find_action


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def public_action(hints: Any) -> Any:
    """The ``pic`` object that came by ``kv_hints``, one a prompt, or ``None``."""
    found = [
        find_action(item, PUBLIC) for item in _each(hints) if isinstance(item, KvHintsEnvelope)
    ]
    if not any(item is not None for item in found):
        return None
    return found if isinstance(hints, list) else found[0]


def check_reserved(obj: GenerateReqInput) -> None:
    """Raise ``PicRequestError`` for what only our own front may send."""
    if any(is_reserved(salt) for salt in _each(obj.cache_salt)):
        raise PicRequestError("cache_salt", "this prefix is reserved for compiled segments")
    for hints in _each(obj.kv_hints):
        if isinstance(hints, KvHintsEnvelope) and any(
            find_action(hints, action) is not None for action in INTERNAL
        ):
            raise PicRequestError("kv_hints", f"{', '.join(INTERNAL)} are internal; use 'pic'")
