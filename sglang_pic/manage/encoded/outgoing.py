"""Documents that are worth keeping are copied to the host piece by piece, and written behind.

As segments are (``manage.outgoing``): a copy goes on between forward passes while its
document is held, and is given up where that goes first.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import OrderedDict
from typing import Any

from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.forest.documents import Document
from sglang_pic.forest.encoded import Encoded
from sglang_pic.manage.known import Known
from sglang_pic.manage.outgoing import MOST_PENDING, STEP_BYTES, HostCopies
from sglang_pic.request.commands import WRITING
from sglang_pic.store.document import DocumentCodec, SavedDocument
from sglang_pic.store.writing import Writer


@dataclasses.dataclass
class _Copy:
    """One document's keys and values on their way to the host: ``done`` numbers of each."""

    document: Document
    host: EncoderKV
    done: int = 0

    @property
    def is_done(self) -> bool:
        return self.done == self.host.k.numel()


class Outgoing:
    """Documents of one scheduler on their way into the store.

    Args:
        known: what need not be written.
    """

    def __init__(
        self,
        encoded: Encoded,
        codec: DocumentCodec,
        writer: Writer,
        known: Known,
        copies: HostCopies,
    ):
        self._encoded = encoded
        self._codec = codec
        self._writer = writer
        self._known = known
        self._copies = copies
        # In the order in which they are copied. What has gone must not stay in memory for it.
        self._pending: OrderedDict[str, weakref.ref[Document]] = OrderedDict()
        self._copy: _Copy | None = None
        self._offered: weakref.WeakSet[Document] = weakref.WeakSet()

    @property
    def pending(self) -> int:
        """Documents that are not copied yet."""
        return len(self._pending) + (self._copy is not None)

    def name_of(self, document: Document) -> str:
        """Of its value."""
        return self._codec.name(document.tenant, document.ids)

    def offer(self, document: Document) -> None:
        """A held one is worth keeping."""
        # Asked at every use: its name would be a hash of its tokens.
        if document not in self._offered and len(self._pending) < MOST_PENDING:
            self._offered.add(document)
            self._pending[document.name] = weakref.ref(document)

    def publish(self, document: Document) -> None:
        """Have a held one written whatever it is worth."""
        self._known.publish(document.name, [self.name_of(document)])
        if not self._is_copied(document) and len(self._pending) < MOST_PENDING:
            self._pending[document.name] = weakref.ref(document)

    def published(self, document: Document) -> tuple[str, str | None]:
        """As ``Known.published``, of one that may still have to be copied."""
        if document.name in self._pending or self._is_copied(document):
            return WRITING, None
        return self._known.published(document.name)

    def _is_copied(self, document: Document) -> bool:
        return self._copy is not None and self._copy.document is document

    def step(self, most: int = STEP_BYTES) -> None:
        """Copy a piece of what waits."""
        while most > 0:
            # Taken out: what fails is not tried again.
            copy, self._copy = self._copy or self._begun(), None
            if copy is None:
                return
            if not self._encoded.is_held(copy.document):
                continue
            most -= self._advance(copy, most)
            if copy.is_done:
                self._finish(copy)
            else:
                self._copy = copy

    def _begun(self) -> _Copy | None:
        """A copy of what waits longest and has to be written, if there is room for it."""
        while self._pending:
            name, waits = next(iter(self._pending.items()))
            document = waits()
            if document is None or self.name_of(document) in self._known:
                del self._pending[name]
                continue
            if not self._writer.has_room(document.nbytes):
                return None
            del self._pending[name]
            empty = self._copies.empty
            return _Copy(document, EncoderKV(*(empty(one, len(one)) for one in document.kv)))
        return None

    def _advance(self, copy: _Copy, most: int) -> int:
        """Copy some of it; the bytes of that."""
        each = sum(one.element_size() for one in copy.host)
        first = copy.done
        copy.done = min(copy.host.k.numel(), first + max(1, most // each))
        for target, source in zip(copy.host, copy.document.kv, strict=True):
            part = source.view(-1)[first : copy.done]
            self._copies.send(target.view(-1)[first : copy.done], part)
        return (copy.done - first) * each

    def _finish(self, copy: _Copy) -> None:
        document, name = copy.document, self.name_of(copy.document)
        tensors = {"k": copy.host.k, "v": copy.host.v}
        saved = SavedDocument(document.ids, document.tenant, document.uses, tensors)

        def encode() -> Any:
            self._copies.wait()
            return self._codec.encode(name, saved)

        if self._writer.write(name, encode, saved.nbytes):
            self._known.add(name)

    def clear(self) -> None:
        """Everything was flushed: what is half copied is given up."""
        self._pending.clear()
        self._copy = None
