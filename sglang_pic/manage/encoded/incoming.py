"""Documents on their way from the store (``manage.coming``), into memory of their own."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from sglang_pic.forest.consensus import Group
from sglang_pic.forest.encoded import Encoded
from sglang_pic.forest.keys import document_id
from sglang_pic.manage.coming import SLACK, Coming
from sglang_pic.store.document import DocumentCodec, SavedDocument
from sglang_pic.store.reading import Reader, Want


class _Room:
    """Memory that a document is filled into; held in no budget before it is full."""

    def __init__(self, encoded: Encoded, saved: SavedDocument):
        self._encoded = encoded
        self._saved = saved
        self._kv = encoded.beside.room(len(saved.ids))
        # Numbers of keys, and of values.
        self._filled = 0

    @property
    def is_full(self) -> bool:
        return self._filled == self._kv.k.numel()

    def fill(self, most: int) -> int:
        each = sum(one.element_size() for one in self._kv)
        first = self._filled
        self._filled = min(self._kv.k.numel(), first + max(1, most // each))
        tensors = self._saved.tensors
        for target, source in zip(self._kv, (tensors["k"], tensors["v"]), strict=True):
            part = source.view(-1)[first : self._filled]
            target.view(-1)[first : self._filled].copy_(part, non_blocking=True)
        return (self._filled - first) * each

    def keep(self, *, named: bool) -> bool:
        saved = self._saved
        return self._encoded.adopt(
            saved.salt or None, saved.ids, self._kv, uses=saved.hits, named=named, evict=True
        )

    def give_back(self) -> None:
        pass


class Incoming:
    """Documents of one scheduler on their way from the store.

    Args:
        come: told the name of a value that has come.
    """

    def __init__(
        self,
        encoded: Encoded,
        codec: DocumentCodec,
        reader: Reader[SavedDocument],
        ranks: Group,
        come: Callable[[str], None],
    ):
        self._encoded = encoded
        self._codec = codec
        self._coming = Coming(reader, ranks, encoded.holds, self._place, come)

    @property
    def count(self) -> int:
        """Documents that are on their way."""
        return len(self._coming)

    def most(self, tokens: int) -> int:
        """Bytes that the value of a document of so many tokens has at most."""
        return tokens * (self._encoded.beside.bytes_per_token + array("q").itemsize) + SLACK

    def begin(self, tenant: str | None, documents: Sequence[array], *, named: bool) -> None:
        """Read these ahead of their prompt."""
        salt, wants = tenant or "", []
        for ids in documents:
            name = document_id(tenant, ids)
            if self._encoded.find(name, tenant) is None:
                want = Want(self._codec.name(salt, ids), salt, ids, self.most(len(ids)))
                wants.append((name, want))
        self._coming.begin(wants, named=named)

    def _place(self, saved: SavedDocument) -> _Room | None:
        if not self._encoded.may_have(saved.nbytes):
            return None
        return _Room(self._encoded, saved)

    def look(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """As ``Coming.look``."""
        return self._coming.look(names)

    def drop(self, name: str) -> None:
        """Nobody waits for it any more: nothing of it is kept."""
        self._coming.drop(name)

    def drop_all(self) -> None:
        """``drop`` every one."""
        self._coming.drop_all()

    def clear(self) -> None:
        """Everything was flushed."""
        self._coming.clear()
