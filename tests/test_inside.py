"""What the notebook about links shows: the oracles' inner values, rows, distances."""

from __future__ import annotations

import functools
import pathlib
import random
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_hybrid_model

from sglang_pic.eval import inside
from sglang_pic.eval.models.tiny import tiny_llama_model
from sglang_pic.eval.oracle.dense import LIVE, Inner, arrange, layout, linked_inner, sources
from sglang_pic.eval.oracle.hybrid import linked_states
from sglang_pic.link.plan import SegmentHit, make_plan
from sglang_pic.link.policy import Outline, Seam

VOCAB = 200
NAMES = ("hidden", "keys", "values")
SEGMENTS = [(0, 20), (22, 50), (50, 70)]
LENGTH = 80


@functools.cache
def llama() -> Any:
    return tiny_llama_model(1, layers=3, vocab=VOCAB, max_position=512)


@functools.cache
def hybrid() -> Any:
    return tiny_hybrid_model("qwen3_5", 3)


def ids(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=n)


def inner(seam: int, policy: str = "seam", **rule: Any) -> Inner:
    return linked_inner(llama(), ids(LENGTH), SEGMENTS, seam=seam, page=1, policy=policy, **rule)


def distances(found: Inner, reference: Inner) -> np.ndarray:
    """[names, layers, tokens]."""
    return np.stack(
        [inside.relative(getattr(found, name), getattr(reference, name)) for name in NAMES]
    )


# -- what a forward holds at each token -------------------------------------------


def test_full_recompute_is_the_plain_models() -> None:
    with torch.no_grad():
        plain = llama()(
            input_ids=torch.tensor([ids(LENGTH)]),
            output_hidden_states=True,
            output_attentions=True,
            use_cache=True,
        )
    full = inner(0, "full")
    # transformers' last hidden states are those behind the final norm.
    for i in range(2):
        torch.testing.assert_close(full.hidden[i], plain.hidden_states[i + 1][0])
    for i in range(3):
        torch.testing.assert_close(full.attention[i], plain.attentions[i][0].mean(0))
        values = plain.past_key_values.layers[i].values[0]
        torch.testing.assert_close(full.values[i], values.transpose(0, 1).flatten(1))


def test_a_seam_as_wide_as_its_segment_leaves_no_distance() -> None:
    full = inner(0, "full")
    for found in (inner(28), inner(1000)):
        assert distances(found, full).max() < 1e-5
        torch.testing.assert_close(found.attention, full.attention, atol=1e-5, rtol=0)


def test_distance_begins_behind_the_first_segment_and_ends_with_the_seam() -> None:
    """A segment that opens the prompt as it was compiled is exact; a later one's
    core is not, and is the same whatever the seam."""
    full = inner(0, "full")
    by_seam = {seam: distances(inner(seam), full) for seam in (0, 4, 16)}
    for seam, found in by_seam.items():
        assert found[:, :, : SEGMENTS[0][1]].max() < 1e-5
        assert found[0, -1, 22 + seam : 49].min() > 0.01
    for wide, narrow in ((4, 0), (16, 4), (16, 0)):
        behind = slice(22 + wide, 49)
        np.testing.assert_allclose(
            by_seam[wide][:, :, behind], by_seam[narrow][:, :, behind], atol=1e-5
        )
    # The first layer's keys and values depend on nothing but their token.
    assert by_seam[0][1:, 0].max() < 1e-5


@pytest.mark.parametrize("context", [[], ids(6, seed=9)])
def test_a_core_holds_what_its_segment_holds_alone(context: list[int]) -> None:
    """Values by token, and the attention inside the segment; a context of 6 tokens
    in front of a segment at 3 shifts all positions."""
    prompt, segments = ids(60), [(3, 25), (30, 55)]
    linked = linked_inner(llama(), prompt, segments, seam=5, page=1, policy="none", context=context)
    for start, end in segments:
        alone = linked_inner(
            llama(), [*context, *prompt[start:end]], [], seam=0, page=1, policy="full"
        )
        here, there = slice(start, end), slice(len(context), len(context) + end - start)
        for name in NAMES:  # to rounding: the positions are others
            found, expected = getattr(linked, name)[:, here], getattr(alone, name)[:, there]
            assert inside.relative(found, expected).max() < 1e-4
        torch.testing.assert_close(
            linked.attention[:, here, here], alone.attention[:, there, there], atol=1e-4, rtol=0
        )
        assert not linked.attention[:, here, :start].any()


def test_attention_of_a_token_sums_to_one() -> None:
    for found in (inner(0), inner(4), inner(0, "full")):
        torch.testing.assert_close(found.attention.sum(-1), torch.ones(3, LENGTH))
        assert not found.attention.triu(1).any()


