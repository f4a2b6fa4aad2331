"""What a segment carries in a hybrid: the states of its linear layers.

Segments need no state of SGLang's, since theirs are ours (``linear.states``): that is
what lets segments of any length be shared at any page size, without taking a state
slot from the requests that run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_pic.config import PicConfig
from sglang_pic.forest.carried import Owner, Path
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.kept import Kept
from sglang_pic.forest.keys import owner_of
from sglang_pic.forest.nodes import TURN
from sglang_pic.forest.segments import NAMED_USES
from sglang_pic.forest.turns import Chain, Turn
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.linear.capture import Capture
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.state import CoreState, SegmentState
from sglang_pic.linear.states import PackedStates
from sglang_pic.link.plan import LinkPlan
from sglang_pic.link.policy import LinkOptions, Outline, Seam, floor_to
from sglang_pic.link.report import NO_STATE
from sglang_pic.store.value import OTHER_SHAPE, BadValue, SavedSegment

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# Segments that end on the path to a node, up to a position: of each node the names, and
# the deepest first.
Ending = Callable[[int, int], Sequence[tuple[int, Collection[str]]]]
Turning = Callable[[torch.Tensor, int], torch.Tensor]


def _turn_end(turn: Turn, tokens: int) -> str:
    """Name of the state behind so many tokens of a turn's path."""
    return f"{turn.salt}:{tokens}"


