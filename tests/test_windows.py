"""Layers that see a window of positions: which are linked, and how Gemma 3 turns its keys."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.models.gemma3_causal import Gemma3RotaryEmbedding
from transformers import Gemma3TextConfig

from sglang_pic.attention.rope import has_windows, layer_ropes, window_of
from sglang_pic.attention.selfcheck import rotary_check

DIM, LENGTH, WINDOW = 8, 200, 24


def embedding(kind: str, theta: float = 1000.0) -> Gemma3RotaryEmbedding:
    """Gemma 3's own."""
    rope = {"rope_type": kind, "rope_theta": theta, "factor": 4.0}
    config = Gemma3TextConfig(head_dim=DIM, max_position_embeddings=LENGTH)
    config.rope_parameters = rope
    return Gemma3RotaryEmbedding(config)


def held(theta: float) -> Any:
    """What a layer holds beside it: without scaling."""
    angle = torch.arange(LENGTH)[:, None] / theta ** (torch.arange(0, DIM, 2) / DIM)
    made = types.new_class("RotaryEmbedding", (torch.nn.Module,))()
    made.cos_sin_cache, made.is_neox_style = torch.cat([angle.cos(), angle.sin()], -1), True
    return made


class Gemma3Attention(torch.nn.Module):
    """Named as SGLang's."""

    def __init__(self, layer: int, rotary: Any, window: int | None):
        super().__init__()
        self.attn = RadixAttention(4, DIM, 1.0, 2, layer, sliding_window_size=window)
        self.rotary_emb, self.is_sliding = rotary, window is not None


class SomebodysAttention(Gemma3Attention):
    """Another class: what it changes we do not know."""


class Gemma3TextModel(torch.nn.Module):
    """Named as SGLang's: a layer with a window, a full one."""

    def __init__(self, kind: str):
        super().__init__()
        self.rotary_emb = embedding(kind, 50000.0)
        self.rotary_emb_local = embedding("default")
        self.layers = torch.nn.ModuleList(
            [Gemma3Attention(0, held(1000.0), WINDOW - 1), Gemma3Attention(1, held(50000.0), None)]
        )


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_gemma_turns_by_what_its_model_holds(kind: str) -> None:
    model = Gemma3TextModel(kind)
    ropes, refusal = layer_ropes(model)
    assert refusal is None and has_windows(model)
    assert [window_of(layer.attn) for layer in model.layers] == [WINDOW - 1, None]
    check = rotary_check(model, ropes)
    assert check is not None and check.found <= check.bound
    scaled = ropes[1]
    assert scaled is not None
    as_held = torch.allclose(scaled.cos_sin_cache, model.layers[1].rotary_emb.cos_sin_cache)
    assert as_held == (kind == "default")


def test_a_wrong_table_is_seen() -> None:
    model = Gemma3TextModel("linear")
    ropes, _ = layer_ropes(model)
    first = ropes[0]
    check = rotary_check(model, {0: first, 1: first})
    assert check is not None and check.found > check.bound


def test_what_is_not_known_is_refused() -> None:
    ropes, refusal = layer_ropes(Gemma3TextModel("dynamic"))
    assert not ropes and "not known to be linear" in str(refusal)
    other = SomebodysAttention(3, held(1000.0), WINDOW)
    ropes, refusal = layer_ropes(torch.nn.Sequential(other))
    assert not ropes and refusal == "layer 3: sliding-window attention of SomebodysAttention"
    assert layer_ropes(torch.nn.Sequential(SomebodysAttention(3, held(9.0), None)))[1] is None
