"""``pic`` and ``pic_segment`` where nobody reads them: a client is told, not ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_pic.errors import PicRequestError

_OURS = ("pic", "pic_segment")
# A client's own data, or SGLang's: a property of a tool may have any name.
_FOREIGN = {
    "arguments",
    "chat_template_kwargs",
    "custom_params",
    "input_embeds",
    "input_ids",
    "input_schema",
    "json_schema",
    "kv_hints",
    "metadata",
    "schema",
}


def _is_foreign(holder: dict[str, Any], key: str, path: str) -> bool:
    if key == "parameters":
        return path != ""  # a tool's; at the top they are Vertex AI's, of the request
    return key in _FOREIGN or (key == "input" and holder.get("type") == "tool_use")


def _strays(body: Any) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Holder, key and path of each field of ours. No recursion: JSON may be deep."""
    stack = [("", body)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, list):
            inner = [(f"{path}[{i}]", item) for i, item in enumerate(value) if _holds(item)]
            stack.extend(reversed(inner))
            continue
        children = []
        for key in list(value):
            here = f"{path}.{key}" if path else key
            if key in _OURS:
                yield value, key, here
            elif _holds(value[key]) and not _is_foreign(value, key, path):
                children.append((here, value[key]))
        stack.extend(reversed(children))


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


def drop_nulls(body: dict[str, Any]) -> None:
    """Take fields of ours out that are ``null``: such a field is absent."""
    for holder, key, _ in _strays(body):
        if holder[key] is None:
            del holder[key]


def refuse_strays(body: dict[str, Any], problem: str) -> None:
    """Raise ``PicRequestError`` for the first field of ours that is left in a body."""
    for _, _, path in _strays(body):
        raise PicRequestError(path, problem)
