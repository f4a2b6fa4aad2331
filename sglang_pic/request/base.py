"""The plain records every request is turned into."""

from __future__ import annotations

import dataclasses

from sglang_pic.link.policy import LinkOptions

# Stands for the plain text before the first segment where segments are numbered.
OPENING = -1


@dataclasses.dataclass(frozen=True)
class TokenSpan:
    """Half-open range of token indices ``[start, end)``; of an empty segment, empty."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class LinkRequest:
    """What the scheduler receives beside the prompt's token ids.

    ``strict`` asks the scheduler to hand the request back, unstarted, when a
    segment is not in the forest, so that it can be compiled first. ``off`` says
    why nothing is linked now, whatever the options say.
    """

    spans: tuple[TokenSpan, ...]
    options: LinkOptions
    strict: bool = True
    off: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether it is to be answered as stock SGLang would."""
        return self.off is not None or self.options.require_exact
