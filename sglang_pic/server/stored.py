"""What the store is asked for: segments, and encoded documents; by which names and commands."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

from sglang_pic.forest.keys import document_id, segment_id
from sglang_pic.server.items import CompileItem, DocumentItem
from sglang_pic.server.sources import ADAPTER, NO_SEGMENT

Item = TypeVar("Item")
Asked = TypeVar("Asked", contravariant=True)


class Kind(Protocol[Asked]):
    """Items of one kind."""

    def refusal(self, item: Asked) -> str | None:
        """Why one cannot be in the store, or nobody knows for which rank it would be."""
        ...

    def name(self, item: Asked) -> str:
        """Under which one is held."""
        ...

    def tokens(self, item: Asked) -> Sequence[int]:
        """Of which its value is."""
        ...

    def alike(self, item: Asked) -> Hashable:
        """What items that go in one command have in common."""
        ...

    def where(self, item: Asked) -> dict[str, Any]:
        """Whose one is, and the rank it is wanted on, as commands have it."""
        ...

    def begin(self, item: Asked) -> dict[str, Any]:
        """The command that has such items read, but for their tokens."""
        ...

    def follow(self) -> dict[str, Any]:
        """The command that goes on with them, but for their names."""
        ...


class Segments:
    """Segments that are compiled alone.

    Args:
        tenant_of: the salt of a client, of a namespace.
        context: tokens of the compile context.
        ranks: of data parallelism.
    """

    def __init__(self, tenant_of: Callable[[str], str], context: int, ranks: int = 1):
        self._tenant_of = tenant_of
        self._context = context
        self._ranks = ranks

    def refusal(self, item: CompileItem) -> str | None:
        if not item.segment or item.company or len(item.seams) != 1:
            return NO_SEGMENT
        if item.rank is None and self._ranks > 1:
            return NO_SEGMENT
        return ADAPTER if item.extra_key or item.lora_path else None

    def name(self, item: CompileItem) -> str:
        return segment_id(item.salt or "", item.extra_key, item.ids[self._context :])

    def tokens(self, item: CompileItem) -> Sequence[int]:
        return item.ids

    def alike(self, item: CompileItem) -> Hashable:
        return item.salt, item.rank, item.seams, item.named

    def where(self, item: CompileItem) -> dict[str, Any]:
        return {"cache_salt": self._tenant_of(item.salt or "") or None, "rank": item.rank}

    def begin(self, item: CompileItem) -> dict[str, Any]:
        return {"do": "fetch", "seam": item.seams[0], "named": item.named}

    def follow(self) -> dict[str, Any]:
        return {"do": "fetched"}


class Documents:
    """Documents that the server's encoder has read."""

    def refusal(self, item: DocumentItem) -> str | None:
        return None

    def name(self, item: DocumentItem) -> str:
        return document_id(item.tenant, item.ids)

    def tokens(self, item: DocumentItem) -> Sequence[int]:
        return item.ids

    def alike(self, item: DocumentItem) -> Hashable:
        return item.tenant, item.named

    def where(self, item: DocumentItem) -> dict[str, Any]:
        return {"cache_salt": item.tenant}

    def begin(self, item: DocumentItem) -> dict[str, Any]:
        return {"do": "fetch_documents", "named": item.named}

    def follow(self) -> dict[str, Any]:
        return {"do": "fetched", "documents": True}
