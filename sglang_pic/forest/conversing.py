"""``ConversingTree``: earlier turns of linked conversations, found and kept.

See ``turns`` for what they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    InsertParams,
)
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_pic.forest.holding import HoldingTree
from sglang_pic.forest.keys import namespace
from sglang_pic.forest.nodes import TURN
from sglang_pic.forest.state import LinkState
from sglang_pic.forest.turns import Chain, Core, Turn, Turns
from sglang_pic.link.plan import LinkPlan
from sglang_pic.link.policy import floor_to
from sglang_pic.link.report import Found
from sglang_pic.request.base import LinkRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_pic.linear.state import CoreState


class ConversingTree(HoldingTree):
    """A tree cache that holds what earlier turns computed."""

    def __init__(self, params: Any):
        self.turns = Turns()
        super().__init__(params)

    @property
    def keeps_states(self) -> bool:
        """Whether a turn is of use only with the state behind it."""
        return False

    def reset(self) -> None:
        self.turns.forget()
        super().reset()

    def _whose(self, req: Req, request: LinkRequest) -> tuple[str, ...]:
        space = namespace(self.forest.context, req.cache_salt)
        return space, req.extra_key or "", request.options.state

    def _cores(
        self, ids: array, plan: LinkPlan, seen: Sequence[Found], prefix: int
    ) -> tuple[Core, ...]:
        cores = []
        for span in plan.spans:
            name = None
            if span.start >= prefix:
                name = next(found.id for found in seen if found.start <= span.start < found.end)
            cores.append(Core.of(ids, span.start, span.end, name))
        return tuple(cores)

    def _chain(
        self,
        req: Req,
        request: LinkRequest,
        plan: LinkPlan,
        cores: tuple[Core, ...],
        limit: int,
    ) -> Chain | None:
        """The earlier turns whose computed tokens are the first of this plan's."""
        if not self.turns or not request.options.reuses_turns:
            return None
        whose = self._whose(req, request)
        ids = np.frombuffer(req.origin_input_ids + req.output_ids, dtype=np.int64)
        computed = plan.order[plan.reused :].numpy()
        chain: Chain | None = None
        done = passed = 0
        while passed < len(cores):
            before, reused = (None, 0) if chain is None else (chain.turn.salt, len(chain.tokens))
            turn = self.turns.longest(whose, cores[passed:], before, reused)
            if turn is None:
                break
            passed += len(turn.cores)
            until = min(limit, cores[passed].start if passed < len(cores) else limit)
            stop = int(np.searchsorted(computed, until))
            tokens = array("q", ids[computed[done:stop]].tobytes())
            node, slots = self.find_path(tokens, req.extra_key, turn.salt)
            slots = slots[: self._usable(turn, slots.numel())]
            following = plan.spans[passed].first_seer if passed < len(cores) else None
            if self.keeps_states and done + slots.numel() == following:
                # Two states, one behind the other, with no token between them to see.
                break
            if not slots.numel():
                break
            done += slots.numel()
            chain = Chain(
                turn,
                passed,
                (*(chain.slots if chain else ()), slots),
                (*(chain.nodes if chain else ()), node),
                tokens[: slots.numel()],
            )
        return chain

    def _prefixes(
        self, req: Req, request: LinkRequest, seen: Sequence[Found], held: int
    ) -> list[int]:
        """Lengths of ordinary prefix worth trying: all that is held, and what an
        earlier turn that began with the same segment stood behind."""
        first = next((found.id for found in seen if found.id is not None), None)
        if not self.turns or first is None or not request.options.reuses_turns:
            return [held]
        earlier = self.turns.prefix_of(self._whose(req, request), first)
        return [held] if earlier is None or earlier >= held else [held, earlier]

    def _usable(self, turn: Turn, held: int) -> int:
        """How many of the tokens held of a turn's path can be reused."""
        return held

    def _turn_state(self, chain: Chain) -> CoreState | None:
        """State of the linear layers behind the last turn; none in models without."""
        return None

    def _turn_kept(self, req: Req, turn: Turn, tokens: int, node: int) -> None:
        """So many tokens of a turn's path are now held, up to where the request ended."""

    def _keep_turn(self, req: Req, link: LinkState) -> None:
        """Keep what a finished link computed for the conversation's next turn, if it
        fits."""
        plan, page = link.plan, self.page_size
        if plan is None or not link.cores or not link.request.options.reuses_turns:
            return
        end = req.owned_kv_len()
        count = floor_to(end - plan.reused, page)
        if count <= 0 or not self.make_room(count, self.kv_limit):
            return
        ids = np.frombuffer(req.origin_input_ids + req.output_ids, dtype=np.int64)
        computed = plan.positions(end)[plan.reused : plan.reused + count].numpy()
        tokens = array("q", ids[computed].tobytes())
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
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
            turn = Turn(self._whose(req, link.request), link.cores)
        node = self.segment_tree.insert(
            InsertParams(
                key=RadixKey(tokens, req.extra_key, cache_salt=turn.salt),
                value=slots,
                prev_prefix_len=past,
                priority=0,
            )
        ).last_device_node
        req.kv.cache_protected_len = plan.reused + count
        self.turns.add(turn)
        self.order.note(self.segment_index, node, TURN, req.cache_salt or None)
        self._turn_kept(req, turn, len(tokens), node)
