"""Checkpoints of a hybrid: which states of ordinary prefixes are kept, and gone on from.

A request that has left a path where no state is computes it again from the deepest one in
front. It is counted (``forest.overlaps``), what is worth keeping of its path is found
(``forest.placement``), and if it computes one of those places anyway, its state is read off
beside it: no prompt is ever computed for a checkpoint. A checkpoint stands at the end of a
node of SGLang's tree and goes with it; its state lies with those of segments and turns,
under one budget and in one order, valued by what dropping it would cost (``forest.steps``).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.checkpoints import CHECKPOINT, Counts
from sglang_pic.forest.consensus import Consensus
from sglang_pic.forest.containment import Containment
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.eviction import ORDINARY
from sglang_pic.forest.keys import is_reserved, owner_of
from sglang_pic.forest.nodes import PREFIX, NodeIndex
from sglang_pic.forest.overlaps import End, Overlaps, Prompt, Tenant
from sglang_pic.forest.placement import (
    Expected,
    Held,
    passes_at,
    places,
    wanted,
    worth_keeping,
)
from sglang_pic.forest.steps import Steps
from sglang_pic.linear.capture import Capture
from sglang_pic.linear.shape import WIDEST, LinearShape
from sglang_pic.linear.state import CoreState, Resumed
from sglang_pic.linear.states import PackedStates

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# Nodes of a path that are looked at, its deepest.
MAX_ENDS = 128


@dataclasses.dataclass(frozen=True)
class Left:
    """Where a request leaves what the tree holds.

    Attributes:
        node: that ends what it shares.
        depth: tokens that it shares.
        stock: tokens from which SGLang would go on.
    """

    node: int | None
    depth: int
    stock: int


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A checkpoint that a request passes.

    Attributes:
        capture: reads its state off.
        depth: tokens in front of it.
        passes: requests expected that share them.
    """

    capture: Capture
    depth: int
    passes: float


