"""Commands to the cache, carried out by the scheduler between two steps.

They come through the request queue (``sglang_hooks.answer_at_once``), so that
every tensor-parallel rank carries out the same ones at the same point of the
request stream. ``server.commands`` sends them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson

from sglang_pic import timer
from sglang_pic.errors import PicRefused
from sglang_pic.faults import faults
from sglang_pic.forest.documents import Document, Wanted
from sglang_pic.forest.forest import Forest
from sglang_pic.manage import documents, segments
from sglang_pic.manage.selfcheck import selfcheck
from sglang_pic.manage.store import Store
from sglang_pic.request import commands as asked


def obey(scheduler: Any, req: Any, command: asked.Command) -> str:
    """Carry out one command.

    Args:
        scheduler: SGLang's scheduler, on our tree cache.
        req: the internal request that brought it; its prompt and link are what
            ``explain`` is about.
        command: what to do.

    Returns:
        The result as JSON; ``{"refused": {"status", "message", "field"}}`` where
        the cache refuses or fails.
    """
    try:
        result = COMMANDS[type(command)](scheduler, req, command)
        return orjson.dumps(result).decode()
    except PicRefused as error:
        refused = error
    except Exception as error:
        # An operator's command must not end the server.
        faults.note(f"command {type(command).__name__}", [req.rid])
        refused = PicRefused(500, f"command failed: {error}", "do")
    return orjson.dumps({"refused": refused.to_json()}).decode()


def _timer(scheduler: Any, req: Any, command: asked.Timer) -> Any:
    if command.on is True:
        timer.engine.start(scheduler.tp_worker.model_runner.model)
    elif command.on is False:
        timer.engine.stop()
    return timer.engine.to_json()


def _forest(scheduler: Any) -> Forest:
    forest: Forest = scheduler.tree_cache.forest
    return forest


# Segments that one command begins to read.
MAX_FETCH = 256

Handler = Callable[[Any, Any, Any], Any]


def _of_one(
    of_segment: Callable[[Forest, str, str | None], Any],
    of_document: Callable[[Forest, Document], Any],
) -> Handler:
    """By an id: of a document, or else of a segment."""

    def handle(scheduler: Any, req: Any, command: Any) -> Any:
        forest, tenant = _forest(scheduler), tenant_of(req)
        document = forest.encoded.find(command.id, tenant)
        if document is not None:
            return of_document(forest, document)
        return of_segment(forest, command.id, tenant)

    return handle


def _pin(scheduler: Any, req: Any, command: asked.Pin) -> Any:
    forest, tenant = _forest(scheduler), tenant_of(req)
    document = forest.encoded.find(command.id, tenant)
    if document is not None:
        return documents.pin(forest, document, tenant, lasting=command.lasting)
    return segments.pin(forest, command.id, tenant, lasting=command.lasting)


def _held(scheduler: Any, req: Any, command: asked.Held) -> Any:
    forest, tenant, names = _forest(scheduler), tenant_of(req), command.segments
    return {
        "held": _either(segments.held(forest, names, tenant), documents.held(forest, names, tenant))
    }


def _name(scheduler: Any, req: Any, command: asked.Name) -> Any:
    forest, tenant, names = _forest(scheduler), tenant_of(req), command.segments
    return {
        "held": _either(
            segments.name(forest, names, tenant, command.seam),
            documents.name(forest, names, tenant),
        )
    }


def _either(of_segments: Sequence[bool], of_documents: Sequence[bool]) -> list[bool]:
    """No name is both."""
    return [one or other for one, other in zip(of_segments, of_documents, strict=True)]


def _store(scheduler: Any) -> Store:
    store = _forest(scheduler).store
    if not isinstance(store, Store):
        raise PicRefused(409, "the server was started without --pic-store", "store")
    return store


def _fetch(scheduler: Any, req: Any, command: asked.Fetch) -> Any:
    context = len(_forest(scheduler).segments.context)
    paths = _cut(req.origin_input_ids, command.lengths, context + 1)
    salt = _forest(scheduler).segments.namespace(tenant_of(req))
    _store(scheduler).begin(salt, paths, seam=command.seam, named=command.named)
    return {}


def _fetch_documents(scheduler: Any, req: Any, command: asked.FetchDocuments) -> Any:
    found = _cut(req.origin_input_ids, command.lengths, 1)
    _store(scheduler).documents.begin(tenant_of(req), found, named=command.named)
    return {}


def _cut(ids: Any, lengths: Sequence[int], least: int) -> list[Any]:
    """The token ids of each, of which a command's prompt is made.

    Raises:
        PicRefused: 400, they are not of so many tokens, one of fewer than ``least``, or too
            many.
    """
    if len(lengths) > MAX_FETCH or min(lengths, default=0) < least or sum(lengths) != len(ids):
        raise PicRefused(400, f"no paths of {len(ids)} tokens: {lengths!r:.80}", "lengths")
    paths, at = [], 0
    for length in lengths:
        paths.append(ids[at : at + length])
        at += length
    return paths


def check_trusted(forest: Forest) -> None:
    """Raise ``PicRefused`` (503) where the forest is trusted no more: nothing can stand for
    documents that ranks may hold differently."""
    if forest.refusal is not None:
        raise PicRefused(503, forest.refusal, "pic.mode")


def _encode(scheduler: Any, req: Any, command: asked.Encode) -> Any:
    check_trusted(_forest(scheduler))
    ids, at, wanted = req.origin_input_ids, 0, []
    lengths = [length for lease in command.leases for length in lease.lengths]
    if min(lengths, default=1) < 1 or sum(lengths) != len(ids) * bool(lengths):
        raise PicRefused(400, f"no documents of {len(ids)} tokens: {lengths!r:.80}", "lengths")
    for lease in command.leases:
        fresh = []
        for length in lease.lengths:
            fresh.append(ids[at : at + length])
            at += length
        wanted.append(Wanted(lease.id, lease.tenant or None, lease.held, fresh, named=lease.named))
    # Its sums over ranks must not run beside those of a pass that is under way.
    scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
    return {"kept": _forest(scheduler).encoded.encode(wanted, command.now)}


def _fetched(scheduler: Any, command: asked.Fetched) -> Any:
    store = _store(scheduler)
    incoming = store.documents if command.documents else store.incoming
    if command.drop:
        for name in command.segments:
            incoming.drop(name)
        return {"segments": []}
    return {"segments": incoming.look(command.segments)}


def tenant_of(req: Any) -> str | None:
    """SGLang gives a batched request without a salt the empty one."""
    return req.cache_salt or None


COMMANDS: dict[type, Handler] = {
    asked.Timer: _timer,
    asked.Forest: lambda scheduler, req, command: _forest(scheduler).state(),
    asked.Stats: lambda scheduler, req, command: segments.stats(_forest(scheduler)),
    asked.Budgets: lambda scheduler, req, command: segments.budgets(_forest(scheduler)),
    asked.Explain: lambda scheduler, req, command: _forest(scheduler).arrivals.explain(req),
    asked.Missing: lambda scheduler, req, command: {
        "missing": _forest(scheduler).arrivals.send_back(req)
    },
    # An adapter's part of it is SGLang's to make.
    asked.Key: lambda scheduler, req, command: {"extra_key": req.extra_key},
    asked.List: lambda scheduler, req, command: {
        "segments": segments.list_all(_forest(scheduler), tenant_of(req)),
        "documents": documents.list_all(_forest(scheduler), tenant_of(req)),
    },
    asked.Get: _of_one(segments.get, documents.card),
    asked.Pin: _pin,
    asked.Unpin: _of_one(segments.unpin, documents.unpin),
    asked.Delete: _of_one(segments.delete, documents.delete),
    asked.Flush: lambda scheduler, req, command: segments.flush(_forest(scheduler), tenant_of(req)),
    asked.Reserve: lambda scheduler, req, command: segments.reserve(
        _forest(scheduler), command.tokens
    ),
    asked.Save: lambda scheduler, req, command: _store(scheduler).save(
        tenant_of(req), command.segments
    ),
    asked.Restore: lambda scheduler, req, command: _store(scheduler).restore(tenant_of(req)),
    asked.Fetch: lambda scheduler, req, command: _fetch(scheduler, req, command),
    asked.FetchDocuments: _fetch_documents,
    asked.Fetched: lambda scheduler, req, command: _fetched(scheduler, command),
    asked.Encode: lambda scheduler, req, command: _encode(scheduler, req, command),
    asked.Publish: lambda scheduler, req, command: {
        "segments": _store(scheduler).publish(command.segments, tenant_of(req), begin=command.begin)
    },
    asked.Held: _held,
    asked.Companies: lambda scheduler, req, command: {
        "held": [_forest(scheduler).companies.is_whole(one) for one in command.companies]
    },
    asked.Name: _name,
    asked.Foretell: lambda scheduler, req, command: documents.foretell(
        _forest(scheduler), req, command.documents
    ),
    asked.Selfcheck: lambda scheduler, req, command: selfcheck(
        scheduler, req, at=command.at, seam=command.seam
    ),
}
