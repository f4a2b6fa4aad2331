"""Text with marked character ranges -> token ids with spans.

Two rules at the edges of a segment:

``pieces`` (default): every segment, and every stretch of text between them, is
    tokenised alone. A segment's ids never depend on its neighbours, so it is
    found again anywhere; a prompt may get a few tokens more than stock would
    give it.
``whole``: the prompt is tokenised once, as stock does, and a segment is the
    tokens that lie entirely inside its characters. The prompt is stock's, token
    for token; a token that straddles an edge belongs to no segment, and the
    same document may tokenise differently behind other text.
"""

from __future__ import annotations

from typing import Any

from sglang_pic.errors import PicRequestError
from sglang_pic.request.base import TokenSpan


def _special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for i in range(len(framed) - len(bare) + 1):
        if framed[i : i + len(bare)] == bare:
            return framed[:i], framed[i + len(bare) :]
    raise PicRequestError("pic.tokenize", "this tokenizer changes a text that it frames")


def _encode_pieces(
    tokenizer: Any, text: str, ranges: tuple[TokenSpan, ...], add_special_tokens: bool
) -> tuple[list[int], tuple[TokenSpan, ...]]:
    before, behind = _special_frame(tokenizer) if add_special_tokens else ([], [])
    ids = list(before)
    spans = []
    at = 0
    for chars in ranges:
        if at < chars.start:
            ids += tokenizer(text[at : chars.start], add_special_tokens=False)["input_ids"]
        start = len(ids)
        ids += tokenizer(text[chars.start : chars.end], add_special_tokens=False)["input_ids"]
        spans.append(TokenSpan(start, len(ids)))
        at = chars.end
    if at < len(text):
        ids += tokenizer(text[at:], add_special_tokens=False)["input_ids"]
    return ids + behind, tuple(spans)


def _encode_whole(
    tokenizer: Any, text: str, ranges: tuple[TokenSpan, ...], add_special_tokens: bool
) -> tuple[list[int], tuple[TokenSpan, ...]]:
    if not getattr(tokenizer, "is_fast", False):
        raise PicRequestError("pic.tokenize", "'whole' needs a fast tokenizer, which maps offsets")
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    spans = []
    token = 0
    for i, chars in enumerate(ranges):
        # Special tokens map to (0, 0): an empty range is inside no segment.
        while token < len(offsets) and (
            offsets[token][0] < chars.start or offsets[token][0] == offsets[token][1]
        ):
            token += 1
        start = token
        while token < len(offsets) and offsets[token][1] <= chars.end:
            token += 1
        if token == start:
            raise PicRequestError(f"pic.segments[{i}]", "no whole token lies inside this segment")
        spans.append(TokenSpan(start, token))
    return encoded["input_ids"], tuple(spans)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ``PicRequestError`` on a server that cannot read text."""
    if tokenizer is None:
        raise PicRequestError("text", "this server has no tokenizer: give 'input_ids'")


def encode_marked(
    tokenizer: Any,
    text: str,
    ranges: tuple[TokenSpan, ...],
    *,
    rule: str,
    add_special_tokens: bool = True,
) -> tuple[list[int], tuple[TokenSpan, ...]]:
    """Tokenise ``text`` and carry the marked character ranges over to tokens.

    Args:
        tokenizer: a Hugging Face tokenizer; ``None`` on a server that has none.
        text: the prompt, without any marker.
        ranges: character ranges, sorted, disjoint, not empty, inside the text.
        rule: ``pieces`` or ``whole``.
        add_special_tokens: frame the prompt as the tokenizer usually does (BOS).

    Returns:
        Token ids and one token span a range.

    Raises:
        PicRequestError: the rule cannot be followed for this text, or there is no
            tokenizer.
    """
    check_tokenizer(tokenizer)
    encode = _encode_pieces if rule == "pieces" else _encode_whole
    return encode(tokenizer, text, ranges, add_special_tokens)