class SparseCheckpoints:
    """``forest.checkpoints.Checkpoints``.

    Args:
        tree: SGLang's tree of ordinary prefixes.
        match: its own ``match_prefix``.
        nodes: the order of its pages.
        states: where they are kept.
        shape: of the linear layers.
        grid: tokens; states are kept behind multiples of it, where the layers' kernels have
            them between two chunks, so that what goes on from one is computed as it was.
        begin_row: told that a row reuses nothing of SGLang's states (``Carried``).
    """

    def __init__(
        self,
        tree: Any,
        match: Callable[[MatchPrefixParams], MatchResult],
        nodes: NodeIndex,
        states: PackedStates,
        shape: LinearShape,
        cost: PrefillCost,
        grid: int,
        begin_row: Callable[[Req], None],
        contained: Containment,
        consensus: Consensus,
    ):
        self._tree = tree
        self._match = match
        self._nodes = nodes
        self._states = states
        self._kept = states.kept
        self._shape = shape
        self._cost = cost
        self._grid = grid
        self._begin_row = begin_row
        self._contained = contained
        self._consensus = consensus
        self._overlaps = Overlaps(grid)
        self._steps = Steps()
        self._left: weakref.WeakKeyDictionary[Req, Left] = weakref.WeakKeyDictionary()
        self._resumed: weakref.WeakKeyDictionary[Req, Resumed] = weakref.WeakKeyDictionary()
        self._wanted: weakref.WeakKeyDictionary[Req, list[Wanted]] = weakref.WeakKeyDictionary()
        self._nbytes = shape.state_nbytes(0, WIDEST)
        self._counts = Counts()

    # -- matching -----------------------------------------------------------------------

    def found(self, req: Req, result: MatchResult) -> MatchResult:
        end, state = self._deepest(req, result)
        return result if state is None else _gone_on(result, end)

    def resume(self, req: Req, result: MatchResult) -> MatchResult:
        self.released(req)
        if self._is_apart(req):
            return result
        node, shared = result.last_visited_node_id, int(result.full_kv_hit_length)
        self._left[req] = Left(node, shared, int(result.device_prefix_len))
        end, state = self._deepest(req, result)
        if state is None:
            return result
        self._resumed[req] = Resumed(state, end.depth)
        self._begin_row(req)
        return _gone_on(result, end)

    def _is_apart(self, req: Req) -> bool:
        """Whether a request's rows are not those of one prompt, or it is one of ours."""
        return (
            req.session is not None
            or req.beam_group is not None
            or is_reserved(req.cache_salt)
            or self._contained.refusal is not None
        )

    def _deepest(self, req: Req, result: MatchResult) -> tuple[End, CoreState | None]:
        """Where the deepest checkpoint is, if it is deeper than SGLang's own, and its state."""
        stock, shared = int(result.device_prefix_len), int(result.full_kv_hit_length)
        nothing = End(-1, stock)
        if not self._steps or shared - stock < self._grid or self._is_apart(req):
            return nothing, None
        for end in reversed(self._path(result.last_visited_node_id)):
            if end.depth <= stock:
                break
            if end.depth <= shared and end.node in self._steps:
                held = self._states.find(_name(end.node), _tenant(req))
                if held is not None:
                    return end, CoreState(None, held.end, held.conv_tail)
        return nothing, None

    def _path(self, node: int | None) -> list[End]:
        """The last nodes of a path, the deepest last."""
        if node is None:
            return []
        try:
            (path,) = self._tree.tree_core.collect_path_info([node])
        except KeyError:
            return []
        return [End(info.node_id, info.path_end) for info in path[-MAX_ENDS:]]

    # -- a row's beginning --------------------------------------------------------------

    def _begin(self, req: Req) -> None:
        """A row runs for the first time: count it, and see what it passes."""
        left = self._left.pop(req)
        went_on = req.prefix_len
        self._counts.tokens_resumed += went_on - left.stock
        tenant, tokens = _tenant(req), len(req.origin_input_ids)
        self._counts.tokens_recomputed += left.depth - went_on
        has_left = left.depth - left.stock >= self._grid
        if not has_left and tokens - left.depth < self._grid:
            return
        path = self._path(left.node) if has_left else _end_of(left)
        path = [end for end in path if end.depth <= left.depth]
        prompt = Prompt(tokens)
        if has_left or self._overlaps.is_left(tenant):
            prompt = Prompt.of(req.origin_input_ids, req.eos_token_ids or ())
        self._overlaps.note(tenant, path, prompt, has_left=has_left)
        if self._overlaps.is_left(tenant):
            self._plan(req, left.stock, path, self._overlaps.expected(tenant, path, prompt))

    def _plan(self, req: Req, stock: int, path: Sequence[End], expected: list[Expected]) -> None:
        """Value the checkpoints of a path, and have more read off where it pays."""
        self._counts.plans += 1
        on_path = [end for end in path if end.node in self._steps]
        before: int | None = None
        for end in on_path:
            self._put(end.node, end.depth, passes_at(expected, end.depth), before)
            before = end.node
        held = Held({end.depth for end in on_path}, stock, self._kept.price(self._nbytes))
        chosen = worth_keeping(places(expected, held, self._grid, self._work))
        first = req.prefix_len
        passed = range(first + 1, len(req.origin_input_ids))
        for place in wanted(chosen, held, passed):
            capture = Capture(self._shape, start=0, heads=(), core_end=place.depth, first=first)
            self._wanted.setdefault(req, []).append(Wanted(capture, place.depth, place.passes))

    def _work(self, depth: int) -> float:
        return self._cost.flops(0, depth)

    # -- what it has computed -----------------------------------------------------------

    def hand_over(self, backend: Any, reqs: Sequence[Req]) -> None:
        for req in reqs:
            if req in self._left:
                resumed = self._resumed.get(req)
                if resumed is not None and req.prefix_len != resumed.depth:
                    raise PicIntegrityError("a row begins elsewhere than at its checkpoint")
                with self._contained("checkpoint", req):
                    self._begin(req)
        if not self._resumed and not self._wanted:
            return
        captures = [[one.capture for one in self._wanted.get(req, ())] for req in reqs]
        backend.set_checkpoints(
            [self._resumed.get(req) for req in reqs],
            [[one for one in of_row if not one.complete] for of_row in captures],
        )

    def concern(self, reqs: Sequence[Req]) -> bool:
        return any(req in self._resumed or req in self._wanted for req in reqs)

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        given_up = [req for req in reqs if req in self._resumed]
        for req in given_up:
            # What it computes from now on is no prefix of anybody's.
            req.skip_radix_cache_insert = True
        for req in reqs:
            self.released(req)
        return given_up

    def inserted(self, req: Req) -> None:
        if not (req.output_ids or req.finished()):
            return
        self._resumed.pop(req, None)
        wanted = [one for one in self._wanted.pop(req, ()) if one.capture.complete]
        later = [one for one in wanted if not self._keep(req, one)]
        if later:
            self._wanted[req] = later

    def _keep(self, req: Req, wanted: Wanted) -> bool:
        """Keep what was read off, if it fits; whether SGLang has kept the pages in front
        of it, without which there is nothing to go on from."""
        ids = req.origin_input_ids[: wanted.depth]
        key = RadixKey(ids, req.extra_key, cache_salt=req.cache_salt)
        found = self._match(MatchPrefixParams(key=key))
        node = found.last_visited_node_id
        if node is None or found.full_kv_hit_length != wanted.depth:
            return False
        capture = wanted.capture
        if node in self._steps:
            return True
        kept = self._states.add(
            _name(node),
            _tenant(req),
            core_end=wanted.depth,
            conv_tail=capture.conv_tail,
            end=capture.end(),
            pairs={},
            group=CHECKPOINT,
            is_exact=True,
        )
        if not kept:
            return True
        self._counts.placed += 1
        self._consensus.note("kept", _name(node))
        self._nodes.note(ORDINARY, node, PREFIX, req.cache_salt)
        self._nodes.end_segment(ORDINARY, node, _name(node))
        in_front = [end.node for end in self._path(node)[:-1] if end.node in self._steps]
        before = in_front[-1] if in_front else None
        self._put(node, wanted.depth, wanted.passes, before)
        return True

    def released(self, req: Req) -> None:
        for of in (self._left, self._resumed, self._wanted):
            of.pop(req, None)

    # -- what is held -------------------------------------------------------------------

    def _put(self, node: int, depth: int, passes: float, before: int | None) -> None:
        self._value(self._steps.put(node, depth, self._work(depth), passes, before))

    def _value(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            self._kept.appraise(_name(node), self._steps.cost(node))

    def gone(self, name: str) -> None:
        node = _node(name)
        if node is not None and node in self._steps:
            self._kept.drop(name)
            self._value(self._steps.drop(node))

    def lost(self, name: str) -> None:
        node = _node(name)
        if node is not None and node in self._steps:
            self._nodes.unend_segment(ORDINARY, node, name)
            self._value(self._steps.drop(node))

    def counts(self) -> Counts:
        return dataclasses.replace(self._counts, held=len(self._steps))

    def clear(self) -> None:
        self._steps.clear()
        self._overlaps.forget()


def _gone_on(result: MatchResult, end: End) -> MatchResult:
    """A match that ends with a checkpoint."""
    branching = result.mamba_branching_seqlen
    return result._replace(
        device_prefix_len=end.depth,
        last_device_node=end.node,
        last_host_node=end.node,
        best_match_node=end.node,
        mamba_branching_seqlen=(
            branching if branching is not None and branching > end.depth else None
        ),
    )


def _tenant(req: Req) -> Tenant:
    return owner_of(req.cache_salt or "", req.extra_key)


def _name(node: int) -> str:
    return f"{CHECKPOINT}:{node}"


def _node(name: str) -> int | None:
    kind, _, node = name.partition(":")
    return int(node) if kind == CHECKPOINT else None


def _end_of(left: Left) -> list[End]:
    return [] if left.node is None else [End(left.node, left.depth)]
