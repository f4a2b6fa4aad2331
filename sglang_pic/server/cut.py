"""A prompt, and the documents in it that a trained encoder reads: they leave its row."""

from __future__ import annotations

from typing import NamedTuple

from sglang_pic.server.life import Prompt


class Cut(NamedTuple):
    """A prompt without its documents.

    Attributes:
        row: its other tokens.
        documents: of each segment that is not empty its index, and its tokens.
    """

    row: list[int]
    documents: list[tuple[int, tuple[int, ...]]]


def cut(prompt: Prompt) -> Cut:
    """Take the documents out of a prompt."""
    ids, link = prompt
    row, documents, at = [], [], 0
    for i, span in enumerate(link.spans):
        row += ids[at : span.start]
        at = span.end
        if span.start < span.end:
            documents.append((i, tuple(ids[span.start : span.end])))
    return Cut([*row, *ids[at:]], documents)
