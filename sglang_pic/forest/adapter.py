"""``PicCache``: the tree cache SGLang runs on.

The one subclass of SGLang's: ordinary requests take its paths unchanged, and what is
position-independent is handed to the part of the forest that knows it. A linked row's
pages are locked for as long as it runs, by a handle that stands where SGLang expects
the node that ends a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    CacheRequestOutcome,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    InitLoadBackParams,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
    TreeLock,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_pic.forest.forest import Forest
from sglang_pic.forest.state import LinkHandle

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class PicCache(UnifiedRadixCache):
    """Tree cache with a forest beside it. Built by ``build_cache``.

    Attributes:
        params: what SGLang built it from.
        forest: its parts; there before the first request is.
    """

    forest: Forest

    def __init__(self, params: Any):
        self.params = params
        self._load_back_is_private = False
        super().__init__(params)

    # -- a request's way in -------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        return self.forest.links.match(params)

    def match_as_sglang(self, params: MatchPrefixParams) -> MatchResult:
        """SGLang's own ``match_prefix``."""
        return super().match_prefix(params)

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Any] | None:
        handle = params.best_match_node
        self._load_back_is_private = isinstance(handle, LinkHandle)
        if not self._load_back_is_private:
            return super().init_load_back(params)
        return self.forest.relocation.load_back(params.req, handle)

    def load_back_is_cache_owned(self) -> bool:
        return not self._load_back_is_private and super().load_back_is_cache_owned()

    def lock(self, node_id: Any, *args: Any, **kwargs: Any) -> TreeLock | None:
        if not isinstance(node_id, LinkHandle):
            return super().lock(node_id, *args, **kwargs)
        prefix = super().lock(node_id.prefix, *args, **kwargs)
        try:
            return TreeLock(node_id, (prefix, self.forest.pages.lock(node_id.nodes)))
        except BaseException:
            super().unlock(prefix)
            raise

    def prefix_device_indices(self, req: Req) -> torch.Tensor:
        if isinstance(req.last_node, LinkHandle):
            return self.forest.links.slots(req)
        self.forest.eviction.used(req)
        return super().prefix_device_indices(req)

    # -- and out ------------------------------------------------------------------

    def unlock(self, lock: TreeLock | None) -> None:
        if lock is None:
            return
        if not isinstance(lock.node, LinkHandle):
            super().unlock(lock)
            self.forest.eviction.unlocked(lock.node)
            return
        prefix, nodes = lock.receipt
        super().unlock(prefix)
        self.forest.pages.unlock(nodes)
        self.forest.eviction.unlocked(lock.node)

    def claim_kv_row(self, req: Req) -> bool:
        finished = req.finished()
        if finished and not isinstance(req.finished_reason, FINISH_ABORT):
            self.forest.links.finished(req)
        claimed = super().claim_kv_row(req)
        if finished:
            self.forest.carried.end(req)
            with self.forest.contained("documents", req):
                self.forest.encoded.end(req)
        elif req.to_finish is not None:
            # It is retracted, and may not come again: SGLang ends the last one so when even
            # that has no room.
            with self.forest.contained("documents", req):
                self.forest.encoded.let_go(req.cache_request_handle)
        return claimed

    def finish(self, handle: CacheRequestHandle, outcome: CacheRequestOutcome) -> None:
        # Of a request that ends in the queue, or between two chunks.
        super().finish(handle, outcome)
        with self.forest.contained("documents"):
            self.forest.encoded.let_go(handle)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        self.forest.links.released(req)
        super().on_release(req, checkpointed=checkpointed)

    def checkpoint_into_tree(self, req: Req, *, up_to: int, **kwargs: Any) -> None:
        # Beside decoding rows SGLang ends a chunk anywhere (--enable-mixed-chunk), and takes
        # a state kept there for that of the whole page in front of it: a wrong answer to
        # whoever goes on from it.
        kept = req.kv.mamba_last_track_seqlen
        if kept is not None and kept % self.page_size:
            req.kv.mamba_last_track_seqlen = None
        super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        with self.forest.contained("checkpoint", req):
            self.forest.checkpoints.inserted(req)

    def insert(self, params: InsertParams) -> InsertResult:
        result = super().insert(params)
        self.forest.eviction.inserted(result.last_device_node, params.key.cache_salt)
        return result

    # -- memory -------------------------------------------------------------------

    def _evict(self, params: EvictParams, *args: Any, **kwargs: Any) -> EvictResult:
        return self.forest.eviction.evict(super()._evict, params, *args, **kwargs)

    def evict_as_sglang(self, params: EvictParams) -> EvictResult:
        """SGLang's own eviction, of ordinary prefixes alone."""
        return super()._evict(params)

    def evictable_size(self) -> int:
        return super().evictable_size() + self.forest.pages.evictable

    def full_evictable_size(self) -> int:
        return super().full_evictable_size() + self.forest.pages.evictable

    def protected_size(self) -> int:
        return super().protected_size() + self.forest.pages.protected

    def full_protected_size(self) -> int:
        return super().full_protected_size() + self.forest.pages.protected

    def total_size(self) -> Any:
        total, *rest = super().total_size()
        return total + self.forest.pages.tokens, *rest

    def all_values_flatten(self) -> torch.Tensor:
        own = super().all_values_flatten()
        return torch.cat([own, self.forest.pages.all_slots().to(own.dtype)])

    def sanity_check(self) -> None:
        super().sanity_check()
        self.forest.pages.check()

    def reset(self) -> None:
        # SGLang's constructor calls it, before there is a forest.
        if hasattr(self, "forest"):
            self.forest.reset()
        super().reset()

    # -- handles where SGLang expects nodes -----------------------------------

    def inc_host_lock_ref(self, node_id: Any) -> IncLockRefResult:
        if isinstance(node_id, LinkHandle):
            return IncLockRefResult()
        return super().inc_host_lock_ref(node_id)

    def dec_host_lock_ref(self, node_id: Any, params: Any) -> Any:
        if isinstance(node_id, LinkHandle):
            return None
        return super().dec_host_lock_ref(node_id, params)

    def dfs_weight_order(self, node_handles: Sequence[Any]) -> list[int]:
        return super().dfs_weight_order(
            [handle.prefix if isinstance(handle, LinkHandle) else handle for handle in node_handles]
        )

    def is_root(self, node_id: Any) -> bool:
        return not isinstance(node_id, LinkHandle) and super().is_root(node_id)

    def is_backuped(self, node_id: Any) -> bool:
        return not isinstance(node_id, LinkHandle) and super().is_backuped(node_id)
