"""Documents that a trained encoder has read: what is held of them, and which rows see them.

Their keys and values lie outside SGLang's pool, in the budget and the eviction order of what
segments carry beside pages. A document is held whole or not at all. What a request sees
stays until it ends: its tokens are not in the row, and could not be computed in their place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sglang_pic.attention.rows import by_row, can_tell
from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.encoder.limits import fits
from sglang_pic.encoder.step import DocumentStep, make_step
from sglang_pic.errors import PicIntegrityError, PicRefused
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.keys import document_id
from sglang_pic.forest.state import asked_for_more
from sglang_pic.linear.state import StateStore

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_pic.encoder.beside import BesideModel

# Kind of thing in the eviction order.
DOCUMENT = "document"
NO_ENCODER = "this server has no encoder: --pic-encoder"


@dataclasses.dataclass(frozen=True)
class Document:
    """What is kept of one: keys and values of all encoder layers."""

    owner: tuple[str, ...]
    tokens: int
    kv: EncoderKV

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.kv)


class Documents(Protocol):
    """What the scheduler does for requests with documents."""

    def encode(self, documents: Sequence[tuple[str | None, array]]) -> list[bool]:
        """Have these encoded, of each the tenant and the tokens; which of them are held.

        Raises:
            PicRefused: 409, there is no encoder; 400, they are too much for one go.
        """
        ...

    def take(self, req: Req, names: Sequence[str]) -> list[int]:
        """Give a request that has arrived the documents of these names.

        Returns:
            Indices of those that are not held; the request has none then.

        Raises:
            PicRefused: 400, such a request can't have documents.
        """
        ...

    def hand_over(self, batch: Any, reqs: Sequence[Req]) -> None:
        """Arrange which rows of the batch that runs next see which documents.

        Raises:
            PicIntegrityError: its rows cannot be told apart.
        """
        ...

    def of(self, reqs: Sequence[Req]) -> list[Req]:
        """Those that have documents."""
        ...

    def end(self, req: Req) -> None:
        """A request is over."""
        ...

    def flush(self, tenant: str | None) -> int:
        """Forget a tenant's that no request sees; how many."""
        ...

    def to_json(self) -> dict[str, Any]:
        """For the operator."""
        ...

    def check(self) -> None:
        """Raise ``PicIntegrityError`` unless it adds up. O(n)."""
        ...

    def clear(self) -> None:
        """Everything was flushed."""
        ...


class NoDocuments:
    """Of a server without an encoder."""

    def encode(self, documents: Sequence[tuple[str | None, array]]) -> list[bool]:
        raise PicRefused(409, NO_ENCODER, "pic.mode")

    def take(self, req: Req, names: Sequence[str]) -> list[int]:
        raise PicRefused(400, NO_ENCODER, "pic.mode")

    def hand_over(self, batch: Any, reqs: Sequence[Req]) -> None:
        pass

    def of(self, reqs: Sequence[Req]) -> list[Req]:
        return []

    def end(self, req: Req) -> None:
        pass

    def flush(self, tenant: str | None) -> int:
        return 0

    def to_json(self) -> dict[str, Any]:
        return {
            "encoder": None,
            "documents": 0,
            "bytes": 0,
            "in_use": 0,
            "budget": 0,
            "encoded": 0,
            "encoded_tokens": 0,
            "no_room": 0,
        }

    def check(self) -> None:
        pass

    def clear(self) -> None:
        pass


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """The documents of a request by name, and what gives them back, once."""

    documents: Mapping[str, EncoderKV]
    release: weakref.finalize


