"""Which segments come together again.

Of every tenant's last prompts the sets of their segments are remembered; what a prompt
shares with one of them is a group that recurs. Bounded, and forgotten by age: what came
together once, long ago, counts for nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable

from cachetools import LRUCache

# Tenants, with adapter and opening; prompts of one of them, and their segments; segments
# of a prompt: with more it is left out, since all of this is looked at whenever one comes.
# Some 100 bytes a segment, 13 MiB if every bound is reached.
MAX_KINDS, MAX_PROMPTS, MAX_NAMES, MAX_SEGMENTS = 128, 64, 1024, 64
Group = frozenset[bytes]


class Recurring:
    """Sets of segments by the kind of prompt that they stood in."""

    def __init__(self) -> None:
        self._kinds: LRUCache[Hashable, OrderedDict[Group, None]] = LRUCache(MAX_KINDS)

    def saw(self, kind: Hashable, names: Collection[bytes]) -> list[Group]:
        """A prompt came with these segments.

        Args:
            kind: groups are of prompts of one kind.

        Returns:
            Groups of them, of two at least, that had come together before: the largest
            first, none with a segment of another.
        """
        here = frozenset(names)
        if not 2 <= len(here) <= MAX_SEGMENTS:
            return []
        earlier = self._kinds.setdefault(kind, OrderedDict())
        shared = {here & prompt for prompt in earlier}
        earlier[here] = None
        earlier.move_to_end(here)
        while len(earlier) > MAX_PROMPTS or sum(map(len, earlier)) > MAX_NAMES:
            earlier.popitem(last=False)
        groups: list[Group] = []
        left = here
        for group in sorted(shared, key=lambda group: (-len(group), sorted(group))):
            group &= left
            if len(group) > 1:
                groups.append(group)
                left -= group
        return groups
