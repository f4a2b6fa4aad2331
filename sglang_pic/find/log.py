"""Recorded requests as prompts: bodies of OpenAI's chat and completions, and of /generate."""

from __future__ import annotations

import json
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from sglang_pic.find.base import CONTENT, MARKED, STRUCTURE, Cut
from sglang_pic.find.cutting import Cutter
from sglang_pic.find.rendered import chat_cuts, regions_of, tools_in
from sglang_pic.find.replay import Prompt
from sglang_pic.find.spans import token_cuts

Offsets = Sequence[tuple[int, int]]


class Rendering(Protocol):
    """What a model makes of requests."""

    def text(self, messages: list[Any], tools: list[Any] | None) -> str:
        """The prompt of a chat."""
        ...

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        """Token ids, and of each its characters ``[start, end)``."""
        ...


class Plain:
    """No model's: messages behind their roles, tools as lines of JSON, and words, with the
    space before them, as tokens."""

    _WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s+")

    def text(self, messages: list[Any], tools: list[Any] | None) -> str:
        head = [json.dumps(tool, ensure_ascii=False) for tool in tools or ()]
        turns = [f"<|{m.get('role')}|>\n{flat(m.get('content'))}\n" for m in messages]
        return "".join([*(f"{line}\n" for line in head), *turns, "<|assistant|>\n"])

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        spans = [match.span() for match in self._WORD.finditer(text)]
        return [zlib.crc32(text[a:b].encode()) >> 1 for a, b in spans], spans


class OfModel:
    """A tokenizer's and its chat template's.

    Args:
        tokenizer: of ``transformers``, a fast one.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._plain = Plain()

    def text(self, messages: list[Any], tools: list[Any] | None) -> str:
        if not self._tokenizer.chat_template:
            return self._plain.text(messages, tools)
        told = [{**message, "content": flat(message.get("content"))} for message in messages]
        return self._tokenizer.apply_chat_template(
            told, tools=tools, tokenize=False, add_generation_prompt=True
        )

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        made = self._tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        return made["input_ids"], made["offset_mapping"]


def flat(content: Any) -> str:
    """A message's text: of parts, those that are text, joined as SGLang joins them."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return " ".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def bodies(path: pathlib.Path) -> Iterator[dict[str, Any] | None]:
    """Requests of a file, or of all files of a directory, by name: one a line, or a file
    ``.json`` of one or of a list; ``None`` for what is none. What a batch or a proxy puts
    around a ``body`` is taken off.

    Raises:
        OSError: a file cannot be read.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix == ".json":
            value = _decoded(file.read_text(encoding="utf-8", errors="replace"))
            yield from map(_body, value if isinstance(value, list) else [value])
        elif file.is_file() or not path.is_dir():
            with file.open(encoding="utf-8", errors="replace") as lines:
                yield from (_body(_decoded(line)) for line in lines if line.strip())


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _body(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict) and isinstance(value.get("body"), dict):
        value = value["body"]
    return value if isinstance(value, dict) else None


def prompt_of(body: dict[str, Any], rendering: Rendering, cutter: Cutter) -> Prompt | None:
    """A request's prompt and all its cuts; ``None`` if it has none that can be read.

    Only the first prompt of a list counts.
    """
    tenant = body.get("cache_salt") if isinstance(body.get("cache_salt"), str) else None
    messages = body.get("messages")
    pic = body.get("pic") if isinstance(body.get("pic"), dict) else {}
    assert isinstance(pic, dict)
    given: list[Cut] = []
    if isinstance(messages, list):
        messages = [message for message in messages if isinstance(message, dict)]
        tools = [tool for tool in _list(body.get("tools")) if isinstance(tool, dict)]
        text = rendering.text(messages, tools or None)
        given = chat_cuts(text, messages, [_name(tool) for tool in tools], cutter.shortest)
        marked = sorted(_marked(text, messages, tools, pic))
        regions = regions_of(given)
    else:
        plain = _plain_prompt(body, pic)
        if isinstance(plain, list):
            return _of_ids(plain, tenant, cutter)
        if plain is None:
            return None
        text, marked = plain
        regions = [(0, len(text))]
    ids, offsets = rendering.encode(text)
    structure = cutter.of_tokens(offsets, cutter.of_text(text, given, regions))
    cuts: dict[str, Sequence[Cut]] = {
        MARKED: [
            cut for cut in token_cuts(offsets, marked) if cut.end - cut.start >= cutter.shortest
        ],
        STRUCTURE: structure,
        CONTENT: cutter.by_content(ids, structure),
    }
    return Prompt(ids, cuts, tenant) if ids else None


def _of_ids(ids: list[int], tenant: str | None, cutter: Cutter) -> Prompt:
    return Prompt(ids, {CONTENT: cutter.by_content(ids, ())}, tenant)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _name(tool: dict[str, Any]) -> str:
    function = tool.get("function")
    name = (function if isinstance(function, dict) else tool).get("name")
    return name if isinstance(name, str) else ""


def _plain_prompt(
    body: dict[str, Any], pic: dict[str, Any]
) -> tuple[str, list[Cut]] | list[int] | None:
    """A text and its marked characters, or token ids."""
    if isinstance(pic.get("parts"), list):
        text, marked = "", []
        for part in pic["parts"]:
            piece = part.get("segment") if isinstance(part, dict) else part
            if not isinstance(piece, str):
                return None
            if isinstance(part, dict):
                marked.append(Cut(len(text), len(text) + len(piece), MARKED))
            text += piece
        return text, marked
    prompt = next((body[name] for name in ("prompt", "text", "input_ids") if body.get(name)), None)
    if isinstance(prompt, list) and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt, [
            Cut(one["start"], one["end"], MARKED)
            for one in _list(pic.get("segments"))
            if isinstance(one, dict)
            and isinstance(one.get("start"), int)
            and isinstance(one.get("end"), int)
        ]
    is_ids = isinstance(prompt, list) and all(
        isinstance(token, int) and 0 <= token < 1 << 31 for token in prompt
    )
    return prompt if is_ids else None


def _marked(text: str, messages: list[Any], tools: list[Any], pic: dict[str, Any]) -> Iterator[Cut]:
    """What a client has marked, in characters."""
    named = {
        (one.get("message"), one.get("part"))
        for one in _list(pic.get("segments"))
        if isinstance(one, dict)
    }
    at = 0
    for i, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list) else [{**message, "text": content}]
        for j, part in enumerate(parts):
            place = (i, j if isinstance(content, list) else None)
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                continue
            core = part["text"].strip()
            start = text.find(core, at)
            if start < 0:
                continue
            at = start + len(core)
            if core and (part.get("pic_segment") is True or place in named):
                yield Cut(start, at, MARKED)
    names = [_name(tool) for tool in tools if tool.get("pic_segment") is True]
    for _, span in tools_in(text, names):
        yield Cut(*span, MARKED)
