"""The canary of documents: may this encoder be served at all? Asked once, at start-up.

A row of pseudo-random tokens sees documents of such tokens, computed as a whole, from what
the prefix cache has of it, and over the documents in another order. What an encoder says
is its own matter; these three must agree, and be numbers.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Awaitable, Callable, Sequence

from sglang_pic.checks import Check
from sglang_pic.forest.keys import document_id
from sglang_pic.request.internal import EncodedRequest
from sglang_pic.server.canary import EXACT_KL, SEED
from sglang_pic.server.compare import Distribution, Generate, encoded, fresh_salt
from sglang_pic.server.verdict import UntestedError

DOCUMENTS, TOKENS, ROW = 3, 48, 40

Encode = Callable[[str, str, Sequence[tuple[int, ...]]], Awaitable[bool | None]]
Flush = Callable[[str], Awaitable[None]]


class EncodedCanary:
    """To be asked once (``verdict.Once``).

    Args:
        encode: has documents (lease, tenant, tokens) encoded and kept; whether they are.
        generate: runs one internal request and returns its last output.
        flush: forgets all that a namespace holds.
        vocabulary: of the model.
        longest: tokens of the longest document, and of the longest prompt.
    """

    def __init__(
        self,
        encode: Encode,
        generate: Generate,
        flush: Flush,
        vocabulary: Callable[[], int],
        longest: Callable[[], tuple[int, int]],
    ):
        self._encode = encode
        self._generate = generate
        self._flush = flush
        self._vocabulary = vocabulary
        self._longest = longest

    async def checks(self) -> dict[str, Check]:
        """As ``Canary.checks``."""
        salt = fresh_salt("canary")
        try:
            return await self._found(salt)
        finally:
            await self._flush(salt)

    async def _found(self, salt: str) -> dict[str, Check]:
        document, prompt = self._longest()
        if prompt <= ROW:
            raise UntestedError("it does not fit into the model's context")
        rng, vocabulary = random.Random(SEED), self._vocabulary()
        ordinary = range(vocabulary // 4, max(vocabulary // 2, vocabulary // 4 + 1))
        tokens = min(TOKENS, document)
        documents = [tuple(rng.choices(ordinary, k=tokens)) for _ in range(DOCUMENTS)]
        row = rng.choices(ordinary, k=ROW)
        first = await self._ask(documents, row, salt, None)
        again = await self._ask(documents, row, salt, first.tokens)
        turned = await self._ask(documents[::-1], row, salt, first.tokens)
        return {
            "encoded_again_kl": Check(again.kl_from(first), EXACT_KL),
            "encoded_order_kl": Check(turned.kl_from(first), EXACT_KL),
        }

    async def _ask(
        self,
        documents: Sequence[tuple[int, ...]],
        row: list[int],
        salt: str,
        tokens: Sequence[int] | None,
    ) -> Distribution:
        lease = uuid.uuid4().hex
        if not await self._encode(lease, salt, documents):
            raise UntestedError("its documents find no room")
        names = tuple(document_id(salt, one) for one in documents)
        asked = EncodedRequest(names, lease, strict=True)
        return await encoded(self._generate, row, asked, salt, tokens)
