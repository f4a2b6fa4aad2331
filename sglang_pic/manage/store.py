"""The store of one scheduler: segments on their way there and back.

Which store is the operator's choice (``--pic-store``), never a client's. What is worth
keeping is written behind (``outgoing``), what a link lacks is read ahead of it
(``coming``), into ``places``; saving, restoring and the pins of a former run are here,
encoded documents in ``encoded.store``. Each tensor-parallel rank keeps its part under a name
of its own; a segment is loaded by all of them or by none.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from sglang_pic import __version__
from sglang_pic.errors import PicRefused
from sglang_pic.forest.consensus import ALONE, Group
from sglang_pic.forest.forest import Forest
from sglang_pic.forest.keys import segment_id
from sglang_pic.forest.segments import SegmentRecord
from sglang_pic.link.policy import floor_to
from sglang_pic.manage.coming import Coming
from sglang_pic.manage.encoded.store import document_store
from sglang_pic.manage.known import Known
from sglang_pic.manage.kv import KvPages
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
from sglang_pic.manage.outgoing import Outgoing, by_head
from sglang_pic.manage.places import Places
from sglang_pic.manage.segments import pin
from sglang_pic.request.commands import UNWRITTEN, WRITING, WRITTEN
from sglang_pic.store.base import Problem, SegmentStore
from sglang_pic.store.reading import Reader
from sglang_pic.store.value import (
    OTHER_SHAPE,
    BadValue,
    Codec,
    SavedSegment,
    digest_of_weights,
    fingerprint,
)
from sglang_pic.store.writing import Writer

# Of several ranks the one that is behind tells.
_BEHIND = (UNWRITTEN, WRITING, WRITTEN)


def _architecture(config: Any) -> str:
    """The model's configuration, wherever it lies."""
    fields = config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        fields.pop(name, None)
    return json.dumps(fields, sort_keys=True, default=str)


