"""``Conversations``: earlier turns of linked conversations, found and kept.

See ``turns`` for what they are.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_pic.forest.carried import Carried
from sglang_pic.forest.eviction import LINKABLE, InOrder
from sglang_pic.forest.nodes import TURN, NodeIndex
from sglang_pic.forest.pages import Pages
from sglang_pic.forest.segments import Segments
from sglang_pic.forest.state import LinkState, text_of
from sglang_pic.forest.turns import Chain, Core, Turn, Turns
from sglang_pic.link.plan import LinkPlan
from sglang_pic.link.policy import floor_to

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

Whose = tuple[str, ...]


class Conversations:
    """What earlier turns computed.

    Args:
        rows: SGLang's table of request rows.
    """

    def __init__(
        self,
        segments: Segments,
        pages: Pages,
        carried: Carried,
        nodes: NodeIndex,
        eviction: InOrder,
        rows: torch.Tensor,
    ):
        self._segments = segments
        self._pages = pages
        self._carried = carried
        self._nodes = nodes
        self._eviction = eviction
        self._rows = rows
        self._turns = Turns()
        # In models without states: nodes that ended a path of a turn, by its namespace.
        self._parts: Counter[str] = Counter()
        # Nodes that end with a state, by its name.
        self._ends: dict[str, int] = {}

    def whose(self, req: Req, link: LinkState) -> Whose:
        """Whose turns a request may go on from: tenant, adapter and state policy."""
        space = self._segments.namespace(req.cache_salt)
        return space, req.extra_key or "", link.request.options.state

    def version(self, whose: Whose, first: str | None) -> int:
        """Changes whenever a turn is kept that began with this segment."""
        return self._turns.version(whose, first)

    def prefixes(self, whose: Whose, first: str | None, held: int) -> list[int]:
        """Lengths of ordinary prefix worth trying: all that is held, and what an
        earlier turn that began with the same segment stood behind."""
        if first is None or not self._turns:
            return [held]
        earlier = self._turns.prefix_of(whose, first)
        return [held] if earlier is None or earlier >= held else [held, earlier]

    def chain(
        self,
        ids: array,
        extra_key: str | None,
        whose: Whose,
        plan: LinkPlan,
        cores: Sequence[Core],
        limit: int,
    ) -> Chain | None:
        """The earlier turns whose computed tokens are the first of this plan's."""
        if not self._turns:
            return None
        tokens_of = np.frombuffer(ids, dtype=np.int64)
        computed = plan.order[plan.reused :].numpy()
        chain: Chain | None = None
        done = passed = 0
        while passed < len(cores):
            before, reused = (None, 0) if chain is None else (chain.turn.salt, len(chain.tokens))
            turn = self._turns.longest(whose, cores[passed:], before, reused)
            if turn is None:
                break
            passed += len(turn.cores)
            until = min(limit, cores[passed].start if passed < len(cores) else limit)
            stop = int(np.searchsorted(computed, until))
            tokens = array("q", tokens_of[computed[done:stop]].tobytes())
            held, node = self._pages.find(tokens, extra_key, turn.salt)
            held = self._carried.usable(turn, held)
            following = plan.spans[passed].first_seer if passed < len(cores) else None
            if self._carried.keeps_states and done + held == following:
                # Two states, one behind the other, with no token between them to see.
                break
            if not held:
                break
            done += held
            chain = Chain(
                turn,
                passed,
                (*(chain.slots if chain else ()), self._pages.slots(node, held)),
                (*(chain.nodes if chain else ()), node),
                tokens[:held],
            )
        if chain is None:
            return None
        return dataclasses.replace(chain, state=self._carried.of_turn(chain))

    def use(self, chain: Chain, salt: str | None) -> None:
        """A link runs that goes on from these turns."""
        self._carried.use_turn(chain)
        for node in chain.nodes:
            self._nodes.use(LINKABLE, node, TURN, salt)

    def keep(self, req: Req, link: LinkState) -> None:
        """Keep what a finished link computed for the conversation's next turn, if it
        fits."""
        plan, page = link.plan, self._pages.page_size
        if plan is None or not link.cores or not link.request.options.reuses_turns:
            return
        if not self._carried.can_keep_turn(req):
            return
        end = req.owned_kv_len()
        count = floor_to(end - plan.reused, page)
        if count <= 0 or not self._eviction.make_room(count):
            return
        ids = np.frombuffer(text_of(req), dtype=np.int64)
        computed = plan.positions(end)[plan.reused : plan.reused + count].numpy()
        tokens = array("q", ids[computed].tobytes())
        row = self._rows[req.kv.req_pool_idx]
        slots = row[plan.reused : plan.reused + count].to(torch.int64, copy=True)
        chain = link.chain
        past = 0
        if chain is not None and chain.cores == len(link.cores):
            turn, past = chain.turn, len(chain.tokens)
            tokens, slots = chain.tokens + tokens, torch.cat([chain.slots[-1], slots])
        elif chain is not None:
            turn = Turn(
                chain.turn.whose, link.cores[chain.cores :], chain.turn.salt, len(chain.tokens)
            )
        else:
            turn = Turn(self.whose(req, link), link.cores)
        node = self._pages.keep(tokens, req.extra_key, turn.salt, slots, ours=past)
        req.kv.cache_protected_len = plan.reused + count
        first = next((core.segment for core in link.cores if core.segment is not None), None)
        self._turns.add(turn, first)
        self._nodes.note(LINKABLE, node, TURN, req.cache_salt or None)
        if not self._carried.keeps_states:
            self._parts[turn.salt] += self._nodes.end_segment(LINKABLE, node, turn.salt)
        name = self._carried.keep_turn(req, turn, len(tokens))
        if name is not None:
            self._ends[name] = node
            self._nodes.end_segment(LINKABLE, node, name)

    def evicted(self, name: str) -> None:
        """The pages that ended with a state, or a turn, went for want of memory."""
        self._ends.pop(name, None)
        if name in self._parts:
            self._parts[name] -= 1
            if not self._parts[name]:
                # None of its pages is left: nothing to remember it for.
                del self._parts[name]
                self._turns.remove(name)

    def remove(self, name: str) -> None:
        """A turn's state went for want of memory: free what is of no use without it."""
        node = self._ends.pop(name, None)
        if node is not None:
            self._nodes.unend_segment(LINKABLE, node, name)
            self._nodes.remove_path(LINKABLE, node)

    def clear(self) -> None:
        """Everything was flushed."""
        self._turns.forget()
        self._parts.clear()
        self._ends.clear()