class Encoded:
    """Documents of one scheduler.

    Args:
        beside: the encoder, beside the model.
        store: of what segments carry beside pages.
        cost: of the model, whose layers the encoder's are like.
        layers: of the model.
    """

    def __init__(self, beside: BesideModel, store: StateStore, cost: PrefillCost, layers: int):
        self._beside = beside
        self._store = store
        self._cost = cost
        self._share = beside.config.layers / layers
        self._rows: weakref.WeakKeyDictionary[Req, _Row] = weakref.WeakKeyDictionary()
        self._arranged: tuple[list[_Row | None], list[int], DocumentStep | None] = [], [], None
        # Requests that see each document.
        self._users: Counter[str] = Counter()
        self._encoded = self._tokens = self._no_room = 0

    def _name(self, tenant: str | None, tokens: array) -> str:
        return document_id(tenant, tokens)

    def _owner(self, tenant: str | None) -> tuple[str, ...]:
        return (DOCUMENT, self._beside.digest, tenant or "")

    def encode(self, documents: Sequence[tuple[str | None, array]]) -> list[bool]:
        wanted = {}
        for tenant, tokens in documents:
            name, owner = self._name(tenant, tokens), self._owner(tenant)
            if self._store.held(name, owner) is None:
                wanted[name] = (owner, tokens)
        if wanted:
            self._encode(wanted)
        return [
            self._store.held(self._name(tenant, tokens), self._owner(tenant)) is not None
            for tenant, tokens in documents
        ]

    def _encode(self, wanted: Mapping[str, tuple[tuple[str, ...], array]]) -> None:
        lengths = [len(tokens) for _, tokens in wanted.values()]
        if not fits(lengths, self._beside.config.max_tokens):
            raise PicRefused(400, f"too much to encode in one go: {lengths!r:.80}", "lengths")
        found = self._beside.encode([tokens for _, tokens in wanted.values()])
        for (name, (owner, tokens)), kv in zip(wanted.items(), found, strict=True):
            count = len(tokens)
            kept = self._store.put(
                name,
                Document(owner, count, kv),
                cost=self._cost.flops(0, count) * self._share,
                group=DOCUMENT,
            )
            self._encoded += 1
            self._tokens += count
            self._no_room += not kept

    def take(self, req: Req, names: Sequence[str]) -> list[int]:
        more = "adapter" if req.lora_id is not None else asked_for_more(req)
        if more is not None:
            raise PicRefused(400, f"not with encoded documents: {more}", "pic.mode")
        owner = self._owner(req.cache_salt)
        found = [self._store.held(name, owner) for name in names]
        missing = [i for i, one in enumerate(found) if one is None]
        if missing:
            return missing
        documents = {name: one.kv for name, one in zip(names, found, strict=True)}
        for name in documents:
            self._store.use(name)
            self._users[name] += 1
            self._store.pin(name)
        # A request that ends in the queue is not told to the cache.
        release = weakref.finalize(req, self._release, tuple(documents))
        release.atexit = False
        self._rows[req] = _Row(documents, release)
        req.extra_key = self._key(req.extra_key, names)
        return []

    def _key(self, extra_key: str | None, names: Sequence[str]) -> str:
        """What the row's own KV depends on beside its tokens. A client's key holds no
        control characters."""
        seen = hashlib.blake2b("\x1f".join([self._beside.digest, *names]).encode(), digest_size=16)
        return f"{extra_key or ''}\x1fencoded\x1f{seen.hexdigest()}"

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            self._users[name] -= 1
            if self._users[name] <= 0:
                del self._users[name]
                self._store.unpin(name)

    def hand_over(self, batch: Any, reqs: Sequence[Req]) -> None:
        rows = [self._rows.get(req) for req in reqs]
        if not any(rows):
            self._arranged = [], [], None
            self._beside.steps.set((), None)
            return
        if not can_tell(batch):
            raise PicIntegrityError("which rows of the batch have documents cannot be told")
        of_rows = by_row(batch.rids, rows, batch)
        lengths = [1] * len(of_rows)
        if batch.forward_mode.is_extend():
            lengths = [int(n) for n in batch.extend_seq_lens_cpu]
        # While the same rows decode it stays as it is.
        if (of_rows, lengths) != self._arranged[:2]:
            seen = [row.documents if row is not None else None for row in of_rows]
            step = make_step(seen, lengths, batch.seq_lens.device)
            self._arranged = of_rows, lengths, step
        self._beside.steps.set(batch.rids, self._arranged[2])

    def of(self, reqs: Sequence[Req]) -> list[Req]:
        return [req for req in reqs if req in self._rows]

    def end(self, req: Req) -> None:
        row = self._rows.pop(req, None)
        if row is not None:
            row.release()

    def flush(self, tenant: str | None) -> int:
        owner = self._owner(tenant)
        names = [name for name in self._store.names(DOCUMENT) if name not in self._users]
        mine = [name for name in names if self._store.held(name, owner) is not None]
        for name in mine:
            self._store.drop(name)
        return len(mine)

    def to_json(self) -> dict[str, Any]:
        config = self._beside.config
        return {
            "encoder": {
                "digest": self._beside.digest,
                "cross_layers": list(config.cross_layers),
                "max_tokens": config.max_tokens,
                "bytes_per_token": self._beside.bytes_per_token,
            },
            "documents": len(self._store.names(DOCUMENT)),
            "bytes": self._store.bytes_of_group(DOCUMENT),
            "in_use": len(self._users),
            "budget": self._store.budget,
            "encoded": self._encoded,
            "encoded_tokens": self._tokens,
            "no_room": self._no_room,
        }

    def check(self) -> None:
        users = Counter(name for row in self._rows.values() for name in row.documents)
        # A request that is gone may not have been collected yet, never the reverse.
        if any(self._users[name] < count for name, count in users.items()):
            raise PicIntegrityError("a document that a request sees is taken for unused")
        self._store.check()

    def clear(self) -> None:
        for name in self._store.names(DOCUMENT):
            self._store.drop(name)
