"""Where a chat's messages, content parts and tools stand in the prompt that its template
makes of them.

They are looked for in the rendered text, so a template may put around them what it likes.
What it rewrites is not found. A range that is found is one of exactly that text, wherever
it comes from: to take another's for it does no harm.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sglang_pic.find.base import Cut
from sglang_pic.find.structure import MESSAGE, PART, TOOL, Range

# Texts that are looked for in vain, before no more are: each takes a pass over the prompt.
MAX_MISSES = 16
# Characters of the longest tool; how often a prompt is read for tools.
MAX_TOOL, MAX_PASSES = 1 << 16, 4
_JSON = json.JSONDecoder()


def chat_cuts(
    text: str, messages: Sequence[Any], tools: Sequence[str], shortest: int = 1
) -> list[Cut]:
    """Cuts in characters of a rendered chat: ``message``, ``part`` and ``tool``.

    Args:
        text: the prompt.
        messages: as OpenAI's chat API has them, decoded JSON.
        tools: their names.
        shortest: characters of the shortest text that is looked for.
    """
    found = [Cut(*span, TOOL) for _, span in tools_in(text, tools)]
    return [*found, *_messages(text, messages, shortest)]


def regions_of(cuts: Sequence[Cut]) -> list[Range]:
    """What of a chat is cut further: its texts, as they came, not the tools."""
    regions: list[Range] = []
    at = 0
    for cut in sorted(cuts, key=lambda cut: (cut.end, -cut.start)):
        if cut.start >= at and cut.rule != TOOL:
            regions.append((cut.start, cut.end))
            at = cut.end
    return regions


def _messages(text: str, messages: Sequence[Any], shortest: int) -> Iterator[Cut]:
    at = misses = 0
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        rule = MESSAGE if isinstance(content, str) else PART
        found: list[Cut] = []
        for part in _texts(content):
            core = part.strip()
            if len(core) < shortest or misses == MAX_MISSES:
                continue
            start = text.find(core, at)
            if start < 0:
                misses += 1
                continue
            at = start + len(core)
            found.append(Cut(start, at, rule))
        yield from found
        if len(found) > 1:
            yield Cut(found[0].start, at, MESSAGE)


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return [text for text in texts if isinstance(text, str)]


def tools_in(text: str, names: Sequence[str]) -> list[tuple[str, Range]]:
    """Tools in a rendered prompt: the JSON objects, however they are written, that have
    one of these names, or a ``function`` of it.

    Returns:
        Names and character ranges, in the order of the text; no name more often than it
        is asked for.
    """
    found: list[tuple[str, Range]] = []
    wanted = Counter(names)
    at, budget = 0, MAX_PASSES * len(text)
    while wanted.total() and budget > 0 and (start := text.find("{", at)) >= 0:
        value, length, read = _object(text[start : start + MAX_TOOL])
        budget -= read
        name = _name_of(value)
        if wanted[name] > 0:
            wanted[name] -= 1
            found.append((name, (start, start + length)))
            at = start + length
        else:
            at = start + 1
    return found


def _object(text: str) -> tuple[Any, int, int]:
    """The JSON value that a text begins with, or ``None``; its characters, and how many
    were read."""
    try:
        value, end = _JSON.raw_decode(text)
    except json.JSONDecodeError as error:
        # Of a string without an end the error tells the beginning.
        whole = error.msg.startswith("Unterminated")
        return None, 0, len(text) if whole else error.pos + 1
    except (ValueError, RecursionError):
        return None, 0, len(text)
    return value, end, end


def _name_of(value: Any) -> str:
    """Of a tool; empty of anything else."""
    holder = value.get("function", value) if isinstance(value, dict) else None
    name = holder.get("name") if isinstance(holder, dict) else None
    return name if isinstance(name, str) else ""
