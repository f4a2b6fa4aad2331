"""Marked tools of a chat request, and where they stand in its prompt.

A segment is the tool's own text as the chat template writes it, an object of JSON; what
stands between two tools is outside. The object is looked for in the prompt by its name, so
nothing is rendered twice for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sglang_pic.errors import PicRequestError
from sglang_pic.find.rendered import tools_in
from sglang_pic.request.base import TokenSpan
from sglang_pic.server.texts import Piece


@dataclasses.dataclass(frozen=True)
class MarkedTool:
    """One marked tool: its place in the body's ``tools``, and its name."""

    index: int
    name: str

    @property
    def field(self) -> str:
        """The place as errors name it: ``tools[3]``."""
        return f"tools[{self.index}]"


def name_of(tool: Any) -> str | None:
    """The name of a tool as a chat request has it, if it has one."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def marked_tools(tools: Any) -> tuple[MarkedTool, ...]:
    """The tools that carry ``"pic_segment": true``, which is removed here.

    Args:
        tools: a decoded JSON value; what is no list of objects holds none.

    Raises:
        PicRequestError: naming the tool at fault.
    """
    marked = []
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict):
            continue
        field = f"tools[{i}].pic_segment"
        flag = tool.pop("pic_segment", None)
        if flag is not None and not isinstance(flag, bool):
            raise PicRequestError(field, f"must be true or false, got {flag!r:.80}")
        if flag:
            name = name_of(tool)
            if name is None:
                raise PicRequestError(field, "marks no function with a name")
            marked.append(MarkedTool(i, name))
    return tuple(marked)


def add_tools(
    tools: Sequence[MarkedTool],
    offered: Sequence[Any] | None,
    pieces: Sequence[Piece],
    ranges: Sequence[Sequence[TokenSpan]],
) -> list[list[TokenSpan]]:
    """The character ranges of marked texts and marked tools in each piece of a prompt.

    Args:
        tools: those that are marked; of these a request's ``tool_choice`` may leave out some.
        offered: the tools that the chat template was given, as a chat request has them.
        pieces: the prompt.
        ranges: of the marked texts.

    Raises:
        PicRequestError: a tool that was offered does not stand in the prompt as JSON.
    """
    names = {name_of(tool) for tool in offered or ()}
    missing = [tool for tool in tools if tool.name in names]
    made = []
    for piece, taken in zip(pieces, ranges, strict=True):
        text = piece.text
        for span in taken:
            text = text[: span.start] + " " * (span.end - span.start) + text[span.end :]
        found = tools_in(text, [tool.name for tool in missing])
        for name, _ in found:
            missing.remove(next(tool for tool in missing if tool.name == name))
        spans = [*taken, *(TokenSpan(*place) for _, place in found)]
        made.append(sorted(spans, key=lambda span: (span.start, span.end)))
    if missing:
        problem = "the chat template does not write this tool as JSON: it cannot be a segment"
        raise PicRequestError(missing[0].field, problem)
    return made
