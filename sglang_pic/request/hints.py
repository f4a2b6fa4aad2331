"""``kv_hints`` as a client may fill them, and how the scheduler answers unqueued.

The action ``pic`` is public: a user of ``sgl.Engine`` attaches it. Those whose type
begins with ``pic.`` are ``request.internal``.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.kv_hints import KvHintAction, KvHintsEnvelope

PUBLIC = "pic"

# The scheduler answers some requests unqueued, by an abort whose message begins so.
# A strict link comes back: followed by a JSON list of segment indices.
MISSING = "sglang_pic: not compiled: "
# A command was carried out: followed by its result as JSON.
DONE = "sglang_pic: done: "
# There was no room for all documents of a prompt.
NO_LONGER = "pic.segments: no room for all encoded documents at once, try again"

_VERSION = "1"


def pic_hints(**fields: Any) -> KvHintsEnvelope:
    """Attach ``pic`` fields to ``sgl.Engine.generate(kv_hints=...)``.

    Takes the same fields as the ``pic`` object of an HTTP request, for example
    ``pic_hints(segments=[{"start": 0, "end": 128}], seam=16)``.
    """
    return KvHintsEnvelope(
        protocol_version=_VERSION,
        message_id=PUBLIC,
        actions=[
            KvHintAction(action_id="0", action_type=PUBLIC, action_version=_VERSION, payload=fields)
        ],
    )


def find_action(hints: KvHintsEnvelope | None, action: str) -> dict[str, Any] | None:
    """Payload of the first action of that type, or ``None``."""
    if hints is None:
        return None
    for item in hints.actions:
        if item.action_type == action:
            return item.payload
    return None
