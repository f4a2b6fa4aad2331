"""The tree of segments and turns, over the pool of pages that all requests share.

Ordinary prefixes keep SGLang's own tree. What is position-independent lives in a
second one of the same kind that knows KV alone, under namespaces of its own
(``keys``, ``turns``): so segments need no state of SGLang's and hold none of its
slots, and all models keep them alike.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache


class Pages:
    """Paths of pages by their tokens.

    Args:
        params: SGLang's, of the tree of ordinary prefixes.

    Attributes:
        tree: SGLang's tree, for who evicts from it.
        page_size: tokens per page.
    """

    def __init__(self, params: Any):
        self.tree = UnifiedRadixCache(
            dataclasses.replace(
                params,
                tree_components=(ComponentType.FULL,),
                enable_metrics=False,
                enable_kv_cache_events=False,
            )
        )
        self.page_size: int = params.page_size
        self._core = self.tree.tree_core
        self._root = self.tree.root_node_handle(None)
        # By their first slot.
        self._reserved: dict[int, torch.Tensor] = {}

    def find(self, tokens: array, extra_key: str | None, salt: str) -> tuple[int, int]:
        """How many of ``tokens`` are held as whole pages, compared one by one, and the
        deepest node on their path. Changes nothing."""
        key = RadixKey(tokens, extra_key, cache_salt=salt)
        held, node, _ = self._core.match_full_device_prefix(key)
        return held, node

    def slots(self, node: int, count: int) -> torch.Tensor:
        """int64 [count], slots of the first tokens of the path to a node."""
        return self._core.collect_full_device_indices(node, self._root)[:count]

    def holds(self, node: int) -> bool:
        """Whether a node is still there, and so all that its path held."""
        try:
            self._core.is_full_device_evicted(node)
        except KeyError:
            return False
        return True

    def keep(
        self, tokens: array, extra_key: str | None, salt: str, slots: torch.Tensor, *, ours: int = 0
    ) -> int:
        """Take over the pages of a path, int64 ``slots``, whole pages; where the same
        tokens are held already, those beyond the first ``ours`` are freed instead.

        Returns:
            The node that ends it.
        """
        key = RadixKey(tokens, extra_key, cache_salt=salt)
        result = self.tree.insert(
            InsertParams(key=key, value=slots, prev_prefix_len=ours, priority=0)
        )
        return int(result.last_device_node)

    def reserve(self, slots: torch.Tensor) -> None:
        """Own pages, int64 ``slots``, that stand on no path yet: nobody finds them, and
        they are locked."""
        self._reserved[int(slots[0])] = slots

    def unreserve(self, slots: torch.Tensor) -> None:
        """Give back what ``reserve`` took."""
        del self._reserved[int(slots[0])]

    @property
    def reserved(self) -> int:
        """Tokens whose pages stand on no path yet."""
        return sum(slots.numel() for slots in self._reserved.values())

    def lock(self, nodes: Iterable[int]) -> tuple[int, ...]:
        """Keep paths from eviction until ``unlock``, which takes what this returns.

        Raises:
            KeyError: one is gone; none is locked.
        """
        locked: list[int] = []
        try:
            for node in nodes:
                self._core.inc_full_pin(node)
                locked.append(node)
        except BaseException:
            self.unlock(locked)
            raise
        return tuple(locked)

    def unlock(self, nodes: Iterable[int]) -> None:
        """Give back what ``lock`` returned."""
        for node in nodes:
            self._core.dec_full_pin(node)

    @property
    def evictable(self) -> int:
        """Tokens that nothing has locked."""
        return int(self._core.full_evictable_size())

    @property
    def protected(self) -> int:
        """Tokens that something has locked."""
        return int(self._core.full_protected_size()) + self.reserved

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.evictable + self.protected

    def all_slots(self) -> torch.Tensor:
        """Every slot it owns. O(n)."""
        return torch.cat([self.tree.all_values_flatten(), *self._reserved.values()])

    def evict(self, tokens: int, targets: Any) -> int:
        """As SGLang would, the least recently used; the tokens freed."""
        return int(self.tree._evict(EvictParams(num_tokens=tokens), targets).num_tokens_evicted)

    def check(self) -> None:
        """SGLang's own check of its tree. O(n)."""
        self.tree.sanity_check()

    def reset(self) -> None:
        """Everything was flushed."""
        self.tree.reset()
        self._reserved.clear()
        self._root = self.tree.root_node_handle(None)


class NoPages(Pages):
    """Of a server that must not link, and whose pools may not suit a second tree."""

    evictable = protected = tokens = reserved = 0

    def __init__(self, params: Any):
        self.page_size = params.page_size

    def all_slots(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)

    def check(self) -> None:
        pass

    def reset(self) -> None:
        pass
