"""The store of one scheduler, as far as it has documents (``manage.store`` has segments).

A value is of one encoder beside one model, of one tenant, and of one tensor-parallel rank,
which holds its own heads of a document; a document is loaded by all ranks or by none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sglang_pic.errors import PicRefused
from sglang_pic.forest.consensus import Group
from sglang_pic.forest.documents import Document
from sglang_pic.forest.encoded import DOCUMENT, Encoded
from sglang_pic.forest.forest import Forest
from sglang_pic.forest.keys import document_id
from sglang_pic.manage.coming import Coming
from sglang_pic.manage.documents import pin
from sglang_pic.manage.encoded.outgoing import Outgoing
from sglang_pic.manage.encoded.places import Places
from sglang_pic.manage.known import Known
from sglang_pic.manage.lasting import LastingPins
from sglang_pic.manage.loading import (
    ANSWER_S,
    NO_ROOM,
    Loaded,
    Wanted,
    listed,
    load_all,
    read,
    within,
)
from sglang_pic.manage.outgoing import HostCopies
from sglang_pic.store.base import Problem, SegmentStore
from sglang_pic.store.document import DocumentCodec, SavedDocument
from sglang_pic.store.reading import Reader
from sglang_pic.store.value import OTHER_SHAPE, BadValue, Codec, fingerprint
from sglang_pic.store.writing import Writer

NO_DOCUMENTS = "the server was started without --pic-encoder"
# Of a segment's fingerprint, what a document depends on too.
_SHARED = ("sglang_pic", "weights", "architecture", "rank")


class DocumentStore(Protocol):
    """Documents of one scheduler and its store."""

    @property
    def reading(self) -> int:
        """Bytes of what is being read."""
        ...

    def join(self, marks: Mapping[str, str]) -> None:
        """Take up the weights that are loaded now.

        Args:
            marks: fingerprint of a segment.
        """
        ...

    def step(self) -> None:
        """Go on with what is copied for the store: a bounded piece."""
        ...

    def published(self, name: str, tenant: str | None, *, begin: bool) -> tuple[str, Any] | None:
        """What has become of a document that is to be written, from now on if it is to
        ``begin``; ``None`` if no such is held."""
        ...

    def pinned(self, document: Document, *, lasting: bool) -> None:
        """A document was pinned, or its pin has ended: pins that are ``lasting`` outlive
        this server."""
        ...

    def deleted(self, document: Document) -> None:
        """One is forgotten by request of its tenant."""
        ...

    def begin(self, tenant: str | None, documents: Sequence[Any], *, named: bool) -> None:
        """Read a tenant's documents, token ids each, ahead of their prompt.

        Raises:
            PicRefused: 409, there is no encoder.
        """
        ...

    def look(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """As ``Coming.look``; raises as ``begin``."""
        ...

    def drop(self, name: str) -> None:
        """Nobody waits for it any more."""
        ...

    def save(self, document: Document) -> int | Problem:
        """Write one now; bytes written."""
        ...

    def restore(self, tenant: str | None) -> Loaded:
        """Load what a tenant has in the store, as far as it fits.

        Raises:
            PicRefused: 409 of a store that lists nothing.
        """
        ...

    def start(self) -> Loaded:
        """Load what was pinned for good when this server ran last."""
        ...

    def drop_all(self) -> None:
        """Nobody waits for anything any more."""
        ...

    def clear(self) -> None:
        """Everything was flushed."""
        ...


class NoDocuments:
    """Of a server without an encoder."""

    reading = 0

    def join(self, marks: Mapping[str, str]) -> None:
        pass

    def step(self) -> None:
        pass

    def published(self, name: str, tenant: str | None, *, begin: bool) -> None:
        return None

    def pinned(self, document: Document, *, lasting: bool) -> None:
        pass

    def deleted(self, document: Document) -> None:
        pass

    def begin(self, tenant: str | None, documents: Sequence[Any], *, named: bool) -> None:
        raise PicRefused(409, NO_DOCUMENTS, "documents")

    def look(self, names: Sequence[str]) -> list[dict[str, Any]]:
        raise PicRefused(409, NO_DOCUMENTS, "documents")

    def drop(self, name: str) -> None:
        pass

    def save(self, document: Document) -> int:
        return 0

    def restore(self, tenant: str | None) -> Loaded:
        return Loaded()

    def start(self) -> Loaded:
        return Loaded()

    def drop_all(self) -> None:
        pass

    def clear(self) -> None:
        pass


class WithEncoder:
    """Of a server with one.

    Args:
        key: the operator's, for signatures, or ``None``.
        server: tells this server's pins from those of others.
        ranks: of tensor parallelism.
    """

    def __init__(
        self,
        forest: Forest,
        encoded: Encoded,
        store: SegmentStore,
        writer: Writer,
        *,
        key: bytes | None,
        server: str,
        ranks: Group,
    ):
        self._forest = forest
        self._encoded = encoded
        self._store = store
        self._writer = writer
        self._key = key
        self._ranks = ranks
        self._lasting = LastingPins(store, writer, lambda: self._values, server)

    def join(self, marks: Mapping[str, str]) -> None:
        beside = self._encoded.beside
        like = beside.room(0).k
        self._values = Codec(
            fingerprint(
                kind=DOCUMENT,
                encoder=beside.digest,
                dtype=like.dtype,
                layers_heads_and_dimension=(like.shape[0], *like.shape[2:]),
                **{name: marks[name] for name in _SHARED},
            ),
            self._key,
        )
        self._codec = DocumentCodec(self._values)
        self._reader = Reader(self._store, self._codec, self._check)
        copies = HostCopies(like.device)
        self._known = Known(self._writer)
        self._outgoing = Outgoing(self._encoded, self._codec, self._writer, self._known, copies)
        self._places = Places(self._encoded, self._codec)
        self._incoming = Coming(
            self._reader, self._ranks, self._encoded.holds, self._places.place, self._known.add
        )
        self._encoded.on_worth = self._outgoing.offer

    def _check(self, saved: SavedDocument) -> None:
        """Raise ``BadValue`` unless it fits this encoder; on any thread."""
        like = self._encoded.beside.room(len(saved.ids), device="meta")
        for name, one in zip(("k", "v"), like, strict=True):
            found = saved.tensors.get(name)
            if found is None or found.shape != one.shape or found.dtype != one.dtype:
                raise BadValue(OTHER_SHAPE, f"{name} is not what its tokens need")
        if len(saved.tensors) != 2:
            raise BadValue(OTHER_SHAPE, "it holds more than keys and values")
        if not 1 <= len(saved.ids) <= self._encoded.beside.config.max_tokens:
            raise BadValue(OTHER_SHAPE, f"a document of {len(saved.ids)} tokens")

    @property
    def reading(self) -> int:
        return self._reader.flying

    def step(self) -> None:
        self._outgoing.step()

    def published(self, name: str, tenant: str | None, *, begin: bool) -> tuple[str, Any] | None:
        document = self._encoded.find(name, tenant)
        if document is None:
            return None
        if begin:
            self._outgoing.publish(document)
        return self._outgoing.published(document)

    def pinned(self, document: Document, *, lasting: bool) -> None:
        if not lasting:
            self._lasting.set(document.name, [])
            return
        self._outgoing.offer(document)
        name = self._outgoing.name_of(document)
        self._lasting.set(document.name, [(document.tenant, document.tokens, name)])

    def deleted(self, document: Document) -> None:
        self._known.remove(self._outgoing.name_of(document))

    def begin(self, tenant: str | None, documents: Sequence[Any], *, named: bool) -> None:
        self._incoming.begin(self._places.wants(tenant, documents), named=named)

    def look(self, names: Sequence[str]) -> list[dict[str, Any]]:
        return self._incoming.look(names)

    def drop(self, name: str) -> None:
        self._incoming.drop(name)

    def save(self, document: Document) -> int | Problem:
        name = self._outgoing.name_of(document)
        tensors = {"k": document.kv.k.cpu(), "v": document.kv.v.cpu()}
        saved = SavedDocument(document.ids, document.tenant, document.uses, tensors)
        value = self._codec.encode(name, saved)
        problem = within(ANSWER_S, lambda: self._store.put(name, value))
        if problem is not None:
            return problem
        self._known.add(name)
        return len(value)

    def restore(self, tenant: str | None) -> Loaded:
        salt = tenant or ""
        wanted = listed(self._store, self._ranks, self._codec.group(salt), salt)
        return load_all(self._ranks, wanted, self._get, self._adopt)

    def start(self) -> Loaded:
        def adopt(saved: SavedDocument) -> tuple[bool, str | None]:
            was_held, problem = self._adopt(saved)
            document = self._find(saved)
            if document is not None:
                try:
                    pin(self._forest, document, saved.salt or None, lasting=True)
                except PicRefused as error:
                    return was_held, error.message
            return was_held, problem

        return load_all(self._ranks, self._lasting.wanted(self._ranks), self._get, adopt)

    def _find(self, saved: SavedDocument) -> Document | None:
        tenant = saved.salt or None
        return self._encoded.find(document_id(tenant, saved.ids), tenant)

    def _get(self, wanted: Wanted) -> SavedDocument | str:
        return read(self._store, wanted, self._places.most, self._decoded)

    def _decoded(self, value: Any, name: str, salt: str) -> SavedDocument:
        saved = self._codec.decode(value, name, salt=salt)
        self._check(saved)
        return saved

    def _adopt(self, saved: SavedDocument) -> tuple[bool, str | None]:
        """Take a value over that all ranks have; evicts nothing."""
        if self._find(saved) is not None:
            return True, None
        kv = self._encoded.beside.room(len(saved.ids))
        kv.k.copy_(saved.tensors["k"])
        kv.v.copy_(saved.tensors["v"])
        where = (saved.salt or None, saved.ids, kv)
        if not self._encoded.adopt(*where, uses=saved.hits, named=True, evict=False):
            return False, NO_ROOM
        self._known.add(self._codec.name(saved.salt, saved.ids))
        return False, None

    def drop_all(self) -> None:
        self._incoming.drop_all()

    def clear(self) -> None:
        self._incoming.clear()
        self._outgoing.clear()
        self._known.clear()
        self._lasting.clear()


def document_store(
    forest: Forest,
    store: SegmentStore,
    writer: Writer,
    *,
    key: bytes | None,
    server: str,
    ranks: Group,
) -> DocumentStore:
    """Of one scheduler; see ``WithEncoder``."""
    if not isinstance(forest.encoded, Encoded):
        return NoDocuments()
    return WithEncoder(forest, forest.encoded, store, writer, key=key, server=server, ranks=ranks)
