"""Nodes of SGLang's trees in one eviction order.

SGLang's tree evicts what was used least recently, one tree at a time. Here every
node of both trees (ordinary prefixes, and what is linked) is an entry of one
``EvictionOrder``, so that they compete by what they save; the tree still does the
evicting, leaf by leaf, and keeps its own counts and locks.

Nodes become known when a path is inserted or used. SGLang splits a node without
telling: its lower half keeps the id, and here the range of both, until that path
is seen again; and what SGLang evicts by itself is not told either. So what is known
may be too much for a while, never too little. Every call looks at a few nodes in
turn and mends what it finds; nothing looks at all of them but what an operator asks.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.order import EvictionOrder

SEGMENT = "segment"
TURN = "turn"
PREFIX = "prefix"
LINKED = (SEGMENT, TURN)
# Nodes looked at in turn by every call that adds some: more than it can add twice over;
# and where none is left that may go.
TENDED, TENDED_AT_LAST = 4, 64


class NodeKey(NamedTuple):
    """A node: which tree, and SGLang's id in it."""

    tree: int
    id: int


@dataclasses.dataclass
class Node:
    """What is known of one node: positions [start, end) of a path of this kind
    and namespace, and the segments that end with it."""

    kind: str
    salt: str | None
    start: int
    end: int
    ends: set[str] = dataclasses.field(default_factory=set)


