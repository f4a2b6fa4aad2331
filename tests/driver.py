"""Drive a real ``PicCache`` as SGLang's scheduler does, without a model.

What a forward pass would compute is replaced by writing each token's id and
position into its KV slot, so that whoever reads a row sees whether every slot still
holds what the plan says; and a hash of all it saw, so that a report of `exact` can be
held against what was reused.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from sglang_pic.config import PicConfig
from sglang_pic.forest.adapter import PicCache
from sglang_pic.forest.build import plant
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.keys import is_reserved, namespace, order_key
from sglang_pic.forest.nodes import SEGMENT
from sglang_pic.link.plan import LinkPlan
from sglang_pic.link.policy import LinkOptions, ceil_to
from sglang_pic.platforms import host_tier
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.internal import compile_hints, link_hints
from sglang_pic.store.value import SavedSegment

_rids = itertools.count()


class Copies:
    """Copies of pages, as ``attention.relocate`` makes them of true ones."""

    def __init__(self, driver: Driver):
        self._driver = driver

    def __call__(self, plan: LinkPlan, private: torch.Tensor) -> None:
        offsets = [torch.full((span.n_tokens,), span.offset) for span in plan.spans]
        self.copy(plan.slots, private, torch.cat(offsets))

    def copy(self, source: torch.Tensor, target: torch.Tensor, offsets: torch.Tensor) -> None:
        keys, values = self._driver.pool.k_buffer[0], self._driver.pool.v_buffer[0]
        keys[target] = keys[source]
        keys[target, 0, 1] += offsets
        values[target] = values[source]
        for one, other in zip(target.tolist(), source.tolist(), strict=True):
            self._driver.touched[one] = self._driver.touched[other]

    def average(self, target: torch.Tensor, other: torch.Tensor) -> None:
        for buffer in (self._driver.pool.k_buffer[0], self._driver.pool.v_buffer[0]):
            buffer[target] = (buffer[target] + buffer[other]) / 2
        for one, two in zip(target.tolist(), other.tolist(), strict=True):
            self._driver.touched[one] |= self._driver.touched[two]


def _behind(seen: int, token: int) -> int:
    """What was seen, and one token more; fits a float32."""
    return hash((seen, token)) & 0xFFFFFF


class Driver:
    """One scheduler's worth of pools and cache.

    Args:
        page: tokens per page.
        size: tokens in the pool.
        config: the server's settings.
        tier: SGLang's write policy of a host tier, twice the pool; ``None`` without one.
    """

    def __init__(self, page: int, size: int, config: PicConfig, tier: str | None = None):
        args = ServerArgs(model_path="dummy", page_size=page)
        if tier is not None:
            args = ServerArgs(
                model_path="dummy", page_size=page, enable_hierarchical_cache=True,
                hicache_write_policy=tier, hicache_ratio=2.0, hicache_io_backend="direct",
                hicache_mem_layout="layer_first",
            )  # fmt: skip
        set_global_server_args_for_scheduler(args)
        self.page = page
        self.size = size
        self.pool = MHATokenToKVPool(
            size=size, page_size=page, dtype=torch.float32, head_num=1, head_dim=2,
            layer_num=1, device="cpu", enable_memory_saver=False,
        )  # fmt: skip
        kind: Any = TokenToKVPoolAllocator
        args: tuple[Any, ...] = (size,)
        if page > 1:
            kind, args = PagedTokenToKVPoolAllocator, (size, page)
        self.allocator = kind(
            *args, dtype=torch.float32, device="cpu", kvcache=self.pool, need_sort=False
        )
        self.rows = ReqToTokenPool(64, 4096, "cpu", False)
        params = CacheInitParams(
            False, self.rows, self.allocator, page, tree_components=(ComponentType.FULL,)
        )
        self.cache = PicCache(params)
        if tier is not None:
            host_tier.bind()
            self.cache.init_hicache(args, params)
        copies: Any = Copies(self)
        self.forest = plant(self.cache, config, PrefillCost(1e6, 10.0, 16), copies=copies)
        # Of each slot, the tokens that have had a part in what it holds, as bits.
        self.touched = [0] * (size + page)
        self._adopt = self.forest.holder.adopt
        self.forest.holder.adopt = self._adopting  # type: ignore[method-assign]
        # Tokens of guests that ship with the project.
        self.nobodys = 0
        # Tokens brought back: from the host, and private copies.
        self.loaded = 0
        self.running: list[Req] = []

    def _adopting(self, saved: SavedSegment, slots: torch.Tensor, **options: Any) -> bool:
        """Pages that a store filled hold what their own tokens left there."""
        touched = 0
        for slot, token in zip(slots.tolist(), saved.path, strict=False):
            touched |= 1 << token
            self.touched[slot] = touched
        return self._adopt(saved, slots, **options)

    # -- requests -----------------------------------------------------------------------

    def request(self, ids: Sequence[int], salt: str | None = None, hints: Any = None) -> Req:
        req = Req(
            rid=str(next(_rids)),
            origin_input_text="",
            origin_input_ids=array("q", ids),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=64),
            cache_salt=salt,
        )
        req.kv_hints = hints
        return req

    def compile(self, ids: Sequence[int], salt: str | None = None, *, named: bool = False) -> bool:
        """Run a compile from start to end; whether it could run at all."""
        context = self.forest.segments.context
        req = self.request(
            [*context, *ids], namespace(context, salt), compile_hints([16], named=named)
        )
        if not self.start(req):
            return False
        self.finish(req)
        return True

    def company(
        self,
        parts: Sequence[Sequence[int]],
        opening: Sequence[int] = (),
        salt: str | None = None,
        *,
        guests: Sequence[Sequence[int]] = (),
        shipped: bool = True,
        between: Any = lambda: None,
    ) -> bool:
        """Run both orders of a company from start to end, or the one behind guests;
        whether they could run at all. ``between`` runs between the two."""
        space = namespace(self.forest.segments.context, salt)
        order = sorted(parts, key=order_key)
        for guest in guests if shipped else ():
            for token in guest:
                self.nobodys |= 1 << token
        behind = [*sorted(guests, key=order_key), *order]
        for i, arranged in enumerate([behind] if guests else [order, order[::-1]]):
            ids, spans = list(opening), []
            for part in arranged:
                spans.append(TokenSpan(len(ids), len(ids) + len(part)))
                ids += part
            hints = compile_hints((), company=spans, guests=len(guests), shipped=shipped)
            req = self.request(ids, space, hints)
            if not self.start(req):
                return False
            self.finish(req)
            if i == 0:
                between()
        return True

    def link(
        self, ids: Sequence[int], spans: Sequence[tuple[int, int]], salt: str | None = None,
        **options: Any,
    ) -> Req:  # fmt: skip
        made = LinkRequest(
            tuple(TokenSpan(start, end) for start, end in spans), LinkOptions(**options)
        )
        return self.request(ids, salt, link_hints(made))

    # -- the scheduler's steps ------------------------------------------------------------

    def start(self, req: Req, *, between: Any = None) -> bool:
        """Match, lock, allocate, compute; ``between`` runs between match and lock.
        False, and nothing is held, where memory does not suffice."""
        req.init_next_round_input(self.cache)
        if between is not None:
            between()
        if req.host_hit_length:
            self._load_back(req)
        req.lock = self.cache.lock(req.last_node)
        total = len(req.full_untruncated_fill_ids)
        wanted = ceil_to(total - req.prefix_len, self.page)
        evict_from_tree_cache(self.cache, wanted)
        slots = self.allocator.alloc(wanted)
        if slots is None:
            self.cache.unlock(req.lock)
            req.lock = None
            self.cache.on_release(req, checkpointed=False)
            return False
        prefix = torch.empty(0, dtype=torch.int64)
        if req.prefix_len:
            prefix = self.cache.prefix_device_indices(req)
        self.rows.alloc([req])
        assert prefix.numel() == req.prefix_len
        row = torch.cat([prefix, slots[: total - req.prefix_len]])
        self.rows.write((req.kv.req_pool_idx, slice(0, total)), row)
        # Only what is beyond a page's end is ours to give back later.
        req.kv.kv_allocated_len = req.kv.kv_committed_len = total
        req.extend_end = total
        self.cache.ready_to_load_host_cache()
        self._check_report(req)
        self._compute(req, req.prefix_len, total)
        self.running.append(req)
        return True

    def _load_back(self, req: Req) -> None:
        """As ``PrefillAdder`` does."""
        held, promised = req.prefix_len, req.host_hit_length
        bracket = self.cache.lock(req.last_node)
        loaded, node = self.cache.init_load_back(
            InitLoadBackParams(req.best_match_node, promised, req=req)
        )
        self.cache.unlock(bracket)
        assert loaded in (0, promised)
        req.last_node = node
        req.prefix_len += loaded
        self.loaded += loaded
        if self.cache.load_back_is_cache_owned():
            req.kv.cache_protected_len = req.prefix_len
            slots = self.cache.path_device_indices(node)[held:].tolist() if loaded else ()
            for i, slot in enumerate(slots, held):
                self.touched[slot] = 0
                for token in req.full_untruncated_fill_ids[: i + 1]:
                    self.touched[slot] |= 1 << token

    def events(self) -> None:
        """What the scheduler looks after before each batch."""
        self.cache.check_hicache_events()

    def _compute(self, req: Req, start: int, end: int) -> None:
        req.refresh_fill_ids() if not req.skip_radix_cache_insert else None
        row = self.rows.req_to_token[req.kv.req_pool_idx, start:end].long()
        tokens = torch.tensor(list(req.full_untruncated_fill_ids[start:end]), dtype=torch.float32)
        self.pool.k_buffer[0][row, 0, 0] = tokens
        self.pool.k_buffer[0][row, 0, 1] = self._positions(req, end)[start:end].float()
        self._look(req, start, end)

    def _look(self, req: Req, start: int, end: int) -> None:
        """Leave in the values of what was computed a hash of all that it saw."""
        row = self.rows.req_to_token[req.kv.req_pool_idx, :end].long()
        tokens = self.pool.k_buffer[0][row, 0, 0].long().tolist()
        saw = self.pool.v_buffer[0][row, 0, 0].long().tolist()
        seen = touched = 0
        for i in torch.argsort(self._positions(req, end)).tolist():
            if i >= start:
                saw[i] = _behind(seen, tokens[i])
                self.touched[row[i]] = touched | 1 << tokens[i]
            seen = _behind(seen, saw[i])
            touched |= self.touched[row[i]]
        self.pool.v_buffer[0][row[start:], 0, 0] = torch.tensor(saw[start:]).float()

    def _check_report(self, req: Req) -> None:
        """`exact` is what reuses nothing but what saw the very tokens before it, and
        nothing else is."""
        if not req.customized_info:
            return
        usual, seen = [], 0
        for token in req.origin_input_ids:
            usual.append(_behind(seen, token))
            seen = _behind(seen, usual[-1])
        row = self.rows.req_to_token[req.kv.req_pool_idx, : req.prefix_len].long()
        self._check_touched(req, row)
        saw = self.pool.v_buffer[0][row, 0, 0].long().tolist()
        positions = self._positions(req, req.prefix_len).tolist()
        exact = all(usual[at] == one for at, one in zip(positions, saw, strict=True))
        assert req.customized_info["pic"][0]["exactness"] == ("exact" if exact else "composed")

    def _check_touched(self, req: Req, row: torch.Tensor) -> None:
        """No token that the prompt does not contain has had a part in what it reuses,
        but the compile context's, and those that are nobody's."""
        own, context = self.nobodys, self.forest.segments.context
        for token in (*req.origin_input_ids, *req.output_ids, *context):
            own |= 1 << token
        assert not any(self.touched[slot] & ~own for slot in row.tolist())

    def _positions(self, req: Req, end: int) -> torch.Tensor:
        """Of the first ``end`` entries of its row."""
        plan = self.forest.links.plans_of([req])[0]
        return torch.arange(end) if plan is None else plan.positions(end)

    def decode(self, req: Req, token: int) -> bool:
        """Sample a token and compute the one before it."""
        # SGLang computes a token's KV one step after sampling it.
        end = req.kv.kv_committed_len
        if req.output_ids:
            if end % self.page == 0:
                evict_from_tree_cache(self.cache, self.page)
                slots = self.allocator.alloc(self.page)
                if slots is None:
                    return False
                slot = slots[:1]
            else:
                slot = self.rows.req_to_token[req.kv.req_pool_idx, end - 1 : end].long() + 1
            self.rows.write((req.kv.req_pool_idx, slice(end, end + 1)), slot)
            self.pool.k_buffer[0][slot, 0, 0] = float(req.output_ids[-1])
            self.pool.k_buffer[0][slot, 0, 1] = float(end)
            self._look(req, end, end + 1)
            req.kv.kv_committed_len = req.kv.kv_allocated_len = end + 1
        req.output_ids.append(token)
        return True

    def finish(self, req: Req, *, abort: bool = False) -> None:
        req.finished_reason = FINISH_ABORT("gone") if abort else FINISH_LENGTH(len(req.output_ids))
        self.running.remove(req)
        # As it processes a batch's results, SGLang holds back what is freed.
        self.allocator.free_group_begin()
        release_kv_cache(req, self.cache, checkpoint=not abort)
        self.allocator.free_group_end()

    # -- what must hold ---------------------------------------------------------------------

    def tokens_seen(self, req: Req) -> list[int]:
        """The tokens its row holds, in position order; each key stands, moved by its
        span's offset, where the plan says."""
        plan = self.forest.links.plans_of([req])[0]
        end = req.kv.kv_committed_len
        row = self.rows.req_to_token[req.kv.req_pool_idx, :end].long()
        held, computed_at = self.pool.k_buffer[0][row, 0].long().unbind(-1)
        position = self._positions(req, end)
        offset = torch.zeros(end, dtype=torch.int64)
        for span in plan.spans if plan is not None else ():
            offset[span.row_start : span.row_start + span.n_tokens] = span.offset
        assert torch.equal(computed_at + offset, position)
        return held[torch.argsort(position)].tolist()

    def check(self) -> None:
        """Integrity, no leak, no budget exceeded, every row as it should be."""
        if not self.cache.ongoing_load_back:
            # SGLang's holds only where its loads have ended.
            self.cache.sanity_check()
        self.forest.check()
        for req in self.running:
            ids = [*req.origin_input_ids, *req.output_ids]
            assert self.tokens_seen(req) == ids[: req.kv.kv_committed_len]
        for node in self.forest.nodes._nodes.values():
            assert (node.kind == SEGMENT) == is_reserved(node.salt)
        own = 0
        for req in self.running:
            own += ceil_to(req.kv.kv_allocated_len, self.page) - req.kv.cache_protected_len
        cache = self.cache
        held = cache.evictable_size() + cache.protected_size() + own
        assert self.allocator.available_size() + held == self.size
