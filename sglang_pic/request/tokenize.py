"""Text with marked character ranges -> token ids with spans.

Two rules at the edges of a segment:

``pieces``: every segment, and every stretch of text between them, is tokenised
    alone. A segment's ids never depend on its neighbours, so it is found again
    anywhere; a prompt may get a few tokens more than stock would give it.
``whole``: the prompt is tokenised once, as stock does, and a segment is the
    tokens that lie entirely inside its characters. The prompt is stock's, token
    for token; a token that straddles an edge belongs to no segment, and the
    same document may tokenise differently behind other text.

Which one is usual depends on the tokenizer (``usual_rule``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_pic.errors import PicRequestError
from sglang_pic.request.base import TokenSpan

PIECES, WHOLE = "pieces", "whole"

# Cut where words begin with and without a space, and at a line's end.
_PROBE = ("See:", " the tower", "stands\n", "\n", "31 metres", "tall.")


Offsets = list[tuple[int, int]]


class Encoded(NamedTuple):
    """A text as tokens.

    Attributes:
        ids: of its tokens.
        spans: of the ranges that are marked in it.
        offsets: of each token its characters ``[start, end)``, none for one that no text
            stands for; empty where they are not asked for.
    """

    ids: list[int]
    spans: tuple[TokenSpan, ...]
    offsets: Offsets


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which rule requests get that name none, and why."""

    rule: str
    why: str


def usual_rule(tokenizer: Any) -> Rule:
    """``pieces``, unless pieces that are tokenised alone spell another text, as with
    tokenizers that put a space in front of whatever they are given.

    Args:
        tokenizer: a Hugging Face tokenizer; ``None`` on a server that has none.
    """
    if tokenizer is None:
        return Rule(PIECES, "this server has no tokenizer: prompts are token ids")
    pieces = [i for text in _PROBE for i in _ids(tokenizer, text)]
    if tokenizer.decode(pieces) == tokenizer.decode(_ids(tokenizer, "".join(_PROBE))):
        return Rule(PIECES, "pieces that are tokenised alone spell the text")
    return Rule(WHOLE, "this tokenizer changes a text that is tokenised in pieces")


def is_fast(tokenizer: Any) -> bool:
    """Whether it knows where in a text its tokens lie."""
    return getattr(tokenizer, "is_fast", False)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and behind a text."""
    bare = _ids(tokenizer, "a")
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for i in range(len(framed) - len(bare) + 1):
        if framed[i : i + len(bare)] == bare:
            return framed[:i], framed[i + len(bare) :]
    raise PicRequestError("pic.tokenize", "this tokenizer changes a text that it frames")


def _encode_pieces(
    tokenizer: Any,
    text: str,
    ranges: Sequence[TokenSpan],
    add_special_tokens: bool,
    placed: bool,
) -> tuple[list[int], list[TokenSpan], Offsets]:
    before, behind = _special_frame(tokenizer) if add_special_tokens else ([], [])
    ids = list(before)
    offsets = [(0, 0)] * len(before)
    spans = []

    def add(start: int, end: int) -> None:
        if not placed:
            ids.extend(_ids(tokenizer, text[start:end]))
            return
        made = _with_offsets(tokenizer, text[start:end], add_special_tokens=False)
        ids.extend(made[0])
        offsets.extend((start + a, start + b) for a, b in made[1])

    at = 0
    for chars in ranges:
        if at < chars.start:
            add(at, chars.start)
        start = len(ids)
        add(chars.start, chars.end)
        spans.append(TokenSpan(start, len(ids)))
        at = chars.end
    if at < len(text):
        add(at, len(text))
    return ids + behind, spans, offsets + [(0, 0)] * len(behind) if placed else []


def _with_offsets(
    tokenizer: Any, text: str, *, add_special_tokens: bool
) -> tuple[list[int], Offsets]:
    made = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return made["input_ids"], made["offset_mapping"]


def _whole_spans(offsets: Offsets, ranges: Sequence[TokenSpan]) -> list[TokenSpan]:
    spans = []
    token = 0
    for chars in ranges:
        # Special tokens map to (0, 0): an empty range is inside no segment.
        while token < len(offsets) and (
            offsets[token][0] < chars.start or offsets[token][0] == offsets[token][1]
        ):
            token += 1
        start = token
        while token < len(offsets) and offsets[token][1] <= chars.end:
            token += 1
        spans.append(TokenSpan(start, token))
    return spans


def _with_empty(ranges: Sequence[TokenSpan], spans: Sequence[TokenSpan]) -> list[TokenSpan]:
    """Spans of all ranges, given those of the ranges that are not empty.

    An empty one stands at the end of the one before it; it cuts no text in two.
    """
    found = iter(spans)
    at = spans[0].start if spans else 0
    placed = []
    for chars in ranges:
        span = next(found) if chars.start < chars.end else TokenSpan(at, at)
        placed.append(span)
        at = span.end
    return placed


def check_tokenizer(tokenizer: Any, field: str = "text", instead: str = "'input_ids'") -> None:
    """Raise ``PicRequestError`` on a server that cannot read text.

    Args:
        field: what is a text.
        instead: what to give.
    """
    if tokenizer is None:
        raise PicRequestError(field, f"this server has no tokenizer: give {instead}")


def encode(
    tokenizer: Any,
    text: str,
    ranges: Sequence[TokenSpan],
    *,
    rule: str,
    add_special_tokens: bool = True,
    placed: bool = False,
) -> Encoded:
    """Tokenise ``text`` and carry the marked character ranges over to tokens.

    Args:
        tokenizer: a Hugging Face tokenizer; ``None`` on a server that has none.
        text: the prompt, without any marker.
        ranges: character ranges, sorted, disjoint, inside the text.
        rule: ``pieces`` or ``whole``.
        add_special_tokens: frame the prompt as the tokenizer usually does (BOS).
        placed: tell where its tokens lie, which takes a fast tokenizer.

    Returns:
        Token ids and one token span a range, empty for a range that is empty or
        holds no whole token.

    Raises:
        PicRequestError: the tokenizer cannot follow the rule, or there is none.
    """
    check_tokenizer(tokenizer)
    solid = [chars for chars in ranges if chars.start < chars.end]
    spans: list[TokenSpan] = []
    offsets: Offsets = []
    if not solid and not placed:
        ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    elif solid and rule == PIECES:
        ids, spans, offsets = _encode_pieces(tokenizer, text, solid, add_special_tokens, placed)
    elif is_fast(tokenizer):
        ids, offsets = _with_offsets(tokenizer, text, add_special_tokens=add_special_tokens)
        spans = _whole_spans(offsets, solid)
    else:
        raise PicRequestError("pic.tokenize", "'whole' needs a fast tokenizer, which maps offsets")
    return Encoded(ids, tuple(_with_empty(ranges, spans)), offsets if placed else [])


def encode_marked(
    tokenizer: Any,
    text: str,
    ranges: Sequence[TokenSpan],
    *,
    rule: str,
    add_special_tokens: bool = True,
) -> tuple[list[int], tuple[TokenSpan, ...]]:
    """Token ids and spans as ``encode`` has them."""
    made = encode(tokenizer, text, ranges, rule=rule, add_special_tokens=add_special_tokens)
    return made.ids, made.spans
