"""Encoded documents without a server: what the front sends, and what the scheduler holds."""

from __future__ import annotations

import asyncio
import gc
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pic.config import PicConfig
from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.encoder.limits import ENCODE_TOKENS
from sglang_pic.encoder.step import Steps
from sglang_pic.errors import PicActionError, PicIntegrityError, PicRefused, PicRequestError
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.encoded import DOCUMENT, Encoded
from sglang_pic.forest.keys import document_id
from sglang_pic.linear.state import StateStore
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.fields import parse_fields
from sglang_pic.request.internal import (
    EncodedRequest,
    encoded_hints,
    link_hints,
    read_internal,
)
from sglang_pic.server.compiler import COMPILED, FAILED, SHARED
from sglang_pic.server.documents import Encoder, Job, cut, report
from sglang_pic.server.queue import FairQueue

MAX = 100
# Of a token: two tensors of a layer, a head and two numbers.
EACH = 16


class Beside:
    """An encoder that makes of each token its own number."""

    digest = "digest"
    bytes_per_token = EACH
    config = SimpleNamespace(layers=1, max_tokens=MAX, cross_layers=(0,))

    def __init__(self) -> None:
        self.steps = Steps()
        self.read: list[list[int]] = []

    def encode(self, documents: Sequence[Sequence[int]]) -> list[EncoderKV]:
        self.read.append([len(one) for one in documents])
        made = [torch.tensor(list(one)).float()[None, :, None, None] for one in documents]
        return [EncoderKV(one.repeat(1, 1, 1, 2), one.repeat(1, 1, 1, 2)) for one in made]


def held_by(tokens: int) -> tuple[Encoded, Beside, StateStore]:
    """What holds so many tokens at most."""
    store = StateStore(PicConfig())
    store.budget = tokens * EACH
    beside = Beside()
    cost = PrefillCost(1e6, 10.0, 16)
    return Encoded(beside, store, cost, layers=4), beside, store  # type: ignore[arg-type]


def ids(seed: int, count: int) -> array:
    return array("q", [seed * 1000 + i for i in range(count)])


@pytest.fixture(scope="module")
def driver() -> Driver:
    return Driver(1, 256, PicConfig(min_segment=1))


def request(driver: Driver, salt: str | None = None) -> Any:
    req = driver.request([1, 2, 3], salt)
    req.multimodal_inputs = None
    return req


# -- the scheduler ------------------------------------------------------------------


def test_a_document_is_encoded_once(driver: Driver) -> None:
    encoded, beside, _ = held_by(100)
    assert encoded.encode([(None, ids(1, 10)), (None, ids(2, 20))]) == [True, True]
    assert encoded.encode([(None, ids(2, 20)), (None, ids(3, 5))]) == [True, True]
    assert beside.read == [[10, 20], [5]]
    assert encoded.encode([("a", ids(3, 5)), ("b", ids(3, 5))]) == [True, True]
    assert beside.read[2:] == [[5, 5]]
    told = encoded.to_json()
    assert told["documents"] == 5 and told["bytes"] == 45 * EACH


def test_a_tenant_sees_its_own_alone(driver: Driver) -> None:
    encoded, _, _ = held_by(100)
    encoded.encode([("a", ids(1, 10))])
    name = document_id("a", ids(1, 10))
    assert encoded.take(request(driver, "b"), [name]) == [0]
    assert encoded.take(request(driver, None), [name]) == [0]
    assert encoded.take(request(driver, "a"), [name]) == []
    assert encoded.flush("b") == 0


def test_what_a_request_sees_stays_until_it_ends(driver: Driver) -> None:
    encoded, _, _ = held_by(30)
    encoded.encode([(None, ids(1, 20))])
    name = document_id(None, ids(1, 20))
    first, second = request(driver), request(driver)
    assert encoded.take(first, [name]) == encoded.take(second, [name]) == []
    assert encoded.to_json()["in_use"] == 1
    assert encoded.encode([(None, ids(2, 20))]) == [False]
    assert encoded.flush(None) == 0
    encoded.end(first)
    encoded.end(first)
    assert encoded.encode([(None, ids(2, 20))]) == [False]
    # One that ended in SGLang's queue is not told of.
    del second
    gc.collect()
    assert encoded.to_json()["in_use"] == 0
    assert encoded.encode([(None, ids(2, 20))]) == [True]
    assert encoded.take(request(driver), [name]) == [0]
    encoded.check()


def test_rows_are_kept_apart_by_what_they_see(driver: Driver) -> None:
    encoded, _, _ = held_by(100)
    documents = [(None, ids(i, 5)) for i in range(3)]
    encoded.encode(documents)
    names = [document_id(None, one) for _, one in documents]
    keys = set()
    for seen in (names, names[::-1], names[:2], names[:1]):
        req = request(driver)
        req.extra_key = "mine"
        encoded.take(req, seen)
        assert req.extra_key.startswith("mine\x1f")
        keys.add(req.extra_key)
    assert len(keys) == 4
    again = request(driver)
    again.extra_key = "mine"
    encoded.take(again, names)
    assert again.extra_key in keys


