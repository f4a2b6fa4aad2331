"""Documents from the store (``manage.coming``): which are read, and the memory that they go
into."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from sglang_pic.forest.encoded import Encoded
from sglang_pic.forest.keys import document_id
from sglang_pic.manage.coming import SLACK
from sglang_pic.store.document import DocumentCodec, SavedDocument
from sglang_pic.store.reading import Want


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


class Places:
    """What is read of one scheduler's documents, and where it goes."""

    def __init__(self, encoded: Encoded, codec: DocumentCodec):
        self._encoded = encoded
        self._codec = codec

    def most(self, tokens: int) -> int:
        """Bytes that the value of a document of so many tokens has at most."""
        return tokens * (self._encoded.beside.bytes_per_token + array("q").itemsize) + SLACK

    def wants(self, tenant: str | None, documents: Sequence[array]) -> list[tuple[str, Want]]:
        """What of these is not held, by the names of documents."""
        salt, wants = tenant or "", []
        for ids in documents:
            name = document_id(tenant, ids)
            if self._encoded.find(name, tenant) is None:
                want = Want(self._codec.name(salt, ids), salt, ids, self.most(len(ids)))
                wants.append((name, want))
        return wants

    def place(self, saved: SavedDocument) -> _Room | None:
        """Where a value goes; nowhere, if there is no room."""
        if not self._encoded.may_have(saved.nbytes):
            return None
        return _Room(self._encoded, saved)
