"""Checkpoints: states of ordinary prefixes, kept where requests leave them.

Sparse Prefix Caching for Hybrid and Recurrent LLM Serving (arXiv 2605.05219). A model whose
attention is full goes on from any page; a hybrid only from where the state of its linear
layers was kept. One protocol; ``linear.checkpoints`` is its form for hybrids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sglang.srt.mem_cache.base_prefix_cache import MatchResult

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# Kind of memory, beside those of ``nodes``.
CHECKPOINT = "checkpoint"


class Checkpoints(Protocol):
    """Told of every ordinary request, at the points where SGLang asks the tree."""

    def found(self, req: Req, result: MatchResult) -> MatchResult:
        """A match with what a request could go on from: the deepest checkpoint, where it is
        deeper than what SGLang holds. Nothing is prepared."""
        ...

    def resume(self, req: Req, result: MatchResult) -> MatchResult:
        """``found``, and the request, an ordinary one, goes on from there."""
        ...

    def inserted(self, req: Req) -> None:
        """What a request has computed so far is in the tree, as far as it will be."""
        ...

    def released(self, req: Req) -> None:
        """A request's row is gone."""
        ...

    def hand_over(self, backend: Any, reqs: Sequence[Req]) -> None:
        """Give the attention backend what it needs of the batch that runs next, behind
        ``Carried.hand_over``; rows among it that run for the first time are counted."""
        ...

    def concern(self, reqs: Sequence[Req]) -> bool:
        """Whether any of these goes on from a checkpoint, or one is read off it."""
        ...

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        """Those of these requests that were to go on from a checkpoint, and do not; nothing
        that they compute is kept."""
        ...

    def gone(self, name: str) -> None:
        """The pages that ended with a checkpoint, or something else, are gone."""
        ...

    def lost(self, name: str) -> None:
        """A checkpoint's state, or something else's, went for want of memory."""
        ...

    def counts(self) -> Counts:
        """What is held, and what has been done."""
        ...

    def clear(self) -> None:
        """Everything was flushed."""
        ...


@dataclasses.dataclass
class Counts:
    """For the operator.

    Attributes:
        held: checkpoints.
        placed: since start.
        plans: solved since start.
        tokens_resumed: that requests did not compute, beyond what SGLang holds.
        tokens_recomputed: shared with what the tree holds, and computed again for want of a
            state behind them.
    """

    held: int = 0
    placed: int = 0
    plans: int = 0
    tokens_resumed: int = 0
    tokens_recomputed: int = 0

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)


class NoCheckpoints:
    """Of models whose attention is full, and where they are off."""

    def found(self, req: Req, result: MatchResult) -> MatchResult:
        return result

    def resume(self, req: Req, result: MatchResult) -> MatchResult:
        return result

    def inserted(self, req: Req) -> None:
        pass

    def released(self, req: Req) -> None:
        pass

    def hand_over(self, backend: Any, reqs: Sequence[Req]) -> None:
        pass

    def concern(self, reqs: Sequence[Req]) -> bool:
        return False

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        return []

    def gone(self, name: str) -> None:
        pass

    def lost(self, name: str) -> None:
        pass

    def counts(self) -> Counts:
        return Counts()

    def clear(self) -> None:
        pass
