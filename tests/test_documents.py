"""Encoded documents without a server: what the front sends, and what the scheduler holds."""

from __future__ import annotations

import asyncio
import itertools
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers import scheduler as sglang_scheduler
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.common import release_kv_cache

from sglang_pic import sglang_hooks
from sglang_pic.config import PicConfig
from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.encoder.limits import ENCODE_TOKENS
from sglang_pic.encoder.step import Steps
from sglang_pic.errors import PicActionError, PicIntegrityError, PicRefused, PicRequestError
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.documents import Wanted
from sglang_pic.forest.encoded import DOCUMENT, Encoded
from sglang_pic.forest.kept import Kept
from sglang_pic.forest.keys import document_id
from sglang_pic.forest.users import LEASE_S
from sglang_pic.link.encoded_report import make_encoded_report
from sglang_pic.link.policy import LinkOptions
from sglang_pic.manage.arrival import Answer, answer
from sglang_pic.request import commands
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.fields import parse_fields
from sglang_pic.request.hints import DONE
from sglang_pic.request.internal import (
    EncodedRequest,
    command_hints,
    encoded_hints,
    link_hints,
    read_internal,
)
from sglang_pic.server.cut import cut
from sglang_pic.server.encoding import Encoder, Job
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


class Clock:
    """The front's."""

    now = 0.0


clock = Clock()
_leases = itertools.count()


class Told(Encoded):
    """As the command tells it the time."""

    def encode(self, prompts: Sequence[Wanted], now: float | None = None) -> list[bool]:
        return super().encode(prompts, clock.now if now is None else now)


