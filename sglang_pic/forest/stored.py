"""What a scheduler does for the store beside its own work (``manage.store``), or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sglang_pic.forest.documents import Document


class StoredDocuments(Protocol):
    """The same of encoded documents."""

    def pinned(self, document: Document, *, lasting: bool) -> None:
        """As ``Stored.pinned``."""
        ...

    def deleted(self, document: Document) -> None:
        """As ``Stored.deleted``."""
        ...


class NotStoredDocuments:
    """There is no store."""

    def pinned(self, document: Document, *, lasting: bool) -> None:
        pass

    def deleted(self, document: Document) -> None:
        pass


class Stored(Protocol):
    """The store of one scheduler."""

    @property
    def documents(self) -> StoredDocuments: ...

    def step(self) -> None:
        """Go on with what is copied for it: between two forward passes, a bounded piece."""
        ...

    def pinned(self, segment: str, *, lasting: bool) -> None:
        """A segment was pinned, or its pin has ended: pins that are ``lasting`` outlive
        this server."""
        ...

    def deleted(self, segment: str) -> None:
        """A held segment will be forgotten by request of its tenant."""
        ...

    def clear(self) -> None:
        """Everything was flushed."""
        ...

    def stats(self) -> dict[str, Any]:
        """For the operator."""
        ...


class NotStored:
    """There is no store."""

    documents = NotStoredDocuments()

    def step(self) -> None:
        pass

    def pinned(self, segment: str, *, lasting: bool) -> None:
        pass

    def deleted(self, segment: str) -> None:
        pass

    def clear(self) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        return {
            "waiting_bytes": 0,
            "reading_bytes": 0,
            "written": 0,
            "written_bytes": 0,
            "present": 0,
            "dropped": 0,
            "failed": {},
        }
