"""Documents that a trained encoder has read: what is held of them, and which rows see them.

Their keys and values lie outside SGLang's pool, in the budget and the eviction order of what
segments carry beside pages. A document is held whole or not at all. What a request sees
stays until it ends: its tokens are not in the row, and could not be computed in their place.

What is held depends on the stream of requests alone, so that tensor-parallel ranks hold the
same: time is what commands say it is, and requests end where SGLang ends them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cachetools import LRUCache

from sglang_pic.attention.rows import by_row, can_tell
from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.encoder.limits import fits
from sglang_pic.encoder.step import DocumentStep, make_step
from sglang_pic.errors import PicIntegrityError, PicRefused
from sglang_pic.forest.consensus import Consensus
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.holder import WORTH
from sglang_pic.forest.kept import Kept
from sglang_pic.forest.keys import document_id
from sglang_pic.forest.segments import MAX_FORMER, NAMED_USES
from sglang_pic.forest.state import asked_for_more
from sglang_pic.request.internal import EncodedRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

    from sglang_pic.encoder.beside import BesideModel

# Kind of thing in the eviction order.
DOCUMENT = "document"
# A prompt whose documents are kept has come by then, or has them encoded again.
LEASE_S = 30.0
NO_ENCODER = "this server has no encoder: --pic-encoder"


@dataclasses.dataclass(eq=False)
class Document:
    """What is held of one.

    Attributes:
        owner: whose it is, and of which encoder.
        ids: its tokens.
        kv: keys and values of all encoder layers.
        uses: requests that have seen it, as far as they are remembered.
        last_use: tick of a clock that advances with every request that sees documents.
        named: it was asked for by name, not for a prompt.
    """

    name: str
    owner: tuple[str, ...]
    ids: array
    kv: EncoderKV
    uses: int = 0
    last_use: int = 0
    named: bool = False

    @property
    def tenant(self) -> str:
        """Its salt; empty for none."""
        return self.owner[-1]

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.kv)

    @property
    def counted(self) -> int:
        return self.nbytes

    @property
    def is_worth_keeping(self) -> bool:
        """Beyond this server, where there is a store."""
        return self.named or self.uses >= WORTH


class Wanted(NamedTuple):
    """Documents that a prompt will need.

    Attributes:
        lease: names the prompt.
        held: names of documents that were held lately.
        documents: tokens of others.
        named: they are asked for by name, and no prompt comes for them.
    """

    lease: str
    tenant: str | None
    held: Sequence[str]
    documents: Sequence[array]
    named: bool = False


class Documents(Protocol):
    """What the scheduler does for requests with documents."""

    def encode(self, prompts: Sequence[Wanted], now: float) -> list[bool]:
        """Have encoded what of these prompts' documents is not held, and keep all of a
        prompt until it comes.

        Args:
            now: seconds, monotonic, of the front's machine.

        Returns:
            Of which prompts all are kept; of the others none is.

        Raises:
            PicRefused: 409, there is no encoder; 400, they are too much for one go.
        """
        ...

    def take(self, req: Req, asked: EncodedRequest) -> list[int]:
        """Give a request that has arrived its documents.

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

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        """Let these see nothing in the batch that runs next; those that should."""
        ...

    def end(self, req: Req) -> None:
        """A request is over."""
        ...

    def let_go(self, handle: CacheRequestHandle) -> None:
        """Keep nothing for a request any longer. Should it run after all, it still sees its
        documents."""
        ...

    def key_of(self, extra_key: str | None, names: Sequence[str]) -> str:
        """What rows that see these documents are kept apart by, in SGLang's cache."""
        ...

    def find(self, name: str, tenant: str | None) -> Document | None:
        """What is held of this tenant's document of that name."""
        ...

    def of_tenant(self, tenant: str | None) -> list[Document]:
        """All that is held of a tenant, the last used first. O(n)."""
        ...

    def is_in_use(self, document: Document) -> bool:
        """Whether a request sees it, or is on its way to."""
        ...

    def name(self, document: Document) -> None:
        """A held one was asked for by name."""
        ...

    def lock(self, document: Document) -> Callable[[], None]:
        """Keep a held one whatever happens, once.

        Returns:
            What lets it go again.
        """
        ...

    def delete(self, document: Document) -> None:
        """Forget one that is neither locked nor in use."""
        ...

    def flush(self, tenant: str | None) -> list[Document]:
        """Forget a tenant's that are neither locked nor in use; which they were."""
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

    def encode(self, prompts: Sequence[Wanted], now: float) -> list[bool]:
        raise PicRefused(409, NO_ENCODER, "pic.mode")

    def take(self, req: Req, asked: EncodedRequest) -> list[int]:
        raise PicRefused(400, NO_ENCODER, "pic.mode")

    def hand_over(self, batch: Any, reqs: Sequence[Req]) -> None:
        pass

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        return []

    def end(self, req: Req) -> None:
        pass

    def let_go(self, handle: CacheRequestHandle) -> None:
        pass

    def key_of(self, extra_key: str | None, names: Sequence[str]) -> str:
        raise PicRefused(400, NO_ENCODER, "pic.mode")

    def find(self, name: str, tenant: str | None) -> Document | None:
        return None

    def of_tenant(self, tenant: str | None) -> list[Document]:
        return []

    def is_in_use(self, document: Document) -> bool:
        return False

    def name(self, document: Document) -> None:
        pass

    def lock(self, document: Document) -> Callable[[], None]:
        return lambda: None

    def delete(self, document: Document) -> None:
        pass

    def flush(self, tenant: str | None) -> list[Document]:
        return []

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
    """The documents of a request by name."""

    documents: Mapping[str, EncoderKV]