class Store:
    """Segments of one scheduler and a store.

    Args:
        forest: whose segments.
        runner: SGLang's model runner.
        store: the operator's.
        key: the operator's, for signatures, or ``None``.
        server: tells this server's pins from those of others.
        ranks: of tensor parallelism.

    Attributes:
        incoming: segments on their way from the store, by name.
        documents: the store of encoded documents.
    """

    def __init__(
        self,
        forest: Forest,
        runner: Any,
        store: SegmentStore,
        *,
        key: bytes | None = None,
        server: str = "",
        ranks: Group = ALONE,
    ):
        self._ranks = ranks
        self._forest = forest
        self._runner = runner
        self._store = store
        self._key = key
        self._layers = sorted(runner.attn_backend.ropes)
        self._kv = KvPages(runner.token_to_kv_pool, self._layers)
        self._writer = Writer(store)
        self._lasting = LastingPins(store, self._writer, lambda: self._codec, server)
        self.documents = document_store(
            forest, store, self._writer, key=key, server=server, ranks=ranks
        )
        self._join()

    def _join(self) -> None:
        """Take up the weights that are loaded now."""
        self._marks = self._fingerprint()
        self._codec = Codec(self._marks, self._key)
        self._reader = Reader(self._store, self._codec, self._check)
        self._known = Known(self._writer)
        self._outgoing = Outgoing(self._forest, self._kv, self._codec, self._writer, self._known)
        self._places = Places(self._forest, self._kv, self._codec)
        self.incoming = Coming(
            self._reader,
            self._ranks,
            self._forest.segments.is_held,
            self._places.place,
            self._known.add,
        )
        self._forest.holder.on_worth = self._outgoing.offer
        self.documents.join(self._marks)

    def _fingerprint(self) -> dict[str, str]:
        forest, (_, first) = self._forest, next(self._kv.buffers())
        return fingerprint(
            sglang_pic=__version__,
            weights=digest_of_weights(self._runner.model),
            architecture=_architecture(self._runner.model_config.hf_config),
            kv_dtype=first.dtype,
            kv_heads_and_dimension=tuple(first.shape[1:]),
            attention_layers=self._layers,
            page_size=forest.pages.page_size,
            compile_context=list(forest.segments.context),
            linear_layers=getattr(self._runner.attn_backend, "shape", None),
            state_dtype=forest.config.state_dtype,
            operator_threshold=forest.config.operator_threshold,
            rank=f"{self._ranks.rank} of {self._ranks.size}",
        )

    # -- beside the scheduler's work ------------------------------------------------------

    def step(self) -> None:
        self._outgoing.step()
        self.documents.step()

    def begin(self, salt: str, paths: Sequence[array], *, seam: int, named: bool) -> None:
        """Read segments, compile context first, ahead of their link, by this seam width."""
        self.incoming.begin(self._places.wants(salt, paths, seam), named=named)

    def publish(
        self, segments: Sequence[str], tenant: str | None, *, begin: bool
    ) -> list[dict[str, Any]]:
        """What has become of segments of a tenant, or documents, that are to be written now,
        alike on all ranks; not those of an adapter.

        Args:
            begin: they are to be written from now on.

        Returns:
            ``{"state": WRITING | WRITTEN | UNWRITTEN, "reason"}`` each.
        """
        told = self._ranks.gather([self._publish(one, tenant, begin=begin) for one in segments])
        found = []
        for states in zip(*told, strict=True):
            state, reason = min(states, key=lambda one: _BEHIND.index(one[0]))
            found.append({"state": state, "reason": reason})
        return found

    def _publish(self, segment: str, tenant: str | None, *, begin: bool) -> tuple[str, str | None]:
        document = self.documents.published(segment, tenant, begin=begin)
        if document is not None:
            return document
        record, space = self._forest.segments.find_held(segment), self._space(tenant)
        if record is None or record.node is None or record.salt != space:
            return UNWRITTEN, "not_held"
        if record.extra_key:
            return UNWRITTEN, "adapter"
        if begin:
            self._outgoing.publish(record)
        return self._outgoing.published(segment)

    def _space(self, tenant: str | None) -> str:
        return self._forest.segments.namespace(tenant)

    def deleted(self, segment: str) -> None:
        record = self._forest.segments.find_held(segment)
        for name in self._outgoing.names(record) if record is not None else ():
            self._known.remove(name)

    def pinned(self, segment: str, *, lasting: bool) -> None:
        record = self._forest.segments.find_held(segment) if lasting else None
        if record is None or record.extra_key:
            self._lasting.set(segment, [])
            return
        self._outgoing.offer(record)
        tokens, names = len(record.path), self._outgoing.names(record)
        self._lasting.set(segment, [(record.salt, tokens, name) for name in names])

    def clear(self) -> None:
        self.incoming.clear()
        self._outgoing.clear()
        self._known.clear()
        self._lasting.clear()
        self.documents.clear()
        # Whoever loads other weights flushes then.
        self._look()

    def _look(self) -> None:
        """See whether other weights are loaded now."""
        if self._fingerprint() != self._marks:
            self.incoming.drop_all()
            self.documents.drop_all()
            self._join()

    def stats(self) -> dict[str, Any]:
        counts = self._writer.counts
        return {
            "waiting_bytes": self._writer.flying,
            "reading_bytes": self._reader.flying + self.documents.reading,
            "written": counts.values,
            "written_bytes": counts.nbytes,
            "present": counts.present,
            "dropped": counts.dropped,
            "failed": dict(counts.failed),
        }

    # -- by an operator's command, while the scheduler waits ------------------------------

    def save(self, tenant: str | None, chosen: Collection[str] | None) -> dict[str, Any]:
        """Write segments and documents of a tenant, all or those chosen by id; not those of
        an adapter, whose weights the fingerprint does not know.

        Raises:
            PicRefused: 404 for an id that is not held; 507 where the store refuses.
        """
        forest = self._forest
        records, documents = forest.segments.records(tenant), forest.encoded.of_tenant(tenant)
        if chosen is not None:
            names = dict.fromkeys(chosen)
            if not names.keys() <= {*(r.id for r in records), *(d.name for d in documents)}:
                raise PicRefused(404, "no such segment", "ids")
            records = [record for record in records if record.id in names]
            documents = [document for document in documents if document.name in names]
        records = [record for record in records if not record.extra_key]
        self._look()
        writes = [
            *(functools.partial(self._write, record) for record in records),
            *(functools.partial(self.documents.save, document) for document in documents),
        ]
        written, failed = 0, None
        for write in writes:
            saved = write()
            if isinstance(saved, Problem):
                failed = f"cannot write to the store: {saved}"
                break
            written += saved
        told = self._ranks.gather((failed, written))
        problems = [problem for problem, _ in told if problem is not None]
        if problems:
            raise PicRefused(507, problems[0], "ids")
        return {
            "segments": len(records),
            "documents": len(documents),
            "bytes": sum(size for _, size in told),
        }

    def _write(self, record: SegmentRecord) -> int | Problem:
        """Write one segment now; bytes written."""
        forest, written = self._forest, 0
        slots = forest.holder.slots(record)
        tensors = {name: buffer[slots].cpu() for name, buffer in self._kv.buffers()}
        core_end = forest.carried.core_end(record.id, record.owner)
        for head, of_head in by_head(forest.carried.tensors(record.id)):
            on_host = {name: one.detach().cpu() for name, one in of_head.items()}
            saved = SavedSegment(
                record.path,
                record.extra_key,
                record.salt,
                record.hits,
                {**tensors, **on_host},
                core_end,
                head,
            )
            name = self._codec.name(record.salt, record.path, head)
            value = self._codec.encode(name, saved)
            problem = within(ANSWER_S, lambda name=name, value=value: self._put(name, value))  # type: ignore[misc]
            if problem is not None:
                return problem
            self._known.add(name)
            written += len(value)
        return written

    def _put(self, name: str, value: np.ndarray) -> Problem | None:
        return self._store.put(name, value)

    def restore(self, tenant: str | None) -> dict[str, Any]:
        """Load what a tenant has in the store, as far as it fits.

        Returns:
            ``{"segments": loaded, "documents": loaded, "present": held already, "refused":
            [{"file", "reason"}]}``; nothing of a refused value is loaded.

        Raises:
            PicRefused: 409 of a store that lists nothing.
        """
        self._look()
        space = self._space(tenant)
        wanted = listed(self._store, self._ranks, self._codec.group(space), space)
        segments = load_all(self._ranks, wanted, self._get, self._adopt)
        return _told(segments, self.documents.restore(tenant))

    def start(self) -> dict[str, Any]:
        """Load what was pinned for good when this server ran last; nothing else is loaded
        before it is asked for.

        Returns:
            As ``restore``.
        """
        wanted = self._lasting.wanted(self._ranks)
        segments = load_all(self._ranks, wanted, self._get, self._adopt_pinned)
        return _told(segments, self.documents.start())

    def _get(self, wanted: Wanted) -> SavedSegment | str:
        """A value, or why it cannot be used."""
        return read(self._store, wanted, self._places.most, self._decoded)

    def _decoded(self, value: Any, name: str, salt: str) -> SavedSegment:
        saved = self._codec.decode(value, name, salt=salt)
        self._check(saved)
        return saved

    def _check(self, saved: SavedSegment) -> None:
        """Raise ``BadValue`` unless it fits this model; on any thread."""
        context = self._forest.segments.context
        if saved.path[: len(context)] != context or len(saved.path) <= len(context):
            raise BadValue(OTHER_SHAPE, "it does not begin with the compile context")
        self._kv.check(saved, floor_to(len(saved.path), self._forest.pages.page_size))
        self._forest.carried.check_saved(saved, len(saved.path) - len(context))

    def _adopt(self, saved: SavedSegment) -> tuple[bool, str | None]:
        """Take a value over that all ranks have: whether it was held already, and why it
        cannot be; on all of them alike. Evicts nothing."""
        forest, name = self._forest, self._segment_of(saved)
        record = forest.segments.find_held(name)
        heads = {head for head, _ in by_head(forest.carried.tensors(name))}
        if record is not None and saved.heads in heads:
            return True, None
        slots = forest.holder.reserve(
            floor_to(len(saved.path), forest.pages.page_size), evict=False
        )
        if slots is None:
            return False, NO_ROOM
        self._kv.fill(saved, slots, 0, len(slots))
        self._known.add(self._codec.name(saved.salt, saved.path, saved.heads))
        if not forest.holder.adopt(saved, slots, named=True, evict=False):
            return False, NO_ROOM
        return False, None

    def _adopt_pinned(self, saved: SavedSegment) -> tuple[bool, str | None]:
        """``_adopt``, and pin it for good."""
        was_held, problem = self._adopt(saved)
        forest, name = self._forest, self._segment_of(saved)
        if problem is None and forest.segments.find_held(name) is not None:
            tenant = saved.salt.removeprefix(forest.segments.namespace(None))
            try:
                pin(forest, name, tenant)
            except PicRefused as error:
                return was_held, error.message
            self.pinned(name, lasting=True)
        return was_held, problem

    def _segment_of(self, saved: SavedSegment) -> str:
        context = len(self._forest.segments.context)
        return segment_id(saved.salt, saved.extra_key, saved.path[context:])


def _told(segments: Loaded, documents: Loaded) -> dict[str, Any]:
    return {
        "segments": segments.loaded,
        "documents": documents.loaded,
        "present": segments.present + documents.present,
        "refused": segments.refused + documents.refused,
    }
