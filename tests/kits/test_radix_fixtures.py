"""SGLang's fuzzer of its radix cache, on our cache in that one's place."""

from __future__ import annotations

import unittest
from typing import Any

import pytest
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.test.kits.unified_radix_cache import fixtures
from sglang.test.kits.unified_radix_cache.config import CONFIGS, CacheConfig
from sglang.test.kits.unified_radix_cache.insert_walk import SegmentLockFuzzFixtures

from sglang_pic.config import PicConfig
from sglang_pic.forest.adapter import PicCache
from sglang_pic.forest.build import plant
from sglang_pic.forest.cost import PrefillCost

pytestmark = pytest.mark.kits
FULL = [cfg for cfg in CONFIGS if cfg.components == (ComponentType.FULL,)]


def _ours(params: Any) -> PicCache:
    cache = PicCache(params)
    plant(cache, PicConfig(), PrefillCost(1e6, 10.0, 16))
    return cache


@pytest.mark.parametrize("cfg", FULL, ids=lambda cfg: cfg.label)
@pytest.mark.parametrize("build", [UnifiedRadixCache, _ours], ids=["stock", "ours"])
def test_inserts_locks_and_evictions(
    monkeypatch: pytest.MonkeyPatch, build: Any, cfg: CacheConfig
) -> None:
    def without_window(params: Any) -> Any:
        cache = build(params)
        lock = cache.inc_lock_ref

        def inc_lock_ref(*args: Any, **kwargs: Any) -> Any:
            receipt = lock(*args, **kwargs)
            receipt.component_lock_uuids.setdefault(ComponentType.SWA, None)
            return receipt

        cache.inc_lock_ref = inc_lock_ref
        return cache

    monkeypatch.setattr(fixtures, "UnifiedRadixCache", without_window)
    monkeypatch.setattr(fixtures, "get_device", lambda: "cpu")
    # The fuzzer also gives back what a sliding window would hold; here is none.
    monkeypatch.setattr(TokenToKVPoolAllocator, "free_swa", lambda *_: None, raising=False)

    class Fuzz(SegmentLockFuzzFixtures, unittest.TestCase):
        pass

    Fuzz.cfg = cfg
    for seed in range(20):
        Fuzz()._run_seed(seed)