class Noted:
    """What ranks would compare."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def note(self, event: str, name: str) -> None:
        self.events.append((event, name))

    def arrived(self) -> None:
        pass


def held_by(tokens: int, noted: Noted | None = None) -> tuple[Encoded, Beside, Kept]:
    """What holds so many tokens at most."""
    noted = noted or Noted()
    kept = Kept(tokens * EACH, lambda name: noted.note("lost", name))
    beside = Beside()
    cost = PrefillCost(1e6, 10.0, 16)
    made = Told(beside, kept, cost, 4, noted)  # type: ignore[arg-type]
    return made, beside, kept


def ids(seed: int, count: int) -> array:
    return array("q", [seed * 1000 + i for i in range(count)])


def wanted(*documents: array, tenant: str | None = None, held: Sequence[str] = ()) -> Wanted:
    """A prompt, under a lease of its own."""
    return Wanted(f"lease-{next(_leases)}", tenant, held, documents)


def asked(prompt: Wanted, *, strict: bool = True) -> EncodedRequest:
    """What it is as a request."""
    names = [*prompt.held, *(document_id(prompt.tenant, one) for one in prompt.documents)]
    return EncodedRequest(tuple(names), prompt.lease, strict)


@pytest.fixture(scope="module")
def driver() -> Driver:
    return Driver(1, 256, PicConfig(min_segment=1))


def request(driver: Driver, salt: str | None = None) -> Any:
    return driver.request([1, 2, 3], salt)


# -- the scheduler ------------------------------------------------------------------


def test_a_document_is_encoded_once() -> None:
    encoded, beside, _ = held_by(100)
    assert encoded.encode([wanted(ids(1, 10), ids(2, 20))]) == [True]
    assert encoded.encode([wanted(ids(2, 20)), wanted(ids(3, 5), ids(2, 20))]) == [True, True]
    assert beside.read == [[10, 20], [5]]
    both = [wanted(ids(3, 5), tenant="a"), wanted(ids(3, 5), tenant="b")]
    assert encoded.encode(both) == [True, True]
    assert beside.read[2:] == [[5, 5]]
    told = encoded.to_json()
    assert told["documents"] == 5 and told["bytes"] == 45 * EACH
    assert told["encoded"] == 5 and told["encoded_tokens"] == 45


def test_a_tenant_sees_its_own_alone(driver: Driver) -> None:
    encoded, _, _ = held_by(100)
    prompt = wanted(ids(1, 10), tenant="a")
    encoded.encode([prompt])
    assert encoded.take(request(driver, "b"), asked(prompt)) == [0]
    assert encoded.take(request(driver, None), asked(prompt)) == [0]
    assert encoded.flush("b") == []
    req = request(driver, "a")
    assert encoded.take(req, asked(prompt)) == []
    assert encoded.flush("a") == []
    encoded.end(req)
    assert len(encoded.flush("a")) == 1


def test_what_a_request_sees_stays_until_it_ends(driver: Driver) -> None:
    encoded, _, _ = held_by(30)
    prompt, other = wanted(ids(1, 20)), wanted(ids(2, 20))
    assert encoded.encode([prompt]) == [True]
    first, second = request(driver), request(driver)
    assert encoded.take(first, asked(prompt)) == encoded.take(second, asked(prompt)) == []
    assert encoded.to_json()["in_use"] == 1
    assert encoded.encode([other]) == [False]
    encoded.end(first)
    encoded.end(first)
    assert encoded.encode([other]) == [False]
    # As of one that ended in SGLang's queue.
    encoded.let_go(second.cache_request_handle)
    assert encoded.to_json()["in_use"] == 0
    assert encoded.encode([other]) == [True]
    assert encoded.take(request(driver), asked(prompt)) == [0]
    encoded.check()


def test_what_is_encoded_stays_until_its_prompt_comes(driver: Driver) -> None:
    encoded, _, _ = held_by(30)
    prompt = wanted(ids(1, 20))
    assert encoded.encode([prompt, wanted(ids(2, 20))]) == [True, False]
    assert encoded.encode([wanted(ids(2, 20))]) == [False]
    encoded.check()
    clock.now += LEASE_S + 1
    assert encoded.encode([wanted(ids(2, 20))]) == [True]
    assert encoded.take(request(driver), asked(prompt)) == [0]
    # Of several samples none ends it.
    several = wanted(ids(3, 5))
    encoded.encode([several])
    req = request(driver)
    encoded.take(req, asked(several, strict=False))
    encoded.end(req)
    assert encoded.to_json()["in_use"] == 2
    encoded.check()


def test_a_prompt_gets_all_of_its_documents_or_none(driver: Driver) -> None:
    """Else those of several would wait for each other's."""
    encoded, _, _ = held_by(50)
    one, two = wanted(ids(1, 20), ids(2, 20)), wanted(ids(3, 20), ids(4, 20))
    assert encoded.encode([one, two]) == [True, False]
    assert encoded.to_json()["in_use"] == 2
    req = request(driver)
    assert encoded.take(req, asked(one)) == []
    assert encoded.encode([two]) == [False]
    encoded.end(req)
    assert encoded.encode([two]) == [True]
    # In parts, under one lease.
    encoded, _, _ = held_by(50)
    begun = wanted(ids(1, 20))
    assert encoded.encode([begun]) == [True]
    more = Wanted(begun.lease, None, asked(begun).documents, [ids(2, 20)])
    assert encoded.encode([more]) == [True]
    assert encoded.to_json()["in_use"] == 2
    too_much = Wanted(begun.lease, None, (), [ids(3, 20)])
    assert encoded.encode([too_much]) == [False]
    assert encoded.to_json()["in_use"] == 0
    encoded.check()


def test_what_has_no_room_is_not_encoded(driver: Driver) -> None:
    encoded, beside, _ = held_by(30)
    assert encoded.encode([wanted(ids(1, 20)), wanted(ids(2, 20)), wanted(ids(3, 10))]) == [
        True, False, True,
    ]  # fmt: skip
    assert encoded.encode([wanted(ids(2, 20))]) == [False]
    assert beside.read == [[20, 10]]
    assert encoded.to_json()["no_room"] == 2


def test_what_was_held_and_is_gone_is_told() -> None:
    encoded, _, _ = held_by(50)
    assert encoded.encode([wanted(ids(1, 20), held=["gone"])]) == [False]
    assert encoded.to_json()["in_use"] == 0