class NodeIndex:
    """Every known node of the trees, and who of them goes first.

    Args:
        trees: SGLang's trees over one pool of pages.
        cost: of the model.
        on_evict: told the segments that ended with a node that is gone.
    """

    def __init__(
        self,
        trees: Sequence[UnifiedRadixCache],
        cost: PrefillCost,
        on_evict: Callable[[Collection[str]], None],
    ):
        self._trees = trees
        self._cost = cost
        self._on_evict = on_evict
        # Those looked at longest ago first.
        self._nodes: OrderedDict[NodeKey, Node] = OrderedDict()
        self._of_salt: dict[str | None, set[NodeKey]] = {}
        self._order: EvictionOrder[NodeKey] = EvictionOrder()
        self._held_back: set[NodeKey] = set()
        self.tokens: Counter[str] = Counter()
        self.evicted: Counter[str] = Counter()
        self.fallbacks = 0

    # -- what is there ------------------------------------------------------------

    def note(
        self,
        tree: int,
        node: int,
        kind: str,
        salt: str | None,
        *,
        uses: int = 1,
        offer: bool = True,
    ) -> None:
        """Learn the path to a node; nodes met for the first time have ``uses``, and
        the path's end may go at once, or from ``release`` on."""
        self._learn(tree, node, kind, salt, uses)
        if not offer:
            self._held_back.add(NodeKey(tree, node))
        self._offer(NodeKey(tree, node))
        self._tend(TENDED)

    def hold_back(self, tree: int, node: int) -> None:
        """A known path's end may go from ``release`` on."""
        key = NodeKey(tree, node)
        self._held_back.add(key)
        self._order.withdraw(key)

    def release(self, tree: int, node: int) -> None:
        """What was held back may go."""
        self._held_back.discard(NodeKey(tree, node))
        self._offer(NodeKey(tree, node))

    def use(self, tree: int, node: int, kind: str, salt: str | None) -> None:
        """One request uses the path to a node."""
        known = self._nodes.get(NodeKey(tree, node))
        if known is not None and known.start == 0:
            # Nothing stands in front of it, or what a split has left there unknown, which
            # will be learnt with the uses counted here.
            self._order.use(NodeKey(tree, node))
            return
        for key in self._learn(tree, node, kind, salt, 1):
            self._order.use(key)

    def unlocked(self, tree: int, node: int) -> None:
        """A path was given back: its end may go now."""
        self._offer(NodeKey(tree, node))

    def _offer(self, key: NodeKey) -> None:
        if key not in self._held_back:
            self._order.offer(key)

    def end_segment(self, tree: int, node: int, segment: str) -> bool:
        """A segment's pages end with this node; whether that was not known."""
        ends = self._nodes[NodeKey(tree, node)].ends
        is_new = segment not in ends
        ends.add(segment)
        return is_new

    def ends_on_path(self, tree: int, node: int, until: int) -> Iterator[tuple[int, set[str]]]:
        """Nodes of a path up to position ``until`` with which segments end, the
        deepest first, and those segments."""
        for info in reversed(self._path(tree, node)):
            known = self._nodes.get(NodeKey(tree, info.node_id))
            if known is not None and known.ends and info.path_end <= until:
                yield info.node_id, known.ends

    def unend_segment(self, tree: int, node: int, segment: str) -> None:
        """They no longer count as its end; they may go at once."""
        known = self._nodes.get(NodeKey(tree, node))
        if known is not None:
            known.ends.discard(segment)
            self.release(tree, node)

    def is_held(self, tree: int, node: int) -> bool:
        """Whether something that runs, or a pin, holds this leaf; no inner node is."""
        key = NodeKey(tree, node)
        info = self._info(key)
        return info is not None and not info.num_children and not self._is_free(key, info)

    def value(self, tree: int, node: int) -> float:
        """Where a node stands in the order; 0 for an unknown one."""
        entry = self._order.get(NodeKey(tree, node))
        return entry.value if entry is not None else 0.0

    def clear(self) -> None:
        """The trees were emptied."""
        self._nodes.clear()
        self._of_salt.clear()
        self._order.clear()
        self._held_back.clear()
        self.tokens.clear()

    def _learn(self, tree: int, node: int, kind: str, salt: str | None, uses: int) -> list[NodeKey]:
        """Bring all that is known of a path up to date; its nodes, deepest first."""
        keys = []
        split: Node | None = None
        split_start = 0
        for info in reversed(self._path(tree, node)):
            if info.full_value_len is None:
                continue
            key = NodeKey(tree, info.node_id)
            keys.append(key)
            known = self._nodes.get(key)
            if known is not None:
                if known.start < info.path_start:
                    split, split_start = known, known.start
                    split_uses = self._order.uses(key)
                    self._move_start(key, known, info.path_start)
            elif split is not None and info.path_start >= split_start:
                self._add(key, split.kind, split.salt, info, split_uses)
            else:
                self._add(key, kind, salt, info, uses)
        return keys

    def _add(self, key: NodeKey, kind: str, salt: str | None, info: Any, uses: int) -> None:
        start, end = info.path_start, info.path_end
        self._nodes[key] = Node(kind, salt, start, end)
        self._of_salt.setdefault(salt, set()).add(key)
        self.tokens[kind] += end - start
        cost, nbytes = self._worth(start, end)
        self._order.add(key, kind, cost=cost, nbytes=nbytes, uses=uses)

    def _move_start(self, key: NodeKey, node: Node, start: int) -> None:
        self.tokens[node.kind] -= start - node.start
        node.start = start
        cost, nbytes = self._worth(start, node.end)
        self._order.resize(key, cost=cost, nbytes=nbytes)

    def _worth(self, start: int, end: int) -> tuple[float, int]:
        return self._cost.flops(start, end), (end - start) * self._cost.kv_bytes

    def _tend(self, count: int) -> None:
        """Bring what is known of a few nodes up to date."""
        for _ in range(min(count, len(self._nodes))):
            key = next(iter(self._nodes))
            self._nodes.move_to_end(key)
            self._refresh(key)

    def _refresh(self, key: NodeKey) -> None:
        node, info = self._nodes[key], self._info(key)
        if info is None:
            self._forget(key)
            return
        if node.start != info.path_start:
            self._learn(*key, node.kind, node.salt, 1)
        if not info.num_children:
            self._offer(key)

    def note_fallback(self) -> None:
        """SGLang evicted by itself."""
        self.fallbacks += 1

    def recount(self) -> None:
        """Bring what is known of all nodes up to date. O(n)."""
        for key in list(self._nodes):
            if key in self._nodes:
                self._refresh(key)

    # -- eviction -------------------------------------------------------------------

    def evict(
        self, is_enough: Callable[[int], bool], kinds: Collection[str] | None = None
    ) -> Counter[ComponentType]:
        """Evict leaf after leaf, least value first, until it is enough.

        Args:
            is_enough: told the tokens freed so far, asked before each victim.
            kinds: whose nodes may go; all by default.

        Returns:
            Freed, by SGLang's component; less than enough where nothing more may go.
        """
        freed: Counter[ComponentType] = Counter()
        has_looked = False
        while not is_enough(freed[ComponentType.FULL]):
            key = self._order.park(kinds)
            if key is None:
                if has_looked:
                    break
                # What SGLang evicted may have left its parents leaves.
                has_looked = True
                self._tend(TENDED_AT_LAST)
                continue
            info = self._info(key)
            if info is None:
                self._forget(key)
            elif not info.num_children and self._is_free(key, info):
                self._evict(key, info, freed, self._order.evicted)
        return freed

    def remove_path(self, tree: int, node: int) -> int:
        """Evict a path from its end up to where something else needs it, or ends.

        Returns:
            Tokens freed.
        """
        freed: Counter[ComponentType] = Counter()
        key = NodeKey(tree, node)
        while (info := self._info(key)) is not None:
            if info.num_children or self._nodes[key].ends or not self._is_free(key, info):
                break
            self._evict(key, info, freed, self._order.remove)
            if info.path_start == 0:
                break
            key = NodeKey(tree, info.parent_id)
        return freed[ComponentType.FULL]

    def remove_all(self, salts: Collection[str | None], kinds: Collection[str]) -> int:
        """Evict every node of these namespaces and kinds that nothing holds.

        Returns:
            Tokens freed.
        """
        held = {key for salt in salts for key in self._of_salt.get(salt, ())}
        for key in held:
            if key in self._nodes:
                self._refresh(key)
        held = {key for salt in salts for key in self._of_salt.get(salt, ())}
        chosen = [key for key in held if self._nodes[key].kind in kinds]
        # The deepest first: a parent may go when its children are gone.
        chosen.sort(key=lambda key: -self._nodes[key].start)
        freed: Counter[ComponentType] = Counter()
        for key in chosen:
            info = self._info(key)
            if info is None:
                self._forget(key)
            elif not info.num_children and self._is_free(key, info):
                self._evict(key, info, freed, self._order.remove)
        return freed[ComponentType.FULL]

    def _evict(
        self,
        key: NodeKey,
        info: Any,
        freed: Counter[ComponentType],
        take: Callable[[NodeKey], Any],
    ) -> None:
        tracker: dict[ComponentType, int] = dict.fromkeys(self._trees[key.tree].tree_components, 0)
        self._trees[key.tree]._evict_device_leaf(key.id, tracker)
        freed.update(tracker)
        node = self._pop(key)
        self.evicted[node.kind] += tracker[ComponentType.FULL]
        take(key)
        if info.path_start > 0:
            parent = NodeKey(key.tree, info.parent_id)
            if parent not in self._nodes and self._info(parent) is not None:
                self._learn(*parent, node.kind, node.salt, 1)
            self._offer(parent)
        self._held_back.discard(key)
        self._on_evict(node.ends)

    def _forget(self, key: NodeKey) -> None:
        node = self._pop(key)
        self._held_back.discard(key)
        self._order.remove(key)
        self._on_evict(node.ends)

    def _pop(self, key: NodeKey) -> Node:
        node = self._nodes.pop(key)
        of_salt = self._of_salt[node.salt]
        of_salt.discard(key)
        if not of_salt:
            del self._of_salt[node.salt]
        self.tokens[node.kind] -= node.end - node.start
        return node

    def check(self) -> None:
        """Raise ``PicIntegrityError`` unless sums, order and SGLang's trees agree;
        after ``recount``."""
        sums: Counter[str] = Counter()
        for key, node in self._nodes.items():
            sums[node.kind] += node.end - node.start
            if key not in self._order:
                raise PicIntegrityError(f"{key} has no place in the eviction order")
        if len(self._order) != len(self._nodes) or sums != +self.tokens:
            raise PicIntegrityError(f"nodes hold {dict(sums)} tokens, counted {dict(self.tokens)}")
        known = sum(sums.values())
        total = sum(tree.tree_core.total_size()[0] for tree in self._trees)
        if known > total:
            raise PicIntegrityError(f"{known} tokens are known of {total} in the trees")

    def _info(self, key: NodeKey) -> Any:
        """SGLang's node, or ``None`` if it is gone, be it to the host."""
        path = self._path(*key)
        return path[-1] if path and path[-1].full_value_len is not None else None

    def _path(self, tree: int, node: int) -> Sequence[Any]:
        """SGLang's nodes from the root's child to this one; none if it is gone."""
        try:
            return self._trees[tree].tree_core.collect_path_info([node])[0]
        except KeyError:
            return ()

    def _is_free(self, key: NodeKey, info: Any) -> bool:
        """Whether nothing that runs, and no pin, holds a leaf: pinning it once more
        then takes its tokens from what SGLang may evict."""
        core = self._trees[key.tree].tree_core
        before = core.full_evictable_size()
        core.inc_full_pin(key.id)
        after = core.full_evictable_size()
        core.dec_full_pin(key.id)
        return before - after >= info.path_end - info.path_start
