"""Lightning attention: the torch form of SGLang's kernel, and states that keys' rotation
turns."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.kernels.ops.attention.linear.seg_la import SegLaMeta
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_pic.attention.rope import layer_ropes, lightning_rope
from sglang_pic.eval.oracle.lightning import slopes
from sglang_pic.kernels.operators import lightning
from sglang_pic.kernels.rotate import LayerRope, angles, rotate
from sglang_pic.linear.step import turned
from sglang_pic.platforms.lightning_kernels import seg_la_fwd
from sglang_pic.platforms.linear_kernels import layernorm_gated

HEADS, DIM, ROTARY = 4, 8, 4
LENGTHS = [1, 64, 130, 3, 62, 70]
SLOPE = slopes(HEADS, 0, 4)


def table(dim: int = ROTARY) -> torch.Tensor:
    freqs = torch.arange(900)[:, None] / 100 ** torch.linspace(0, 1, dim // 2)
    return torch.cat([freqs.cos(), freqs.sin()], -1)


def packed(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """q, k, v [tokens, heads, dim] and a pool of ten states."""
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, sum(lengths), HEADS, DIM, generator=draw)
    return *qkv, torch.randn(10, HEADS, DIM, DIM, generator=draw)


def meta_of(lengths: list[int], slots: list[int], held: list[int]) -> SegLaMeta:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return SegLaMeta(
        batch_size=len(lengths),
        max_q_length=None,
        q_offsets=offsets,
        s_offsets=torch.tensor(slots),
        q_lengths=offsets.diff(),
        s_scales=torch.tensor(held),
    )


def recur(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64, token by token."""
    q, k, v, state = (x.double() for x in (q, k, v, state))
    return lightning.recurrent(q * DIM**-0.5, k, v, -SLOPE, state)


@pytest.mark.parametrize("lengths", [LENGTHS, [1] * 6])
def test_the_kernel_is_the_recurrence(lengths: list[int]) -> None:
    """Prompts and decode, sequences that begin and such that go on, tracked states."""
    q, k, v, pool = packed(lengths)
    slots, held = [3, 1, 4, 0, 9, 6], [1, 0, 1, 1, 0, 1]
    begun = pool.clone()
    track = [128 if length == 130 else 64 if length == 70 else 0 for length in lengths]
    target = torch.tensor([7 if n == 128 else 8 if n == 64 else -1 for n in track])
    out = seg_la_fwd(
        q, k, v, pool, SLOPE.float().view(-1, 1, 1), meta_of(lengths, slots, held),
        track_lens=torch.tensor(track), track_state_indices=target, softmax_scale=DIM**-0.5,
    )  # fmt: skip
    at = 0
    for i, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        part = [x[at : at + length] for x in (q, k, v)]
        start = begun[slot] * held[i]
        expected, end = recur(*part, start)
        torch.testing.assert_close(out[at : at + length].double(), expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(pool[slot].double(), end, atol=2e-5, rtol=1e-4)
        if track[i]:
            _, tracked = recur(*(x[: track[i]] for x in part), start)
            found = pool[target[i]].double()
            torch.testing.assert_close(found, tracked, atol=2e-5, rtol=1e-4)
        at += length
    untouched = [slot for slot in range(10) if slot not in (*slots, *target.tolist())]
    assert untouched and torch.equal(pool[untouched], begun[untouched])


@given(
    offset=st.integers(-400, 400),
    length=st.integers(1, 40),
    neox=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_what_turns_keys_turns_the_state_they_wrote(
    offset: int, length: int, neox: bool, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(length)
    k, v = torch.randn(2, length, HEADS, DIM, generator=draw)
    where = torch.arange(400, 400 + length)

    def state(position: torch.Tensor) -> torch.Tensor:
        moved = rotate(k, *angles(table(), position), neox=neox)
        return recur(moved, moved, v, torch.zeros(HEADS, DIM, DIM))[1].float()

    here = state(where)[None].to(dtype)
    found = turned(here, LayerRope(table(), neox), offset)
    assert found.dtype == dtype and found.mT.is_contiguous()
    bound = 1e-3 if dtype == torch.float32 else 2e-2
    there = state(where + offset)
    torch.testing.assert_close(found[0].float(), there, atol=bound, rtol=bound)
    if abs(offset) > 3:
        assert (here[0].float() - there).abs().max() > 10 * bound


def test_groups_are_normed_by_themselves() -> None:
    draw = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 5, 12, generator=draw)
    weight = torch.randn(12, generator=draw)
    found = layernorm_gated(
        x=x, weight=weight, bias=None, z=z, group_size=4, is_rms_norm=True, activation="sigmoid"
    )
    groups = x.view(5, 3, 4)
    normed = groups / (groups.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(found, normed.view(5, 12) * weight * z.sigmoid())
    plain = layernorm_gated(x=x.view(5, 3, 4), weight=weight[:4], bias=None, is_rms_norm=True)
    torch.testing.assert_close(plain, normed * weight[:4])


class BailingMoELinearAttention(torch.nn.Module):
    """Named as SGLang's."""

    def __init__(self, layer: int, rotary: Any, linear_rope: bool = True):
        super().__init__()
        self.attn = RadixAttention(HEADS, DIM, 1.0, HEADS, layer)
        self.rotary_emb, self.linear_rope = rotary, linear_rope


def rotary(name: str = "RotaryEmbedding") -> Any:
    made = types.new_class(name)()
    made.cos_sin_cache, made.is_neox_style = table(), True
    return made


def test_what_turns_linear_layers_is_found_or_refused() -> None:
    one = rotary()
    layers = torch.nn.ModuleList([BailingMoELinearAttention(i, one) for i in (0, 2)])
    assert lightning_rope(layers, [0, 2]) == (LayerRope(one.cos_sin_cache, True), None)
    # They are no layers of keys and values.
    assert layer_ropes(layers)[1] == "the model has no attention layer SGLang could cache"
    still = torch.nn.ModuleList([BailingMoELinearAttention(0, one, linear_rope=False)])
    assert lightning_rope(still, [0]) == (None, None)
    for model, known, why in (
        (layers, [0, 2, 3], "not known"),
        (torch.nn.ModuleList([still[0], layers[1]]), [0, 2], "differently"),
        (torch.nn.ModuleList([layers[0], BailingMoELinearAttention(2, rotary())]), [0, 2], "diff"),
        (BailingMoELinearAttention(0, rotary("DynamicNTKScalingRotaryEmbedding")), [0], "linear"),
    ):
        rope, refusal = lightning_rope(model, known)
        assert rope is None and why in str(refusal)
