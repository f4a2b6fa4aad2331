"""The store of one scheduler: segments on their way there and back.

Which store is the operator's choice (``--pic-store``), never a client's. What is worth
keeping is written behind (``outgoing``), what a link lacks is read ahead of it
(``incoming``); saving, restoring and the pins of a former run are here. Each
tensor-parallel rank keeps its part under a name of its own; a segment is loaded by all of
them or by none.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np

from sglang_pic import __version__
from sglang_pic.errors import PicRefused
from sglang_pic.forest.consensus import ALONE, Group
from sglang_pic.forest.forest import Forest
from sglang_pic.forest.keys import segment_id
from sglang_pic.forest.segments import SegmentRecord
from sglang_pic.link.policy import floor_to
from sglang_pic.manage.incoming import Incoming
from sglang_pic.manage.kv import KvPages
from sglang_pic.manage.outgoing import Outgoing, by_head
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

logger = logging.getLogger(__name__)

# How long an operator's command, or a start, waits for one answer of the store.
ANSWER_S = 60.0
# Of a value whose segment's length is not known; of the list of pins.
MAX_VALUE = 4 << 30
MAX_PINS_BYTES = 16 << 20
LATE = "store_late"
NO_ROOM = "it does not fit into what is free of the budgets"

# Of several ranks the one that is behind tells.
_BEHIND = (UNWRITTEN, WRITING, WRITTEN)

T = TypeVar("T")


def _architecture(config: Any) -> str:
    """The model's configuration, wherever it lies."""
    fields = config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        fields.pop(name, None)
    return json.dumps(fields, sort_keys=True, default=str)


