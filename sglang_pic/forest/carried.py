"""What a segment carries beside its pages.

In models whose attention is full: nothing. In hybrids: the states of the linear
layers (``linear.carried``). One protocol, so that nothing else in this folder asks
which model it serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sglang_pic.forest.turns import Chain, Turn
from sglang_pic.link.plan import LinkPlan
from sglang_pic.link.policy import LinkOptions
from sglang_pic.store.value import SavedSegment

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_pic.linear.state import CoreState

Owner = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Path:
    """Tokens of a compile that are held already: so many, on the path to this node."""

    node: int
    tokens: int


class Carried(Protocol):
    """Named as segments are, and of an owner who is compared.

    ``budget``: bytes that all of it may take. ``usual_nbytes``: at most what one more
    segment takes, for one seam width. ``history``: tokens at a core's beginning that see
    what stands in front of it, whatever else does: the convolutions' width less one.
    """

    @property
    def budget(self) -> int: ...

    @property
    def usual_nbytes(self) -> int: ...

    @property
    def history(self) -> int: ...

    # -- compiles

    def begin(self, req: Req, seams: Sequence[int], held: Path) -> Path:
        """A compile is about to run, for links of these seam widths.

        Args:
            held: the longest path of its tokens that is held, whole pages.

        Returns:
            What of it need not be computed again.
        """
        ...

    def keep(self, req: Req, name: str, owner: Owner, *, uses: int, offer: bool) -> bool:
        """Keep what a complete compile has made; whether it fits.

        Args:
            uses: as in ``EvictionOrder.add``.
            offer: it may go at once, or from ``release`` on.
        """
        ...

    def end(self, req: Req) -> bool:
        """A compile is over, whatever became of it; whether it was one."""
        ...

    # -- links

    def of_core(
        self, name: str, owner: Owner, core: tuple[int, int], *, opening: bool
    ) -> tuple[CoreState | None, str | None]:
        """What a core [first, last) does to the linear layers, and why it cannot be
        reused, or ``None``."""
        ...

    def begin_row(self, req: Req) -> None:
        """A row is laid out that reuses nothing of the ordinary prefix SGLang matched."""
        ...

    def hand_over(
        self,
        backend: Any,
        rids: Sequence[str],
        reqs: Sequence[Req],
        plans: Sequence[LinkPlan | None],
        options: Sequence[LinkOptions | None],
    ) -> None:
        """Give the attention backend what it needs of the batch that runs next."""
        ...

    # -- a segment's life

    def use(self, names: Collection[str]) -> None:
        """One link uses these."""
        ...

    def hold_back(self, name: str) -> None:
        """It may go from ``release`` on."""
        ...

    def release(self, name: str) -> None:
        """What was held back may go."""
        ...

    def pin(self, name: str) -> None:
        """It stays until ``unpin``."""
        ...

    def unpin(self, name: str) -> None:
        """It may go again."""
        ...

    def drop(self, name: str) -> None:
        """The segment is gone."""
        ...

    def lost(self, name: str) -> None:
        """What was kept under this name went for want of memory."""
        ...

    # -- companies

    def begin_company(
        self, req: Req, members: Sequence[tuple[int, int]], seams: Sequence[int]
    ) -> None:
        """The prefill of a company begins: of each member, [start, end) of its row, what
        links of these seam widths need is read off."""
        ...

    def keep_members(
        self,
        req: Req,
        names: Sequence[str],
        owner: Owner,
        *,
        others: Sequence[str] = (),
        offer: bool,
    ) -> bool:
        """It is complete: keep what each member carries under a name of its own.

        Args:
            others: names under which the other order is kept: the mean of both is.
            offer: it may go at once, or from ``release`` on.

        Returns:
            Whether there was room for all; if not, none is kept.
        """
        ...

    # -- earlier turns

    @property
    def keeps_states(self) -> bool:
        """Whether a turn is of use only with the state behind it."""
        ...

    def can_keep_turn(self, req: Req) -> bool:
        """Whether what a finished link left is that of its last token."""
        ...

    def keep_turn(self, req: Req, turn: Turn, tokens: int) -> str | None:
        """So many tokens of a turn's path are held, up to where its request ended.

        Returns:
            Name under which a state is kept there, which goes with the path.
        """
        ...

    def usable(self, turn: Turn, held: int) -> int:
        """How many of the tokens held of a turn's path can be reused."""
        ...

    def of_turn(self, chain: Chain) -> CoreState | None:
        """State of the linear layers behind the last turn."""
        ...

    def use_turn(self, chain: Chain) -> None:
        """One link goes on from it."""
        ...

    # -- stores, and for people

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All that is kept of a segment, by name; empty if nothing is."""
        ...

    def core_end(self, name: str, owner: Owner) -> int | None:
        """Where a segment's cores end, if anything is kept of it."""
        ...

    def heads(self, tokens: int, seam: int) -> tuple[int, ...]:
        """First tokens of the cores that a link of this seam width needs of a segment of
        so many tokens, as far as anything is kept for them."""
        ...

    def check_saved(self, saved: SavedSegment, tokens: int) -> None:
        """Raise ``BadValue`` unless what a value holds of a segment of so many tokens has
        the shapes that it must have."""
        ...

    def adopt(
        self, name: str, saved: SavedSegment, *, cost: float, uses: int, offer: bool, evict: bool
    ) -> bool:
        """Keep what a value holds of a segment, beside what is held of it.

        Args:
            uses, offer: as of ``keep``.
            evict: others may go for it.

        Returns:
            Whether it fits.
        """
        ...

    def nbytes_of(self, name: str) -> int:
        """Bytes held for a segment."""
        ...

    def nbytes_of_kind(self, kind: str) -> int:
        """Bytes held for all segments, or all turns."""
        ...

    def to_json(self) -> dict[str, Any]:
        """For the operator."""
        ...

    def to_json_of(self, name: str) -> dict[str, Any]:
        """Of one segment."""
        ...

    def clear(self) -> None:
        """Everything was flushed."""
        ...