def test_sources_are_live_rows_and_cores() -> None:
    prompt = ids(LENGTH)
    cores = layout(LENGTH, SEGMENTS, seam=4, page=4, prompt_ids=prompt).cores
    rows = arrange(prompt, SEGMENTS, cores)
    source = sources(rows, cores)
    assert rows.tokens[source].tolist() == prompt
    assert rows.position[source].tolist() == list(range(LENGTH))
    reused = frozenset().union(*cores)
    assert {i for i in range(LENGTH) if rows.copy[source[i]] != LIVE} == reused


# -- states of a hybrid -----------------------------------------------------------


def states(seam: int, policy: str = "seam", **rule: Any) -> torch.Tensor:
    return linked_states(hybrid(), ids(LENGTH), SEGMENTS, seam=seam, page=1, policy=policy, **rule)


def test_states_of_full_recompute_are_the_plain_models() -> None:
    full = states(0, "full")
    assert full.shape[:2] == (2, LENGTH)
    for n in (1, 33, LENGTH):
        with torch.no_grad():
            out = hybrid()(input_ids=torch.tensor([ids(LENGTH)[:n]]), use_cache=True)
        for state, layer in zip(full, (0, 2), strict=True):
            (plain,) = out.past_key_values.layers[layer].recurrent_states[0]
            torch.testing.assert_close(state[n - 1], plain, atol=1e-4, rtol=1e-4)


def test_distance_of_states() -> None:
    full = states(0, "full")

    def distance(seam: int, **rule: Any) -> np.ndarray:
        return inside.relative(states(seam, **rule), full, dims=3)

    assert distance(28).max() < 1e-5
    narrow, wide, last = distance(0), distance(4), distance(4, state="last")
    for found in (narrow, wide, last):
        assert found[:, : SEGMENTS[0][1]].max() < 1e-5
    # The convolution of width 4 is all that the first layer needs a head for.
    assert wide[0].max() < 1e-5 < 1e-3 < narrow[0, 22:].min()
    assert wide[1, 26:].min() > 1e-3
    assert last[0, 26:49].min() > 0.1


# -- rows -------------------------------------------------------------------------


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=5),
    seam=st.integers(0, 20),
    page=st.sampled_from([1, 4, 16]),
)
def test_pieces_are_the_row_that_the_server_plans(
    lengths: list[tuple[int, int]], seam: int, page: int
) -> None:
    segments, at = [], 0
    for gap, length in lengths:
        segments.append((at + gap, at + gap + length))
        at += gap + length
    n = at + 3
    cores = layout(n, segments, seam=seam, page=page, prompt_ids=ids(n)).cores
    made = inside.pieces(n, segments, cores)
    assert [part.start for part in made] == [0, *(part.end for part in made[:-1])]
    assert made[-1].end == n
    hits = [
        SegmentHit(
            start,
            end,
            start,
            torch.arange(start, end),
            Seam(seam).core(Outline(end - start, opening=start == 0), page=page),
        )
        for start, end in segments
    ]
    no_prefix = torch.empty(0, dtype=torch.int64)
    plan = make_plan(n, limit=n - 1, prefix=no_prefix, hits=hits, page=page)
    in_row = sorted(made, key=lambda part: part.row)
    assert [i for part in in_row for i in range(part.start, part.end)] == plan.order.tolist()
    assert sum(p.end - p.start for p in made if p.kind == inside.CORE) == plan.reused


def test_relative_and_paid_by_hand() -> None:
    found, reference = torch.tensor([[3.0, 5.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [2.0, 0]])
    np.testing.assert_allclose(inside.relative(found, reference), [0.2, 0.5])
    np.testing.assert_allclose(inside.relative(found, reference, dims=2), (2 / 29) ** 0.5)
    attention = torch.arange(32.0).reshape(2, 4, 4)
    shares = inside.paid(attention, range(1, 3), range(2))
    np.testing.assert_allclose(shares, [[12, 13], [16, 17]])


def test_pictures(tmp_path: pathlib.Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    prompt = ids(LENGTH)
    cores = layout(LENGTH, SEGMENTS, seam=4, page=4, prompt_ids=prompt).cores
    figure, axes = plt.subplots(5, 1)
    inside.plot_row(axes[0], inside.pieces(LENGTH, SEGMENTS, cores), "ABC")
    named = [text.get_text() for text in axes[0].texts]
    assert [named.count(name) for name in "ABC"] == [2, 2, 2]
    assert f"reused: {sum(map(len, cores))} tokens" in named
    values, near = np.linspace(0.01, 1, 2 * LENGTH).reshape(2, LENGTH), range(18, 30)
    inside.plot_by_token(axes[1], {"w = 0": values[0]}, near, border=22)
    inside.label_tokens(axes[1], [f"{i}\n" for i in prompt], near)
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), values[0, 18:30])
    inside.plot_layers(axes[2], values, near, border=22, limits=(0.01, 1))
    inside.plot_states(axes[3:], {"w = 0": values, "w = 4": values / 2}, SEGMENTS)
    figure.savefig(tmp_path / "all.png")
    plt.close(figure)
