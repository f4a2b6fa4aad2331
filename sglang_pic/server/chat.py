"""Segments through SGLang's own chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_pic.errors import PicRequestError
from sglang_pic.request.fields import MAX_SEGMENTS, check_length
from sglang_pic.request.tokenize import encode_marked
from sglang_pic.server.exchange import of_messages


def render_marked(
    original: Callable[..., Any],
    serving: Any,
    messages: list[dict[str, Any]],
    **kwargs: Any,
) -> tuple[list[int], str | None]:
    """Around ``OpenAIServingChat._render_and_encode_chat_template``.

    Renders twice, with and without marks. Only if the marked text, its marks
    cut out, is the unmarked one, is it tokenised by segment: a template that
    reads its content is never misled by a mark.
    """
    exchange = of_messages(messages)
    if exchange is None or exchange.marks is None:
        return original(serving, messages, **kwargs)
    if kwargs["use_cache"] or serving._prompt_text_round_trip_is_lossy:
        raise PicRequestError("messages", "this model's chat encoding cannot carry segments")
    tokenizer = serving.tokenizer_manager.tokenizer

    def render(messages: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=kwargs.get("add_generation_prompt", True),
            tools=kwargs["tools"],
            return_dict=False,
            **kwargs["template_kwargs"],
        )

    marks = exchange.marks
    text, ranges = marks.cut(render(messages))
    if text != render(marks.strip(messages)):
        raise PicRequestError("messages", "the chat template alters a marked part")
    check_length(text, serving.tokenizer_manager.model_config.context_len, "messages")
    if len(ranges) > MAX_SEGMENTS:
        raise PicRequestError("messages", f"at most {MAX_SEGMENTS} segments a request")
    rule = exchange.pic.get("tokenize", "pieces")
    special = kwargs["encode_kwargs"].get("add_special_tokens", True)
    exchange.ids, exchange.spans = encode_marked(
        tokenizer, text, ranges, rule=rule, add_special_tokens=special
    )
    return list(exchange.ids), None
