"""Latent attention (MLA): one row a token, of which positions turn a part."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from sglang_pic.attention.latent import absorbed_where_linked, stored
from sglang_pic.attention.relocate import Relocator
from sglang_pic.attention.rope import layer_ropes
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.kernels.rotate import LayerRope, angles, rotate

LATENT, ROTARY = 8, 4


def pool() -> MLATokenToKVPool:
    made = MLATokenToKVPool(
        size=64, page_size=1, dtype=torch.float32, kv_lora_rank=LATENT,
        qk_rope_head_dim=ROTARY, layer_num=2, device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    for buffer in made.kv_buffer:
        buffer.normal_(generator=torch.Generator().manual_seed(0))
    return made


def table(dim: int = ROTARY) -> torch.Tensor:
    freqs = torch.arange(200)[:, None] / 10 ** torch.linspace(0, 2, dim // 2)
    return torch.cat([freqs.cos(), freqs.sin()], -1)


@given(first=st.integers(0, 3), rest=st.integers(0, 3), neox=st.booleans(), seed=st.integers(0, 99))
def test_a_slice_is_turned_as_by_itself(first: int, rest: int, neox: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 2, first + ROTARY + rest, generator=generator)
    turns = angles(table(), torch.randint(-99, 99, (5,), generator=generator))
    parts = x.split([first, ROTARY, rest], -1)
    expected = torch.cat([parts[0], rotate(parts[1], *turns, neox=neox), parts[2]], -1)
    assert torch.equal(rotate(x, *turns, neox=neox, first=first), expected)


def test_what_is_stored_does_not_overlap() -> None:
    latent = pool()
    keys, values = stored(latent, 1)
    assert keys.shape[-1] == ROTARY and values.shape[-1] == LATENT
    assert torch.equal(torch.cat([values, keys], -1), latent.get_key_buffer(1))
    plain = MHATokenToKVPool(
        size=8, page_size=1, dtype=torch.float32, head_num=1, head_dim=4, layer_num=1,
        device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    assert [part.data_ptr() for part in stored(plain, 0)] == [
        part.data_ptr() for part in plain.get_kv_buffer(0)
    ]


@pytest.mark.parametrize("turned", [True, False])
def test_pages_are_copied_with_their_rotary_slice_alone_turned(turned: bool) -> None:
    made = pool()
    before = [buffer.clone() for buffer in made.kv_buffer]
    rope = LayerRope(table(), neox=False, first=LATENT) if turned else None
    source, target = torch.arange(1, 11), torch.arange(20, 30)
    offsets = torch.arange(10) * 7 - 30
    Relocator(made, {0: rope, 1: rope}).copy(source, target, offsets)
    for layer, was in enumerate(before):
        expected = was[source]
        if turned:
            turns = angles(table(), offsets)
            expected = rotate(expected, *turns, neox=False, first=LATENT)
        assert torch.equal(made.get_key_buffer(layer)[target], expected)
        assert torch.equal(made.get_key_buffer(layer)[source], was[source])


def test_a_mean_is_taken_once() -> None:
    made = pool()
    one, two = torch.arange(1, 6), torch.arange(11, 16)
    rows = made.get_key_buffer(0).clone()
    Relocator(made, {0: None}).average(one, two)
    assert torch.allclose(made.get_key_buffer(0)[one], (rows[one] + rows[two]) / 2)


def test_of_latent_attention_one_key_head_is_held() -> None:
    cost = PrefillCost.of_model(
        torch.nn.Sequential(torch.nn.Linear(2, 3)), pool(), kv_itemsize=4, kv_heads=1, heads=6
    )
    assert cost.kv_bytes == 2 * 4 * (LATENT + ROTARY)
    # Of each layer and head, a row for the score and about as much for the values.
    assert cost.per_pair == 2 * 2 * 2 * 6 * (LATENT + ROTARY)


class DeepseekV2AttentionMLA(torch.nn.Module):
    """Named as SGLang's."""

    def __init__(self, rotary: Any = None, *, use_dsa: bool = False):
        super().__init__()
        self.attn_mqa = RadixAttention(
            4, LATENT + ROTARY, 1.0, num_kv_heads=1, layer_id=3, v_head_dim=LATENT
        )
        self.attn_mha = RadixAttention(4, 6, 1.0, num_kv_heads=4, layer_id=3, v_head_dim=5)
        self.rotary_emb = rotary
        self.use_dsa = use_dsa


class SomebodysMLA(DeepseekV2AttentionMLA):
    """Another class: what it changes we do not know."""


def test_only_what_is_known_is_linked() -> None:
    rotary = types.new_class("DeepseekScalingRotaryEmbedding")()
    rotary.cos_sin_cache, rotary.is_neox_style = table(), False
    found, refusal = layer_ropes(torch.nn.Sequential(DeepseekV2AttentionMLA(rotary)))
    assert refusal is None
    assert found == {3: LayerRope(rotary.cos_sin_cache, False, LATENT)}
    # Kimi Linear's have no positions.
    assert layer_ropes(torch.nn.Sequential(DeepseekV2AttentionMLA())) == ({3: None}, None)
    for other, why in (
        (DeepseekV2AttentionMLA(use_dsa=True), "sparse"),
        (SomebodysMLA(), "unknown"),
    ):
        ropes, refusal = layer_ropes(torch.nn.Sequential(other))
        assert not ropes and why in str(refusal)


def test_linked_rows_are_absorbed_whatever_sglang_would_choose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    choose = absorbed_where_linked(lambda attn, forward_batch: AttnForwardMethod.MHA)
    ours = types.SimpleNamespace(links=lambda batch: batch == "linked")
    for backend, batch, form in (
        (ours, "linked", AttnForwardMethod.MLA),
        (ours, "ordinary", AttnForwardMethod.MHA),
        (object(), "linked", AttnForwardMethod.MHA),
    ):
        monkeypatch.setattr(forward_mha, "resolve_attn_backend", lambda _, found=backend: found)
        assert choose(None, batch) is form
