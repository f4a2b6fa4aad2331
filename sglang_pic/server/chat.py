"""Segments through SGLang's own chat serving, however it builds the prompt.

The prompt is built twice over a stand-in for the tokenizer (``server.texts``): from
the messages as they are, which is the prompt, and from a copy with signs around the
marked texts. If the copy, its signs cut out, is the same text, and every marked text
stands in it unchanged, they are segments; else the request is refused. Marked tools are
looked for in the prompt itself (``server.tools``).
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import TypeAdapter
from sglang.srt.entrypoints.openai.protocol import ChatCompletionMessageParam

from sglang_pic.errors import PicRequestError
from sglang_pic.find.base import Cut
from sglang_pic.request.base import TokenSpan
from sglang_pic.request.fields import MAX_SEGMENTS, check_length
from sglang_pic.request.tokenize import Encoded
from sglang_pic.server.exchange import Exchange, current, entered, noting
from sglang_pic.server.finding import Finding
from sglang_pic.server.funnel import funnel_of, is_enabled
from sglang_pic.server.marks import Mark, Marks
from sglang_pic.server.texts import CANNOT, Piece, Texts
from sglang_pic.server.tools import add_tools, name_of

_messages = TypeAdapter(list[ChatCompletionMessageParam])

# Of each piece of a prompt, the marked texts in it: number and character range.
Found = list[list[tuple[int, TokenSpan]]]


def convert(
    original: Callable[..., Any], serving: Any, request: Any, raw_request: Any = None
) -> Any:
    """Around ``OpenAIServingChat._convert_to_internal_request``, which SGLang calls in
    a worker thread: makes the exchange known there."""
    with entered(raw_request):
        return original(serving, request, raw_request)


class _Manager:
    """SGLang's tokenizer manager with another tokenizer."""

    def __init__(self, manager: Any, tokenizer: Any):
        self._manager = manager
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def _shadow(serving: Any, texts: Texts) -> Any:
    """SGLang's chat serving with a stand-in for its tokenizer."""
    shadow = copy.copy(serving)
    shadow.tokenizer_manager = _Manager(serving.tokenizer_manager, texts)
    shadow._chat_template_cache = collections.OrderedDict()
    return shadow