def within(seconds: float, call: Callable[[], T]) -> T | Problem:
    """What ``call`` returns, which raises nothing, unless it takes longer."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else Problem(LATE, f"no answer in {seconds:g} s")


class Store:
    """Segments of one scheduler and a store.

    Args:
        forest: whose segments.
        runner: SGLang's model runner.
        store: the operator's.
        key: the operator's, for signatures, or ``None``.
        server: tells this server's pins from those of others.
        ranks: of tensor parallelism.
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
        self._server = server
        self._layers = sorted(runner.attn_backend.ropes)
        self._kv = KvPages(runner.token_to_kv_pool, self._layers)
        self._writer = Writer(store)
        self._lasting: dict[str, list[list[Any]]] = {}
        self._join()

    def _join(self) -> None:
        """Take up the weights that are loaded now."""
        self._marks = self._fingerprint()
        self._codec = Codec(self._marks, self._key)
        self._reader = Reader(self._store, self._codec, self._check)
        self._outgoing = Outgoing(self._forest, self._kv, self._codec, self._writer)
        self.incoming = Incoming(
            self._forest, self._kv, self._codec, self._reader, self._outgoing, self._ranks
        )
        self._forest.holder.on_worth = self._outgoing.offer

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

    def publish(
        self, segments: Sequence[str], tenant: str | None, *, begin: bool
    ) -> list[dict[str, Any]]:
        """What has become of segments of a tenant that are to be written now, alike on all
        ranks; not those of an adapter.

        Args:
            begin: they are to be written from now on.

        Returns:
            ``{"state": WRITING | WRITTEN | UNWRITTEN, "reason"}`` each.
        """
        own = self._forest.segments.namespace(tenant)
        told = self._ranks.gather([self._publish(one, own, begin=begin) for one in segments])
        found = []
        for states in zip(*told, strict=True):
            state, reason = min(states, key=lambda one: _BEHIND.index(one[0]))
            found.append({"state": state, "reason": reason})
        return found

    def _publish(self, segment: str, space: str, *, begin: bool) -> tuple[str, str | None]:
        record = self._forest.segments.find_held(segment)
        if record is None or record.node is None or record.salt != space:
            return UNWRITTEN, "not_held"
        if record.extra_key:
            return UNWRITTEN, "adapter"
        if begin:
            self._outgoing.publish(record)
        return self._outgoing.published(segment)

    def deleted(self, segment: str) -> None:
        record = self._forest.segments.find_held(segment)
        for name in self._outgoing.names(record) if record is not None else ():
            self._outgoing.forget(name)
            self._writer.remove(name)

    def pinned(self, segment: str, *, lasting: bool) -> None:
        was = self._lasting.pop(segment, None)
        if lasting:
            self._keep_pin(segment)
        if was != self._lasting.get(segment):
            self._list_pins()

    def _list_pins(self) -> None:
        """Write which pins outlive this server."""
        content = [entry for entries in self._lasting.values() for entry in entries]
        name = self._codec.own_name(f"pins {self._server}")
        codec = self._codec
        self._writer.write(name, lambda: codec.encode_own(name, content), 0, replace=True)

    def _keep_pin(self, segment: str) -> None:
        """A held segment's pin outlives this server."""
        record = self._forest.segments.find_held(segment)
        if record is None or record.extra_key:
            return
        self._outgoing.offer(record)
        tokens, names = len(record.path), self._outgoing.names(record)
        self._lasting[segment] = [[record.salt, tokens, name] for name in names]

    def clear(self) -> None:
        self.incoming.clear()
        self._outgoing.clear()
        if self._lasting:
            self._lasting.clear()
            self._list_pins()
        # Whoever loads other weights flushes then.
        self._look()

    def _look(self) -> None:
        """See whether other weights are loaded now."""
        if self._fingerprint() != self._marks:
            self.incoming.drop_all()
            self._join()

    def stats(self) -> dict[str, Any]:
        counts = self._writer.counts
        return {
            "waiting_bytes": self._writer.flying,
            "reading_bytes": self._reader.flying,
            "written": counts.values,
            "written_bytes": counts.nbytes,
            "present": counts.present,
            "dropped": counts.dropped,
            "failed": dict(counts.failed),
        }

    # -- by an operator's command, while the scheduler waits ------------------------------

    def save(self, tenant: str | None, chosen: Collection[str] | None) -> dict[str, Any]:
        """Write segments of a tenant, all or those chosen by id; not those of an
        adapter, whose weights the fingerprint does not know.

        Raises:
            PicRefused: 404 for an id that is not held; 507 where the store refuses.
        """
        forest = self._forest
        records = forest.segments.records(tenant)
        if chosen is not None:
            held = {record.id: record for record in records}
            if any(name not in held for name in chosen):
                raise PicRefused(404, "no such segment", "ids")
            records = [held[name] for name in dict.fromkeys(chosen)]
        records = [record for record in records if not record.extra_key]
        self._look()
        written, failed = 0, None
        for record in records:
            saved = self._write(record)
            if isinstance(saved, Problem):
                failed = f"cannot write to the store: {saved}"
                break
            written += saved
        told = self._ranks.gather((failed, written))
        problems = [problem for problem, _ in told if problem is not None]
        if problems:
            raise PicRefused(507, problems[0], "ids")
        return {"segments": len(records), "bytes": sum(size for _, size in told)}

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
            self._outgoing.know(name)
            written += len(value)
        return written

    def _put(self, name: str, value: np.ndarray) -> Problem | None:
        return self._store.put(name, value)

    def restore(self, tenant: str | None) -> dict[str, Any]:
        """Load what a tenant has in the store, as far as it fits.

        Returns:
            ``{"segments": loaded, "present": held already, "refused": [{"file",
            "reason"}]}``; nothing of a refused value is loaded.

        Raises:
            PicRefused: 409 of a store that lists nothing.
        """
        self._look()
        salt = self._forest.segments.namespace(tenant)
        listed = within(ANSWER_S, lambda: self._store.names(self._codec.group(salt)))
        told = self._ranks.gather(listed)
        problem = next((one for one in told if isinstance(one, Problem)), None)
        if problem is not None:
            raise PicRefused(409, f"the store cannot be listed: {problem}", "store")
        own = {_everywhere(name): name for name in listed} if isinstance(listed, list) else {}
        wanted = sorted(
            {_everywhere(name) for names in told if isinstance(names, list) for name in names}
        )
        return self._load_all([(own.get(one), salt, None) for one in wanted])

    def start(self) -> dict[str, Any]:
        """Load what was pinned for good when this server ran last; nothing else is loaded
        before it is asked for.

        Returns:
            As ``restore``.
        """
        own = {_everywhere(name): (name, salt, tokens) for salt, tokens, name in self._pins()}
        wanted = sorted({one for names in self._ranks.gather(sorted(own)) for one in names})
        found = self._load_all([own.get(one, (None, "", None)) for one in wanted], pins=True)
        return found

    def _pins(self) -> list[tuple[str, int, str]]:
        name = self._codec.own_name(f"pins {self._server}")
        value = within(ANSWER_S, lambda: self._store.get(name, MAX_PINS_BYTES))
        if isinstance(value, Problem):
            return []
        try:
            content = self._codec.decode_own(value, name)
            return [(str(salt), int(tokens), str(one)) for salt, tokens, one in content]
        except (BadValue, ValueError, TypeError) as error:
            logger.warning("sglang_pic: the list of pins is refused: %s", error)
            return []

    def _load_all(
        self, wanted: Sequence[tuple[str | None, str, int | None]], *, pins: bool = False
    ) -> dict[str, Any]:
        """Load values now, in the same order on all ranks.

        Args:
            wanted: name, namespace, and the length of the path if it is known; no name of
                what this rank lacks.
            pins: pin what is loaded.
        """
        loaded = present = 0
        refused = []
        for name, salt, tokens in wanted:
            saved = self._get(name, salt, tokens)
            told = self._ranks.gather(saved if isinstance(saved, str) else None)
            problem = next((one for one in told if one is not None), None)
            if problem is None:
                assert isinstance(saved, SavedSegment)
                held, problem = self._adopt(saved, repin=pins)
                present += held and problem is None
                loaded += not held and problem is None
            if problem is not None:
                logger.warning("sglang_pic: %s is not loaded: %s", name, problem)
                refused.append({"file": name or "", "reason": problem})
        return {"segments": loaded, "present": present, "refused": refused}

    def _get(self, name: str | None, salt: str, tokens: int | None) -> SavedSegment | str:
        """A value, or why it cannot be used."""
        if name is None:
            return "this rank's part is not there"
        most = MAX_VALUE if tokens is None else self.incoming.most(tokens)
        value = within(ANSWER_S, lambda: self._store.get(name, most))
        if isinstance(value, Problem):
            return str(value)
        try:
            saved = self._codec.decode(value, name, salt=salt)
            self._check(saved)
        except BadValue as error:
            return str(error)
        except Exception as error:
            # The other ranks wait for what this one says.
            return f"it could not be read: {error!r}"
        return saved

    def _check(self, saved: SavedSegment) -> None:
        """Raise ``BadValue`` unless it fits this model; on any thread."""
        context = self._forest.segments.context
        if saved.path[: len(context)] != context or len(saved.path) <= len(context):
            raise BadValue(OTHER_SHAPE, "it does not begin with the compile context")
        self._kv.check(saved, floor_to(len(saved.path), self._forest.pages.page_size))
        self._forest.carried.check_saved(saved, len(saved.path) - len(context))

    def _adopt(self, saved: SavedSegment, *, repin: bool) -> tuple[bool, str | None]:
        """Take a value over that all ranks have: whether it was held already, and why it
        cannot be; on all of them alike. Evicts nothing."""
        forest, context = self._forest, len(self._forest.segments.context)
        name = segment_id(saved.salt, saved.extra_key, saved.path[context:])
        record = forest.segments.find_held(name)
        heads = {head for head, _ in by_head(forest.carried.tensors(name))}
        was_held = record is not None and saved.heads in heads
        if not was_held:
            slots = forest.holder.reserve(
                floor_to(len(saved.path), forest.pages.page_size), evict=False
            )
            if slots is None:
                return False, NO_ROOM
            self._kv.fill(saved, slots, 0, len(slots))
            self._outgoing.know(self._codec.name(saved.salt, saved.path, saved.heads))
            if not forest.holder.adopt(saved, slots, named=True, evict=False):
                return False, NO_ROOM
        if repin and forest.segments.find_held(name) is not None:
            tenant = saved.salt.removeprefix(forest.segments.namespace(None))
            try:
                pin(forest, name, tenant)
            except PicRefused as error:
                return was_held, error.message
            self._keep_pin(name)
        return was_held, None


def _everywhere(name: str) -> str:
    """The part of a value's name that is alike on all ranks."""
    return name.partition("-")[2]