class Nothing:
    """Pages are all there is: of models whose attention is full."""

    budget = usual_nbytes = history = 0
    keeps_states = False

    def begin(self, req: Req, seams: Sequence[int], held: Path) -> Path:
        return held

    def keep(self, req: Req, name: str, owner: Owner, *, uses: int, offer: bool) -> bool:
        return True

    def end(self, req: Req) -> bool:
        return False

    def of_core(
        self, name: str, owner: Owner, core: tuple[int, int], *, opening: bool
    ) -> tuple[None, None]:
        return None, None

    def begin_row(self, req: Req) -> None:
        pass

    def hand_over(
        self,
        backend: Any,
        rids: Sequence[str],
        reqs: Sequence[Req],
        plans: Sequence[LinkPlan | None],
        options: Sequence[LinkOptions | None],
    ) -> None:
        backend.set_plans(rids, plans)

    def use(self, names: Collection[str]) -> None:
        pass

    def hold_back(self, name: str) -> None:
        pass

    def release(self, name: str) -> None:
        pass

    def pin(self, name: str) -> None:
        pass

    def unpin(self, name: str) -> None:
        pass

    def drop(self, name: str) -> None:
        pass

    def lost(self, name: str) -> None:
        pass

    def begin_company(
        self, req: Req, members: Sequence[tuple[int, int]], seams: Sequence[int]
    ) -> None:
        pass

    def keep_members(
        self,
        req: Req,
        names: Sequence[str],
        owner: Owner,
        *,
        others: Sequence[str] = (),
        offer: bool,
    ) -> bool:
        return True

    def can_keep_turn(self, req: Req) -> bool:
        return True

    def keep_turn(self, req: Req, turn: Turn, tokens: int) -> None:
        return None

    def usable(self, turn: Turn, held: int) -> int:
        return held

    def of_turn(self, chain: Chain) -> None:
        return None

    def use_turn(self, chain: Chain) -> None:
        pass

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {}

    def core_end(self, name: str, owner: Owner) -> None:
        return None

    def heads(self, tokens: int, seam: int) -> tuple[int, ...]:
        return ()

    def check_saved(self, saved: SavedSegment, tokens: int) -> None:
        pass

    def adopt(
        self, name: str, saved: SavedSegment, *, cost: float, uses: int, offer: bool, evict: bool
    ) -> bool:
        return True

    def nbytes_of(self, name: str) -> int:
        return 0

    def nbytes_of_kind(self, kind: str) -> int:
        return 0

    def to_json(self) -> dict[str, Any]:
        return {}

    def to_json_of(self, name: str) -> dict[str, Any]:
        return {}

    def clear(self) -> None:
        pass
