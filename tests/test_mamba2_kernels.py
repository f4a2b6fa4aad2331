"""The torch forms of SGLang's Mamba-2 kernels, and what is read off a mixer."""

from __future__ import annotations

import itertools
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sglang.srt.layers.radix_attention import AttentionType

from sglang_pic.attention.rope import layer_ropes
from sglang_pic.kernels.operators import ssd
from sglang_pic.linear import mamba2
from sglang_pic.platforms.mamba2_kernels import mamba_chunk_scan_combined, selective_state_update

HEADS, GROUPS, DV, DK = 4, 2, 6, 8
LENGTHS = [1, 64, 130, 3, 62, 70]


@pytest.fixture
def packed() -> dict[str, Any]:
    """Arguments of the scan over sequences of ``LENGTHS``."""
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    return {
        "x": torch.randn(1, tokens, HEADS, DV),
        "dt": torch.randn(1, tokens, HEADS),
        "A": -torch.rand(HEADS) / 8,
        "B": torch.randn(1, tokens, GROUPS, DK),
        "C": torch.randn(1, tokens, GROUPS, DK),
        "D": torch.randn(HEADS),
        "dt_bias": torch.randn(HEADS) - 2,
        "initial_states": torch.randn(len(LENGTHS), HEADS, DV, DK),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(LENGTHS)]),
    }


def recur(packed: dict[str, Any], sequence: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and end state [heads, dv, dk] of a sequence's first tokens."""
    start = int(packed["cu_seqlens"][sequence])
    x, dt, key, query = (packed[name][0, start : start + tokens] for name in ("x", "dt", "B", "C"))
    step = F.softplus(dt + packed["dt_bias"])
    begun = packed["initial_states"][sequence].transpose(-1, -2)
    out, end = ssd.recurrent(query, key, x, step * packed["A"], step, begun)
    return out + packed["D"][:, None] * x, end.transpose(-1, -2)


def scan(packed: dict[str, Any], **more: Any) -> tuple[torch.Tensor, ...]:
    out = torch.empty_like(packed["x"])
    states = mamba_chunk_scan_combined(
        **packed,
        chunk_size=64,
        dt_softplus=True,
        out=out,
        return_varlen_states=True,
        return_track_states=True,
        **more,
    )
    return out, *states


def test_scan_equals_the_recurrence(packed: dict[str, Any]) -> None:
    out, _, ends, _ = scan(packed)
    outputs, states = zip(*(recur(packed, i, n) for i, n in enumerate(LENGTHS)), strict=True)
    torch.testing.assert_close(out[0], torch.cat(outputs), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ends, torch.stack(states), atol=2e-5, rtol=1e-4)


def test_states_that_sglang_keeps(packed: dict[str, Any]) -> None:
    """At chunk starts of sequences, wherever in the batch; and on the batch's own grid."""
    which = torch.tensor([2, 2, 5])
    places = packed["cu_seqlens"][which] + torch.tensor([64, 128, 64])
    _, _, _, tracked = scan(packed, track_seq_idx=which, track_end_locs=places)
    expected = [recur(packed, 2, 64)[1], recur(packed, 2, 128)[1], recur(packed, 5, 64)[1]]
    torch.testing.assert_close(tracked[0], torch.stack(expected), atol=2e-5, rtol=1e-4)
    assert scan(packed)[3] is None
    aligned = {**packed, "cu_seqlens": torch.tensor([0, 128, 330])}
    aligned["initial_states"] = packed["initial_states"][:2]
    grid = scan(aligned)[1][0]
    for chunk, (sequence, tokens) in enumerate([(0, 0), (0, 64), (1, 0), (1, 64), (1, 128)]):
        expected_state = recur(aligned, sequence, tokens)[1]
        torch.testing.assert_close(grid[chunk], expected_state, atol=2e-5, rtol=1e-4)


def test_one_token_is_a_scan_of_one(packed: dict[str, Any]) -> None:
    pool, out = torch.randn(5, HEADS, DV, DK), torch.empty(2, HEADS, DV)
    slots = torch.tensor([3, 1])
    begun = pool.clone()
    selective_state_update(
        pool,
        packed["x"][0, :2],
        packed["dt"][0, :2, :, None].expand(-1, -1, DV),
        packed["A"][:, None, None].expand(-1, DV, DK),
        packed["B"][0, :2],
        packed["C"][0, :2],
        packed["D"][:, None].expand(-1, DV),
        dt_bias=packed["dt_bias"][:, None].expand(-1, DV),
        dt_softplus=True,
        state_batch_indices=slots,
        out=out,
    )
    one = {**packed, "cu_seqlens": torch.arange(3), "initial_states": begun[slots]}
    one |= {name: packed[name][:, :2] for name in ("x", "dt", "B", "C")}
    expected, _, ends, _ = scan(one)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(pool[slots], ends)
    torch.testing.assert_close(pool[[0, 2, 4]], begun[[0, 2, 4]])


def test_operator_and_end_state_from_zero_are_the_pair(packed: dict[str, Any]) -> None:
    """The decay over a stretch, and the scan from zero, against the operator algebra."""
    sequences = mamba2.Sequences.of(LENGTHS, 64, torch.device("cpu"))
    mixer = types.SimpleNamespace(A=packed["A"], dt_bias=packed["dt_bias"])
    decay = mamba2._decay(mixer, packed["dt"][0], sequences)
    zero = torch.zeros_like(packed["initial_states"])
    _, _, ends, _ = scan({**packed, "initial_states": zero})
    step = F.softplus(packed["dt"][0] + packed["dt_bias"])
    pair = ssd.capture(packed["B"][0], packed["x"][0], step * packed["A"], step, LENGTHS)
    torch.testing.assert_close(decay, pair.A)
    torch.testing.assert_close(ends.transpose(-1, -2), pair.B, atol=2e-5, rtol=1e-4)


def test_attention_without_positions_is_known_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attention(torch.nn.Module):
        layer_id, qk_head_dim, v_head_dim, sliding_window_size = 3, 16, 16, None
        logit_cap, xai_temperature_len, attn_type = 0.0, -1, AttentionType.DECODER
        k_scale_float = v_scale_float = None

    class GraniteMoeHybridAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.rotary_emb = Attention(), None

    class SomebodysAttention(GraniteMoeHybridAttention):
        """By exact class: a subclass may bring positions of its own."""

    monkeypatch.setattr("sglang_pic.attention.rope.RadixAttention", Attention)
    assert layer_ropes(torch.nn.Sequential(GraniteMoeHybridAttention())) == ({3: None}, None)
    ropes, refusal = layer_ropes(torch.nn.Sequential(SomebodysAttention()))
    assert not ropes and refusal is not None and "position encoding unknown" in refusal
