"""The oracle against the plain model, hand-made counts and a second construction."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

from sglang_pic.eval.models.tiny import tiny_llama, tiny_llama_model
from sglang_pic.eval.oracle.dense import (
    LIVE,
    Layout,
    arrange,
    full_logprobs,
    layout,
    linked_logprobs,
)

VOCAB = 200
TOLERANCE = 1e-5


@functools.cache
def model(layers: int = 2):
    return tiny_llama_model(1, layers=layers, vocab=VOCAB, max_position=512)


def ids(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=n)


def assert_same(a, b, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(a.full_logprobs, b.full_logprobs, atol=tolerance, rtol=0)
    assert a.tokens == b.tokens


@st.composite
def cases(draw):
    """A prompt with segments, some equal, some behind the compile context, and a geometry."""
    page = draw(st.sampled_from([1, 3, 4]))
    context = ids(page * draw(st.integers(0, 2)), seed=9)
    prompt = list(context) if draw(st.booleans()) else []
    segments = []
    for _ in range(draw(st.integers(1, 4))):
        prompt += ids(draw(st.integers(0, 5)), seed=len(prompt) + 50)
        length = draw(st.integers(1, 5 * page + 2))
        segments.append((len(prompt), len(prompt) + length))
        prompt += ids(length, seed=draw(st.integers(0, 2)))
    prompt += ids(draw(st.integers(0, 4)), seed=77)
    rule = {
        "seam": draw(st.sampled_from([0, 1, 2, 3, 5, 8, 100])),
        "page": page,
        "policy": draw(st.sampled_from(["seam", "seam", "none", "full"])),
        "context": context,
        "min_segment": draw(st.sampled_from([1, 1, 6])),
    }
    return prompt, segments, rule


# -- which tokens are reused ------------------------------------------------------


def plan(n, segments, seam, page, policy="seam", context=(), min_segment=1, whole=False) -> Layout:
    prompt = [*context, *ids(n)][:n]
    return layout(
        n,
        segments,
        seam=seam,
        page=page,
        policy=policy,
        context=context,
        min_segment=min_segment,
        whole=whole,
        prompt_ids=prompt,
    )


@pytest.mark.parametrize(
    ("n", "segments", "seam", "page", "reused"),
    [
        # Page 1: all but the seam.
        (20, [(5, 15)], 4, 1, range(9, 15)),
        (20, [(5, 15)], 0, 1, range(5, 15)),
        (20, [(5, 6)], 0, 1, [5]),
        (20, [(5, 9)], 4, 1, []),  # as long as the seam
        (20, [(5, 10)], 4, 1, [9]),
        (20, [(5, 15)], 1000, 1, []),
        # The prompt starts with a segment, ends with one, is one: its last token is computed.
        (20, [(0, 10)], 4, 1, range(10)),
        (20, [(10, 20)], 4, 1, range(14, 19)),
        (20, [(0, 20)], 4, 1, range(19)),
        (1, [(0, 1)], 4, 1, []),
        # Neighbours, and one that only follows an opening one.
        (20, [(0, 10), (10, 20)], 2, 1, [*range(10), *range(12, 19)]),
        # Pages of 4, counted from the segment's start.
        (40, [(5, 8)], 0, 4, []),
        (40, [(5, 9)], 0, 4, range(5, 9)),
        (40, [(5, 12)], 0, 4, range(5, 9)),
        (40, [(5, 13)], 0, 4, range(5, 13)),
        (40, [(5, 30)], 1, 4, range(9, 29)),  # the seam takes a whole page
        (40, [(5, 30)], 4, 4, range(9, 29)),
        (40, [(5, 30)], 5, 4, range(13, 29)),
        (40, [(0, 40)], 5, 4, range(36)),
        (40, [(0, 16), (16, 40)], 3, 4, [*range(16), *range(20, 36)]),
    ],
)
def test_reused_tokens_by_hand(n, segments, seam, page, reused):
    made = plan(n, segments, seam, page)
    assert made.reused == set(reused)
    assert made.n_reused == len(made.reused)


@pytest.mark.parametrize(
    ("segments", "page", "reused"),
    [
        ([(0, 10), (10, 20)], 1, range(10)),
        ([(0, 10), (10, 19)], 1, range(19)),
        ([(4, 20)], 4, []),
        ([(5, 20)], 4, range(5, 17)),  # its last token is on no whole page
    ],
)
def test_whole_cores_are_not_cut_in_front_of_a_prompts_last_token(segments, page, reused):
    assert plan(20, segments, 0, page, whole=True).reused == set(reused)


def test_policies_context_and_minimum_by_hand():
    assert plan(20, [(5, 15)], 4, 1, policy="none").reused == set(range(5, 15))
    assert plan(20, [(5, 15)], 4, 1, policy="full").n_reused == 0
    assert plan(20, [(2, 8), (8, 15)], 2, 1, min_segment=7).reused == set(range(10, 15))
    # Behind the compile context itself a segment opens the prompt: no seam.
    assert plan(20, [(4, 16)], 4, 2, context=[1, 2, 3, 4]).reused == set(range(4, 16))
    # At index 0, or behind other tokens, it does not.
    assert plan(20, [(0, 12)], 4, 2, context=[1, 2, 3, 4]).reused == set(range(4, 12))
    assert plan(20, [(5, 17)], 4, 2, context=[1, 2, 3, 4]).reused == set(range(9, 17))


@pytest.mark.parametrize("segments", [[(3, 3)], [(4, 2)], [(0, 5), (4, 8)], [(5, 8), (0, 3)]])
def test_malformed_segments_are_refused(segments):
    with pytest.raises(ValueError, match="do not divide"):
        plan(20, segments, 0, 1)
    with pytest.raises(ValueError, match="do not divide"):
        plan(4, [(0, 5)], 0, 1)


# -- who sees whom ------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(cases())
def test_visibility_and_positions(case):
    prompt, segments, rule = case
    made = layout(len(prompt), segments, prompt_ids=prompt, **rule)
    rows = arrange(prompt, segments, made.cores, context=rule["context"])
    shift = int(rows.position[-1]) - (len(prompt) - 1)
    assert int(rows.position.min()) >= 0
    assert shift == 0 or int(rows.position.min()) == 0
    true_position = (rows.position - shift).tolist()
    assert made.n_reused < len(prompt)
    live = [p for p, copy in zip(true_position, rows.copy.tolist(), strict=True) if copy == LIVE]
    assert live == sorted(set(range(len(prompt))) - made.reused)
    for i, (p, k) in enumerate(zip(true_position, rows.copy.tolist(), strict=True)):
        seen = rows.visible[i].nonzero().flatten().tolist()
        positions = [true_position[j] for j in seen]
        if k == LIVE:
            # Every token of the prompt up to its own, once, and none behind it.
            assert sorted(positions) == list(range(p + 1))
            assert [prompt[q] for q in positions] == [int(rows.tokens[j]) for j in seen]
        else:
            start = segments[k][0]
            assert positions == list(range(start - len(rule["context"]), p + 1))
            alone = [*rule["context"], *prompt[start : segments[k][1]]]
            assert rows.tokens[seen].tolist() == alone[: len(seen)]


# -- values -------------------------------------------------------------------------


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize(
    "kwargs", [{"seam": 1000}, {"seam": 2, "policy": "full"}, {"seam": 2, "min_segment": 1000}]
)
def test_nothing_reused_is_plain(kwargs, page):
    prompt = ids(60)
    segments = [(0, 0 + 3), (3, 20), (25, 60)]
    linked = linked_logprobs(model(), prompt, segments[1:], page=page, n_new=4, **kwargs)
    assert_same(linked, full_logprobs(model(), prompt, 4))


@pytest.mark.parametrize("context", [[], [5, 6, 7, 8]])
@pytest.mark.parametrize("end", [30, 45])
def test_opening_segment_is_plain(context, end):
    prompt = [*context, *ids(45 - len(context))]
    segments = [(len(context), end)]
    rule = {"seam": 3, "page": 4, "context": context}
    assert layout(45, segments, prompt_ids=prompt, **rule).n_reused > 16
    linked = linked_logprobs(model(), prompt, segments, n_new=4, **rule)
    assert_same(linked, full_logprobs(model(), prompt, 4))


@settings(deadline=None, max_examples=40)
@given(cases())
def test_one_layer_is_plain(case):
    """Keys and values of a first layer depend on nothing before their token."""
    prompt, segments, rule = case
    linked = linked_logprobs(model(layers=1), prompt, segments, n_new=2, **rule)
    assert_same(linked, full_logprobs(model(layers=1), prompt, 2))


def test_naive_linking_is_not_plain():
    """The tests above have power: two layers tell a link from a full prefill."""
    prompt, segments = ids(60), [(5, 25), (25, 55)]
    plain = full_logprobs(model(), prompt, 1).full_logprobs
    naive = linked_logprobs(model(), prompt, segments, seam=0, page=1, n_new=1).full_logprobs
    seam = linked_logprobs(model(), prompt, segments, seam=4, page=1, n_new=1).full_logprobs
    assert (naive - plain).abs().max() > 0.1
    assert (seam - plain).abs().max() > 0.01
    assert (seam - naive).abs().max() > 0.01


def test_generated_tokens_are_live_prompt():
    prompt, segments, rule = ids(60), [(5, 25), (25, 60)], {"seam": 3, "page": 4}
    made = linked_logprobs(model(), prompt, segments, n_new=4, **rule)
    for i in range(1, 4):
        longer = linked_logprobs(model(), prompt + made.tokens[:i], segments, n_new=1, **rule)
        torch.testing.assert_close(
            longer.full_logprobs[0], made.full_logprobs[i], atol=TOLERANCE, rtol=0
        )


def test_forced_continuation():
    prompt, segments, rule = ids(60), [(5, 25)], {"seam": 3, "page": 1}
    free = linked_logprobs(model(), prompt, segments, n_new=4, **rule)
    assert_same(
        linked_logprobs(model(), prompt, segments, n_new=4, forced=free.tokens, **rule), free
    )
    forced = linked_logprobs(model(), prompt, segments, n_new=2, forced=[7, 8], **rule)
    assert forced.tokens == [7, 8]
    assert forced.logprobs == [float(forced.full_logprobs[i, 7 + i]) for i in range(2)]
    plain = full_logprobs(model(), prompt, 2, forced=[7, 8])
    assert plain.tokens == [7, 8]
    assert_same(full_logprobs(model(), [*prompt, 7], 1, forced=[8]), _second(plain))


def _second(made):
    return type(made)(made.tokens[1:], made.logprobs[1:], made.full_logprobs[1:])


def rotate(keys: torch.Tensor, offset: int, theta: float) -> torch.Tensor:
    """Move rotated keys [..., 16] by ``offset`` positions, as Llama pairs dimensions."""
    half = keys.shape[-1] // 2
    angle = offset * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = keys.double().split(half, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).float()


@torch.no_grad()
def stitched_logprobs(prompt, segments, cores, context):
    """The link built the other way: compile each segment in a forward of its
    own, from position 0, move its keys, then one forward of the live tokens."""
    llama = model()
    stitched, places = DynamicCache(), []
    for (start, end), core in zip(segments, cores, strict=True):
        if not core:
            continue
        alone = llama(input_ids=torch.tensor([[*context, *prompt[start:end]]]), use_cache=True)
        local = torch.tensor(sorted(core)) - start + len(context)
        for i, layer in enumerate(alone.past_key_values.layers):
            keys = rotate(
                layer.keys[:, :, local],
                start - len(context),
                llama.config.rope_parameters["rope_theta"],
            )
            stitched.update(keys, layer.values[:, :, local], i)
        places += sorted(core)
    live = [i for i in range(len(prompt)) if i not in places]
    query, key = torch.tensor(live), torch.tensor(places + live)
    mask = torch.where(key[None] <= query[:, None], 0.0, float("-inf"))
    out = llama(
        input_ids=torch.tensor([[prompt[i] for i in live]]),
        position_ids=query[None],
        attention_mask=mask[None, None],
        past_key_values=stitched,
    )
    return torch.log_softmax(out.logits[0, -1], -1)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_dense_forward_equals_stitched_caches(case):
    prompt, segments, rule = case
    cores = layout(len(prompt), segments, prompt_ids=prompt, **rule).cores
    linked = linked_logprobs(model(), prompt, segments, n_new=1, **rule)
    stitched = stitched_logprobs(prompt, segments, cores, rule["context"])
    torch.testing.assert_close(linked.full_logprobs[0], stitched, atol=5e-5, rtol=0)


def test_saved_tiny_llama(tmp_path):
    """The server tests' model: reloads as it was, and attention decides its output."""
    path = tiny_llama(tmp_path, seed=3)
    assert {file.name for file in path.iterdir()} <= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    loaded = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    prompt = random.Random(0).choices(range(512), k=60)
    plain = full_logprobs(loaded, prompt, 3)
    assert_same(plain, full_logprobs(tiny_llama_model(3), prompt, 3))
    naive = linked_logprobs(loaded, prompt, [(5, 25), (25, 55)], seam=0, page=1, n_new=1)
    assert (naive.full_logprobs[0] - plain.full_logprobs[0]).abs().max() > 0.1
