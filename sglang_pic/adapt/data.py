"""What an adapter learns from: prompts, one a line of JSON.

    {"segments": ["...", ...], "question": "..." or ["...", ...],
     "opening": "...", "gap": "..."}

The prompt is opening, segments with a gap behind each, question, as text: what a chat
template puts around them belongs to opening and question. Opening and gap may be left
out. Several questions share the prompt's segments, each asked by itself.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

Ids = tuple[int, ...]


class AdaptError(ValueError):
    """Nothing can be learnt from what was given; the message says why."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt's parts, each tokenised by itself."""

    opening: Ids
    segments: tuple[Ids, ...]
    gap: Ids
    questions: tuple[Ids, ...]

    @property
    def starts(self) -> list[int]:
        """Where each segment starts in the prompt."""
        starts, at = [], len(self.opening)
        for segment in self.segments:
            starts.append(at)
            at += len(segment) + len(self.gap)
        return starts

    @property
    def length(self) -> int:
        """Tokens in front of a question."""
        return self.starts[-1] + len(self.segments[-1]) + len(self.gap)


def _texts(row: dict[str, Any], name: str) -> list[str]:
    """A list of texts, none of them empty."""
    found = row.get(name)
    found = [found] if name == "question" and isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(t, str) and t for t in found):
        raise AdaptError(f"'{name}' must be texts, at least one and none empty")
    return found


def prompt_of(row: Any, tokenizer: Any) -> Prompt:
    """One line's prompt.

    Raises:
        AdaptError: it is none.
    """

    def ids(text: str) -> Ids:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    if not isinstance(row, dict):
        raise AdaptError("a prompt is a JSON object")
    unknown = set(row) - {"segments", "question", "opening", "gap"}
    if unknown:
        raise AdaptError(f"unknown fields: {', '.join(sorted(unknown))}")
    for name in ("opening", "gap"):
        if not isinstance(row.get(name, ""), str):
            raise AdaptError(f"'{name}' must be a text")
    prompt = Prompt(
        ids(row.get("opening", "")),
        tuple(map(ids, _texts(row, "segments"))),
        ids(row.get("gap", "")),
        tuple(map(ids, _texts(row, "question"))),
    )
    if len(set(prompt.segments)) < len(prompt.segments):
        raise AdaptError("a segment stands in it twice")
    return prompt


def read_prompts(path: pathlib.Path, tokenizer: Any, longest: int) -> Sequence[Prompt]:
    """All prompts of a file.

    Args:
        longest: tokens that a prompt may have, its longest question included.

    Raises:
        AdaptError: there is none, or a line is no prompt, or too long.
        OSError: it can't be read.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = prompt_of(json.loads(line), tokenizer)
        except ValueError as error:
            raise AdaptError(f"{path}:{number}: {error}") from error
        tokens = prompt.length + max(map(len, prompt.questions))
        if tokens > longest:
            raise AdaptError(f"{path}:{number}: {tokens} tokens, of {longest} that the model takes")
        prompts.append(prompt)
    if not prompts:
        raise AdaptError(f"{path} holds no prompt")
    return prompts
