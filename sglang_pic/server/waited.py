"""What a request waited for before it was linked, as its report says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sglang_pic.request.base import OPENING
from sglang_pic.server.compiler import Made


@dataclasses.dataclass(frozen=True)
class Waited:
    """Of one prompt.

    Attributes:
        missing: indices of the segments that were not compiled, ``OPENING`` for the
            text in front of them.
        made: what became of each.
        seconds: the wait.
    """

    missing: Sequence[int] = ()
    made: Sequence[Made] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """``{"tokens_compiled", "waited_s", "waited_for": [{"segment", "outcome", "source",
        "why", "seconds", "bytes"}]}``."""
        return {
            "tokens_compiled": sum(one.tokens for one in self.made),
            "waited_s": round(self.seconds, 4),
            "waited_for": [
                {
                    "segment": None if i == OPENING else i,
                    "outcome": one.outcome,
                    "source": one.source.kind,
                    "why": one.source.reason,
                    "seconds": round(one.source.seconds, 4),
                    "bytes": one.source.nbytes,
                }
                for i, one in zip(self.missing, self.made, strict=True)
            ],
        }


NOTHING = Waited()
