"""The canary of documents: what it asks, what it finds, and that it leaves nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sglang_pic.errors import PicRefused
from sglang_pic.request.internal import read_internal
from sglang_pic.server.compare import TOP
from sglang_pic.server.encoded_canary import EncodedCanary
from sglang_pic.server.verdict import FAILED, PASSED, UNTESTED, Once


class FakeEncoder:
    """Keeps documents, and answers a row that sees them; ``off``: by how much the likeliest
    token's log-probability is off, of the number of the request and the documents' names."""

    def __init__(self, off: Callable[[int, Sequence[str]], float] = lambda number, names: 0.0):
        self.off = off
        self.kept: bool = True
        self.error: Exception | None = None
        self.encoded: list[Sequence[tuple[int, ...]]] = []
        self.asked: list[Any] = []
        self.leases: list[str] = []
        self.flushed: list[str] = []

    async def encode(self, lease: str, tenant: str, documents: Sequence[tuple[int, ...]]) -> bool:
        if self.error is not None:
            raise self.error
        self.encoded.append(documents)
        self.leases.append(lease)
        return self.kept

    async def generate(self, obj: Any) -> Any:
        self.asked.append(obj)
        seen = read_internal(obj.kv_hints, salt=obj.cache_salt).encoded
        assert seen is not None and seen.strict and seen.lease == self.leases[-1]
        first = math.log(0.5) - self.off(len(self.asked), seen.documents)
        rest = math.log(0.4 / TOP)
        top = [(first, 0, None), *((rest, token, None) for token in range(1, TOP))]
        meta: dict[str, Any] = {"output_top_logprobs": [top]}
        if obj.token_ids_logprob is not None:
            row = [(first if t == 0 else rest, t, None) for t in obj.token_ids_logprob]
            meta["output_token_ids_logprobs"] = [row]
        return {"meta_info": meta}

    async def flush(self, salt: str) -> None:
        self.flushed.append(salt)


def judged(fake: FakeEncoder, document: int = 300, prompt: int = 4096) -> tuple[Once, list[str]]:
    failures: list[str] = []
    canary = EncodedCanary(
        fake.encode,
        fake.generate,
        fake.flush,
        lambda: 512,
        lambda: (document, prompt),
    )
    once = Once("the canary of documents", canary.checks, 5.0, failures.append)

    async def both() -> None:
        await asyncio.gather(once.settle(), once.settle())

    asyncio.run(both())
    return once, failures


def test_it_asks_once_over_documents_in_both_orders_and_leaves_nothing() -> None:
    fake = FakeEncoder()
    canary, failures = judged(fake)
    assert canary.verdict.result == PASSED and failures == []
    assert set(canary.verdict.checks) == {"encoded_again_kl", "encoded_order_kl"}
    first, again, turned = fake.encoded
    assert first == again and list(turned) == list(first)[::-1] != list(first)
    assert len({tuple(one.input_ids) for one in fake.asked}) == 1
    assert fake.flushed == [*{one.cache_salt for one in fake.asked}]


@pytest.mark.parametrize("document", [1, 7, 47, 48, 300])
def test_a_document_is_no_longer_than_the_encoder_reads(document: int) -> None:
    fake = FakeEncoder()
    judged(fake, document)
    assert {len(ids) for documents in fake.encoded for ids in documents} == {min(48, document)}


@pytest.mark.parametrize(
    ("off", "name"),
    [
        (lambda number, names: 0.5 * (number == 2), "encoded_again_kl"),
        (lambda number, names: 0.5 * (number == 3), "encoded_order_kl"),
        (lambda number, names: math.nan, "encoded_again_kl"),
        (lambda number, names: math.inf if number == 3 else 0.0, "encoded_order_kl"),
    ],
)
def test_what_disagrees_or_is_no_number_stops_documents(off: Any, name: str) -> None:
    fake = FakeEncoder(off)
    canary, (why,) = judged(fake)
    assert canary.verdict.result == FAILED and name in why
    assert len(fake.flushed) == 1


def test_what_cannot_be_tested_stops_nothing() -> None:
    fake = FakeEncoder()
    fake.kept = False
    canary, failures = judged(fake)
    assert (canary.verdict.result, failures) == (UNTESTED, [])
    assert "no room" in str(canary.verdict.why) and len(fake.flushed) == 1
    fake.error = PicRefused(409, "this server has no encoder", "pic.mode")
    canary, failures = judged(fake)
    assert (canary.verdict.result, failures) == (UNTESTED, [])
    canary, failures = judged(FakeEncoder(), prompt=20)
    assert (canary.verdict.result, failures) == (UNTESTED, [])


def test_an_encoder_that_cannot_run_is_not_served() -> None:
    fake = FakeEncoder()
    fake.error = RuntimeError("no memory")
    canary, (why,) = judged(fake)
    assert canary.verdict.result == FAILED and "no memory" in why
