"""What one scheduler knows of the store: which values it has, and what has become of those that
were to be written whatever they are worth."""

from __future__ import annotations

from collections.abc import Sequence

from cachetools import LRUCache

from sglang_pic.request.commands import UNWRITTEN, WRITING, WRITTEN
from sglang_pic.store.base import DROPPED
from sglang_pic.store.writing import Writer

MOST_KNOWN, MOST_PUBLISHED = 65536, 4096


class Known:
    """Of one kind of values, by their names."""

    def __init__(self, writer: Writer):
        self._writer = writer
        self._known: LRUCache[str, bool] = LRUCache(MOST_KNOWN)
        # Names of the values of what was published, by the name that it is held under.
        self._published: LRUCache[str, Sequence[str]] = LRUCache(MOST_PUBLISHED)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def add(self, name: str) -> None:
        """The store has a value by this name, or is about to: it need not be written."""
        self._known[name] = True

    def remove(self, name: str) -> None:
        """Have a value removed from the store."""
        self._known.pop(name, None)
        self._writer.remove(name)

    def publish(self, held: str, names: Sequence[str]) -> None:
        """What is held under a name is to be written anew, as these values. What the store had,
        it may have evicted; what it did not take, it may take now."""
        for name in names:
            self._known.pop(name, None)
            self._writer.forgive(name)
        self._published[held] = names

    def published(self, held: str) -> tuple[str, str | None]:
        """What has become of that, once it is copied: ``WRITING``, ``WRITTEN``, or
        ``UNWRITTEN`` and why."""
        names = self._published.get(held, ())
        if any(map(self._writer.is_under_way, names)):
            return WRITING, None
        problem = next(filter(None, map(self._writer.refusal, names)), None)
        if problem is not None:
            return UNWRITTEN, problem.reason
        if names and all(name in self._known for name in names):
            return WRITTEN, None
        return UNWRITTEN, DROPPED

    def clear(self) -> None:
        """Everything was flushed. The store has what it had."""
        self._published.clear()
