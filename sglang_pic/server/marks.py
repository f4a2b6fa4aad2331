"""Marked texts of a chat request, and how they are found in a rendered prompt.

A mark is remembered by its place in the request's body; what SGLang handles is
never marked. Only a copy of the messages is rendered with a sign before and
behind every marked text, beside the rendering that counts (``server.chat``).
The copy's text is compared, searched for the signs and thrown away. A sign
holds 128 random bits that are made after the request has come.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import BaseModel

from sglang_pic.errors import PicRequestError
from sglang_pic.request.base import TokenSpan
from sglang_pic.request.fields import MAX_SEGMENTS
from sglang_pic.server.tools import MarkedTool, marked_tools

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Mark:
    """One marked text.

    Attributes:
        path: its place in the body, ``("messages", 3, "content", 1, "text")``.
        text: as the client sent it.
    """

    path: Path
    text: str

    @property
    def field(self) -> str:
        """The place as errors name it: ``messages[3].content[1].text``."""
        steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path)
        return "".join(steps).removeprefix(".")

    @property
    def core(self) -> str:
        """The segment: the text without surrounding white space, which templates trim."""
        return self.text.strip()


class Marks:
    """What is marked in one request, in the order of its body.

    Args:
        marks: its texts.
        tools: its tools; with the texts at least one.

    Raises:
        PicRequestError: there are too many texts.
    """

    def __init__(self, marks: Sequence[Mark], tools: Sequence[MarkedTool] = ()):
        if len(marks) > MAX_SEGMENTS:
            raise PicRequestError(
                marks[MAX_SEGMENTS].field, f"at most {MAX_SEGMENTS} segments a request"
            )
        self.all = tuple(marks)
        self.tools = tuple(tools)
        self.nonce = secrets.token_hex(16)
        self._sign = re.compile(f"PIC(OPEN|CLOSE){self.nonce}([0-9a-f]{{4}})")

    def written(self, body: Any, count: int | None = None) -> Any:
        """A copy of the body with signs around the first ``count`` marked texts that
        are not empty; by default around all.

        Args:
            body: a model of SGLang's, or plain JSON; shared with the copy where
                nothing is marked.

        Raises:
            PicRequestError: a text is not where the client sent it.
        """
        marks = [(i, mark) for i, mark in enumerate(self.all[:count]) if mark.core]
        return self._write(body, marks, 0) if marks else body

    def _write(self, value: Any, marks: Sequence[tuple[int, Mark]], depth: int) -> Any:
        i, first = marks[0]
        if len(first.path) == depth:
            if value != first.text:
                raise PicRequestError(first.field, "was changed before the chat template saw it")
            at = value.index(first.core)
            end = at + len(first.core)
            opening, closing = (f"PIC{kind}{self.nonce}{i:04x}" for kind in ("OPEN", "CLOSE"))
            return f"{value[:at]}{opening}{value[at:end]}{closing}{value[end:]}"
        inside: dict[str | int, list[tuple[int, Mark]]] = {}
        for i, mark in marks:
            inside.setdefault(mark.path[depth], []).append((i, mark))
        new = {step: self._write(_at(value, step), of, depth + 1) for step, of in inside.items()}
        if isinstance(value, BaseModel):
            return value.model_copy(update={str(step): text for step, text in new.items()})
        if isinstance(value, dict):
            return {**value, **new}
        return [new.get(i, item) for i, item in enumerate(value)]

    def cut(self, text: str) -> tuple[str, list[tuple[int, TokenSpan]]] | None:
        """Remove the signs.

        Returns:
            The text, and the number and character range of every marked text in it;
            ``None`` if the signs are not pairs that stand one behind the other.
        """
        pieces: list[str] = []
        found: list[tuple[int, TokenSpan]] = []
        open_at: tuple[str, int] | None = None
        at = length = 0
        for sign in self._sign.finditer(text):
            pieces.append(text[at : sign.start()])
            length += sign.start() - at
            at = sign.end()
            kind, number = sign.groups()
            if kind == "OPEN" and open_at is None:
                open_at = number, length
            elif kind == "CLOSE" and open_at is not None and open_at[0] == number:
                found.append((int(number, 16), TokenSpan(open_at[1], length)))
                open_at = None
            else:
                return None
        if open_at is not None:
            return None
        return "".join([*pieces, text[at:]]), found


def _at(value: Any, step: str | int) -> Any:
    try:
        return getattr(value, str(step)) if isinstance(value, BaseModel) else value[step]
    except (AttributeError, LookupError, TypeError):
        return None


# -- reading a body -------------------------------------------------------------------


def _flag(holder: dict[str, Any], path: Path) -> bool:
    value = holder.pop("pic_segment", None)
    if value is not None and not isinstance(value, bool):
        field = Mark((*path, "pic_segment"), "").field
        raise PicRequestError(field, f"must be true or false, got {value!r:.80}")
    return bool(value)


def _mark(holder: dict[str, Any], path: Path) -> Mark:
    text = holder.get(str(path[-1]))
    mark = Mark(path, text if isinstance(text, str) else "")
    if not isinstance(text, str):
        raise PicRequestError(mark.field, f"a segment must be text, got {text!r:.80}")
    return mark


def find_marks(
    messages: Any,
    at: Path,
    named: Collection[Path] = (),
    keys: Sequence[str] = ("content",),
) -> list[Mark]:
    """The marked texts of a list of messages, or of content parts.

    One is marked if it carries ``"pic_segment": true``, which is removed here, or if
    ``named`` holds its path. A message's text is its ``content``, a part's its ``text``.

    Args:
        messages: a decoded JSON value; what is no list of objects holds none.
        at: the list's place in the body.
        keys: where a message may have its text, or its parts.

    Raises:
        PicRequestError: naming the message or part at fault.
    """
    marks: list[Mark] = []
    for i, item in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(item, dict):
            continue
        path = (*at, i)
        key = next((key for key in keys if key in item), "text")
        content = item.get(key)
        if _flag(item, path) or path in named:
            marks.append(_mark(item, (*path, key)))
        elif isinstance(content, list):
            marks += find_marks(content, (*path, key), named, keys)
    return marks


def mark_messages(messages: Any, named: Any, tools: Any = None) -> Marks | None:
    """The marks of a chat request, or ``None`` if nothing is marked.

    Args:
        messages: the body's; flags are removed in place.
        named: ``pic.segments``, a list of ``{"message": i}`` and
            ``{"message": i, "part": j}``.
        tools: the body's, as ``messages``.

    Raises:
        PicRequestError: naming the message, part, tool or entry at fault.
    """
    wanted = _named(named)
    marks = find_marks(messages, ("messages",), wanted)
    found = {mark.path[:-1] for mark in marks}
    for path in wanted:
        if path not in found:
            raise PicRequestError("pic.segments", f"{Mark(path, '').field} does not exist")
    of_tools = marked_tools(tools)
    return Marks(marks, of_tools) if marks or of_tools else None


def _named(named: Any) -> dict[Path, None]:
    if not isinstance(named, list):
        raise PicRequestError("pic.segments", "must be a list of {message, part}")
    wanted: dict[Path, None] = {}
    for i, item in enumerate(named):
        field = f"pic.segments[{i}]"
        if not isinstance(item, dict) or not {"message"} <= set(item) <= {"message", "part"}:
            raise PicRequestError(field, "in a chat request, must be {'message': i, 'part': j}")
        for value in item.values():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise PicRequestError(field, f"must hold indices, got {value!r:.80}")
        part: Path = ("content", item["part"]) if "part" in item else ()
        wanted[("messages", item["message"], *part)] = None
    return wanted