@pytest.mark.parametrize(
    "change",
    [
        {"lora_id": "x"},
        {"session": object()},
        {"input_embeds": [[0.0]]},
        {"multimodal_inputs": object()},
        {"beam_group": object()},
    ],
)
def test_other_requests_have_no_documents(driver: Driver, change: dict[str, Any]) -> None:
    encoded, _, _ = held_by(100)
    encoded.encode([(None, ids(1, 5))])
    req = request(driver)
    for name, value in change.items():
        setattr(req, name, value)
    with pytest.raises(PicRefused, match="not with encoded documents") as refused:
        encoded.take(req, [document_id(None, ids(1, 5))])
    assert refused.value.status == 400


def test_what_is_encoded_in_one_go_is_bounded() -> None:
    encoded, beside, _ = held_by(100)
    for lengths in ([MAX + 1], [MAX, *[1] * (ENCODE_TOKENS // MAX)]):
        with pytest.raises(PicRefused, match="too much"):
            encoded.encode([(None, ids(i, n)) for i, n in enumerate(lengths)])
    assert not beside.read


def batch_of(reqs: Sequence[Any], lengths: Sequence[int] | None = None) -> Any:
    mode = SimpleNamespace(
        is_extend=lambda: lengths is not None,
        is_extend_without_speculative=lambda: lengths is not None,
    )
    return SimpleNamespace(
        rids=[req.rid for req in reqs],
        seq_lens=torch.ones(len(reqs)),
        forward_mode=mode,
        extend_seq_lens_cpu=lengths,
        extend_prefix_lens_cpu=lengths,
    )


def test_a_batch_is_told_which_rows_see_what(driver: Driver) -> None:
    encoded, beside, _ = held_by(100)
    encoded.encode([(None, ids(1, 5))])
    seeing, plain = request(driver), request(driver)
    encoded.take(seeing, [document_id(None, ids(1, 5))])
    batch = batch_of([plain, seeing], [3, 2])
    encoded.hand_over(batch, [plain, seeing])
    step = beside.steps.read(batch)
    assert step is not None and step.tokens.tolist() == [3, 4]
    batch = batch_of([plain, seeing])
    encoded.hand_over(batch, [plain, seeing])
    step = beside.steps.read(batch)
    assert step is not None and step.tokens.tolist() == [1]
    encoded.hand_over(batch_of([plain]), [plain])
    assert beside.steps.read(batch_of([plain])) is None
    with pytest.raises(PicIntegrityError, match="cannot be told"):
        encoded.hand_over(batch_of([seeing, seeing]), [seeing, seeing])
    assert encoded.of([plain, seeing]) == [seeing]


sizes = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes, room=st.integers(1, 60), data=st.data())
def test_whatever_happens_the_sums_hold(sizes: list[int], room: int, data: Any) -> None:
    driver = Driver(1, 64, PicConfig(min_segment=1))
    encoded, _, store = held_by(room)
    running: list[Any] = []
    for i, size in enumerate(sizes):
        document = (None, ids(i, size))
        (held,) = encoded.encode([document])
        assert held is (store.held(document_id(*document), (DOCUMENT, "digest", "")) is not None)
        if held and data.draw(st.booleans()):
            running.append(request(driver))
            assert encoded.take(running[-1], [document_id(*document)]) == []
        if running and data.draw(st.booleans()):
            encoded.end(running.pop(data.draw(st.integers(0, len(running) - 1))))
        encoded.check()
        assert store.nbytes <= store.budget
    for req in running:
        encoded.end(req)
    assert encoded.to_json()["in_use"] == 0
    held = len(store.names(DOCUMENT))
    assert encoded.flush(None) == held and store.nbytes == 0
    encoded.check()


# -- what the front says of a request ---------------------------------------------------


def test_what_the_front_says_is_read_back() -> None:
    asked = EncodedRequest(("a", "b"), strict=False)
    assert read_internal(encoded_hints(asked)).encoded == asked
    both = encoded_hints(asked)
    link = LinkRequest((TokenSpan(0, 1),), LinkOptions())
    both.actions.extend(link_hints(link).actions)
    with pytest.raises(PicActionError, match="documents"):
        read_internal(both)
    with pytest.raises(PicActionError, match="documents"):
        read_internal(encoded_hints(EncodedRequest(("a",) * 513)))
    forged = encoded_hints(asked)
    forged.actions[0].payload["seal"] = "0"
    with pytest.raises(PicActionError, match="own to send"):
        read_internal(forged)


def test_documents_leave_the_prompt() -> None:
    spans = (TokenSpan(1, 3), TokenSpan(3, 3), TokenSpan(4, 6))
    prompt = ([0, 1, 2, 3, 4, 5, 6], LinkRequest(spans, LinkOptions()))
    made = cut(prompt)
    assert made.row == [0, 3, 6]
    assert made.documents == [(0, (1, 2)), (2, (4, 5))]
    told = report(prompt, ["a", "b"], cached=2).to_json()
    assert told["tokens_outside"] == 4 and told["tokens_computed"] == 1
    assert [(one["id"], one["reason"]) for one in told["segments"]] == [
        ("a", "encoded"), (None, "empty"), ("b", "encoded"),
    ]  # fmt: skip


@pytest.mark.parametrize("stray", ["seam", "policy", "require_exact", "turns", "link", "state"])
def test_what_links_means_nothing_to_documents(stray: str) -> None:
    value = {"seam": 3, "policy": "seam", "state": "last"}.get(stray, True)
    with pytest.raises(PicRequestError, match=rf"pic\.{stray}: means nothing"):
        parse_fields({"mode": "encode", "segments": [], stray: value}, LinkOptions())
    assert parse_fields({"mode": "encode", "segments": []}, LinkOptions()).options.mode == "encode"


# -- the front's encoder ------------------------------------------------------------------


class Scheduler:
    """Carries the command out; what it was sent, one at a time."""

    def __init__(self, room: int = 1 << 30):
        self.sent: list[list[int]] = []
        self.tenants: list[str | None] = []
        self.room = room
        self.error: Exception | None = None
        self._busy = False

    async def __call__(self, do: str, **fields: Any) -> list[Any]:
        assert do == "encode" and not self._busy
        assert sum(fields["lengths"]) == len(fields["ids"])
        self._busy = True
        await asyncio.sleep(0)
        self._busy = False
        if self.error is not None:
            raise self.error
        self.sent.append(fields["lengths"])
        self.tenants += fields["tenants"]
        held = []
        for length in fields["lengths"]:
            held.append(length <= self.room)
            self.room -= length if held[-1] else 0
        return [{"held": held}]


def encoder(scheduler: Scheduler, *, waiting: int = 64, longest: int = 1 << 20) -> Encoder:
    queue: FairQueue[Job] = FairQueue(64, 64, waiting)
    return Encoder(scheduler, queue, MAX, lambda: longest)


def doc(seed: int, count: int) -> tuple[int, ...]:
    return tuple(ids(seed, count))


def test_documents_go_together_and_each_once() -> None:
    async def run() -> None:
        scheduler = Scheduler()
        front = encoder(scheduler)
        one, two = await asyncio.gather(
            front.encode([doc(1, 10), doc(2, 20)], None, 0),
            front.encode([doc(2, 20), doc(3, 30)], None, 0),
        )
        assert sorted(n for one in scheduler.sent for n in one) == [10, 20, 30]
        assert [made.outcome for made in one] == [COMPILED, COMPILED]
        assert [made.outcome for made in two] == [SHARED, COMPILED]
        assert [made.tokens for made in (*one, *two)] == [10, 20, 0, 30]
        again = await front.encode([doc(1, 10)], None, 0)
        assert [made.outcome for made in again] == [COMPILED]

    asyncio.run(run())


def test_a_batch_is_within_the_bound() -> None:
    async def run() -> None:
        scheduler = Scheduler()
        front = encoder(scheduler, longest=250)
        await front.encode([doc(i, MAX) for i in range(7)], "a", 0)
        assert all(sum(lengths) <= 250 for lengths in scheduler.sent)
        assert [n for one in scheduler.sent for n in one] == [MAX] * 7
        many = Scheduler()
        await encoder(many).encode([doc(0, MAX), *(doc(i, 1) for i in range(1, 64))], None, 0)
        assert all(len(one) * max(one) <= ENCODE_TOKENS for one in many.sent)

    asyncio.run(run())


def test_tenants_take_turns() -> None:
    async def run() -> None:
        scheduler = Scheduler()
        front = encoder(scheduler)
        await asyncio.gather(
            front.encode([doc(i, 10) for i in range(5)], "a", 0),
            front.encode([doc(i, 10) for i in range(2)], "b", 0),
        )
        assert scheduler.tenants[:4] == ["a", "b", "a", "b"]

    asyncio.run(run())


def test_what_does_not_fit_and_what_fails_is_told() -> None:
    async def run() -> None:
        scheduler = Scheduler(room=15)
        front = encoder(scheduler)
        made = await front.encode([doc(1, 10), doc(2, 20)], None, 0)
        assert [one.outcome for one in made] == [COMPILED, FAILED]
        scheduler.error = PicRefused(409, "no", "pic.mode")
        made = await front.encode([doc(3, 10)], None, 0)
        assert made[0].outcome == FAILED and made[0].error is scheduler.error
        scheduler.error = None
        short = encoder(Scheduler(), waiting=1)
        made = await short.encode([doc(1, 10), doc(2, 10)], None, 0)
        assert [one.outcome for one in made] == [COMPILED, FAILED]

    asyncio.run(run())
