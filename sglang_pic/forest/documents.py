"""What the scheduler does for requests whose documents a trained encoder has read.

On a server with an encoder: ``forest.encoded``. On any other: nothing. One protocol, so that
nothing else in this folder asks whether there is one.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.errors import PicRefused
from sglang_pic.forest.holder import WORTH
from sglang_pic.request.internal import EncodedRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

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
