"""Who goes when pages are short.

A shortage is met from one order over ordinary prefixes, segments and turns
(``nodes``). Where the order cannot help (joint pools) and where it runs out, SGLang's own
eviction follows. With a host tier it comes first: what a prefix loses there comes back.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Protocol

from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_pic.forest.containment import Containment
from sglang_pic.forest.keys import is_reserved
from sglang_pic.forest.nodes import LINKED, PREFIX, NodeIndex
from sglang_pic.forest.pages import Pages
from sglang_pic.forest.state import LinkHandle

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

AsStock = Callable[..., EvictResult]
# Places of the two trees in ``NodeIndex``.
ORDINARY, LINKABLE = 0, 1


class Eviction(Protocol):
    """What the adapter tells of ordinary prefixes, and asks."""

    def inserted(self, node: Any, salt: str | None) -> None:
        """An ordinary prefix ends with this node now."""
        ...

    def used(self, req: Req) -> None:
        """A request runs behind an ordinary prefix."""
        ...

    def unlocked(self, node: Any) -> None:
        """A request gives back what its row stood on: a node, or a ``LinkHandle``."""
        ...

    def evict(self, stock: AsStock, params: EvictParams, *args: Any, **kwargs: Any) -> EvictResult:
        """In the place of ``UnifiedRadixCache._evict``, which is ``stock``."""
        ...


class AsSglang:
    """On a server that must not link."""

    def inserted(self, node: Any, salt: str | None) -> None:
        pass

    def used(self, req: Req) -> None:
        pass

    def unlocked(self, node: Any) -> None:
        pass

    def evict(self, stock: AsStock, params: EvictParams, *args: Any, **kwargs: Any) -> EvictResult:
        return stock(params, *args, **kwargs)


class InOrder:
    """By one order over both trees.

    Args:
        cache: SGLang's tree cache, of ordinary prefixes.
        pages: of segments and turns.
        nodes: the order.
        limit: most tokens of segments and turns.
        contained: around what of ours could fail.
        release_held_back: memory is needed: offer to eviction what was held back.
    """

    def __init__(
        self,
        cache: Any,
        pages: Pages,
        nodes: NodeIndex,
        limit: int,
        contained: Containment,
        release_held_back: Callable[[], None],
    ):
        self._cache = cache
        self._pages = pages
        self._nodes = nodes
        self.limit = limit
        self._contained = contained
        self._release_held_back = release_held_back

    def inserted(self, node: Any, salt: str | None) -> None:
        if node is not None and not is_reserved(salt):
            with self._contained("insert"):
                self._nodes.note(ORDINARY, node, PREFIX, salt)

    def used(self, req: Req) -> None:
        if not is_reserved(req.cache_salt):
            with self._contained("use", req):
                self._nodes.use(ORDINARY, req.last_node, PREFIX, req.cache_salt)

    def unlocked(self, node: Any) -> None:
        with self._contained("unlock"):
            if not isinstance(node, LinkHandle):
                self._nodes.unlocked(ORDINARY, node)
                return
            self._nodes.unlocked(ORDINARY, node.prefix)
            for one in node.nodes:
                self._nodes.unlocked(LINKABLE, one)

    def evict(
        self,
        stock: AsStock,
        params: EvictParams,
        available_size_targets: Any = None,
        *,
        allocation_reclaim_satisfied: Any = None,
    ) -> EvictResult:
        targets, satisfied = available_size_targets, allocation_reclaim_satisfied
        target = (targets or {}).get(ComponentType.FULL)
        ours = (
            params.num_tokens > 0
            and satisfied is None
            and (target is None or target[0] is ComponentType.FULL)
        )
        if not ours:
            return self._as_stock(stock, params, targets, satisfied)
        freed, enough = self.free(params.num_tokens, targets, None)
        mamba = freed.get(ComponentType.MAMBA, 0)
        missing = params.num_tokens - freed[ComponentType.FULL]
        rest = dataclasses.replace(
            params,
            num_tokens=0 if enough else max(1, missing),
            mamba_num=max(0, params.mamba_num - mamba),
        )
        result = self._as_stock(stock, rest, targets, None)
        return dataclasses.replace(
            result,
            num_tokens_evicted=result.num_tokens_evicted + freed[ComponentType.FULL],
            mamba_num_evicted=result.mamba_num_evicted + mamba,
        )

    def free(
        self, wanted: int, targets: Any, kinds: Collection[str] | None
    ) -> tuple[dict[ComponentType, int], bool]:
        """Evict in order until so many tokens are free, or as many more as SGLang's targets
        say where it names some.

        Args:
            kinds: whose nodes may go; all by default.

        Returns:
            Freed, by SGLang's component; whether that is enough.
        """
        started = time.perf_counter()
        target = (targets or {}).get(ComponentType.FULL)

        def is_enough(freed: int) -> bool:
            if target is not None:
                free = self._cache._component_available_size(ComponentType.FULL)
                return bool(free >= target[1])
            return freed >= wanted

        freed: dict[ComponentType, int] = {ComponentType.FULL: 0}
        enough = False
        with self._contained("evict"):
            freed, enough = self._in_order(is_enough, kinds)
        self._cache.update_eviction_metrics(freed[ComponentType.FULL], started)
        return freed, enough

    def _in_order(
        self, is_enough: Callable[[int], bool], kinds: Collection[str] | None
    ) -> tuple[dict[ComponentType, int], bool]:
        freed = self._nodes.evict(is_enough, kinds)
        if not is_enough(freed[ComponentType.FULL]):
            self._release_held_back()
            before = freed[ComponentType.FULL]
            freed.update(self._nodes.evict(lambda more: is_enough(before + more), kinds))
        return freed, is_enough(freed[ComponentType.FULL])

    def _as_stock(
        self, stock: AsStock, params: EvictParams, targets: Any, satisfied: Any
    ) -> EvictResult:
        result = stock(params, targets, allocation_reclaim_satisfied=satisfied)
        if result.num_tokens_evicted:
            self._nodes.note_fallback()
        if satisfied is not None:
            return result
        return self.free_unordered(params, result, targets)

    def free_unordered(self, params: EvictParams, result: EvictResult, targets: Any) -> EvictResult:
        """Evict what else is missing of segments and turns: the order knows of all that may
        go there, unless a fault has lost some."""
        short = params.num_tokens - result.num_tokens_evicted
        if short <= 0:
            return result
        own = None
        if targets is not None and ComponentType.FULL in targets:
            own = {ComponentType.FULL: targets[ComponentType.FULL]}
        more = self._pages.evict(short, own)
        return dataclasses.replace(result, num_tokens_evicted=result.num_tokens_evicted + more)

    def make_room(self, tokens: int) -> bool:
        """Bring what segments and conversations hold down, until so many tokens
        more are within the limit.

        Returns:
            Whether they are; nothing in use or pinned is evicted for it.
        """

        def fits(_: int = 0) -> bool:
            return self._pages.tokens + tokens <= self.limit

        return tokens <= self.limit and (fits() or self._in_order(fits, LINKED)[1])


class BehindTier:
    """With a host tier: prefixes go there first, in SGLang's own order, which alone knows
    which of them are leaves on the device. Then segments and turns, by theirs."""

    def __init__(self, in_order: InOrder):
        self._in_order = in_order
        self.inserted = in_order.inserted
        self.used = in_order.used
        self.unlocked = in_order.unlocked

    def evict(
        self,
        stock: AsStock,
        params: EvictParams,
        available_size_targets: Any = None,
        *,
        allocation_reclaim_satisfied: Any = None,
    ) -> EvictResult:
        targets, satisfied = available_size_targets, allocation_reclaim_satisfied
        result = stock(params, targets, allocation_reclaim_satisfied=satisfied)
        short = params.num_tokens - result.num_tokens_evicted
        if short <= 0 or satisfied is not None:
            return result
        freed, enough = self._in_order.free(short, targets, LINKED)
        result = dataclasses.replace(
            result, num_tokens_evicted=result.num_tokens_evicted + freed[ComponentType.FULL]
        )
        return result if enough else self._in_order.free_unordered(params, result, targets)
