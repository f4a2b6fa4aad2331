"""Documents that a trained encoder has read: what is held of them.

Their keys and values lie outside SGLang's pool, in the budget and the eviction order of what
segments carry beside pages. A document is held whole or not at all. What a request sees
stays until it ends: its tokens are not in the row, and could not be computed in their place.

What is held depends on the stream of requests alone, so that tensor-parallel ranks hold the
same: time is what commands say it is, and requests end where SGLang ends them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.encoder.limits import fits
from sglang_pic.encoder.rows import DocumentRows
from sglang_pic.errors import PicRefused
from sglang_pic.forest.consensus import Consensus
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.documents import Document, Wanted
from sglang_pic.forest.kept import Kept
from sglang_pic.forest.keys import document_id
from sglang_pic.forest.segments import MAX_FORMER, NAMED_USES
from sglang_pic.forest.state import asked_for_more
from sglang_pic.forest.users import Users
from sglang_pic.request.internal import EncodedRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

    from sglang_pic.encoder.beside import BesideModel

# Kind of thing in the eviction order.
DOCUMENT = "document"


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
        self._users = Users(kept)
        self._rows = DocumentRows(beside.steps)
        # Uses of those that were held, too.
        self._former: LRUCache[str, int] = LRUCache(MAX_FORMER)
        self._ticks = 0
        self._encoded = self._tokens = self._no_room = 0

    @property
    def beside(self) -> BesideModel:
        """The encoder."""
        return self._beside

    def _owner(self, tenant: str | None) -> tuple[str, ...]:
        return (DOCUMENT, self._beside.digest, tenant or "")

    def encode(self, prompts: Sequence[Wanted], now: float) -> list[bool]:
        self._users.tick(now)
        fresh = self._read(prompts)
        kept = [self._keep_all(prompt, fresh) for prompt in prompts]
        for prompt, is_kept in zip(prompts, kept, strict=True):
            if prompt.named and is_kept:
                for name in self._names(prompt):
                    self.name(self._kept.held(name, self._owner(prompt.tenant)))
                self._users.end_lease(prompt.lease)
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

    def _keep_all(self, prompt: Wanted, fresh: Mapping[str, Document]) -> bool:
        """Keep all documents of a prompt, or none. What of it is kept already is kept first,
        so that nothing of it goes for another one."""
        owner = self._owner(prompt.tenant)
        already = set(self._users.lease(prompt.lease))
        names = [name for name in self._names(prompt) if name not in already]
        names.sort(key=lambda name: self._kept.held(name, owner) is None)
        for name in names:
            if self._kept.held(name, owner) is None and not self._put(name, fresh):
                self._users.end_lease(prompt.lease)
                return False
            self._users.keep(prompt.lease, name)
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
        self._users.take(req.cache_request_handle, list(documents))
        if asked.strict:
            self._users.end_lease(asked.lease)
        self._rows.add(req, documents)
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

    def hand_over(self, batch: Any, reqs: Sequence[Req]) -> None:
        self._rows.hand_over(batch, reqs)

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        return self._rows.give_up(reqs)

    def end(self, req: Req) -> None:
        self._rows.remove(req)
        self.let_go(req.cache_request_handle)

    def let_go(self, handle: CacheRequestHandle) -> None:
        self._users.let_go(handle)

    def find(self, name: str, tenant: str | None) -> Document | None:
        found: Document | None = self._kept.held(name, self._owner(tenant))
        return found

    def of_tenant(self, tenant: str | None) -> list[Document]:
        found = (self.find(name, tenant) for name in self._kept.names(DOCUMENT))
        return sorted((one for one in found if one is not None), key=lambda one: -one.last_use)

    def is_in_use(self, document: Document) -> bool:
        return self._users.is_in_use(document.name)

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
        return self._users.lock(document.name)

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
            "in_use": self._users.count,
            "budget": self._kept.budget,
            "encoded": self._encoded,
            "encoded_tokens": self._tokens,
            "no_room": self._no_room,
        }

    def check(self) -> None:
        self._users.check()

    def clear(self) -> None:
        self._users.clear()
        self._former.clear()
        for name in self._kept.names(DOCUMENT):
            self._kept.drop(name)
