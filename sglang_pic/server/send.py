"""A resolved request in internal form: token ids, and a link, or the names of documents, in
its ``kv_hints``.

In place: SGLang's endpoints keep the object, to abort it if its client leaves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.kv_hints import KvHintsEnvelope

from sglang_pic.request.base import LinkRequest
from sglang_pic.request.hints import PUBLIC
from sglang_pic.request.internal import (
    ENCODED,
    LINK,
    EncodedRequest,
    encoded_hints,
    link_hints,
)


def _other_actions(hints: Any) -> list[Any]:
    if not isinstance(hints, KvHintsEnvelope):
        return []
    ours = (PUBLIC, LINK, ENCODED)
    return [action for action in hints.actions if action.action_type not in ours]


def _hints(obj_hints: Any, link: LinkRequest) -> KvHintsEnvelope:
    made = link_hints(link)
    made.actions.extend(_other_actions(obj_hints))
    return made


def set_link(obj: GenerateReqInput, ids: list[int], link: LinkRequest, *, strict: bool) -> None:
    """Give the request its prompt and link."""
    obj.text, obj.input_ids = None, list(ids)
    obj.kv_hints = _hints(obj.kv_hints, dataclasses.replace(link, strict=strict))


def set_encoded(obj: GenerateReqInput, ids: list[int], encoded: EncodedRequest) -> None:
    """Give the request its prompt without documents, and their names."""
    obj.text, obj.input_ids = None, list(ids)
    made = encoded_hints(encoded)
    made.actions.extend(_other_actions(obj.kv_hints))
    obj.kv_hints = made


def is_batch(obj: GenerateReqInput) -> bool:
    """Whether it has a list of prompts."""
    return isinstance(obj.text, list) or isinstance((obj.input_ids or [0])[0], list)


def split(obj: GenerateReqInput) -> list[GenerateReqInput]:
    """The requests that a batch stands for, one a prompt; each has all its samples."""
    obj.normalize_batch_and_arguments()
    return [obj[i] for i in range(obj.batch_size)]
