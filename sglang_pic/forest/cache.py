"""``PicCache``: the tree cache SGLang runs on, with the forest above it.

A subclass of SGLang's ``UnifiedRadixCache``: ordinary requests take its paths
unchanged. A request that carries a link is planned in ``match_prefix``; its
row is permuted (see ``link.plan``), its pages are locked for as long as it
runs, and it is never inserted as if it were a prefix.
"""

from __future__ import annotations

import dataclasses
import weakref
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    IncLockRefResult,
    InitLoadBackParams,
    MatchPrefixParams,
    MatchResult,
    TreeLock,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.forest import Lookup, SegmentForest
from sglang_pic.forest.state import LinkHandle, LinkState, unlinkable
from sglang_pic.link.plan import LinkPlan, SegmentHit, make_plan, unlinked_plan
from sglang_pic.link.policy import floor_to
from sglang_pic.link.report import Found, make_report
from sglang_pic.request.base import OPENING, LinkRequest
from sglang_pic.request.hints import COMPILE, find_action, read_link

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class PicCache(UnifiedRadixCache):
    """Tree cache that plans links. Built by ``build_cache``, never directly."""

    def __init__(self, params: Any):
        super().__init__(params)
        self._links: weakref.WeakKeyDictionary[Req, LinkState] = weakref.WeakKeyDictionary()
        self._load_back_is_private = False
        self.relocate: Any = None
        # Compiled segments are paths of this tree, under namespaces of their own.
        self.segment_tree: UnifiedRadixCache = self

    def configure(self, config: PicConfig, refusal: str | None) -> None:
        """Set up linking.

        Args:
            config: the server's settings; its compile context is cut to whole pages.
            refusal: why this server must not link at all, or ``None``.
        """
        self.config = config
        self.refusal = refusal
        context = config.compile_context
        self.forest = SegmentForest(self, context[: floor_to(len(context), self.page_size)])

    # -- PageTree -----------------------------------------------------------

    def find_path(
        self, tokens: array, extra_key: str | None, salt: str
    ) -> tuple[Any, torch.Tensor]:
        # Not our own match_prefix, where the segments' tree is this one.
        result = UnifiedRadixCache.match_prefix(
            self.segment_tree, MatchPrefixParams(key=RadixKey(tokens, extra_key, cache_salt=salt))
        )
        node = result.last_device_node
        slots = self.segment_tree.path_device_indices(node)[: result.device_prefix_len]
        return node, slots.to(torch.int64)

    def all_slots(self) -> torch.Tensor:
        return self.all_values_flatten().to(torch.int64)

    # -- planning -----------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        req = params.req
        link = self._link_of(req) if req is not None else None
        if link is None:
            return super().match_prefix(params)
        # SGLang matches what it last laid out, which a former plan permuted.
        self._drop_plan(req, link)
        if req.positional_embed_overrides is None:
            params.key.token_ids = req.origin_input_ids + req.output_ids
        result = super().match_prefix(params)
        refusal = self.refusal or unlinkable(req)
        if link.request.options.require_exact:
            refusal = "require_exact"
        if refusal is not None:
            return self._unlinked(req, link, result, refusal)
        if not link.request.options.link:
            self._unlinked(req, link, result, "link_off")
            link.plan = unlinked_plan(len(params.key.token_ids))
            return result
        return self._linked(req, link, params, result)

    def _opens_at(self, ids: array) -> int:
        """Where a segment would stand exactly as it was compiled, or -1."""
        context = self.forest.context
        return len(context) if ids[: len(context)] == context else -1

    def missing(self, req: Req) -> list[int]:
        """Indices of the segments that would have to be compiled before linking;
        ``OPENING`` stands for the plain text before the first one."""
        link = self._link_of(req)
        if link is None or self.refusal or unlinkable(req):
            return []
        options = link.request.options
        if not options.link or options.require_exact or options.policy == "full":
            return []
        found = self._find_segments(req, link.request)
        missing = [i for i, lookup in enumerate(found) if lookup is not None and lookup.miss]
        opening = link.request.spans[0].start if link.request.spans else 0
        if opening >= self.config.min_segment:
            key = RadixKey(req.origin_input_ids[:opening], req.extra_key, cache_salt=req.cache_salt)
            held = super().match_prefix(MatchPrefixParams(key=key)).device_prefix_len
            if held < floor_to(opening, self.prefix_grid):
                missing.append(OPENING)
        return missing

    @property
    def prefix_grid(self) -> int:
        """An ordinary prefix is held in multiples of this many tokens."""
        return self.page_size

    def _link_of(self, req: Req) -> LinkState | None:
        link = self._links.get(req)
        if link is None:
            request = read_link(req.kv_hints)
            if request is None:
                return None
            link = self._links[req] = LinkState(request)
        return link

    def _find_segments(self, req: Req, request: LinkRequest) -> list[Lookup | None]:
        """One lookup a segment; ``None`` for one too short to compile."""
        ids = req.origin_input_ids
        found: list[Lookup | None] = []
        for span in request.spans:
            if span.end - span.start < self.config.min_segment:
                found.append(None)
                continue
            tokens = ids[span.start : span.end]
            found.append(self.forest.find(tokens, req.extra_key, req.cache_salt))
        return found

    def _unlinked(
        self, req: Req, link: LinkState, result: MatchResult, reason: str | None
    ) -> MatchResult:
        """Answer as stock would: ordinary prefix, ordinary row."""
        bare = [Found(span.start, span.end) for span in link.request.spans]
        self._report(req, link, bare, result.device_prefix_len, reason)
        return result

    def _linked(
        self, req: Req, link: LinkState, params: MatchPrefixParams, prefix: MatchResult
    ) -> MatchResult:
        options = link.request.options
        ids = req.origin_input_ids + req.output_ids
        spans = link.request.spans
        if options.policy == "full":
            prefix = self._root_match(req.extra_key)
            found: list[Lookup | None] = [None] * len(spans)
        else:
            found = self._find_segments(req, link.request)
        prefix_slots = self.path_device_indices(prefix.last_device_node)
        prefix_slots = prefix_slots[: prefix.device_prefix_len].to(torch.int64)
        context = self.forest.context
        opens_at = self._opens_at(ids)
        hits, seen = [], []
        for span, lookup in zip(spans, found, strict=True):
            opening = span.start == opens_at
            if lookup is None:
                seen.append(Found(span.start, span.end))
                continue
            offset = span.start - len(context)
            slots, state = lookup.slots, lookup.state
            hits.append(SegmentHit(span.start, span.end, offset, slots, opening, state))
            seen.append(Found(span.start, span.end, lookup.id, lookup.miss, opening))
        plan = make_plan(
            len(ids),
            limit=len(params.key),
            prefix=prefix_slots,
            hits=hits,
            policy=options.recompute_policy(),
            page=self.page_size,
        )
        if plan.reused == prefix_slots.numel() and options.policy != "full":
            # No core is reused: an ordinary request, and cached as one.
            self._report(req, link, seen, prefix.device_prefix_len, None)
            return prefix
        link.plan = plan = dataclasses.replace(plan, relocated=options.mode == "relocate")
        in_row_order = np.frombuffer(ids, dtype=np.int64)[plan.order.numpy()]
        req.full_untruncated_fill_ids = array("q", in_row_order.tobytes())
        req.skip_radix_cache_insert = True
        self._report(req, link, seen, prefix.device_prefix_len, None)
        if not plan.reused:
            return self._root_match(req.extra_key)
        held = [lookup for lookup in found if lookup is not None and lookup.slots.numel()]
        nodes = dict.fromkeys(lookup.node for lookup in held)
        handle = LinkHandle(
            prefix.last_device_node, tuple(nodes), plan, tuple(lookup.id for lookup in held)
        )
        if plan.relocated:
            return MatchResult(0, handle, handle, handle, host_hit_length=plan.reused)
        return MatchResult(plan.reused, handle, handle, handle)

    def _root_match(self, extra_key: str | None) -> MatchResult:
        root = self.root_node_handle(extra_key)
        return MatchResult(0, root, root, root)

    def _drop_plan(self, req: Req, link: LinkState) -> None:
        """Undo what a former plan did to the request."""
        link.plan = None
        if link.private is not None:
            self.token_to_kv_pool_allocator.free(link.private)
            link.private = None
        if req.skip_radix_cache_insert:
            req.skip_radix_cache_insert = False
            req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids

    def _report(
        self,
        req: Req,
        link: LinkState,
        segments: Sequence[Found],
        prefix_tokens: int,
        reason: str | None,
    ) -> None:
        if req.output_ids:
            return  # the report left with the first token
        made = make_report(
            len(req.origin_input_ids),
            link.request.options,
            segments=segments,
            prefix_tokens=prefix_tokens,
            plan=link.plan,
            reason=reason,
        )
        req.customized_info = {"pic": [made.to_json()]}

    # -- ownership ----------------------------------------------------------

    def lock(self, node_id: Any, *args: Any, **kwargs: Any) -> TreeLock | None:
        if not isinstance(node_id, LinkHandle):
            return super().lock(node_id, *args, **kwargs)
        held = [(self, super().lock(node_id.prefix, *args, **kwargs))]
        tree = self.segment_tree
        held += [(tree, UnifiedRadixCache.lock(tree, node)) for node in node_id.nodes]
        return TreeLock(node_id, held)

    def unlock(self, lock: TreeLock | None) -> None:
        if lock is None or not isinstance(lock.node, LinkHandle):
            return super().unlock(lock)
        for tree, held in lock.receipt:
            UnifiedRadixCache.unlock(tree, held)
        return None

    def prefix_device_indices(self, req: Req) -> torch.Tensor:
        if not isinstance(req.last_node, LinkHandle):
            return super().prefix_device_indices(req)
        link = self._links[req]
        self.forest.note_hits(req.last_node.segments)
        slots = req.last_node.plan.slots
        if link.private is not None:
            slots, link.private = link.private, None
        return slots[: req.prefix_len]

    def inc_host_lock_ref(self, node_id: Any) -> IncLockRefResult:
        if isinstance(node_id, LinkHandle):
            return IncLockRefResult()
        return super().inc_host_lock_ref(node_id)

    def dec_host_lock_ref(self, node_id: Any, params: Any) -> Any:
        if isinstance(node_id, LinkHandle):
            return None
        return super().dec_host_lock_ref(node_id, params)

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Any] | None:
        """*Relocate*: copy the plan's pages into private slots, K rotated.

        All or nothing, as SGLang demands; without room the request is computed
        exactly.
        """
        handle = params.best_match_node
        self._load_back_is_private = isinstance(handle, LinkHandle)
        if not self._load_back_is_private:
            return super().init_load_back(params)
        req, plan = params.req, handle.plan
        link = self._links[req]
        allocator = self.token_to_kv_pool_allocator
        held = self.lock(handle)
        short = plan.reused - allocator.available_size()
        if short > 0:
            self.evict(EvictParams(num_tokens=short))
        private = allocator.alloc(plan.reused)
        if private is None:
            self.unlock(held)
            self._drop_plan(req, link)
            self._unlinked(req, link, self._root_match(req.extra_key), "no_room_to_relocate")
            return 0, self.root_node_handle(req.extra_key)
        private = private.to(torch.int64)
        self.relocate(plan, private)
        self.unlock(held)
        spans = tuple(
            dataclasses.replace(
                span,
                offset=0,
                slots=private[span.row_start : span.row_start + span.end - span.start],
            )
            for span in plan.spans
        )
        link.plan = dataclasses.replace(plan, spans=spans)
        link.private = private
        root = self.root_node_handle(req.extra_key)
        return plan.reused, LinkHandle(root, (), link.plan, handle.segments)

    def load_back_is_cache_owned(self) -> bool:
        return not self._load_back_is_private and super().load_back_is_cache_owned()

    # -- handles where SGLang expects nodes -----------------------------------

    def dfs_weight_order(self, node_handles: Sequence[Any]) -> list[int]:
        return super().dfs_weight_order(
            [handle.prefix if isinstance(handle, LinkHandle) else handle for handle in node_handles]
        )

    def is_root(self, node_id: Any) -> bool:
        return not isinstance(node_id, LinkHandle) and super().is_root(node_id)

    def is_backuped(self, node_id: Any) -> bool:
        return not isinstance(node_id, LinkHandle) and super().is_backuped(node_id)

    # -- life of a plan -------------------------------------------------------

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        link = self._links.get(req)
        if link is not None:
            link.plan = None
        elif find_action(req.kv_hints, COMPILE) is not None and not isinstance(
            req.finished_reason, FINISH_ABORT
        ):
            self.forest.note_compiled(req.origin_input_ids, req.extra_key, req.cache_salt)
        super().on_release(req, checkpointed=checkpointed)

    def reset(self) -> None:
        if hasattr(self, "forest"):
            self.forest.forget()
        super().reset()

    def state(self) -> dict[str, Any]:
        """The forest and what its pages cost, for the management API.

        ``bytes_per_token`` is of KV over all layers; ``integrity`` is ``"ok"``
        or what the check found.
        """
        pool = self.token_to_kv_pool_allocator.get_kvcache()
        key_bytes, value_bytes = pool.get_kv_size_bytes()
        try:
            self.forest.check()
            integrity = "ok"
        except PicIntegrityError as error:
            integrity = str(error)
        return {
            **self.forest.dump(),
            "integrity": integrity,
            "refusal": self.refusal,
            "available_tokens": self.token_to_kv_pool_allocator.available_size(),
            "protected_tokens": self.protected_size(),
            "evictable_tokens": self.evictable_size(),
            "bytes_per_token": int(key_bytes + value_bytes) // (pool.size + pool.page_size),
            "live_plans": sum(link.plan is not None for link in self._links.values()),
        }

    def hand_over(self, backend: Any, rids: Sequence[str], reqs: Sequence[Req]) -> None:
        """Give the attention backend the plans of the batch that runs next."""
        backend.set_plans(rids, self.plans_of(reqs))

    def plans_of(self, reqs: Sequence[Req]) -> list[LinkPlan | None]:
        """Current plan of each request; ``None`` for ordinary ones."""
        if not self._links:
            return [None] * len(reqs)
        links = (self._links.get(req) for req in reqs)
        return [link.plan if link is not None else None for link in links]
