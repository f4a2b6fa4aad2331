"""The wire between SGLang's processes: ``kv_hints`` actions.

``pic`` is public (a user of ``sgl.Engine`` may attach it); the others are
internal, made by our front and never accepted from outside. The scheduler
answers some requests unqueued, by an abort whose message begins with ``MISSING``
or ``DONE``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.kv_hints import KvHintAction, KvHintsEnvelope

from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest, TokenSpan

PUBLIC = "pic"
LINK = "pic.link"
COMPILE = "pic.compile"
COMMAND = "pic.command"
INTERNAL = (LINK, COMPILE, COMMAND)

# A strict link comes back: followed by a JSON list of segment indices.
MISSING = "sglang_pic: not compiled: "
# A command was carried out: followed by its result as JSON.
DONE = "sglang_pic: done: "

_VERSION = "1"


def _envelope(action: str, payload: dict[str, Any]) -> KvHintsEnvelope:
    return KvHintsEnvelope(
        protocol_version=_VERSION,
        message_id=action,
        actions=[
            KvHintAction(
                action_id="0", action_type=action, action_version=_VERSION, payload=payload
            )
        ],
    )


def pic_hints(**fields: Any) -> KvHintsEnvelope:
    """Attach ``pic`` fields to ``sgl.Engine.generate(kv_hints=...)``.

    Takes the same fields as the ``pic`` object of an HTTP request, for example
    ``pic_hints(segments=[{"start": 0, "end": 128}], seam=16)``.
    """
    return _envelope(PUBLIC, fields)


def link_hints(request: LinkRequest) -> KvHintsEnvelope:
    """Encode an internal link request."""
    payload = {
        "spans": [[span.start, span.end] for span in request.spans],
        "options": dataclasses.asdict(request.options),
        "strict": request.strict,
        "off": request.off,
    }
    return _envelope(LINK, payload)


def compile_hints(seams: Sequence[int], *, named: bool = False) -> KvHintsEnvelope:
    """Mark an internal request as the compilation of one segment, whose linear
    states are wanted for these seam widths in tokens (0: no head); ``named``: it
    was asked for by name, no link waits for it."""
    return _envelope(COMPILE, {"seams": list(seams), "named": named})


def command_hints(command: dict[str, Any]) -> KvHintsEnvelope:
    """Encode a command to the cache (``manage.commands``)."""
    return _envelope(COMMAND, command)


def find_action(hints: KvHintsEnvelope | None, action: str) -> dict[str, Any] | None:
    """Payload of the first action of that type, or ``None``."""
    if hints is None:
        return None
    for item in hints.actions:
        if item.action_type == action:
            return item.payload
    return None


def read_link(hints: KvHintsEnvelope | None) -> LinkRequest | None:
    """Decode an internal link request; the funnel has validated it."""
    payload = find_action(hints, LINK)
    if payload is None:
        return None
    return LinkRequest(
        spans=tuple(TokenSpan(start, end) for start, end in payload["spans"]),
        options=LinkOptions(**payload["options"]),
        strict=payload["strict"],
        off=payload["off"],
    )
