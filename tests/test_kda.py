"""KDA: what a CPU serves it with, and its pairs, against the recurrence."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.kernels.ops.attention.fla import kda as fla_kda

from sglang_pic.kernels.operators import kda
from sglang_pic.kernels.operators.pair import apply
from sglang_pic.linear import kda as wired
from sglang_pic.linear.packed import indptr
from sglang_pic.linear.shape import LinearShape
from sglang_pic.platforms import linear_kernels

HEADS, DK, DV = 3, 8, 6
CHANNELS = HEADS * (2 * DK + DV)
CPU = torch.device("cpu")
SHAPE = LinearShape(1, HEADS, DK, DV, CHANNELS, 3, scalar=False, tokens_first=True)
RULE = wired.PicKDABackend.rule
lengths_ = st.lists(st.sampled_from([1, 2, 17, 63, 64, 65, 130]), min_size=1, max_size=3)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla_kda, "chunk_kda", linear_kernels.chunk_kda)


def layer(bound: float | None = None) -> Any:
    return types.SimpleNamespace(
        A_log=torch.linspace(-7, -4, HEADS).view(1, 1, HEADS, 1),
        dt_bias=torch.linspace(-3, 0, HEADS * DK),
        lower_bound=bound,
    )


def inputs(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(1, tokens, *shape, generator=generator)

    return {
        "q": drawn(HEADS, DK), "k": drawn(HEADS, DK), "v": drawn(HEADS, DV),
        "g": drawn(HEADS, DK), "beta": drawn(HEADS) - 3,
    }  # fmt: skip


def recurrent(
    asked: Any, given: dict[str, torch.Tensor], own: slice, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, state [heads, dv, dk] as SGLang's."""
    q, k = (torch.nn.functional.normalize(given[n][0, own], dim=-1) for n in "qk")
    rate, x = asked.A_log.exp().view(-1, 1), given["g"][0, own] + asked.dt_bias.view(HEADS, DK)
    g = -rate * x.exp().log1p()
    if asked.lower_bound is not None:
        g = asked.lower_bound * torch.sigmoid(rate * x)
    beta = given["beta"][0, own].sigmoid()
    out, end = kda.recurrent(q * DK**-0.5, k, given["v"][0, own], g, beta, state.transpose(-1, -2))
    return out, end.transpose(-1, -2)


@settings(max_examples=25)
@given(lengths=lengths_, bound=st.sampled_from([None, -2.0]), seed=st.integers(0, 99))
def test_the_chunk_kernel_is_the_recurrence(
    lengths: list[int], bound: float | None, seed: int
) -> None:
    asked, given_ = layer(bound), inputs(sum(lengths), seed)
    pool = torch.randn(7, HEADS, DV, DK, generator=torch.Generator().manual_seed(seed))
    slots = torch.tensor([5, 1, 3][: len(lengths)])
    before = pool.clone()
    tracked = torch.zeros(len(lengths), HEADS, DV, DK)
    # Only what ends inside a chunk is tracked by its start.
    chunk = torch.tensor([n // 64 if n % 64 else -1 for n in lengths])
    out, starts = linear_kernels.chunk_kda(
        **given_, initial_state=pool, initial_state_indices=slots, use_qk_l2norm_in_kernel=True,
        cu_seqlens=indptr(lengths, CPU), A_log=asked.A_log, dt_bias=asked.dt_bias,
        lower_bound=bound, output_intermediate_states=True, track_state=tracked,
        track_chunk_idx=chunk, beta_is_raw=True,
    )  # fmt: skip
    assert starts.shape[1] == sum(-(-n // 64) for n in lengths)
    at = 0
    for i, (n, slot) in enumerate(zip(lengths, slots.tolist(), strict=True)):
        expected, end = recurrent(asked, given_, slice(at, at + n), before[slot])
        torch.testing.assert_close(out[0, at : at + n], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pool[slot], end, rtol=1e-4, atol=1e-5)
        if chunk[i] >= 0:
            whole = slice(at, at + n // 64 * 64)
            _, start = recurrent(asked, given_, whole, before[slot])
            torch.testing.assert_close(tracked[i], start, rtol=1e-4, atol=1e-5)
        at += n
    others = [slot for slot in range(7) if slot not in slots]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("bound", [None, -2.0])
def test_a_decoded_token_is_one_of_the_recurrence(bound: float | None) -> None:
    asked, given_ = layer(bound), inputs(3)
    pool = torch.randn(5, HEADS, DV, DK)
    before, slots = pool.clone(), torch.tensor([4, 0, 2])
    out = torch.empty(3, 1, HEADS, DV)
    linear_kernels.kda_packed_decode(
        torch.cat([given_[name][0].flatten(1) for name in "qkv"], -1),
        given_["g"][0].flatten(1), given_["beta"][0], asked.A_log.reshape(-1), asked.dt_bias,
        DK**-0.5, pool, out, slots, use_qk_l2norm_in_kernel=True, lower_bound=bound,
    )  # fmt: skip
    for i, slot in enumerate(slots.tolist()):
        expected, end = recurrent(asked, given_, slice(i, i + 1), before[slot])
        torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pool[slot], end, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(lengths=lengths_, seed=st.integers(0, 99))
def test_a_pair_does_what_its_tokens_do(lengths: list[int], seed: int) -> None:
    asked, given_ = layer(), inputs(sum(lengths), seed)
    running = SHAPE.begun(len(lengths), CPU)
    parts = [given_[name] for name in ("k", "v", "g", "beta")]
    RULE.advance(asked, *parts, running, lengths)
    pair = SHAPE.pair(running)
    assert pair.A.flatten(2).norm(dim=-1).min() > 1e-3, "operators vanish: nothing is shown"
    states = torch.randn(len(lengths), HEADS, DV, DK)
    composed = apply(pair, states.transpose(-1, -2))
    RULE.walk(asked, given_["q"], *parts, states, lengths)
    torch.testing.assert_close(composed, states.transpose(-1, -2), rtol=1e-3, atol=1e-4)


def test_histories_are_read_and_written_where_sglang_has_them() -> None:
    conv, temporal = torch.zeros(2, 9, 3, CHANNELS), torch.zeros(2, 9, HEADS, DV, DK)
    cache = types.SimpleNamespace(conv=[conv], temporal=temporal)
    pool: Any = types.SimpleNamespace(mamba_cache=cache)
    shape = LinearShape.of_pool(pool, scalar=False, tokens_first=True)
    assert (shape.channels, shape.history) == (CHANNELS, 3)
    shape.histories(conv)[:, 4] = torch.arange(CHANNELS)[:, None] + torch.tensor([0.0, 0.1, 0.2])
    assert conv[1, 4, 2, 7] == pytest.approx(7.2)
