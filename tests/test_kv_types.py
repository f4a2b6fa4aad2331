"""A KV cache of another type than the model's: stored in that, computed in the model's."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
import torch
from conftest import CHECKS, TINY, serve
from linking import assemble, body, distributions, fresh_salt, ids_of, model

from sglang_pic.eval.oracle import dense
from sglang_pic.eval.oracle.narrow import narrow_logprobs
from sglang_pic.eval.serving import Server
from sglang_pic.forest.build import PLAIN
from sglang_pic.kernels.relocate import relocate
from sglang_pic.kernels.rotate import angles

N_NEW = 3
# What is summed in another order may be rounded to the next number of eight, or 128.
TYPES = {"fp8_e4m3": (torch.float8_e4m3fn, 0.03), "bfloat16": (torch.bfloat16, 0.003)}


@pytest.fixture(
    scope="module",
    params=["fp8_e4m3", pytest.param("bfloat16", marks=pytest.mark.long)],
)
def narrow(
    request: pytest.FixtureRequest, tiny_path: pathlib.Path, logs: pathlib.Path
) -> Iterator[tuple[Server, torch.dtype, float]]:
    name = request.param
    flags = (f"--kv-cache-dtype={name}", "--page-size=4")
    with serve(tiny_path, logs / f"kv_{name}.log", *TINY, *flags, env=CHECKS) as server:
        yield server, *TYPES[name]


@pytest.mark.server
@pytest.mark.parametrize("lengths", [[60], [40, 33], [25, 70, 48]])
def test_links_are_rounded_once_and_turned(
    narrow: tuple[Server, torch.dtype, float], lengths: list[int]
) -> None:
    server, dtype, tolerance = narrow
    assert server.forest()["refusal"] is None
    parts = [("segment", ids_of(30 + i, n)) for i, n in enumerate(lengths)]
    ids, segments = assemble([("text", ids_of(1, 7)), *parts, ("text", ids_of(2, 9))])
    where = {"seam": 4, "page": 4, "n_new": N_NEW}
    for pic in ({"seam": 4}, {"policy": "full"}, {"seam": 4, "turns": True}):
        answer = server.generate(**body(ids, segments, N_NEW, fresh_salt(), **pic))
        report = answer["meta_info"]["pic"]
        policy = pic.get("policy", "seam")
        planned = dense.layout(len(ids), segments, seam=4, page=4, policy=policy, prompt_ids=ids)
        assert report["tokens_reused"] - report["prefix_tokens"] == planned.n_reused
        forced = answer["output_ids"]
        expected = narrow_logprobs(
            model(), ids, segments, dtype, policy=policy, forced=forced, **where
        ).full_logprobs
        assert (distributions(answer) - expected).abs().max() < tolerance


@pytest.mark.server
def test_the_rounding_is_seen(narrow: tuple[Server, torch.dtype, float]) -> None:
    """What the tolerance lets pass is less than what the type changes."""
    server, _, tolerance = narrow
    ids, segments = assemble([("segment", ids_of(5, 60)), ("text", ids_of(2, 9))])
    answer = server.generate(**body(ids, segments, N_NEW, fresh_salt(), seam=4))
    wide = dense.linked_logprobs(
        model(), ids, segments, seam=4, page=4, n_new=N_NEW, forced=answer["output_ids"]
    ).full_logprobs
    assert (distributions(answer) - wide).abs().max() > 2 * tolerance


@pytest.mark.server
def test_relocated_pages_are_rounded_once_more(narrow: tuple[Server, torch.dtype, float]) -> None:
    server, _, tolerance = narrow
    ids, segments = assemble(
        [("text", ids_of(1, 7)), ("segment", ids_of(5, 60)), ("text", ids_of(2, 9))]
    )
    salt = fresh_salt()
    shared = server.generate(**body(ids, segments, N_NEW, salt, seam=4))
    moved = server.generate(**body(ids, segments, N_NEW, salt, seam=4, mode="relocate"))
    assert moved["meta_info"]["pic"]["segments"][0]["hit"]
    assert (distributions(shared) - distributions(moved)).abs().max() < 10 * tolerance


@pytest.mark.parametrize("dtype", [one for one in PLAIN if one.itemsize < 4])
def test_a_page_moves_in_its_own_type(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(20, 2, 8, generator=draw).to(dtype)
    values = torch.randn(20, 2, 8, generator=draw).to(dtype)
    table = torch.randn(40, 8, generator=draw)
    source, target = torch.arange(5), torch.arange(10, 15)
    turns = angles(table, torch.full((5,), 7))
    wide = keys.float()
    relocate(wide, values.float(), source, target, turns)
    relocate(keys, values, source, target, turns)
    assert torch.equal(keys[target].float(), wide[target].to(dtype).float())
    assert torch.equal(values[target].float(), values[source].float())


def test_scales_are_refused() -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    from sglang_pic.attention.rope import layer_ropes

    attention = RadixAttention(2, 8, 1.0, 2, 0)
    block = torch.nn.Module()
    block.attn = attention
    block.rotary_emb = type("RotaryEmbedding", (torch.nn.Module,), {})()
    block.rotary_emb.cos_sin_cache, block.rotary_emb.is_neox_style = torch.zeros(4, 8), True
    assert layer_ropes(block)[1] is None
    attention.k_scale_float, attention.v_scale_float = 1.0, 1.0
    assert layer_ropes(block)[1] is None
    attention.v_scale_float = 0.5
    assert "scales" in str(layer_ropes(block)[1])
