"""What a tenant's request carries: its own salt, and nothing that reaches another's.

Every endpoint makes one of SGLang's request objects; it is judged there, whatever body
or header its fields came from.
"""

from __future__ import annotations

import re
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.errors import PicRequestError
from sglang_pic.server.tenants import current

_SESSION = "a session belongs to whoever knows its id, not to a tenant"
_IMAGE = "it would name what is cached of another tenant's image"
_ROUTER = "it is what SGLang's servers and router tell one another"

REFUSED = {
    "session_id": _SESSION,
    "session_params": _SESSION,
    "mm_hashes": _IMAGE,
    "mm_content_hashes": _IMAGE,
    "bootstrap_host": _ROUTER,
    "bootstrap_port": _ROUTER,
    "bootstrap_room": _ROUTER,
    "bootstrap_pair_key": _ROUTER,
    "decode_tp_size": _ROUTER,
    "disagg_prefill_dp_rank": _ROUTER,
    "encoder_urls": _ROUTER,
    "need_wait_for_mm_inputs": _ROUTER,
    "num_items_assigned": _ROUTER,
    "http_worker_ipc": _ROUTER,
    "external_trace_header": _ROUTER,
    "lora_id": "it is made of 'lora_path' by the server",
}
"""Fields that a tenant may not send, and why."""

# As SGLang makes them. It aborts by how an id begins, so that a short one, and a client
# that leaves, would take other tenants' requests with it.
_RID = re.compile(r"(resp_)?[0-9a-f]{32}")


def bind(obj: Any) -> None:
    """Give SGLang's request the salt of the tenant whose key it came with, if any.

    Raises:
        PicRequestError: it names another, or carries what may reach another tenant's.
    """
    if current.get() is None:
        return
    if not isinstance(obj, GenerateReqInput):
        raise PicRequestError("input", "embeddings are cached without salt, for all tenants alike")
    for name, reason in REFUSED.items():
        if getattr(obj, name) is not None:
            raise PicRequestError(name, f"not from a tenant: {reason}")
    for rid in obj.rid if isinstance(obj.rid, list) else [obj.rid]:
        if rid is not None and not (isinstance(rid, str) and _RID.fullmatch(rid)):
            raise PicRequestError("rid", "not from a tenant, unless it is 32 hexadecimal digits")
    set_salt(obj)


def set_salt(obj: Any) -> None:
    """The salt alone, of anything that has one.

    Raises:
        PicRequestError: it names another.
    """
    salt = current.get()
    if salt is None:
        return
    asked = obj.cache_salt if isinstance(obj.cache_salt, list) else [obj.cache_salt]
    if any(one not in (None, salt) for one in asked):
        raise PicRequestError("cache_salt", "is the server's to set, from the API key")
    obj.cache_salt = salt
