"""The plan: layout of a row, by property and by the design's formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_pic.errors import PicIntegrityError
from sglang_pic.link.plan import LinkPlan, SegmentHit, make_plan, reuse_turns
from sglang_pic.link.policy import Full, Graded, LinkOptions, Naive, Outline, Seam
from sglang_pic.link.report import Found, make_report


def slots(count: int, first: int) -> torch.Tensor:
    return torch.arange(first, first + count)


SOUND = (
    Naive(), Full(), Seam(0), Seam(1), Seam(5), Seam(16, 4),
    Graded(Seam(4), 0.0), Graded(Seam(4), 0.3), Graded(Seam(16, 0), 1.0),
)  # fmt: skip


@st.composite
def prompts(draw: st.DrawFn) -> dict:
    page = draw(st.sampled_from([1, 4, 16]))
    at = draw(st.integers(0, 20))
    places, outlines = [], []
    for _ in range(draw(st.integers(0, 5))):
        length = draw(st.integers(1, 70))
        places.append(at)
        outlines.append(Outline(length, opening=at == 0, in_company=draw(st.booleans())))
        at += length + draw(st.integers(0, 9))
    policy = draw(st.sampled_from(SOUND))
    hits = []
    for i, (start, shape, core) in enumerate(
        zip(places, outlines, policy.cores(outlines, page=page), strict=True)
    ):
        held = draw(st.integers(0, shape.length // page)) * page
        end = start + shape.length
        hits.append(SegmentHit(start, end, start, slots(held, 1000 * (i + 1)), core))
    n = at + draw(st.integers(0 if hits else 1, 9))
    n = max(n, hits[-1].end if hits else 1)
    prefix = draw(st.integers(0, (n - 1) // page)) * page
    return {
        "n_tokens": n,
        "limit": draw(st.integers(0, n - 1)),
        "prefix": slots(min(prefix, draw(st.integers(0, prefix // page)) * page), 0),
        "hits": hits,
        "page": page,
    }


@given(prompts())
def test_every_plan_is_sound(prompt: dict) -> None:
    if prompt["prefix"].numel() > prompt["limit"]:
        prompt["prefix"] = prompt["prefix"][:0]
    plan = make_plan(**prompt)
    plan.check(prompt["page"])
    assert plan.slots.numel() == plan.reused < prompt["n_tokens"]
    # Every reused slot is the one compiled for that very token.
    for span in plan.spans:
        hit = next((h for h in prompt["hits"] if h.start <= span.start < h.end), None)
        if hit is not None and span.offset == hit.offset and span.slots[0] >= 1000:
            assert span.slots[0] == hit.slots[0] + span.start - hit.start
        assert span.end <= max(prompt["limit"], prompt["prefix"].numel())


@pytest.mark.parametrize(
    ("policy", "outline", "page", "core"),
    [
        (Seam(4), Outline(100), 1, (4, 100)),
        (Seam(4), Outline(100, opening=True), 1, (0, 100)),
        (Seam(4), Outline(100), 16, (16, 96)),
        (Seam(17), Outline(100), 16, (32, 96)),
        (Seam(0), Outline(15), 16, (0, 0)),
        (Seam(0), Outline(16), 16, (0, 16)),
        (Seam(4), Outline(1), 1, (4, 1)),
        (Naive(), Outline(32), 16, (0, 32)),
        (Full(), Outline(100, opening=True), 1, (0, 0)),
    ],
)
def test_core(policy, outline, page, core) -> None:
    assert policy.cores([outline], page=page) == [core]


def test_the_last_token_of_a_prompt_that_ends_in_a_segment_is_computed() -> None:
    hits = [SegmentHit(0, 8, 0, slots(8, 0), (0, 8)), SegmentHit(8, 16, 8, slots(8, 64), (0, 8))]
    for page, reused in ((1, 15), (4, 12)):
        plan = make_plan(16, limit=15, prefix=slots(0, 0), hits=hits, page=page)
        plan.check(page)
        assert plan.reused == reused


def test_a_seam_in_company_has_its_own_width() -> None:
    outlines = [
        Outline(100),
        Outline(100, in_company=True),
        Outline(100, opening=True, in_company=True),
    ]
    assert Seam(16, 4).cores(outlines, page=4) == [(16, 100), (4, 100), (0, 100)]


@given(
    st.lists(st.builds(Outline, st.integers(1, 90), st.booleans(), st.booleans()), max_size=8),
    st.sampled_from([0, 4, 16]),
    st.floats(0, 1),
    st.sampled_from([1, 4, 16]),
)
def test_a_budget_is_spent_from_the_question_backwards(
    outlines: list[Outline], width: int, share: float, page: int
) -> None:
    seam = Seam(width)
    cores = Graded(seam, share).cores(outlines, page=page)
    narrow = seam.cores(outlines, page=page)
    whole = [i for i, core in enumerate(cores) if core != narrow[i]]
    for i in whole:
        # Behind it nothing is reused.
        assert all(start >= end for start, end in cores[i:])

    def computed(cores: list[tuple[int, int]]) -> int:
        return sum(s.length - max(0, b - a) for s, (a, b) in zip(outlines, cores, strict=True))

    budget = int(share * sum(s.length for s in outlines))
    assert computed(cores) <= max(budget, computed(narrow))
    # One more would have been too much.
    reused = [i for i, (start, end) in enumerate(cores) if start < end]
    if reused:
        last = reused[-1]
        assert computed([(0, 0) if i >= last else c for i, c in enumerate(cores)]) > budget


def test_a_prefix_ends_inside_a_segment() -> None:
    hit = SegmentHit(4, 40, 4, slots(36, 100), (4, 32))
    plan = make_plan(50, limit=49, prefix=slots(12, 0), hits=[hit], page=4)
    assert [(s.start, s.end, s.offset) for s in plan.spans] == [(0, 12, 0), (12, 36, 4)]


def test_check_refuses_a_span_seen_too_early() -> None:
    plan = make_plan(
        20, limit=19, prefix=slots(0, 0), hits=[SegmentHit(5, 15, 5, slots(10, 0), (2, 9))],
        page=1,
    )  # fmt: skip
    span = plan.spans[0]
    bad = LinkPlan(20, plan.reused, (type(span)(**{**vars(span), "first_seer": 0}),), plan.order)
    with pytest.raises(PicIntegrityError, match="seen by the wrong tokens"):
        bad.check(1)


def test_options_choose_the_policy() -> None:
    assert LinkOptions(policy="seam", seam=3).recompute_policy() == Seam(3)
    assert LinkOptions(policy="none").recompute_policy() == Naive()
    assert LinkOptions(policy="full").recompute_policy() == Full()


@given(prompts(), st.data())
def test_a_report_counts_every_token_once(prompt: dict, data: st.DataObject) -> None:
    """By spans as token by token, empty segments among them, and behind turns whose
    tokens stand between cores."""
    if prompt["prefix"].numel() > prompt["limit"]:
        prompt["prefix"] = prompt["prefix"][:0]
    plan = make_plan(**prompt)
    computed = plan.n_tokens - plan.reused
    turn = data.draw(st.integers(0, computed - 1)) // prompt["page"] * prompt["page"]
    if turn:
        plan = reuse_turns(plan, [slots(turn, 9000)], len(plan.spans), None)
    named = []
    for hit in prompt["hits"]:
        if data.draw(st.booleans()):
            named.append(Found(hit.start, hit.start))
        named.append(Found(hit.start, hit.end, "id"))
    prefix = prompt["prefix"].numel()
    made = make_report(
        plan.n_tokens, LinkOptions(), segments=named, prefix_tokens=prefix, plan=plan, reason=None
    )
    reused = set(plan.order[: plan.reused].tolist()) | set(range(prefix))
    assert made.tokens_reused == len(reused)
    for one in made.segments:
        assert one.tokens_reused == len(reused & set(range(one.start, one.end)))
        assert one.tokens_reused + one.tokens_computed == one.end - one.start