def build(
    original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around SGLang's two ways to make a prompt of messages,
    ``OpenAIServingChat._apply_jinja_template`` and ``_apply_conversation_template``."""
    exchange = current.get()
    if exchange is None:
        return original(serving, request, *args, **kwargs)
    with noting(exchange):
        if exchange.marks is not None:
            return _linked(exchange, exchange.marks, original, serving, request, *args, **kwargs)
        found = _cut(exchange, original, serving, request, *args, **kwargs)
        return original(serving, request, *args, **kwargs) if found is None else found


def _linked(
    exchange: Exchange,
    marks: Marks,
    original: Callable[..., Any],
    serving: Any,
    request: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if (
        serving.chat_encoding_spec not in (None, "dsv32")
        or serving._prompt_text_round_trip_is_lossy
    ):
        raise PicRequestError("messages", CANNOT)
    manager = serving.tokenizer_manager
    texts = Texts(manager.tokenizer)

    shadow = _shadow(serving, texts)

    def make(asked: Any) -> Any:
        return original(shadow, asked, *args, **kwargs)

    def signed(count: int) -> list[Piece]:
        twin = exchange.twin
        written = marks.written(request, count).messages if twin is None else twin(count)
        asked = request.model_copy(update={"messages": _messages.validate_python(written)})
        try:
            return texts.pieces(make(asked).prompt_ids)
        except Exception:
            return []  # the signs have caused it: without them there was a prompt

    result = make(request)
    if result.image_data or result.video_data or result.audio_data:
        raise PicRequestError("messages", "images, audio and video leave no room for segments")
    pieces = texts.pieces(result.prompt_ids)
    text = "".join(piece.text for piece in pieces)
    check_length(text, manager.model_config.context_len, "messages")
    ranges = locate(marks, pieces, signed) if marks.all else [[] for _ in pieces]
    ranges = add_tools(marks.tools, _offered(request, *args), pieces, ranges)
    if sum(map(len, ranges)) > MAX_SEGMENTS:
        raise PicRequestError("messages", f"at most {MAX_SEGMENTS} segments a request")
    funnel = funnel_of(manager)
    is_asked = funnel.finding.is_asked(exchange.pic)
    made = funnel.resolver.chat(pieces, ranges, exchange.pic, placed=is_asked)
    exchange.ids, exchange.spans = _joined(made)
    if is_asked:
        exchange.cuts = _cuts(funnel.finding, request, args, pieces, made)
    result.prompt_ids = list(exchange.ids)
    return result


def _cut(
    exchange: Exchange,
    original: Callable[..., Any],
    serving: Any,
    request: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """SGLang's prompt of a request that names no segment, and where it may be cut, in the
    exchange; ``None`` where none are looked for, or SGLang makes it without a text."""
    manager = serving.tokenizer_manager
    if not is_enabled():
        return None
    finding, resolver = funnel_of(manager).finding, funnel_of(manager).resolver
    if not finding.is_asked(exchange.find):
        return None
    if (
        serving.chat_encoding_spec not in (None, "dsv32")
        or serving._prompt_text_round_trip_is_lossy
    ):
        return None
    texts = Texts(manager.tokenizer)
    shadow = _shadow(serving, texts)
    try:
        result = original(shadow, request, *args, **kwargs)
        pieces = texts.pieces(result.prompt_ids)
    except Exception:
        return None  # SGLang says in its own words what is wrong, if anything is
    if result.image_data or result.video_data or result.audio_data:
        return None
    made = [one for piece in pieces if (one := resolver.plain(piece)) is not None]
    if len(made) < len(pieces):
        return None
    exchange.ids, _ = _joined(made)
    exchange.cuts = _cuts(finding, request, args, pieces, made)
    result.prompt_ids = list(exchange.ids)
    return result


def _joined(made: Sequence[Encoded]) -> tuple[list[int], tuple[TokenSpan, ...]]:
    """Token ids and spans of a prompt of several texts."""
    ids: list[int] = []
    spans: list[TokenSpan] = []
    for one in made:
        spans += (TokenSpan(span.start + len(ids), span.end + len(ids)) for span in one.spans)
        ids += one.ids
    return ids, tuple(spans)


def _cuts(
    finding: Finding,
    request: Any,
    arguments: Sequence[Any],
    pieces: Sequence[Piece],
    made: Sequence[Encoded],
) -> list[Cut]:
    messages = [message.model_dump() for message in request.messages]
    names = (name_of(tool) for tool in _offered(request, *arguments))
    return finding.cut_chat(pieces, made, messages, [name for name in names if name is not None])


def _offered(request: Any, tools: Any, *_: Any) -> list[Any]:
    """The tools that a template in Jinja is given, without those that ``tool_choice`` leaves
    out. The other kind is given none, and all are missed."""
    if isinstance(tools, bool):
        return [tool.model_dump() for tool in request.tools or ()]
    return tools or []


def locate(
    marks: Marks, pieces: list[Piece], signed: Callable[[int], list[Piece]]
) -> list[list[TokenSpan]]:
    """Where the marked texts stand in a prompt: character ranges in each of its pieces,
    empty ones behind the text that was marked before.

    Args:
        marks: of its messages.
        pieces: the prompt.
        signed: makes it of messages with signs around the first so many of the marks.

    Raises:
        PicRequestError: the prompt does not hold each of them unchanged.
    """
    found = _compare(marks, pieces, signed(len(marks.all)))
    if found is None:
        raise PicRequestError(
            _first_altered(marks, pieces, signed).field,
            "the chat template reads, alters or breaks up this text: it cannot be a segment",
        )
    for piece, of in zip(pieces, found, strict=True):
        for number, span in of:
            mark = marks.all[number]
            if piece.text[span.start : span.end] != mark.core:
                raise PicRequestError(mark.field, "the chat template alters this text")
    seen = {number for of in found for number, _ in of}
    for number, mark in enumerate(marks.all):
        if mark.core and number not in seen:
            raise PicRequestError(mark.field, "the chat template leaves this text out")
    return _with_empty(marks, found)


def _with_empty(marks: Marks, found: Found) -> list[list[TokenSpan]]:
    behind: dict[int, int] = {}  # empty texts, by the one before them that is not
    number = -1
    for i, mark in enumerate(marks.all):
        if mark.core:
            number = i
        else:
            behind[number] = behind.get(number, 0) + 1
    last = {number: (i, j) for i, of in enumerate(found) for j, (number, _) in enumerate(of)}
    ranges: list[list[TokenSpan]] = [[] for _ in found]
    ranges[0] += [TokenSpan(0, 0)] * behind.get(-1, 0)
    for i, of in enumerate(found):
        for j, (number, span) in enumerate(of):
            ranges[i].append(span)
            if last[number] == (i, j):
                ranges[i] += [TokenSpan(span.end, span.end)] * behind.get(number, 0)
    return ranges


def _compare(marks: Marks, pieces: list[Piece], signed: list[Piece]) -> Found | None:
    """What is found in a prompt with signs; ``None`` if it is not the prompt."""
    if len(signed) != len(pieces):
        return None
    found = []
    for with_signs, piece in zip(signed, pieces, strict=True):
        text, spans = marks.cut(with_signs.text) or (None, [])
        if text != piece.text:
            return None
        found.append(spans)
    return found


def _first_altered(marks: Marks, pieces: list[Piece], signed: Callable[[int], list[Piece]]) -> Mark:
    """A mark with which the prompt becomes another, though not yet without it."""
    good, bad = 0, len(marks.all)
    while bad - good > 1:
        middle = (good + bad) // 2
        if _compare(marks, pieces, signed(middle)) is None:
            bad = middle
        else:
            good = middle
    return marks.all[bad - 1]
