"""Capture and link of one gated-delta-net layer against a single pass over the prompt.

At the first layer a link is exact for heads of at least 3 tokens (the width of
the convolution less one), whatever the segments, chunks and requests in a batch.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pic.forest.kept import Kept
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.linear import delta, gdn, packed
from sglang_pic.linear.capture import Capture, CaptureRow, build_capture
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.state import CoreState
from sglang_pic.linear.states import PackedStates
from sglang_pic.linear.step import LinkRow, build_link, has_core, runs_of
from sglang_pic.link.plan import LinkPlan, SegmentHit, make_plan, reuse_turns
from sglang_pic.link.policy import LinkOptions, Outline, Seam
from sglang_pic.platforms import linear_kernels

HEADS, KEY_HEADS, DK, DV = 4, 2, 8, 6
CHANNELS = 2 * KEY_HEADS * DK + HEADS * DV
SHAPE = LinearShape(1, HEADS, DK, DV, CHANNELS, 3, scalar=False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Torch kernels in the place of SGLang's, counted."""
    count = {"chunk": 0, "conv": 0, "gating": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        return call

    for module, attribute, name, function in (
        (gdn.fla_chunk, "chunk_gated_delta_rule", "chunk", linear_kernels.chunk_gated_delta_rule),
        (packed.short_conv, "causal_conv1d_fn", "conv", linear_kernels.causal_conv1d_fn),
        (gdn.gating, "fused_gdn_gating", "gating", linear_kernels.fused_gdn_gating),
    ):
        monkeypatch.setattr(module, attribute, counted(name, function))
    return count


def make_layer() -> Any:
    generator = torch.Generator().manual_seed(0)
    return types.SimpleNamespace(
        num_q_heads=KEY_HEADS,
        num_k_heads=KEY_HEADS,
        num_v_heads=HEADS,
        head_q_dim=DK,
        head_k_dim=DK,
        head_v_dim=DV,
        q_dim=KEY_HEADS * DK,
        k_dim=KEY_HEADS * DK,
        v_dim=HEADS * DV,
        conv_weights=torch.randn(CHANNELS, 4, generator=generator) * 0.5,
        bias=None,
        activation="silu",
        A_log=torch.linspace(-5, -2, HEADS),
        dt_bias=torch.full((HEADS,), -1.0),
    )


def inputs_of(tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolution inputs, a and b of tokens; the same token gives the same input."""
    table = torch.Generator().manual_seed(1)
    rows = torch.randn(64, CHANNELS + 2 * HEADS, generator=table)[list(tokens)]
    return tuple(rows.split([CHANNELS, HEADS, HEADS], -1))


def pools(slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(slots, CHANNELS, 3), torch.zeros(slots, HEADS, DV, DK)


def single_pass(layer: Any, tokens: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Outputs of all tokens, end state and convolution history."""
    x, a, b = inputs_of(tokens)
    conv, states = pools(1)
    q, k, v = delta.split_convolved(layer, x, conv, [len(tokens)])
    g, beta = gdn.gating.fused_gdn_gating(layer.A_log, a, b, layer.dt_bias)
    return gdn._walk(layer, q, k, v, g, beta, states, [len(tokens)])[0], states[0], conv[0]


def compile_segments(
    layer: Any, segments: Sequence[list[int]], *, seam: int, page: int, chunk: int
) -> list[Capture]:
    """Compile all segments in one batch of chunked prefills."""
    captures = []
    for segment in segments:
        first, last = Seam(seam).core(Outline(len(segment)), page=page)
        heads = [first] if first < last else []
        captures.append(Capture(SHAPE, start=0, heads=heads, core_end=max(0, last)))
    conv, states = pools(len(segments))
    for prefix in range(0, max(map(len, segments)), chunk):
        rows, parts, at = [], [], 0
        for i, segment in enumerate(segments):
            part = segment[prefix : prefix + chunk]
            if part:
                rows.append(CaptureRow(captures[i], at, prefix, len(part), i))
                parts.append((i, part))
                at += len(part)
        x, a, b = inputs_of([token for _, part in parts for token in part])
        step = build_capture(rows, torch.arange(len(segments)))
        if step is not None:
            delta.capture(gdn.RULE, step, 0, layer, x, a, b, conv, states)
        at = 0
        for i, part in parts:  # the requests' own pass
            own = slice(at, at + len(part))
            q, k, v = delta.split_convolved(layer, x[own], conv[i : i + 1], [len(part)])
            g, beta = gdn.gating.fused_gdn_gating(layer.A_log, a[own], b[own], layer.dt_bias)
            gdn._walk(layer, q, k, v, g, beta, states[i : i + 1], [len(part)])
            at += len(part)
    return captures


def core_of(capture: Capture, *, opening: bool) -> CoreState | None:
    from sglang_pic.kernels.operators.storage import pack

    if not capture.complete:
        return None
    if opening:
        return CoreState(None, capture.end(), capture.conv_tail)
    found = capture.pairs()
    if not found:
        return None
    return CoreState(pack(next(iter(found.values()))), None, capture.conv_tail)


def plan_prompt(
    parts: Sequence[tuple[str, list[int]]], captures: dict[int, Capture], *, seam: int, page: int
) -> tuple[list[int], LinkPlan]:
    tokens: list[int] = []
    hits = []
    for i, (kind, part) in enumerate(parts):
        if kind == "segment":
            start, end = len(tokens), len(tokens) + len(part)
            opening = start == 0
            state = core_of(captures[i], opening=opening)
            if state is not None:
                slots = torch.arange(len(part) // page * page) + 1000 * i
                core = Seam(seam).core(Outline(len(part), opening), page=page)
                hits.append(SegmentHit(start, end, start, slots, core, state))
        tokens += part
    plan = make_plan(
        len(tokens),
        limit=len(tokens) - 1,
        prefix=torch.empty(0, dtype=torch.int64),
        hits=hits,
        page=page,
    )
    return tokens, plan


part = st.tuples(
    st.sampled_from(["segment", "segment", "text"]),
    st.lists(st.integers(0, 63), min_size=1, max_size=40),
)
prompts = st.lists(st.lists(part, min_size=1, max_size=6), min_size=1, max_size=3)


@settings(max_examples=60)
@given(
    prompts=prompts,
    seam=st.sampled_from([3, 4, 7]),
    page=st.sampled_from([1, 4]),
    compile_chunk=st.sampled_from([5, 64]),
    link_chunk=st.sampled_from([1, 3, 64]),
)
def test_a_link_equals_a_single_pass(
    prompts: list[list[tuple[str, list[int]]]],
    seam: int,
    page: int,
    compile_chunk: int,
    link_chunk: int,
) -> None:
    layer = make_layer()
    made = []
    for parts in prompts:
        segments = {i: tokens for i, (kind, tokens) in enumerate(parts) if kind == "segment"}
        captures = {}
        if segments:
            found = compile_segments(
                layer, list(segments.values()), seam=seam, page=page, chunk=compile_chunk
            )
            captures = dict(zip(segments, found, strict=True))
        made.append(plan_prompt(parts, captures, seam=seam, page=page))
    check_links(layer, made, link_chunk)


def check_links(layer: Any, made: Sequence[tuple[list[int], LinkPlan]], link_chunk: int) -> None:
    """Linked in chunks, all in one batch, they leave what a single pass over each leaves."""
    conv, states = pools(len(made))
    outputs: list[list[torch.Tensor]] = [[] for _ in made]
    done = [plan.reused for _, plan in made]
    while any(plan.n_tokens > n for (_, plan), n in zip(made, done, strict=True)):
        linked, live, at = [], [], 0
        for i, (tokens, plan) in enumerate(made):
            extend = min(link_chunk, plan.n_tokens - done[i])
            if extend:
                own = [tokens[p] for p in plan.order[done[i] : done[i] + extend]]
                linked.append((i, LinkRow(plan, LinkOptions(), at, done[i], extend, i)))
                live += own
                at += extend
        x, a, b = inputs_of(live)
        # Rows without a core among their tokens are SGLang's own; here, a link of one run.
        step = (
            build_link([row for _, row in linked], SHAPE, torch.arange(len(made)))
            if all(has_core(row.plan, row.prefix, row.extend) for _, row in linked)
            else None
        )
        for i, row in linked:
            one = dataclasses.replace(row, first_query=0)
            own = slice(row.first_query, row.first_query + row.extend)
            if step is None and has_core(row.plan, row.prefix, row.extend):
                out = delta.link(
                    gdn.RULE,
                    build_link([one], SHAPE, torch.arange(len(made))),
                    0,
                    layer,
                    x[own],
                    a[own],
                    b[own],
                    conv,
                    states,
                )
                outputs[i].append(out[0])
            elif step is None:
                q, k, v = delta.split_convolved(layer, x[own], conv[i : i + 1], [row.extend])
                g, beta = gdn.gating.fused_gdn_gating(layer.A_log, a[own], b[own], layer.dt_bias)
                out = gdn._walk(layer, q, k, v, g, beta, states[i : i + 1], [row.extend])
                outputs[i].append(out[0])
            done[i] += row.extend
        if step is not None:
            out = delta.link(gdn.RULE, step, 0, layer, x, a, b, conv, states)[0]
            for i, row in linked:
                outputs[i].append(out[row.first_query : row.first_query + row.extend])
    for i, (tokens, plan) in enumerate(made):
        expected, state, history = single_pass(layer, tokens)
        live = plan.order[plan.reused :]
        torch.testing.assert_close(torch.cat(outputs[i]), expected[live], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(states[i], state, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(conv[i], history)


def compile_company(
    layer: Any,
    opening: list[int],
    members: Sequence[list[int]],
    *,
    seam: int,
    page: int,
    chunk: int,
) -> list[Capture]:
    """Captures of all members, read off one prefill behind the opening."""
    captures, row = [], list(opening)
    for member in members:
        first, last = Seam(seam).core(Outline(len(member)), page=page)
        heads = [first] if first < last else []
        where = {"start": len(row), "heads": heads, "core_end": max(0, last)}
        captures.append(Capture(SHAPE, opens=False, **where))
        row += member
    conv, states = pools(1)
    for prefix in range(0, len(row), chunk):
        part = row[prefix : prefix + chunk]
        x, a, b = inputs_of(part)
        rows = [CaptureRow(capture, 0, prefix, len(part), 0) for capture in captures]
        step = build_capture(rows, torch.arange(1))
        if step is not None:
            assert step.lengths == [len(part)], "a row's tokens are taken once"
            delta.capture(gdn.RULE, step, 0, layer, x, a, b, conv, states)
        q, k, v = delta.split_convolved(layer, x, conv, [len(part)])
        g, beta = gdn.gating.fused_gdn_gating(layer.A_log, a, b, layer.dt_bias)
        gdn._walk(layer, q, k, v, g, beta, states, [len(part)])
    return captures


member = st.lists(st.integers(0, 63), min_size=1, max_size=40)


@settings(max_examples=60)
@given(
    opening=st.lists(st.integers(0, 63), min_size=1, max_size=20),
    members=st.lists(member, min_size=1, max_size=5),
    seam=st.sampled_from([0, 3, 7]),
    page=st.sampled_from([1, 4]),
    compile_chunk=st.sampled_from([5, 64]),
    link_chunk=st.sampled_from([1, 3, 64]),
)
def test_what_is_read_off_a_company_is_what_its_members_do(
    opening: list[int],
    members: list[list[int]],
    seam: int,
    page: int,
    compile_chunk: int,
    link_chunk: int,
) -> None:
    """Linked in the order in which they were computed they are a single pass, with nothing
    recomputed at their beginnings."""
    layer = make_layer()
    sizes = {"seam": seam, "page": page}
    captures = compile_company(layer, opening, members, chunk=compile_chunk, **sizes)
    parts = [("text", opening), *(("segment", one) for one in members), ("text", [1, 2])]
    made = plan_prompt(parts, dict(enumerate(captures, 1)), **sizes)
    check_links(layer, [made], link_chunk)


@pytest.mark.parametrize("requests", [1, 5])
@pytest.mark.parametrize("segments", [2, 12])
def test_kernel_calls_do_not_grow(calls: dict[str, int], requests: int, segments: int) -> None:
    """A layer takes as many kernel calls for five requests of twelve segments as
    for one of two."""
    layer = make_layer()
    parts = [("segment", [(7 * i + j) % 64 for j in range(20)]) for i in range(segments)]
    tokens = [tokens for _, tokens in parts]
    captures = dict(enumerate(compile_segments(layer, tokens, seam=3, page=1, chunk=64)))
    prompt, plan = plan_prompt([*parts, ("text", [1, 2])], captures, seam=3, page=1)
    live = [prompt[p] for p in plan.order[plan.reused :]]
    x, a, b = inputs_of(live * requests)
    rows = [
        LinkRow(plan, LinkOptions(), i * len(live), plan.reused, len(live), i)
        for i in range(requests)
    ]
    conv, states = pools(requests)
    calls.update(chunk=0, conv=0, gating=0)
    delta.link(
        gdn.RULE, build_link(rows, SHAPE, torch.arange(requests)), 0, layer, x, a, b, conv, states
    )
    assert calls == {"chunk": 2, "conv": 1, "gating": 1}


def test_runs_end_where_cores_stand() -> None:
    layer = make_layer()
    a, b = list(range(20)), list(range(30))
    parts = [("text", [1, 2, 3]), ("segment", a), ("segment", b), ("text", [4, 5])]
    found = compile_segments(layer, [a, b], seam=4, page=1, chunk=64)
    _, plan = plan_prompt(parts, {1: found[0], 2: found[1]}, seam=4, page=1)
    # text and head, head, question
    assert [run.length for run in runs_of(plan, plan.reused, 13)] == [7, 4, 2]
    assert [len(run.cores) for run in runs_of(plan, plan.reused, 13)] == [0, 1, 1]
    assert [run.length for run in runs_of(plan, plan.reused + 7, 3)] == [3]
    assert not has_core(plan, plan.reused + 8, 3)


def test_cores_that_meet_act_in_the_order_in_which_they_stand() -> None:
    """Two segments without a seam, and one that follows an earlier turn at once."""
    layer = make_layer()
    a, b = list(range(20)), list(range(30, 32))
    parts = [("text", [1, 2, 3]), ("segment", a), ("segment", b), ("text", [4, 5])]
    found = compile_segments(layer, [a, b], seam=0, page=1, chunk=64)
    _, plan = plan_prompt(parts, {1: found[0], 2: found[1]}, seam=0, page=1)
    first, second = runs_of(plan, plan.reused, 5)
    assert (first.length, second.length) == (3, 2) and not first.cores
    assert [core.length for core in second.cores] == [20, 2]
    conv, states = pools(1)
    inner = Pair(torch.rand(1, HEADS, DK, DK), torch.rand(1, HEADS, DK, DV))
    step = build_link([LinkRow(plan, LinkOptions(), 0, plan.reused, 5, 0)], SHAPE, torch.arange(1))
    expected = inner.B[0]
    for capture in found:
        (pair,) = capture.pairs().values()
        expected = pair.A[0] @ expected + pair.B[0]
    there = step.incoming(0, states.mT.contiguous(), inner)
    torch.testing.assert_close(there[1], expected)
    # Of the second, shorter than a history, all; and what the first ends with.
    history = step.history(0, conv, torch.zeros(5, CHANNELS))
    tails = found[0].conv_tail[0][:, 2:], found[1].conv_tail[0][:, 1:]
    torch.testing.assert_close(history[1], torch.cat(tails, 1))

    end = CoreState(None, torch.zeros(1, HEADS, DK, DV), torch.zeros(1, CHANNELS, 3))
    later = reuse_turns(plan, [torch.arange(3)], 0, end)
    (run,) = runs_of(later, later.reused, 2)
    assert [core.state for core in run.cores] == [end, *(core.state for core in second.cores)]


OWNER = ("pic\x1fcontext\x1fus", "")


def test_a_state_is_its_owners_alone() -> None:
    """Whatever names it: a hash that two shared would open no other's states."""
    config = types.SimpleNamespace(state_dtype="float32", operator_threshold=0.0, state_mib=1)
    kept = Kept(config.state_mib << 20)
    states = PackedStates(config, kept)
    pair = Pair(torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16))
    tail, end = torch.zeros(2, CHANNELS, 3), torch.zeros(2, 4, 16, 16)
    states.add("s", OWNER, core_end=9, conv_tail=tail, end=end, pairs={4: pair})
    for other in (("pic\x1fcontext\x1fthem", ""), (OWNER[0], "adapter")):
        assert states.find("s", other) is None
        states.add("s", other, core_end=9, conv_tail=tail, end=end, pairs={7: pair})
        held = states.find("s", other)
        assert held is not None and list(held.pairs) == [7], "another owner's pair was kept"
        states.add("s", OWNER, core_end=9, conv_tail=tail, end=end, pairs={4: pair})


def test_the_store_stays_within_its_budget() -> None:
    config = types.SimpleNamespace(state_dtype="float32", operator_threshold=0.0, state_mib=1)
    kept = Kept(config.state_mib << 20)
    states = PackedStates(config, kept)
    pair = Pair(torch.randn(2, 4, 64, 64), torch.randn(2, 4, 64, 64))
    for i in range(10):
        tail, end = torch.zeros(2, CHANNELS, 3), torch.zeros(2, 4, 64, 64)
        states.add(f"s{i}", OWNER, core_end=9, conv_tail=tail, end=end, pairs={4: pair})
        assert kept.nbytes <= kept.budget == 1 << 20
    assert states.find("s0", OWNER) is None
    found = states.find("s9", OWNER)
    assert found is not None and found.core(4, 9, opening=False) is not None
    assert found.core(5, 9, opening=False) is None
    assert found.core(4, 8, opening=False) is None
    states.add("s9", OWNER, core_end=9, conv_tail=tail, end=end, pairs={7: pair})
    both = states.find("s9", OWNER)
    assert both is not None and sorted(both.pairs) == [4, 7]
    kept.drop("s9")
    assert states.find("s9", OWNER) is None


def test_the_store_keeps_what_it_counts() -> None:
    """No view of a step's tensor, and every state in the type that was asked for."""
    config = types.SimpleNamespace(state_dtype="float16", operator_threshold=0.0, state_mib=1)
    kept = Kept(config.state_mib << 20)
    states = PackedStates(config, kept)
    tails, end = torch.randn(5, 2, CHANNELS, 3), torch.randn(2, 4, 16, 16)
    pair = Pair(torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16))
    states.add("s", OWNER, core_end=9, conv_tail=tails[1], end=end, pairs={4: pair})
    found = states.find("s", OWNER)
    assert found is not None and found.end.dtype is torch.float16
    assert found.conv_tail.untyped_storage().nbytes() == tails[1].numel() * 4
    assert found.nbytes == tails[1].numel() * 4 + 3 * end.numel() * 2 + 2 * 4 * 8


def test_a_pinned_state_survives_further_seam_widths() -> None:
    config = types.SimpleNamespace(state_dtype="float32", operator_threshold=0.0, state_mib=1)
    kept = Kept(config.state_mib << 20)
    states = PackedStates(config, kept)
    pair = Pair(torch.randn(2, 4, 64, 64), torch.randn(2, 4, 64, 64))
    tail, end = torch.zeros(2, CHANNELS, 3), torch.zeros(2, 4, 64, 64)

    def add(name: str, head: int) -> bool:
        return states.add(name, OWNER, core_end=9, conv_tail=tail, end=end, pairs={head: pair})

    assert add("pinned", 4)
    kept.pin("pinned")
    assert not all(add("pinned", head) for head in range(5, 15))
    kept.check()
    held = states.find("pinned", OWNER)
    assert held is not None and 4 in held.pairs
    add("other", 4)
    assert states.find("pinned", OWNER) is not None
    kept.unpin("pinned")
    for i in range(5):
        add(f"s{i}", 4)
    assert states.find("pinned", OWNER) is None
    kept.check()