class LinearStates:
    """States of segments and turns; ``forest.carried.Carried``.

    Args:
        context: tokens of the compile context.
        shape: of the linear layers.
        rows: SGLang's table of request rows, which holds their states.
        is_exact: whether the state SGLang holds of a request is that of its last token.
        kept: where states are kept; ``lost`` is to be told what goes from there.
        by_shape: what is kept counts by its shape alone (``SegmentState``).
        ending: which shorter segments a path begins with.
        turn: states [layers, heads, dk, dv] of tokens that stand so many positions further
            on, where keys are turned to their positions.
    """

    keeps_states = True

    def __init__(
        self,
        config: PicConfig,
        *,
        context: int,
        page: int,
        shape: LinearShape,
        cost: PrefillCost,
        rows: Any,
        device: Any,
        is_exact: bool,
        kept: Kept,
        by_shape: bool,
        ending: Ending,
        turn: Turning,
    ):
        self._context = context
        self._page = page
        self._shape = shape
        self._cost = cost
        self._rows = rows
        self._device = device
        self._is_exact = is_exact
        self._ending = ending
        self._turn = turn
        self._kept = kept
        self.states = PackedStates(config, kept, shape if by_shape else None)
        # Lengths of each turn's path behind which a state is held.
        self._turn_ends: dict[str, set[int]] = {}
        # Of a compile one, of a company one a member.
        self._captures: weakref.WeakKeyDictionary[Req, tuple[Capture, ...]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def budget(self) -> int:
        return self._kept.budget

    @property
    def usual_nbytes(self) -> int:
        return self._shape.state_nbytes(1, self.states.itemsize)

    @property
    def history(self) -> int:
        return self._shape.history

    # -- compiles -----------------------------------------------------------------

    def begin(self, req: Req, seams: Sequence[int], held: Path) -> Path:
        """From the first token, or from where a shorter segment's cores end: the pairs
        must see all tokens."""
        length = len(req.origin_input_ids) - self._context
        core_end, heads = floor_to(length, self._page), self._heads(length, seams)
        capture = Capture(self._shape, start=self._context, heads=heads, core_end=core_end)
        self._captures[req] = (capture,)
        owner = owner_of(req.cache_salt or "", req.extra_key)
        for node, names in self._ending(held.node, held.tokens):
            for name in sorted(names):
                state = self.states.find(name, owner)
                if (
                    state is not None
                    and state.core_end < core_end
                    and set(heads) <= set(state.pairs)
                ):
                    capture.grown_from = state
                    return Path(node, self._context + state.core_end)
        return Path(held.node, 0)

    def keep(self, req: Req, name: str, owner: Owner, *, uses: int, offer: bool) -> bool:
        (capture,) = self._captures[req]
        return not capture.complete or self.states.add(
            name,
            owner,
            core_end=capture.core_end,
            conv_tail=capture.conv_tail,
            end=capture.end(),
            pairs=capture.pairs(),
            cost=self._cost.flops(capture.start, len(req.origin_input_ids)),
            uses=uses,
            offer=offer,
        )

    def end(self, req: Req) -> bool:
        return self._captures.pop(req, None) is not None

    def _heads(self, tokens: int, seams: Sequence[int]) -> list[int]:
        """First tokens of the cores of a segment of so many tokens."""
        cores = [Seam(w).core(Outline(tokens), page=self._page) for w in seams]
        return sorted({first for first, last in cores if first < last})

    # -- companies ------------------------------------------------------------------

    def begin_company(
        self, req: Req, members: Sequence[tuple[int, int]], seams: Sequence[int]
    ) -> None:
        seams = [max(seam, self.history) for seam in seams]
        self._captures[req] = tuple(
            Capture(
                self._shape,
                start=start,
                heads=self._heads(end - start, seams),
                core_end=floor_to(end - start, self._page),
                opens=False,
            )
            for start, end in members
        )

    def keep_members(
        self,
        req: Req,
        names: Sequence[str],
        owner: Owner,
        *,
        others: Sequence[str] = (),
        offer: bool,
    ) -> bool:
        captures = self._captures[req]
        beside = [self.states.find(name, owner) for name in others] or [None] * len(captures)
        kept: list[str] = []
        for name, capture, other in zip(names, captures, beside, strict=True):
            if not capture.heads:
                continue
            if others and (other is None or other.pairs.keys() != {*capture.heads}):
                fits = False
            else:
                fits = self._keep_member(name, owner, capture, other, offer=offer)
            if not fits:
                for one in kept:
                    self._kept.drop(one)
                return False
            kept.append(name)
        return True

    def _keep_member(
        self, name: str, owner: Owner, capture: Capture, other: SegmentState | None, *, offer: bool
    ) -> bool:
        assert capture.conv_tail is not None
        tail = capture.conv_tail
        pairs = {
            head: Pair(pair.A, self._turn(pair.B, -capture.start))
            for head, pair in capture.pairs().items()
        }
        if other is not None:
            tail = (tail + other.conv_tail) / 2
            unpacked = {head: pair.unpack() for head, pair in other.pairs.items()}
            pairs = {
                head: Pair(
                    (pair.A + unpacked[head].A.to(pair.A)) / 2,
                    (pair.B + unpacked[head].B.to(pair.B)) / 2,
                )
                for head, pair in pairs.items()
            }
        end = capture.start + capture.core_end
        return self.states.add(
            name,
            owner,
            core_end=capture.core_end,
            conv_tail=tail,
            # It opens no prompt.
            end=tail.new_zeros(0, 0, self._shape.dk, self._shape.dv),
            pairs=pairs,
            cost=self._cost.flops(capture.start, end),
            uses=NAMED_USES,
            offer=offer,
        )

    # -- links --------------------------------------------------------------------

    def of_core(
        self, name: str, owner: Owner, core: tuple[int, int], *, opening: bool
    ) -> tuple[CoreState | None, str | None]:
        held = self.states.find(name, owner)
        state = held.core(*core, opening=opening) if held is not None else None
        return state, NO_STATE if state is None else None

    def begin_row(self, req: Req) -> None:
        if req.kv.mamba_cow_src_index is not None:
            req.kv.mamba_cow_src_index = None
            req.kv.mamba_needs_clear = True

    def hand_over(
        self,
        backend: Any,
        rids: Sequence[str],
        reqs: Sequence[Req],
        plans: Sequence[LinkPlan | None],
        options: Sequence[LinkOptions | None],
    ) -> None:
        backend.set_rows(rids, plans, options, [self._captures.get(req, ()) for req in reqs])

    # -- a segment's life -----------------------------------------------------------

    def use(self, names: Collection[str]) -> None:
        for name in names:
            self._kept.use(name)

    def hold_back(self, name: str) -> None:
        self._kept.hold_back(name)

    def release(self, name: str) -> None:
        self._kept.release(name)

    def pin(self, name: str) -> None:
        self._kept.pin(name)

    def unpin(self, name: str) -> None:
        self._kept.unpin(name)

    def drop(self, name: str) -> None:
        self._kept.drop(name)
        self._forget_turn_end(name)

    def lost(self, name: str) -> None:
        self._forget_turn_end(name)

    # -- earlier turns --------------------------------------------------------------

    def can_keep_turn(self, req: Req) -> bool:
        return self._is_exact and req.owned_kv_len() == req.kv.kv_committed_len

    def keep_turn(self, req: Req, turn: Turn, tokens: int) -> str | None:
        cache = self._rows.mamba_pool.mamba_cache
        index = req.kv.mamba_pool_idx.reshape(1)
        slot = int(self._rows.translate_mamba_indices(index)[0])
        name = _turn_end(turn, tokens)
        kept = self.states.add(
            name,
            turn.whose,
            core_end=tokens,
            conv_tail=self._shape.histories(cache.conv[0])[:, slot].float(),
            end=self._shape.states(cache.temporal[:, slot]).float(),
            pairs={},
            cost=self._cost.flops(0, req.kv.kv_committed_len),
            group=TURN,
        )
        if not kept:
            return None
        self._turn_ends.setdefault(turn.salt, set()).add(tokens)
        return name

    def usable(self, turn: Turn, held: int) -> int:
        return max((n for n in self._turn_ends.get(turn.salt, ()) if n <= held), default=0)

    def of_turn(self, chain: Chain) -> CoreState | None:
        held = self.states.find(_turn_end(chain.turn, len(chain.tokens)), chain.turn.whose)
        assert held is not None
        return CoreState(None, held.end, held.conv_tail)

    def use_turn(self, chain: Chain) -> None:
        self._kept.use(_turn_end(chain.turn, len(chain.tokens)))

    def _forget_turn_end(self, name: str) -> None:
        salt, _, tokens = name.rpartition(":")
        ends = self._turn_ends.get(salt)
        if ends is not None:
            ends.discard(int(tokens))
            if not ends:
                del self._turn_ends[salt]

    # -- stores, and for people ------------------------------------------------------

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return self.states.tensors(name)

    def core_end(self, name: str, owner: Owner) -> int | None:
        held = self.states.find(name, owner)
        return held.core_end if held is not None else None

    def heads(self, tokens: int, seam: int) -> tuple[int, ...]:
        first, last = Seam(seam).core(Outline(tokens), page=self._page)
        return (first,) if first < last else ()

    def check_saved(self, saved: SavedSegment, tokens: int) -> None:
        states = {name: one for name, one in saved.tensors.items() if name[:2] not in ("k.", "v.")}
        if saved.core_end is None:
            if states or saved.heads:
                raise BadValue(OTHER_SHAPE, "states that end nowhere")
            return
        if saved.core_end != floor_to(tokens, self._page):
            raise BadValue(OTHER_SHAPE, f"its cores end at {saved.core_end}")
        if {int(name.split(".")[1]) for name in states if name.startswith("pair.")} != {
            *saved.heads
        }:
            raise BadValue(OTHER_SHAPE, "it does not hold the cores that it says")
        self._shape.check_tensors(states, saved.heads)

    def adopt(
        self, name: str, saved: SavedSegment, *, cost: float, uses: int, offer: bool, evict: bool
    ) -> bool:
        if saved.core_end is None:
            return True
        return self.states.adopt(
            name,
            owner_of(saved.salt, saved.extra_key),
            saved.core_end,
            saved.tensors,
            device=self._device,
            cost=cost,
            uses=uses,
            offer=offer,
            evict=evict,
        )

    def nbytes_of(self, name: str) -> int:
        return self._kept.nbytes_of(name)

    def nbytes_of_kind(self, kind: str) -> int:
        return self._kept.bytes_of_group(kind)

    def to_json(self) -> dict[str, Any]:
        return {
            "state_bytes": self._kept.nbytes,
            "state_bytes_packed": self._kept.packed_bytes,
            "state_budget": self._kept.budget,
        }

    def to_json_of(self, name: str) -> dict[str, Any]:
        return {"state_bytes": self._kept.nbytes_of(name)}

    def clear(self) -> None:
        self._turn_ends.clear()