class Encoded:
    """Documents of one scheduler.

    Args:
        beside: the encoder, beside the model.
        kept: where they are kept.
        cost: of the model, whose layers the encoder's are like.
        layers: of the model.
        consensus: told what is kept and what is refused; of what has gone, ``kept`` tells it.

    Attributes:
        on_worth: told a held document that has been used twice, or was asked for by name.
    """

    def __init__(
        self,
        beside: BesideModel,
        kept: Kept,
        cost: PrefillCost,
        layers: int,
        consensus: Consensus,
    ):
        self._beside = beside
        self.on_worth: Callable[[Document], None] = lambda document: None
        self._kept = kept
        self._cost = cost
        self._consensus = consensus
        self._share = beside.config.layers / layers
        self._rows: weakref.WeakKeyDictionary[Req, _Row] = weakref.WeakKeyDictionary()
        self._arranged: tuple[list[_Row | None], list[int], DocumentStep | None] = [], [], None
        # Requests, and locks, that hold each document.
        self._users: Counter[str] = Counter()
        # What is kept for those that have not ended. Several may have one name, which clients
        # choose, where there are several tokenizer workers: they end together.
        self._taken: dict[CacheRequestHandle, tuple[str, ...]] = {}
        self._locked: set[str] = set()
        # Uses of those that were held, too.
        self._former: LRUCache[str, int] = LRUCache(MAX_FORMER)
        self._ticks = 0
        # Those kept for prompts on their way, and until when.
        self._leases: dict[str, tuple[float, list[str]]] = {}
        # The latest that any front has said.
        self._now = 0.0
        self._encoded = self._tokens = self._no_room = 0

    @property
    def beside(self) -> BesideModel:
        """The encoder."""
        return self._beside

    def _owner(self, tenant: str | None) -> tuple[str, ...]:
        return (DOCUMENT, self._beside.digest, tenant or "")

    def encode(self, prompts: Sequence[Wanted], now: float) -> list[bool]:
        self._now = now = max(self._now, now)
        for lease in [lease for lease, (until, _) in self._leases.items() if until <= now]:
            self._end_lease(lease)
        fresh = self._read(prompts)
        kept = [self._keep_all(prompt, fresh, now + LEASE_S) for prompt in prompts]
        for prompt, is_kept in zip(prompts, kept, strict=True):
            if prompt.named and is_kept:
                for name in self._names(prompt):
                    self.name(self._kept.held(name, self._owner(prompt.tenant)))
                self._end_lease(prompt.lease)
        return kept

    def _names(self, prompt: Wanted) -> list[str]:
        """Of its documents, each once."""
        fresh = (document_id(prompt.tenant, one) for one in prompt.documents)
        return list(dict.fromkeys([*prompt.held, *fresh]))

    def _read(self, prompts: Sequence[Wanted]) -> dict[str, Document]:
        """By name what of these prompts' documents was not held, and has room."""
        wanted: dict[str, tuple[tuple[str, ...], array]] = {}
        room = self._kept.budget - self._kept.pinned_bytes
        for prompt in prompts:
            owner, fresh, need = self._owner(prompt.tenant), {}, 0
            for tokens in prompt.documents:
                name = document_id(prompt.tenant, tokens)
                if self._kept.held(name, owner) is None and name not in wanted:
                    fresh[name] = (owner, tokens)
                    need += len(tokens) * self._beside.bytes_per_token
            if need > room:
                self._no_room += len(fresh)
                self._consensus.note("refused", prompt.lease)
                continue
            room -= need
            wanted |= fresh
        if not wanted:
            return {}
        lengths = [len(tokens) for _, tokens in wanted.values()]
        if not fits(lengths, self._beside.config.max_tokens):
            raise PicRefused(400, f"too much to encode in one go: {lengths!r:.80}", "lengths")
        found = self._beside.encode([tokens for _, tokens in wanted.values()])
        self._encoded += len(wanted)
        self._tokens += sum(lengths)
        return {
            name: Document(name, owner, tokens, kv, self._former.get(name, 0))
            for (name, (owner, tokens)), kv in zip(wanted.items(), found, strict=True)
        }

    def _keep_all(self, prompt: Wanted, fresh: Mapping[str, Document], until: float) -> bool:
        """Keep all documents of a prompt, or none. What of it is kept already is kept first,
        so that nothing of it goes for another one."""
        owner = self._owner(prompt.tenant)
        _, kept = self._leases.get(prompt.lease, (0.0, []))
        self._leases[prompt.lease] = until, kept
        already = set(kept)
        names = [name for name in self._names(prompt) if name not in already]
        names.sort(key=lambda name: self._kept.held(name, owner) is None)
        for name in names:
            if self._kept.held(name, owner) is None and not self._put(name, fresh):
                self._end_lease(prompt.lease)
                return False
            self._keep([name])
            kept.append(name)
        return True

    def _put(self, name: str, fresh: Mapping[str, Document]) -> bool:
        document = fresh.get(name)
        if document is None:
            return False  # it has gone meanwhile
        kept = self._hold(document)
        self._no_room += not kept
        self._consensus.note("kept" if kept else "refused", name)
        return kept

    def _hold(self, document: Document, *, evict: bool = True) -> bool:
        cost = self._cost.flops(0, document.tokens) * self._share
        uses = 1 + document.uses + NAMED_USES * document.named
        name = document.name
        kept = self._kept.put(name, document, cost=cost, group=DOCUMENT, uses=uses, evict=evict)
        if kept:
            self._look(document)
        return kept

    def _look(self, document: Document) -> None:
        if document.is_worth_keeping:
            self.on_worth(document)

    def _end_lease(self, lease: str) -> None:
        _, names = self._leases.pop(lease, (0.0, []))
        self._release(names)

    def take(self, req: Req, asked: EncodedRequest) -> list[int]:
        if req in self._rows:
            return []  # SGLang has paused it before it had a token
        names = asked.documents
        more = "adapter" if req.lora_id is not None else asked_for_more(req)
        if more is not None:
            raise PicRefused(400, f"not with encoded documents: {more}", "pic.mode")
        owner = self._owner(req.cache_salt)
        found = [self._kept.held(name, owner) for name in names]
        missing = [i for i, one in enumerate(found) if one is None]
        if missing:
            return missing
        documents = {name: one.kv for name, one in zip(names, found, strict=True)}
        self._use(dict(zip(names, found, strict=True)))
        self._keep(list(documents))
        if asked.strict:
            self._end_lease(asked.lease)
        handle = req.cache_request_handle
        self._taken[handle] = (*self._taken.get(handle, ()), *documents)
        self._rows[req] = _Row(documents)
        req.extra_key = self.key_of(req.extra_key, names)
        return []

    def key_of(self, extra_key: str | None, names: Sequence[str]) -> str:
        # What the row's own KV depends on beside its tokens. A client's key holds no
        # control characters.
        seen = hashlib.blake2b("\x1f".join([self._beside.digest, *names]).encode(), digest_size=16)
        return f"{extra_key or ''}\x1fencoded\x1f{seen.hexdigest()}"

    def _use(self, documents: Mapping[str, Document]) -> None:
        """A request sees these."""
        self._ticks += 1
        for name, document in documents.items():
            self._kept.use(name)
            document.uses += 1
            document.last_use = self._ticks
            self._former[name] = document.uses
            self._look(document)

    def _keep(self, names: Sequence[str]) -> None:
        for name in names:
            self._users[name] += 1
            self._kept.pin(name)

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            self._users[name] -= 1
            if self._users[name] <= 0:
                del self._users[name]
                self._kept.unpin(name)

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

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        self._arranged = [], [], None
        self._beside.steps.clear()
        return [req for req in reqs if req in self._rows]

    def end(self, req: Req) -> None:
        if self._rows.pop(req, None) is not None:
            self._arranged = [], [], None
        self.let_go(req.cache_request_handle)

    def let_go(self, handle: CacheRequestHandle) -> None:
        self._release(self._taken.pop(handle, ()))

    def find(self, name: str, tenant: str | None) -> Document | None:
        found: Document | None = self._kept.held(name, self._owner(tenant))
        return found

    def of_tenant(self, tenant: str | None) -> list[Document]:
        found = (self.find(name, tenant) for name in self._kept.names(DOCUMENT))
        return sorted((one for one in found if one is not None), key=lambda one: -one.last_use)

    def is_in_use(self, document: Document) -> bool:
        return self._seen_by_any(document.name)

    def _seen_by_any(self, name: str) -> bool:
        return self._users[name] > (name in self._locked)

    def name(self, document: Document) -> None:
        if not document.named:
            document.named = True
            self._kept.use(document.name)
        self._look(document)

    def holds(self, name: str) -> bool:
        """Whether a document of any tenant is held."""
        return self._kept.nbytes_of(name) > 0

    def is_held(self, document: Document) -> bool:
        """Whether this very one is."""
        return self._kept.held(document.name, document.owner) is document

    def may_have(self, nbytes: int) -> bool:
        """Whether there could be room for so much, if others went."""
        return nbytes <= self._kept.budget - self._kept.pinned_bytes

    def adopt(
        self,
        tenant: str | None,
        ids: array,
        kv: EncoderKV,
        *,
        uses: int,
        named: bool,
        evict: bool,
    ) -> bool:
        """Take a document over that was read elsewhere.

        Args:
            uses: of its former life.
            evict: others may go for it.

        Returns:
            Whether there is room for it.
        """
        name = document_id(tenant, ids)
        uses = max(uses, self._former.get(name, 0))
        document = Document(name, self._owner(tenant), ids, kv, uses, named=named)
        kept = self._hold(document, evict=evict)
        self._consensus.note("adopted" if kept else "refused", name)
        return kept

    def lock(self, document: Document) -> Callable[[], None]:
        name = document.name
        self._locked.add(name)
        self._keep([name])
        return lambda: self._unlock(name)

    def _unlock(self, name: str) -> None:
        if name in self._locked:
            self._locked.remove(name)
            self._release([name])

    def delete(self, document: Document) -> None:
        self._former.pop(document.name, None)
        self._kept.drop(document.name)

    def flush(self, tenant: str | None) -> list[Document]:
        mine = [one for one in self.of_tenant(tenant) if one.name not in self._users]
        for document in mine:
            self.delete(document)
        return mine

    def to_json(self) -> dict[str, Any]:
        config = self._beside.config
        return {
            "encoder": {
                "digest": self._beside.digest,
                "cross_layers": list(config.cross_layers),
                "max_tokens": config.max_tokens,
                "bytes_per_token": self._beside.bytes_per_token,
            },
            "documents": self._kept.count(DOCUMENT),
            "bytes": self._kept.bytes_of_group(DOCUMENT),
            "in_use": sum(map(self._seen_by_any, list(self._users))),
            "budget": self._kept.budget,
            "encoded": self._encoded,
            "encoded_tokens": self._tokens,
            "no_room": self._no_room,
        }

    def check(self) -> None:
        users = Counter(name for names in self._taken.values() for name in names)
        users.update(name for _, names in self._leases.values() for name in names)
        users.update(self._locked)
        if users != self._users:
            raise PicIntegrityError("which documents requests see does not add up")

    def clear(self) -> None:
        for lease in list(self._leases):
            self._end_lease(lease)
        for handle in list(self._taken):
            self.let_go(handle)
        for name in list(self._locked):
            self._unlock(name)
        self._former.clear()
        for name in self._kept.names(DOCUMENT):
            self._kept.drop(name)
