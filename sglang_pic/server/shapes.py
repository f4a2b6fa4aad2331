"""Conversations of other APIs than OpenAI's chat: where their texts are, and what chat
messages SGLang makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from sglang.srt.entrypoints.openai.protocol import ResponsesRequest

from sglang_pic.server.marks import Marks, find_marks

MESSAGES = ("/v1/messages", "/v1/messages/count_tokens")
RESPONSES = "/v1/responses"


def marks_of(path: str, body: dict[str, Any]) -> Marks | None:
    """The marks of a conversation, or ``None`` if nothing is marked; flags are removed
    in place.

    Raises:
        PicRequestError: naming the text at fault.
    """
    if path == RESPONSES:
        marks = find_marks(body.get("input"), ("input",), keys=("content", "output"))
    else:
        marks = [
            mark for key in ("system", "messages") for mark in find_marks(body.get(key), (key,))
        ]
    return Marks(marks) if marks else None


def twin_of(
    path: str, body: dict[str, Any], marks: Marks, app: Any
) -> Callable[[int], Sequence[Any]]:
    """What makes chat messages of the body with signs, as ``Exchange.twin``."""

    def of_messages(count: int) -> Sequence[Any]:
        written = {"max_tokens": 1, **marks.written(body, count)}
        request = AnthropicMessagesRequest.model_validate(written)
        return app.state.anthropic_serving._convert_to_chat_completion_request(request).messages

    def of_input(count: int) -> Sequence[Any]:
        request = ResponsesRequest.model_validate(marks.written(body, count))
        return app.state.openai_serving_responses._construct_input_messages(request)

    return of_input if path == RESPONSES else of_messages
