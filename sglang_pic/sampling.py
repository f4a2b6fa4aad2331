"""Rows without a token to sample.

A grammar that is at its end, beside ``min_new_tokens``, or one that no text fits leaves
a row no token: all its probabilities are NaN. SGLang's torch samplers raise of that,
which ends the scheduler (the one without top-k and top-p only where
``SGLANG_OPT_USE_GUMBEL_SAMPLE`` is off). With some token, which its grammar does not
take, SGLang ends that request alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def sample(original: Callable[..., Any], probs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's functions over ``probs`` [rows, vocabulary]: a row without
    probabilities gets the first token."""
    lost = ~torch.isfinite(probs).all(dim=-1, keepdim=True)
    first = torch.zeros_like(probs)
    first[:, 0] = 1
    return original(torch.where(lost, first, probs), *args, **kwargs)
