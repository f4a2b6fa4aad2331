"""The plain record that every way to cut a prompt gives."""

from __future__ import annotations

from typing import NamedTuple

# How segments are found: not at all, by the blocks a text is built of, or by these and by
# what its tokens are.
OFF, STRUCTURE, CONTENT = "off", "structure", "content"
FIND = (OFF, STRUCTURE, CONTENT)
# How those came to be segments that a request names.
MARKED = "marked"


class Cut(NamedTuple):
    """A place where a prompt may be cut: half-open range ``[start, end)`` of characters or
    of tokens, and the name of the rule that found it."""

    start: int
    end: int
    rule: str

    @property
    def found(self) -> str:
        """Whether it was found by ``structure`` or by ``content``."""
        return CONTENT if self.rule == CONTENT else STRUCTURE
