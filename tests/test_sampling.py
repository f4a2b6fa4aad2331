"""Rows that a grammar leaves no token, in SGLang's own torch samplers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.layers import sampler

from sglang_pic.sampling import sample

ROWS = 3
SAMPLERS: dict[str, Callable[..., Any]] = {
    "plain": sampler.sampling_from_probs_torch,
    "top_k": functools.partial(
        sampler.top_k_top_p_min_p_sampling_from_probs_torch,
        top_ks=torch.full((ROWS,), 5),
        top_ps=torch.full((ROWS,), 0.9),
        min_ps=torch.zeros(ROWS),
        need_min_p_sampling=False,
        sampling_seed=None,
        positions=torch.arange(ROWS),
    ),
}


@pytest.mark.parametrize("stock", SAMPLERS.values(), ids=SAMPLERS)
def test_a_row_without_probabilities_gets_a_token(stock: Callable[..., Any]) -> None:
    probs = torch.randn(ROWS, 16).softmax(-1)
    lost = probs.clone()
    # What is left of logits that are all masked.
    lost[1] = torch.full((16,), -torch.inf).softmax(-1)
    # With it SGLang draws by noise, of anything, where neither top-k nor top-p is asked.
    with envs.SGLANG_OPT_USE_GUMBEL_SAMPLE.override(False):
        with pytest.raises(RuntimeError, match="probability tensor"):
            stock(lost.clone())
        found = sample(stock, lost).reshape(-1)
    assert found[1] == 0 and set(found.tolist()) <= set(range(16))
    assert lost[1].isnan().all()


@pytest.mark.parametrize("stock", SAMPLERS.values(), ids=SAMPLERS)
def test_other_rows_are_drawn_as_stock_draws_them(stock: Callable[..., Any]) -> None:
    for seed in range(5):
        probs = torch.randn(ROWS, 16).softmax(-1)
        torch.manual_seed(seed)
        expected = stock(probs.clone())
        torch.manual_seed(seed)
        assert torch.equal(sample(stock, probs.clone()), expected)
