"""Token ids that clients send, checked before a scheduler sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from sglang_pic.errors import PicRequestError

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


def check_prompt(ids: Sequence[int], field: str, *, limit: int, vocabulary: int) -> None:
    """Raise ``PicRequestError`` unless a server could compute these tokens.

    Args:
        ids: not negative.
        field: what they were given as.
        limit: one more than the most tokens that it takes.
        vocabulary: how many tokens its model knows.
    """
    if not ids:
        raise PicRequestError(field, "must not be empty")
    if len(ids) >= limit:
        raise PicRequestError(field, f"{len(ids)} tokens are too many, at most {limit - 1} fit")
    if max(ids) >= vocabulary:
        raise PicRequestError(field, f"{max(ids)} is not in the vocabulary of {vocabulary} tokens")
