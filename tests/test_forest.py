"""The forest under pressure, in a real tree cache without a model."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest
from driver import Driver
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicRefused
from sglang_pic.forest import links as links_module
from sglang_pic.forest.keys import namespace, segment_id
from sglang_pic.forest.turns import Core, Turn, Turns
from sglang_pic.manage import segments

KV = 16  # bytes a token, as the driver says


def _tokens(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(1, 1000), k=n)


def _config(**settings: Any) -> PicConfig:
    return PicConfig(**{"min_segment": 1, "seam": 2, **settings})


def _name(driver: Driver, ids: list[int], salt: str | None = None) -> str:
    return segment_id(namespace(driver.forest.segments.context, salt), None, ids)


class Machine(RuleBasedStateMachine):
    """Compile, link, abort, release, evict, pin, grow, flush, in any order, against
    a simple model: what is compiled, named and pinned, and by whom."""

    @initialize(page=st.sampled_from([1, 4]), context=st.sampled_from([0, 4]))
    def begin(self, page: int, context: int) -> None:
        self.driver = Driver(page, 256, _config(compile_context=tuple(range(2000, 2000 + context))))
        self.known: dict[tuple[str | None, str], list[int]] = {}
        self.pinned: set[tuple[str | None, str]] = set()
        # Of linked requests: spans, salt, policy.
        self.links: dict[str, tuple[list[tuple[int, int]], str | None, str]] = {}
        self.turns: list[tuple[list[int], list[tuple[int, int]], str | None, str]] = []

    def _pick(self, seed: int, salt: str | None) -> list[int] | None:
        mine = [ids for (whose, _), ids in sorted(self.known.items(), key=str) if whose == salt]
        return mine[seed % len(mine)] if mine else None

    salts = st.sampled_from([None, "a"])
    seeds = st.integers(0, 9)

    @rule(seed=seeds, n=st.integers(1, 40), salt=salts, named=st.booleans())
    def compile(self, seed: int, n: int, salt: str | None, named: bool) -> None:
        ids = _tokens(seed, n)
        if self.driver.compile(ids, salt, named=named):
            self.known[salt, _name(self.driver, ids, salt)] = ids

    @rule(seed=seeds, n=st.integers(1, 20), salt=salts)
    def grow(self, seed: int, n: int, salt: str | None) -> None:
        ids = self._pick(seed, salt)
        if ids is not None and len(ids) < 80:
            ids = ids + _tokens(seed + 100, n)
            if self.driver.compile(ids, salt):
                self.known[salt, _name(self.driver, ids, salt)] = ids

    @rule(
        chosen=st.lists(st.integers(0, 20), min_size=2, max_size=4, unique=True),
        before=st.integers(0, 2),
        salt=salts,
        evict=st.sampled_from([0, 60, 250]),
    )
    def meet(self, chosen: list[int], before: int, salt: str | None, evict: int) -> None:
        parts: list[list[int]] = []
        for seed in chosen:
            segment = self._pick(seed, salt)
            if segment is not None and segment not in parts:
                parts.append(segment)
        if len(parts) > 1 and sum(map(len, parts)) < 200:
            self.driver.company(
                parts, _tokens(500, before), salt, between=lambda: evict and self.evict(evict)
            )

    @rule(
        chosen=st.lists(st.integers(0, 20), min_size=1, max_size=3),
        before=st.integers(0, 6),
        question=st.integers(0, 6),
        salt=salts,
        policy=st.sampled_from(["seam", "none", "graded"]),
        evict=st.sampled_from([0, 60, 250]),
    )
    def link(
        self,
        chosen: list[int],
        before: int,
        question: int,
        salt: str | None,
        policy: str,
        evict: int,
    ) -> None:
        ids, spans = _tokens(500, before), []
        for seed in chosen:
            segment = self._pick(seed, salt)
            if segment is not None:
                spans.append((len(ids), len(ids) + len(segment)))
                ids = ids + segment
        ids = ids + _tokens(501, question)
        if not spans:
            return
        req = self.driver.link(ids, spans, salt, policy=policy)

        # SGLang evicts nothing between a match and the lock on it. But a request is
        # asked what it misses, waits, is matched, finds no room, waits, and is matched
        # again; whenever it waits, pages may go.
        def wait() -> None:
            cache = self.driver.cache
            cache.unlock(cache.lock(req.last_node))
            self.evict(evict)
            req.init_next_round_input(cache)

        if evict:
            self.driver.forest.arrivals.send_back(req)
            self.evict(evict)
        if self.driver.start(req, between=wait if evict else None):
            self.links[req.rid] = (spans, salt, policy)

    @precondition(lambda self: getattr(self, "turns", None))
    @rule(
        which=st.integers(0, 9),
        cut=st.integers(0, 3),
        add=st.one_of(st.none(), st.integers(0, 9)),
        question=st.integers(1, 6),
    )
    def next_turn(self, which: int, cut: int, add: int | None, question: int) -> None:
        ids, spans, salt, policy = self.turns[-1 - which % len(self.turns)]
        ids = ids[: len(ids) - cut]
        spans = [(start, end) for start, end in spans if end <= len(ids)]
        segment = self._pick(add, salt) if add is not None else None
        if segment is not None:
            spans = [*spans, (len(ids), len(ids) + len(segment))]
            ids = ids + segment
        ids = ids + _tokens(600 + question, question)
        if spans and len(ids) < 200:
            req = self.driver.link(ids, spans, salt, policy=policy)
            if self.driver.start(req):
                self.links[req.rid] = (spans, salt, policy)

    @rule(seed=seeds, n=st.integers(1, 30), salt=salts)
    def ask(self, seed: int, n: int, salt: str | None) -> None:
        self.driver.start(self.driver.request(_tokens(seed, n), salt))

    @precondition(lambda self: hasattr(self, "driver") and self.driver.running)
    @rule(which=st.integers(0, 9), token=st.integers(1, 999), times=st.integers(1, 6))
    def decode(self, which: int, token: int, times: int) -> None:
        req = self.driver.running[which % len(self.driver.running)]
        for _ in range(times):
            self.driver.decode(req, token)

    @precondition(lambda self: hasattr(self, "driver") and self.driver.running)
    @rule(which=st.integers(0, 9), abort=st.booleans())
    def finish(self, which: int, abort: bool) -> None:
        req = self.driver.running[which % len(self.driver.running)]
        self.driver.finish(req, abort=abort)
        if req.rid in self.links:
            self.turns.append(([*req.origin_input_ids, *req.output_ids], *self.links[req.rid]))

    @rule(n=st.integers(1, 100))
    def evict(self, n: int) -> None:
        self.driver.cache.evict(EvictParams(num_tokens=n))

    @rule(seed=seeds, salt=salts, whose=salts)
    def pin(self, seed: int, salt: str | None, whose: str | None) -> None:
        ids = self._pick(seed, whose)
        if ids is None:
            return
        name = _name(self.driver, ids, whose)
        try:
            card = segments.pin(self.driver.forest, name, salt)
        except PicRefused as refused:
            assert refused.status == (404 if salt != whose else refused.status)
        else:
            assert salt == whose and card["pinned"]
            self.pinned.add((whose, name))

    @rule(seed=seeds, salt=salts)
    def unpin(self, seed: int, salt: str | None) -> None:
        mine = sorted((p for p in self.pinned if p[0] == salt), key=str)
        if mine:
            whose, name = mine[seed % len(mine)]
            segments.unpin(self.driver.forest, name, whose)
            self.pinned.discard((whose, name))

    @rule(seed=seeds, salt=salts)
    def delete(self, seed: int, salt: str | None) -> None:
        ids = self._pick(seed, salt)
        if ids is None:
            return
        name = _name(self.driver, ids, salt)
        try:
            segments.delete(self.driver.forest, name, salt)
        except PicRefused as refused:
            assert refused.status in (404, 409)
        else:
            assert (salt, name) not in self.pinned
            assert segments.held(self.driver.forest, [name], salt) == [False]

    @rule(salt=salts)
    def flush(self, salt: str | None) -> None:
        others = {None: "a", "a": None}[salt]
        before = segments.list_all(self.driver.forest, others)
        segments.flush(self.driver.forest, salt)
        assert segments.list_all(self.driver.forest, others) == before

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.driver.check()
        for salt, name in self.pinned:
            assert segments.held(self.driver.forest, [name], salt) == [True]


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestForest = Machine.TestCase


def _ask(driver: Driver, ids: list[int], spans: list[tuple[int, int]], answer: list[int]) -> Any:
    """One turn from start to end; its report."""
    req = driver.link(ids, spans)
    assert driver.start(req)
    report = req.customized_info["pic"][0]
    for token in [*answer, 0]:
        assert driver.decode(req, token)
    driver.check()
    driver.finish(req)
    driver.check()
    return report


@pytest.mark.parametrize("page", [1, 4])
def test_the_next_turn_computes_what_is_new(page: int) -> None:
    driver = Driver(page, 2048, _config())
    documents = [_tokens(i, 40) for i in range(3)]
    for document in documents:
        assert driver.compile(document)
    ids, spans = _tokens(50, 8), []
    for document in documents[:2]:
        spans.append((len(ids), len(ids) + 40))
        ids = ids + document
    ids = ids + _tokens(51, 9)
    answer = _tokens(52, 11)
    first = _ask(driver, ids, spans, answer)
    assert first["turn_tokens"] == 0 and first["exactness"] == "composed"

    # No further segment: the path grows; twice.
    for turn in range(2):
        before = len(ids) + len(answer)
        ids = ids + answer + _tokens(60 + turn, 7)
        answer = _tokens(70 + turn, 5)
        report = _ask(driver, ids, spans, answer)
        assert report["exactness"] == "composed" and report["turn_tokens"] > 0
        assert len(ids) - before <= report["tokens_computed"] < len(ids) - before + page

    # A further segment: a path of its own behind it; and one more turn.
    before = len(ids) + len(answer)
    ids = ids + answer + _tokens(80, 3)
    spans = [*spans, (len(ids), len(ids) + 40)]
    ids = ids + documents[2] + _tokens(81, 4)
    core = report["seam"]
    report = _ask(driver, ids, spans, answer := _tokens(82, 6))
    new = len(ids) - before
    assert new - 40 < report["tokens_computed"] < new - 40 + core + 3 * page + 4
    before = len(ids) + len(answer)
    ids = ids + answer + _tokens(83, 5)
    report = _ask(driver, ids, spans, [])
    assert len(ids) - before <= report["tokens_computed"] < len(ids) - before + 2 * page


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("context", [0, 4])
def test_a_turn_is_as_exact_as_the_row_that_made_it(page: int, context: int) -> None:
    begin = _tokens(40, context)
    driver = Driver(page, 2048, _config(compile_context=tuple(begin), min_segment=8))
    opening, short, other = _tokens(41, 40), _tokens(42, 5), _tokens(43, 40)
    for one in (opening, other):
        assert driver.compile(one)
    ids, spans = [*begin, *opening, *_tokens(44, 9)], [(context, context + 40)]
    reports = [_ask(driver, ids, spans, [])]
    # The same prompt again; the next turn, which names what is too short to compile; a
    # turn that links a segment compiled elsewhere, and the one behind it.
    reports.append(_ask(driver, ids, spans, answer := _tokens(45, 6)))
    ids = [*ids, *answer]
    for document in (short, other):
        spans = [*spans, (len(ids), len(ids) + len(document))]
        ids = [*ids, *document, *_tokens(46, 7)]
        reports += [_ask(driver, ids, spans, []) for _ in range(2)]
    assert [report["exactness"] for report in reports] == 4 * ["exact"] + 2 * ["composed"]
    assert reports[0]["turn_tokens"] == 0 and all(report["turn_tokens"] for report in reports[1:])


def test_a_turn_is_found_by_nobody_else() -> None:
    driver = Driver(1, 2048, _config())
    document, other = _tokens(0, 40), _tokens(1, 40)
    for one in (document, other):
        assert driver.compile(one) and driver.compile(one, "a")
    question, answer = _tokens(2, 9), _tokens(3, 5)
    ids = [*document, *other, *question]
    spans = [(0, 40), (40, 80)]
    _ask(driver, ids, spans, answer)
    follow = [*ids, *answer, *_tokens(4, 6)]

    def turn_tokens(*args: Any, **options: Any) -> int:
        req = driver.link(*args, **options)
        assert driver.start(req)
        driver.check()
        found = req.customized_info["pic"][0]["turn_tokens"]
        driver.finish(req, abort=True)
        return found

    assert turn_tokens(follow, spans) > 0
    # Another tenant, other segments, another order, another seam, an edited question.
    assert turn_tokens(follow, spans, "a") == 0
    assert turn_tokens(follow, spans[1:]) == 0
    swapped = [*other, *document, *follow[80:]]
    assert turn_tokens(swapped, spans) == 0
    assert turn_tokens(follow, spans, seam=4) == 0
    edited = [*ids[:-1], 7777, *follow[len(ids) :]]
    assert turn_tokens(edited, spans) < turn_tokens(follow, spans)
    # Nor is it a prefix of an ordinary request.
    req = driver.request(follow)
    assert driver.start(req) and req.prefix_len == 0
    driver.finish(req)


def test_a_turn_is_not_reused_behind_a_core_it_did_not_see() -> None:
    """The same tokens go on, but a segment stands among them now."""
    driver = Driver(1, 2048, _config())
    segment = [1, 2, *_tokens(5, 40), 3]
    for one in (_tokens(0, 40), segment):
        assert driver.compile(one)
    ids, spans = [*_tokens(0, 40), *_tokens(1, 9)], [(0, 40)]
    _ask(driver, [*ids, 1, 2, 3, 4, 5, 6, 7], spans, [])
    named = [*spans, (len(ids), len(ids) + len(segment))]
    req = driver.link([*ids, *segment, 4, 5, 6], named, seam=2)
    assert driver.start(req)
    driver.check()
    assert req.customized_info["pic"][0]["turn_tokens"] > 0


def test_segments_that_begin_alike_share_pages_and_growing_ones_extend() -> None:
    driver = Driver(4, 512, _config())
    begin = _tokens(0, 41)
    assert driver.compile(begin)
    held = driver.forest.total_tokens
    assert held == 40
    grown = [*begin, *_tokens(1, 23)]
    assert driver.compile(grown)
    assert driver.forest.total_tokens == 64
    branch = [*begin[:20], *_tokens(2, 20)]
    assert driver.compile(branch)
    assert driver.forest.total_tokens == 64 + 20
    # One that differs in its last, partial page alone has the very same ones.
    twin = [*begin[:40], 999]
    assert driver.compile(twin)
    assert driver.forest.total_tokens == 64 + 20
    # Each is whole; deleting one leaves the others.
    names = [_name(driver, ids) for ids in (begin, grown, branch)]
    assert segments.held(driver.forest, names, None) == [True] * 3
    assert segments.delete(driver.forest, names[1], None)["freed_tokens"] == 24
    assert segments.held(driver.forest, names, None) == [True, False, True]
    driver.check()
    assert segments.delete(driver.forest, _name(driver, twin), None)["freed_tokens"] == 0
    assert segments.held(driver.forest, names[:1], None) == [True]
    assert segments.delete(driver.forest, names[0], None)["freed_tokens"] == 20
    assert segments.held(driver.forest, names, None) == [False, False, True]
    driver.check()


def _linked_hits(driver: Driver, chosen: list[list[int]]) -> int:
    """Link these segments, compiling what is missing; how many were there."""
    ids: list[int] = []
    spans = []
    for segment in chosen:
        spans.append((len(ids), len(ids) + len(segment)))
        ids = ids + segment
    req = driver.link([*ids, 1, 2, 3], spans)
    missing = [i for i in driver.forest.arrivals.send_back(req) if i >= 0]
    for i in missing:
        assert driver.compile(chosen[i])
    assert driver.start(req)
    # Whatever was compiled for it is still there.
    assert all(part["hit"] for part in req.customized_info["pic"][0]["segments"])
    driver.finish(req)
    return len(chosen) - len(missing)


def test_reuse_stays_flat_when_the_corpus_is_larger_than_the_cache() -> None:
    """50 batches of new questions; two of four documents of each are asked for once."""
    draw = random.Random(0)
    driver = Driver(1, 1000, _config())
    corpus = [_tokens(i, 50) for i in range(100)]
    curve = []
    for batch in range(50):
        hits = 0
        for question in range(4):
            hot = [corpus[min(int(draw.paretovariate(0.9)) - 1, 99)] for _ in range(2)]
            once = [_tokens(10_000 + 100 * batch + 10 * question + i, 50) for i in range(2)]
            hits += _linked_hits(driver, [*hot, *once])
        curve.append(hits / 8)
    driver.check()
    early, late = sum(curve[5:25]) / 20, sum(curve[30:]) / 20
    assert late > 0.7 and late > early - 0.05, curve
    assert driver.forest.nodes.fallbacks == 0


@pytest.mark.parametrize("page", [1, 4])
def test_budgets_are_kept_and_refusals_say_why(page: int) -> None:
    driver = Driver(page, 1 << 17, _config(kv_mib=1, pin_share=0.3))  # 65536 tokens
    limit = driver.forest.budgets.limit.kv
    assert limit == 1 << 20
    documents = [_tokens(i, 4096) for i in range(20)]
    for document in documents:
        assert driver.compile(document, named=True)
        assert segments.budgets(driver.forest)["kv"]["segment"] <= limit
    driver.check()
    held = [d for d in documents if segments.held(driver.forest, [_name(driver, d)], None)[0]]
    assert len(held) == 16
    with pytest.raises(PicRefused, match="bytes of kv") as refused:
        segments.reserve(driver.forest, [4096] * 17)
    assert refused.value.status == 507
    assert segments.reserve(driver.forest, [4096] * 16) == {}
    # A third for one tenant: four of sixteen; half for all: eight.
    for document in held[:4]:
        segments.pin(driver.forest, _name(driver, document), None)
    with pytest.raises(PicRefused, match="this tenant may pin") as refused:
        segments.pin(driver.forest, _name(driver, held[4]), None)
    assert refused.value.status == 507
    for tenant in ("a", "b"):
        for document in documents[:4]:
            assert driver.compile(document, tenant, named=True)
    for document in documents[:4]:
        segments.pin(driver.forest, _name(driver, document, "a"), "a")
    with pytest.raises(PicRefused, match="all tenants together"):
        segments.pin(driver.forest, _name(driver, documents[0], "b"), "b")
    # What is pinned stays, whatever comes.
    for i in range(40):
        driver.compile(_tokens(100 + i, 4096))
    assert all(segments.held(driver.forest, [_name(driver, d) for d in held[:4]], None))
    driver.check()
    with pytest.raises(PicRefused, match="pinned") as refused:
        segments.delete(driver.forest, _name(driver, held[0]), None)
    assert refused.value.status == 409
    stats = segments.stats(driver.forest)
    assert stats["refused"]["quota"] == 2 and stats["refused"]["budget"] == 1
    assert stats["pins"] == 8


def test_no_tenant_sees_or_touches_what_is_anothers() -> None:
    driver = Driver(1, 1024, _config())
    document = _tokens(0, 50)
    assert driver.compile(document, "a")
    mine = _name(driver, document, "a")
    assert mine != _name(driver, document)
    for other in (None, "", "b"):
        for act in (segments.get, segments.pin, segments.unpin, segments.delete):
            for name in (mine, "0" * 32):
                with pytest.raises(PicRefused) as refused:
                    act(driver.forest, name, other)
                assert refused.value.to_json() == {
                    "status": 404, "message": "no such segment", "field": "id",
                }  # fmt: skip
        assert segments.list_all(driver.forest, other) == []
        assert segments.flush(driver.forest, other) == {
            "segments": 0, "documents": 0, "freed_tokens": 0,
        }  # fmt: skip
        req = driver.link([*document, 1], [(0, 50)], other)
        explained = driver.forest.arrivals.explain(req)
        assert not explained["segments"][0]["hit"] and explained["tokens_to_compile"] == 50
        assert explained["segments"][0]["reason"] == "not_compiled"
    assert segments.held(driver.forest, [mine], "a") == [True]
    req = driver.link([*document, 1], [(0, 50)], "a")
    assert driver.forest.arrivals.explain(req)["segments"][0]["hit"]


def test_what_is_held_as_a_prefix_needs_no_compile() -> None:
    """Every token but the last, or as many as make whole pages; one less is not it."""
    for page in (1, 16):
        driver = Driver(page, 1024, _config())
        prompt = _tokens(0, 100)
        assert driver.start(driver.request(prompt))
        driver.finish(driver.running[0])
        assert driver.forest.arrivals.missing(driver.link(prompt, [(10, 90)])) == []
        assert driver.forest.arrivals.send_back(driver.link(prompt, [(10, 90)])) == []
        longer = [*prompt, *_tokens(1, 20)]
        assert driver.forest.arrivals.missing(driver.link(longer, [(10, 90)])) == [0]
        other = [*prompt[:97], *_tokens(2, 3)]
        assert driver.forest.arrivals.missing(driver.link(other, [(10, 90)])) == (
            [0] if page == 1 else []
        )
        assert 0 in driver.forest.arrivals.missing(driver.link(prompt, [(10, 90)], "other tenant"))


def test_what_is_held_counts_as_compiled_by_name() -> None:
    driver = Driver(1, 1024, _config())
    document = _tokens(0, 50)
    assert driver.compile(document, "a")
    mine = _name(driver, document, "a")
    names = [mine, "0" * 32]
    assert segments.name(driver.forest, names, "a", 4) == [True, False]
    assert segments.name(driver.forest, names, "b", 4) == [False, False]
    record = driver.forest.segments.record(mine, "a")
    assert record is not None and record.named and record.hits == 0
    driver.check()


def test_a_repeated_compile_changes_no_count() -> None:
    driver = Driver(1, 1024, _config())
    for _ in range(3):
        assert driver.compile(_tokens(0, 100), named=True)
        assert driver.request(_tokens(0, 30)) and driver.start(driver.request(_tokens(1, 30)))
        driver.finish(driver.running[0])
        kv = segments.budgets(driver.forest)["kv"]
        assert (kv["segment"], kv["prefix"]) == (100 * KV, 30 * KV)
        driver.check()


def test_a_fresh_segment_waits_for_its_link_through_failed_admissions() -> None:
    driver = Driver(1, 200, _config())
    assert driver.start(driver.request(_tokens(9, 60)))
    driver.finish(driver.running[0])
    segment = _tokens(0, 50)
    assert driver.compile(segment)
    req = driver.link([*segment, 1, 2], [(0, 50)])
    for _ in range(3):
        req.init_next_round_input(driver.cache)
        driver.cache.unlock(driver.cache.lock(req.last_node))
    driver.cache.evict(EvictParams(num_tokens=40))
    assert segments.held(driver.forest, [_name(driver, segment)], None) == [True]
    assert driver.start(req)
    driver.finish(req)
    driver.cache.evict(EvictParams(num_tokens=200))
    assert segments.held(driver.forest, [_name(driver, segment)], None) == [False]


def test_what_is_there_waits_with_a_link_for_what_is_compiled() -> None:
    driver = Driver(1, 200, _config())
    here, absent = _tokens(0, 40), _tokens(1, 40)
    assert driver.compile(here, named=True)
    req = driver.link([*here, *absent, 1, 2], [(0, 40), (40, 80)])
    assert driver.forest.arrivals.send_back(req) == [1]
    assert driver.compile(absent)
    # Worth more than either, and yet not at their cost.
    for _ in range(4):
        assert driver.start(driver.request(_tokens(9, 60)))
        driver.finish(driver.running[0])
    driver.cache.evict(EvictParams(num_tokens=40))
    assert driver.start(req)
    assert all(part["reason"] == "hit" for part in req.customized_info["pic"][0]["segments"])
    driver.check()
    driver.finish(req)
    driver.cache.evict(EvictParams(num_tokens=200))
    assert segments.list_all(driver.forest, None) == []
    driver.check()


def test_a_flush_finds_what_a_lookup_has_split() -> None:
    driver = Driver(1, 200, _config())
    assert driver.start(driver.request(_tokens(0, 40), "a"))
    driver.finish(driver.running[0])
    other = driver.request(_tokens(0, 20), "a")
    other.init_next_round_input(driver.cache)
    assert segments.flush(driver.forest, "a")["freed_tokens"] == 40
    driver.check()


def test_what_sglang_evicts_itself_frees_what_stood_in_front() -> None:
    driver = Driver(1, 200, _config())
    begin = _tokens(0, 30)
    for ids in (begin, [*begin, *_tokens(1, 20)]):
        assert driver.start(driver.request(ids))
        driver.finish(driver.running[0])
    order = driver.forest.nodes
    assert order._order.park() is not None  # the inner one comes up, and is put aside
    UnifiedRadixCache._evict(driver.cache, EvictParams(num_tokens=15))
    assert order.evict(lambda freed: freed >= 30)[ComponentType.FULL] == 30
    driver.check()


def test_many_cores_are_named_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    blake2b = hashlib.blake2b
    monkeypatch.setattr(hashlib, "blake2b", lambda *a, **o: digests.append(0) or blake2b(*a, **o))
    cores = [Core(i, i + 1, "s", b"d") for i in range(1024)]
    turns = Turns()
    turn = Turn(("t",), tuple(cores[:700]))
    turns.add(turn, "s")
    digests.clear()
    assert turns.longest(("t",), cores, None, 0) == turn
    assert len(digests) == 1
    assert turns.longest(("u",), cores, None, 0) is None
    assert turns.longest(("t",), cores, turn.salt, 3) is None


# -- plans that are kept while a request waits -------------------------------------------


def _planned(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Reports as they are made: of each plan, or reason for none, one."""
    made: list[Any] = []
    usual = links_module.make_report

    def make_report(*args: Any, **kwargs: Any) -> Any:
        made.append(usual(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(links_module, "make_report", make_report)
    return made


def _waiting(driver: Driver, **options: Any) -> tuple[Any, list[list[int]]]:
    """A link of two segments, of which the first is held, that SGLang has looked at."""
    documents = [_tokens(i, 40) for i in range(2)]
    assert driver.compile(documents[0], named=True)
    req = driver.link([*documents[0], *documents[1], 1, 2], [(0, 40), (40, 80)], **options)
    req.init_next_round_input(driver.cache)
    return req, documents


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "relocate"}, {"policy": "full"}, {"require_exact": True}, {"link": False}],
    ids=str,
)
def test_nothing_is_planned_anew_while_nothing_changes(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(1, 256, _config())
    made = _planned(driver, monkeypatch)
    req, _ = _waiting(driver, **options)
    # What others hold, use and lose changes nothing.
    assert driver.compile(_tokens(7, 30)) and driver.start(driver.request(_tokens(8, 30)))
    driver.finish(driver.running[0])
    for _ in range(5):
        req.init_next_round_input(driver.cache)
    assert len(made) == 1
    linked = not options or "mode" in options
    assert [one.hit for one in made[0].segments] == [linked, False]


def test_a_plan_goes_with_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(1, 256, _config())
    made = _planned(driver, monkeypatch)
    req, _ = _waiting(driver)
    driver.cache.evict(EvictParams(num_tokens=256))
    # Somebody else's tokens, where its were.
    assert driver.compile(_tokens(9, 120))
    assert driver.start(req)
    assert [[one.hit for one in report.segments] for report in made] == [[True, False], [False] * 2]
    assert driver.tokens_seen(req) == list(req.origin_input_ids)
    driver.check()


def test_a_plan_is_made_anew_for_what_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that it lacked, a turn, a longer ordinary prefix."""
    driver = Driver(1, 512, _config())
    made = _planned(driver, monkeypatch)
    req, documents = _waiting(driver)
    assert driver.compile(documents[1], named=True)
    req.init_next_round_input(driver.cache)
    assert [one.hit for one in made[-1].segments] == [True, True]
    other = driver.link(req.origin_input_ids, [(0, 40), (40, 80)])
    assert driver.start(other)
    driver.finish(other)
    before = len(made)
    req.init_next_round_input(driver.cache)
    assert len(made) == before + 1 and made[-1].turn_tokens > 0
    assert driver.start(driver.request(req.origin_input_ids))
    driver.finish(driver.running[0])
    req.init_next_round_input(driver.cache)
    assert made[-1].prefix_tokens == len(req.origin_input_ids) - 1
    assert driver.start(req)
    driver.check()


def test_no_plan_is_kept_of_a_row_that_is_gone() -> None:
    driver = Driver(1, 256, _config())
    req, _ = _waiting(driver)
    assert driver.start(req)
    driver.finish(req)
    link = driver.forest.links.of(req)
    assert link is not None and link.plan is link.kept is link.found is None


def test_a_forest_that_is_trusted_no_more_hands_out_no_plan() -> None:
    driver = Driver(1, 256, _config())
    req, _ = _waiting(driver)
    driver.forest.contained.refusal = "in this test"
    assert driver.start(req)
    assert req.customized_info["pic"][0]["reason"] == "in this test"


@pytest.mark.parametrize("page", [1, 4])
def test_a_turn_is_remembered_as_long_as_its_pages(page: int) -> None:
    driver = Driver(page, 512, _config())
    segment = _tokens(1, 40)
    driver.compile(segment)
    ids = [*_tokens(2, 8), *segment, *_tokens(3, 16)]
    for more in (0, 12, 24):
        req = driver.link([*ids, *_tokens(4, more)], [(8, 48)])
        assert driver.start(req)
        driver.finish(req)
    turns = driver.forest.conversations._turns
    assert len(turns._turns) == 1
    # A path that grew goes leaf by leaf.
    for _ in range(200):
        driver.cache.evict(EvictParams(num_tokens=page))
        held = driver.forest.nodes.tokens["turn"]
        assert bool(turns) == (held > 0)
        driver.check()
    assert not turns