def test_rows_are_kept_apart_by_what_they_see(driver: Driver) -> None:
    encoded, _, _ = held_by(100)
    prompt = wanted(*(ids(i, 5) for i in range(3)))
    encoded.encode([prompt])
    names = asked(prompt).documents
    keys = set()
    for seen in (names, names[::-1], names[:2], names[:1]):
        req = request(driver)
        req.extra_key = "mine"
        encoded.take(req, EncodedRequest(seen))
        assert req.extra_key.startswith("mine\x1f")
        keys.add(req.extra_key)
    assert len(keys) == 4
    again = request(driver)
    again.extra_key = "mine"
    encoded.take(again, EncodedRequest(names))
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
    prompt = wanted(ids(1, 5))
    encoded.encode([prompt])
    req = request(driver)
    for name, value in change.items():
        setattr(req, name, value)
    with pytest.raises(PicRefused, match="not with encoded documents") as refused:
        encoded.take(req, asked(prompt))
    assert refused.value.status == 400


def test_what_is_encoded_in_one_go_is_bounded() -> None:
    encoded, beside, _ = held_by(1 << 20)
    for lengths in ([MAX + 1], [MAX, *[1] * (ENCODE_TOKENS // MAX)]):
        with pytest.raises(PicRefused, match="too much"):
            encoded.encode([wanted(*(ids(i, n) for i, n in enumerate(lengths)))])
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
    prompt = wanted(ids(1, 5))
    encoded.encode([prompt])
    seeing, plain = request(driver), request(driver)
    encoded.take(seeing, asked(prompt))
    batch = batch_of([plain, seeing], [3, 2])
    encoded.hand_over(batch, [plain, seeing])
    step = beside.steps.read(batch)
    assert step is not None and step.tokens.tolist() == [3, 4]
    for _ in range(2):
        batch = batch_of([plain, seeing])
        encoded.hand_over(batch, [plain, seeing])
        step, former = beside.steps.read(batch), step
        assert step is not None and step.tokens.tolist() == [1]
    # Nothing is arranged anew while the same rows decode.
    assert step is former
    encoded.hand_over(batch_of([seeing]), [seeing])
    step = beside.steps.read(batch_of([seeing]))
    assert step is not None and step.tokens.tolist() == [0]
    encoded.hand_over(batch_of([plain]), [plain])
    assert beside.steps.read(batch_of([plain])) is None
    with pytest.raises(PicIntegrityError, match="cannot be told"):
        encoded.hand_over(batch_of([seeing, seeing]), [seeing, seeing])
    assert encoded.give_up([plain, seeing]) == [seeing]
    assert beside.steps.read(batch) is None


def test_rows_that_cannot_be_told_apart_end_those_with_documents(driver: Driver) -> None:
    """They would else run without, or with another row's."""
    encoded, beside, _ = held_by(100)
    prompt = wanted(ids(1, 5))
    encoded.encode([prompt])
    seeing, plain = request(driver), request(driver)
    encoded.take(seeing, asked(prompt))
    driver.forest.encoded = encoded
    batch = SimpleNamespace(tree_cache=driver.cache, reqs=[plain, seeing])
    runner = SimpleNamespace(attn_backend=SimpleNamespace(set_plans=lambda rids, plans: None))
    told = batch_of([plain, seeing])
    sglang_hooks.set_positions(told, None, batch, runner)
    assert seeing.to_finish is None and beside.steps.read(told) is not None
    wrong = batch_of([seeing, seeing])
    sglang_hooks.set_positions(wrong, None, batch, runner)
    assert isinstance(seeing.to_finish, FINISH_ABORT) and seeing.to_finish.status_code == 500
    assert plain.to_finish is None and beside.steps.read(told) is None


def test_what_no_longer_counts_is_still_seen(driver: Driver) -> None:
    """A request that is to end may be retracted first, and run once more."""
    encoded, beside, _ = held_by(30)
    prompt = wanted(ids(1, 20))
    encoded.encode([prompt])
    req = request(driver)
    encoded.take(req, asked(prompt))
    encoded.let_go(req.cache_request_handle)
    assert encoded.encode([wanted(ids(2, 20))]) == [True]
    assert encoded.take(request(driver), asked(prompt)) == [0]
    batch = batch_of([req])
    encoded.hand_over(batch, [req])
    step = beside.steps.read(batch)
    assert step is not None and step.parts[0].kv.k.shape[1] == 20
    encoded.end(req)
    encoded.check()


def test_a_request_that_comes_anew_has_its_documents(driver: Driver) -> None:
    """SGLang pauses, and queues what has no token yet as if it had just come."""
    encoded, _, _ = held_by(30)
    prompt = wanted(ids(1, 20))
    encoded.encode([prompt])
    req = request(driver)
    assert encoded.take(req, asked(prompt)) == []
    key = req.extra_key
    assert encoded.take(req, asked(prompt)) == [] and req.extra_key == key
    encoded.end(req)
    assert encoded.to_json()["in_use"] == 0
    # Clients name requests, and several tokenizer workers may get one name twice.
    one, two = request(driver), request(driver)
    two.cache_request_handle = one.cache_request_handle
    assert encoded.take(one, asked(prompt)) == encoded.take(two, asked(prompt)) == []
    for req in (one, two):
        encoded.end(req)
        encoded.check()
    assert encoded.to_json()["in_use"] == 0


def scheduler_of(driver: Driver) -> Any:
    """As much of SGLang's as aborts what is in its queue."""
    scheduler = SimpleNamespace(
        tree_cache=driver.cache, waiting_queue=[], chunked_req=None, mm_receiver=None,
        dllm_config=None, disaggregation_mode=DisaggregationMode.NULL,
        beam_coordinator=SimpleNamespace(retire_group=lambda req: None),
        grammar_manager=SimpleNamespace(abort_requests=lambda asked: None),
        send_abort_output=lambda abort, req: None, collect_inflight_reqs=lambda: set(),
        enable_priority_scheduling=False, max_queued_requests=0,
    )  # fmt: skip
    release = sglang_scheduler.Scheduler._release_aborted_request
    scheduler._release_aborted_request = lambda req: release(scheduler, req)
    return scheduler


def test_what_ends_in_the_queue_is_told(driver: Driver) -> None:
    """By SGLang, to the cache; not by when Python collects it, which differs by rank."""
    encoded, _, _ = held_by(30)
    driver.forest.encoded = encoded
    prompt, scheduler = wanted(ids(1, 20)), scheduler_of(driver)
    abort = sglang_scheduler.Scheduler.abort_request
    encoded.encode([prompt])
    waits, kept = request(driver), request(driver)
    for req in (waits, kept):
        assert encoded.take(req, asked(prompt)) == []
        scheduler.waiting_queue.append(req)
    abort(scheduler, AbortReq(rid=waits.rid))
    assert scheduler.waiting_queue == [kept]
    assert encoded.to_json()["in_use"] == 1
    encoded.check()
    abort(scheduler, AbortReq(rid=kept.rid))
    assert encoded.to_json()["in_use"] == 0
    encoded.check()


@pytest.mark.parametrize("last", [True, False])
def test_what_is_retracted_is_kept_unless_it_is_to_end(driver: Driver, last: bool) -> None:
    """SGLang ends a request so for which there is no memory, even alone."""
    encoded, _, _ = held_by(30)
    driver.forest.encoded = encoded
    prompt = wanted(ids(1, 20))
    encoded.encode([prompt])
    req = request(driver)
    encoded.take(req, asked(prompt))
    assert driver.start(req)
    req.to_finish = FINISH_ABORT("no memory") if last else None
    release_kv_cache(req, driver.cache, checkpoint=False)
    driver.running.remove(req)
    assert encoded.to_json()["in_use"] == (0 if last else 1)
    encoded.end(req)


def test_ranks_that_differ_read_nothing() -> None:
    """What one of them holds another may not, and sums over both would never end."""
    driver = Driver(1, 256, PicConfig(min_segment=1))
    encoded, beside, _ = held_by(30)
    driver.forest.encoded = encoded
    waited: list[str] = []
    scheduler = SimpleNamespace(
        tree_cache=driver.cache,
        schedule_stream=SimpleNamespace(wait_stream=waited.append),
        forward_stream="forward",
    )
    prompt = wanted(ids(1, 20))
    lease = commands.Lease(prompt.lease, None, [], [20])

    def told() -> tuple[str, Answer | None]:
        hints = command_hints(commands.Encode([lease], clock.now))
        command = answer(scheduler, driver.request(ids(1, 20), None, hints), False)
        asks = driver.request([1, 2, 3], None, encoded_hints(asked(prompt)))
        assert command is not None
        return command.message, answer(scheduler, asks, False)

    assert told() == (DONE + '{"kept":[true]}', None)
    assert waited == ["forward"] and beside.read == [[20]]
    driver.forest.contained.distrust("ranks differ")
    command, refused = told()
    assert '"status":503' in command and "ranks differ" in command
    assert refused == Answer("pic.mode: ranks differ", 503)
    assert waited == ["forward"]


def test_leases_end_by_what_commands_say() -> None:
    """Of two ranks, which get the same commands at other times, and in which time goes by
    at other rates."""
    ranks = [Noted(), Noted()]
    made = [held_by(30, noted)[0] for noted in ranks]
    prompt, other = wanted(ids(1, 20)), wanted(ids(2, 20))
    for encoded in made:
        assert encoded.encode([prompt], 100.0) == [True]
        assert encoded.encode([other], 100.0 + LEASE_S - 0.1) == [False]
        # Of a front that is behind.
        assert encoded.encode([other], 3.0) == [False]
        assert encoded.encode([other], 100.0 + LEASE_S) == [True]
        assert encoded.encode([prompt], 3.0) == [False]
    assert ranks[0].events == ranks[1].events
    name, second = (document_id(None, ids(i, 20)) for i in (1, 2))
    assert ("kept", name) in ranks[0].events
    assert ranks[0].events[-4:] == [
        ("refused", other.lease), ("lost", name), ("kept", second), ("refused", prompt.lease),
    ]  # fmt: skip


sizes = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes, room=st.integers(1, 60), data=st.data())
def test_whatever_happens_the_sums_hold(
    driver: Driver, sizes: list[int], room: int, data: Any
) -> None:
    encoded, _, store = held_by(room)
    running: list[Any] = []
    for i, size in enumerate(sizes):
        prompt = wanted(ids(i, size), ids(max(0, i - 2), sizes[max(0, i - 2)]))
        (kept,) = encoded.encode([prompt])
        if kept and data.draw(st.booleans()):
            running.append(request(driver))
            assert encoded.take(running[-1], asked(prompt)) == []
        if running and data.draw(st.booleans()):
            encoded.end(running.pop(data.draw(st.integers(0, len(running) - 1))))
        if data.draw(st.booleans()):
            clock.now += LEASE_S + 1
        encoded.check()
        assert store.nbytes <= store.budget
    for req in running:
        encoded.end(req)
    clock.now += LEASE_S + 1
    encoded.encode([])
    assert encoded.to_json()["in_use"] == 0
    held = len(store.names(DOCUMENT))
    assert len(encoded.flush(None)) == held and store.nbytes == 0
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
    told = make_encoded_report(7, prompt[1], names=["a", "b"], cached=2).to_json()
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
        leases = fields["leases"]
        lengths = [length for lease in leases for length in lease["lengths"]]
        assert sum(lengths) == len(fields["ids"])
        self._busy = True
        await asyncio.sleep(0)
        self._busy = False
        if self.error is not None:
            raise self.error
        self.sent.append(lengths)
        self.tenants += [lease["tenant"] for lease in leases]
        kept = []
        for lease in leases:
            kept.append(sum(lease["lengths"]) <= self.room)
            self.room -= sum(lease["lengths"]) if kept[-1] else 0
        return [{"kept": kept}]


def encoder(scheduler: Scheduler, *, waiting: int = 64, longest: int = 1 << 20) -> Encoder:
    queue: FairQueue[Job] = FairQueue(64, 64, waiting)
    return Encoder(scheduler, queue, MAX, lambda: longest)


def doc(seed: int, count: int) -> tuple[int, ...]:
    return tuple(ids(seed, count))


def encode(front: Encoder, *documents: tuple[int, ...], tenant: str | None = None) -> Any:
    return front.encode(f"lease-{next(_leases)}", tenant, 0, [], documents)


def test_prompts_go_together() -> None:
    async def run() -> None:
        scheduler = Scheduler()
        front = encoder(scheduler)
        kept = await asyncio.gather(
            encode(front, doc(1, 10), doc(2, 20), doc(1, 10)), encode(front, doc(3, 30))
        )
        assert kept == [True, True]
        assert scheduler.sent == [[10, 20, 30]]
        assert await encode(front, doc(4, 10)) is True
        assert await encode(front) is True
        assert scheduler.sent[1:] == [[10]]

    asyncio.run(run())


documents_of = st.lists(st.integers(1, MAX), min_size=1, max_size=30)


@settings(max_examples=30)
@given(prompts=st.lists(documents_of, min_size=1, max_size=5), longest=st.integers(MAX, 900))
def test_a_batch_is_within_the_bound_and_all_are_sent(
    prompts: list[list[int]], longest: int
) -> None:
    async def run() -> None:
        scheduler = Scheduler()
        front = encoder(scheduler, longest=longest)
        numbers = itertools.count()
        made = [[doc(next(numbers), size) for size in one] for one in prompts]
        assert all(await asyncio.gather(*(encode(front, *one) for one in made)))
        for lengths in scheduler.sent:
            assert sum(lengths) <= longest
            assert len(lengths) * max(lengths) <= ENCODE_TOKENS
        sent = [length for lengths in scheduler.sent for length in lengths]
        assert sorted(sent) == sorted(length for one in prompts for length in one)

    asyncio.run(run())


def test_tenants_take_turns() -> None:
    async def run() -> None:
        scheduler = Scheduler()
        front = encoder(scheduler)
        asking = [encode(front, doc(i, 10), tenant="a") for i in range(5)]
        asking += [encode(front, doc(i, 10), tenant="b") for i in range(2)]
        await asyncio.gather(*asking)
        assert scheduler.tenants[:4] == ["a", "b", "a", "b"]

    asyncio.run(run())


def test_what_does_not_fit_and_what_fails_is_told() -> None:
    async def run() -> None:
        scheduler = Scheduler(room=15)
        front = encoder(scheduler)
        asking = asyncio.gather(encode(front, doc(1, 10)), encode(front, doc(2, 20)))
        assert await asking == [True, False]
        scheduler.error = PicRefused(409, "no", "pic.mode")
        with pytest.raises(PicRefused, match="no"):
            await encode(front, doc(3, 10))
        scheduler.error = None
        assert await encode(front, doc(4, 5)) is True
        # Of a prompt that needs several goes, the first of which fails, no more is sent.
        many = [doc(i, MAX) for i in range(200)]
        assert await encode(front, *many) is False
        assert len(scheduler.sent[-1]) < 200
        short = encoder(Scheduler(), waiting=1)
        asking = asyncio.gather(encode(short, doc(1, 10)), encode(short, doc(2, 10)))
        assert await asking == [True, None]

    asyncio.run(run())


def test_a_client_that_leaves_takes_nothing_with_it() -> None:
    async def run() -> None:
        scheduler = Scheduler()
        front = encoder(scheduler)
        leaving = asyncio.ensure_future(encode(front, doc(1, 10)))
        staying = asyncio.ensure_future(encode(front, doc(2, 10)))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying is True
        assert scheduler.sent == [[10, 10]]

    asyncio.run(run())
