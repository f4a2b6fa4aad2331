"""SGLang's host tier (HiCache) behind the pages of ordinary prefixes.

It is SGLang's own, and knows of its own tree alone: segments and turns stand in another
tree (``pages``), which has none.
"""

from __future__ import annotations

from typing import Any, Protocol

from sglang.srt.mem_cache.base_prefix_cache import EvictParams


class Tier(Protocol):
    """What concerns the rest of the forest."""

    @property
    def is_loading(self) -> bool:
        """Pages of ordinary prefixes are named that may not hold their keys yet."""
        ...

    def drop(self) -> int:
        """Drop what it holds, and what would come to it from the device.

        Returns:
            Tokens freed on the device.
        """
        ...


class NoTier:
    is_loading = False

    def drop(self) -> int:
        return 0


class HostTier:
    """SGLang's.

    Args:
        cache: SGLang's tree cache, of ordinary prefixes.
    """

    def __init__(self, cache: Any):
        self._cache = cache

    @property
    def is_loading(self) -> bool:
        return bool(self._cache.ongoing_load_back)

    def drop(self) -> int:
        # SGLang can neither name what its host pool holds of a namespace nor evict it.
        evictable = self._cache.tree_core.full_evictable_size()
        freed = self._cache.evict_as_sglang(EvictParams(num_tokens=evictable))
        self._cache.evict_host(self._cache.cache_controller.mem_pool_host.size)
        return int(freed.num_tokens_evicted)
