"""What an operator may ask of one tenant's encoded documents, and do with them.

As of segments (``manage.segments``): an id of another tenant's is as unknown as one that
never was. Pins of both share a tenant's quota.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_pic.errors import PicRefused
from sglang_pic.forest.budget import Need
from sglang_pic.forest.documents import Document
from sglang_pic.forest.forest import Forest


def card(forest: Forest, document: Document) -> dict[str, Any]:
    """One document for the operator; ``last_use`` is a tick of a clock that advances with
    every request that sees documents."""
    return {
        "id": document.name,
        "tokens": document.tokens,
        "bytes": document.nbytes,
        "hits": document.uses,
        "last_use": document.last_use,
        "pinned": document.name in forest.pins,
        "in_use": forest.encoded.is_in_use(document),
    }


def list_all(forest: Forest, tenant: str | None) -> list[dict[str, Any]]:
    """Cards of all, the last used first."""
    return [card(forest, document) for document in forest.encoded.of_tenant(tenant)]


def held(forest: Forest, documents: Sequence[str], tenant: str | None) -> list[bool]:
    """Which of these are held."""
    return [forest.encoded.find(one, tenant) is not None for one in documents]


def name(forest: Forest, documents: Sequence[str], tenant: str | None) -> list[bool]:
    """Which of these are held, which count as asked for by name from now on."""
    found = [forest.encoded.find(one, tenant) for one in documents]
    for document in found:
        if document is not None:
            forest.encoded.name(document)
    return [document is not None for document in found]


def pin(
    forest: Forest, document: Document, tenant: str | None, *, lasting: bool = False
) -> dict[str, Any]:
    """Keep a document until it is unpinned; ``lasting`` as of ``manage.segments.pin``.

    Raises:
        PicRefused: 507 over a quota.
    """
    space, need = forest.segments.namespace(tenant), Need(0, document.nbytes)
    try:
        forest.pins.add(document.name, space, need, lambda: forest.encoded.lock(document))
    except PicRefused:
        forest.holder.refused["quota"] += 1
        raise
    forest.store.documents.pinned(document, lasting=lasting)
    return card(forest, document)


def unpin(forest: Forest, document: Document) -> dict[str, Any]:
    """Let a document go again when it is worth least."""
    forest.pins.remove(document.name)
    forest.store.documents.pinned(document, lasting=False)
    return card(forest, document)


def delete(forest: Forest, document: Document) -> dict[str, Any]:
    """Forget a document.

    Raises:
        PicRefused: 409 while it is pinned or in use.
    """
    if document.name in forest.pins:
        raise PicRefused(409, "the document is pinned", "id")
    if forest.encoded.is_in_use(document):
        raise PicRefused(409, "the document is in use", "id")
    forest.store.documents.deleted(document)
    forest.encoded.delete(document)
    return {"id": document.name, "freed_tokens": document.tokens}


def flush(forest: Forest, tenant: str | None) -> int:
    """Forget a tenant's that are neither pinned nor in use; how many."""
    gone = forest.encoded.flush(tenant)
    for document in gone:
        forest.store.documents.deleted(document)
    return len(gone)


def foretell(forest: Forest, req: Any, documents: Sequence[str]) -> dict[str, Any]:
    """What a prompt with these documents would find.

    Args:
        req: a request of its row; its key becomes that of the prompt.

    Returns:
        ``{"held", "cached"}``: which of its documents are held, and the tokens of its row
        that are cached behind them.

    Raises:
        PicRefused: 400, there is no encoder.
    """
    req.extra_key = forest.encoded.key_of(req.extra_key, documents)
    return {
        "held": held(forest, documents, req.cache_salt or None),
        "cached": forest.arrivals.cached(req),
    }
