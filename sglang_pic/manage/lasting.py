"""Pins that outlive a server: a list of them, as a value of its own in the store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from sglang_pic.forest.consensus import Group
from sglang_pic.manage.loading import ANSWER_S, Wanted, everywhere, within
from sglang_pic.store.base import Problem, SegmentStore
from sglang_pic.store.value import BadValue, Codec
from sglang_pic.store.writing import Writer

logger = logging.getLogger(__name__)

MAX_BYTES = 16 << 20

Entry = tuple[str, int, str]
"""A value of what is pinned: namespace, length of the path, name."""


class LastingPins:
    """Those of one server and one kind.

    Args:
        codec: that seals the list now.
        server: tells this server's from those of others.
    """

    def __init__(
        self, store: SegmentStore, writer: Writer, codec: Callable[[], Codec], server: str
    ):
        self._store = store
        self._writer = writer
        self._codec = codec
        self._server = server
        self._entries: dict[str, list[Entry]] = {}

    def set(self, pinned: str, entries: Sequence[Entry]) -> None:
        """What is pinned, by its name, is read again from these at the next start; from
        none, if it is pinned no more, or not for good."""
        was = self._entries.pop(pinned, [])
        if entries:
            self._entries[pinned] = list(entries)
        if was != self._entries.get(pinned, []):
            self._write()

    def clear(self) -> None:
        """Everything was flushed."""
        if self._entries:
            self._entries.clear()
            self._write()

    def _write(self) -> None:
        content = [list(entry) for entries in self._entries.values() for entry in entries]
        codec = self._codec()
        name = codec.own_name(f"pins {self._server}")
        self._writer.write(name, lambda: codec.encode_own(name, content), 0, replace=True)

    def wanted(self, ranks: Group) -> list[Wanted]:
        """What was pinned for good when this server ran last, alike on all ranks."""
        own = {everywhere(name): Wanted(name, salt, n) for salt, n, name in self._read()}
        parts = sorted({part for names in ranks.gather(sorted(own)) for part in names})
        return [own.get(part, Wanted(None, "")) for part in parts]

    def _read(self) -> list[Entry]:
        codec = self._codec()
        name = codec.own_name(f"pins {self._server}")
        value = within(ANSWER_S, lambda: self._store.get(name, MAX_BYTES))
        if isinstance(value, Problem):
            return []
        try:
            content = codec.decode_own(value, name)
            return [(str(salt), int(tokens), str(one)) for salt, tokens, one in content]
        except (BadValue, ValueError, TypeError) as error:
            logger.warning("sglang_pic: the list of pins is refused: %s", error)
            return []
