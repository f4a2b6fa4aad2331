"""Marks around a segment's text, for the time it spends in a chat template.

A mark is plain ASCII with 128 random bits of this request, so that no user
text can hold one, no template escapes one, and none can survive: what a
template renders is searched for them, and they are cut out before anything is
tokenised.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from typing import Any

from sglang_pic.errors import PicRequestError
from sglang_pic.request.base import TokenSpan

_OPEN, _CLOSE = "PICOPEN", "PICCLOSE"
_ANY_OPEN = re.compile(_OPEN + "[0-9a-f]{32}")


def find_open(value: Any) -> str | None:
    """The first opening mark in the strings of a JSON value, or ``None``."""
    if isinstance(value, str):
        found = _ANY_OPEN.search(value)
        return found.group() if found else None
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((mark for mark in map(find_open, inner) if mark is not None), None)


@dataclasses.dataclass(frozen=True)
class ChatMarks:
    """The opening and closing mark of one request."""

    open: str
    close: str

    @classmethod
    def fresh(cls) -> ChatMarks:
        nonce = secrets.token_hex(16)
        return cls(_OPEN + nonce, _CLOSE + nonce)

    def wrap(self, text: str) -> str:
        """Mark a text inside its surrounding white space, which templates may trim."""
        body = text.strip()
        at = text.index(body)
        return f"{text[:at]}{self.open}{body}{self.close}{text[at + len(body) :]}"

    def strip(self, value: Any) -> Any:
        """A copy of a JSON value without any mark in its strings."""
        if isinstance(value, str):
            return value.replace(self.open, "").replace(self.close, "")
        if isinstance(value, list):
            return [self.strip(item) for item in value]
        if isinstance(value, dict):
            return {key: self.strip(item) for key, item in value.items()}
        return value

    def cut(self, text: str) -> tuple[str, tuple[TokenSpan, ...]]:
        """Remove the marks; return the text and the character ranges they held.

        Raises:
            PicRequestError: the template broke the marks up or reordered them.
        """
        pieces: list[str] = []
        ranges: list[TokenSpan] = []
        start: int | None = None
        at = length = 0
        for found in re.finditer(f"{self.open}|{self.close}", text):
            piece = text[at : found.start()]
            pieces.append(piece)
            length += len(piece)
            at = found.end()
            opens = found.group() == self.open
            if opens != (start is None):
                raise PicRequestError("messages", "the chat template broke up a marked part")
            if opens:
                start = length
            else:
                assert start is not None
                if length > start:
                    ranges.append(TokenSpan(start, length))
                start = None
        if start is not None:
            raise PicRequestError("messages", "the chat template broke up a marked part")
        pieces.append(text[at:])
        return "".join(pieces), tuple(ranges)


def _wrap_text(text: Any, field: str, marks: ChatMarks) -> str:
    if not isinstance(text, str):
        raise PicRequestError(field, f"a segment must be text, got {text!r:.80}")
    if not text.strip():
        raise PicRequestError(field, "a segment must not be empty")
    return marks.wrap(text)


def _flag(holder: dict[str, Any], field: str) -> bool:
    value = holder.pop("pic_segment", False)
    if not isinstance(value, bool):
        raise PicRequestError(f"{field}.pic_segment", f"must be true or false, got {value!r:.80}")
    return value


def mark_messages(messages: Any, named: Any) -> ChatMarks | None:
    """Put marks around the segments of a chat request, in place.

    A segment is a message with string content, or a text part, that carries
    ``"pic_segment": true`` (removed here) or is named in ``pic.segments`` as
    ``{"message": i}`` or ``{"message": i, "part": j}``.

    Returns:
        The marks, or ``None`` if nothing is marked.

    Raises:
        PicRequestError: naming the message, part or entry at fault.
    """
    wanted = _named(named)
    if not isinstance(messages, list):
        return None  # SGLang refuses it
    marks = ChatMarks.fresh()
    count = 0
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        field = f"messages[{i}]"
        content = message.get("content")
        if _flag(message, field) or (i, None) in wanted:
            wanted.discard((i, None))
            message["content"] = _wrap_text(content, f"{field}.content", marks)
            count += 1
        if not isinstance(content, list):
            continue
        for j, part in enumerate(content):
            if not isinstance(part, dict):
                continue
            here = f"{field}.content[{j}]"
            if _flag(part, here) or (i, j) in wanted:
                wanted.discard((i, j))
                part["text"] = _wrap_text(part.get("text"), f"{here}.text", marks)
                count += 1
    if wanted:
        i, part = min(wanted, key=str)
        where = f"messages[{i}]" if part is None else f"messages[{i}].content[{part}]"
        raise PicRequestError("pic.segments", f"{where} does not exist")
    return marks if count else None


def _named(named: Any) -> set[tuple[int, int | None]]:
    if not isinstance(named, list):
        raise PicRequestError("pic.segments", "must be a list of {message, part}")
    wanted: set[tuple[int, int | None]] = set()
    for i, item in enumerate(named):
        field = f"pic.segments[{i}]"
        if not isinstance(item, dict) or not {"message"} <= set(item) <= {"message", "part"}:
            raise PicRequestError(field, "in a chat request, must be {'message': i, 'part': j}")
        for value in item.values():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise PicRequestError(field, f"must hold indices, got {value!r:.80}")
        wanted.add((item["message"], item.get("part")))
    return wanted
