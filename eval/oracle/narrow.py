"""What a prompt must answer where keys and values are kept in a narrower type.

Every key, rotated to the position at which it is computed, and every value is rounded as
it is written, and computed with as float32. A segment's stand at positions of its own; in
a prompt they are turned as they were rounded.

Nothing here imports the code under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sglang_pic.eval.oracle.company import Layers, steps
from sglang_pic.eval.oracle.dense import Generation, Segment, _generation, layout


class NarrowCache(DynamicCache):
    """Rounds what is new to another type, and gives it back as it was."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        rounded = (x.to(self._dtype).to(x.dtype) for x in (keys, values))
        return super().update(*rounded, layer, *args, **kwargs)


def _turned(model: Any, keys: Tensor, by: int) -> Tensor:
    """Keys [1, heads, n, dim] (GPT-NeoX layout), so many positions further on."""
    cos, sin = model.model.rotary_emb(keys, torch.tensor([[by]]))
    first, second = keys.chunk(2, -1)
    return keys * cos + torch.cat([-second, first], -1) * sin


@torch.no_grad()
def narrow_logprobs(
    model: Any,
    prompt_ids: Sequence[int],
    segments: Sequence[Segment],
    dtype: torch.dtype,
    *,
    seam: int,
    page: int,
    n_new: int,
    policy: str = "seam",
    forced: Sequence[int] | None = None,
) -> Generation:
    """Continue a linked prompt.

    Args:
        model: a Llama of transformers, float32, ``attn_implementation="eager"``.
        dtype: of its KV cache.
        The others: see ``dense.layout`` and ``dense.linked_logprobs``.
    """
    cores = layout(
        len(prompt_ids), segments, seam=seam, page=page, policy=policy, prompt_ids=prompt_ids
    ).cores
    positions: list[int] = []
    parts: list[Layers] = []
    for (start, end), core in zip(segments, cores, strict=True):
        if not core:
            continue
        cache = NarrowCache(dtype)
        alone = torch.tensor([prompt_ids[start:end]])
        model(input_ids=alone, past_key_values=cache, use_cache=True)
        at = torch.tensor(sorted(core)) - start
        parts.append(
            [
                (_turned(model, one.keys[:, :, at], start), one.values[:, :, at])
                for one in cache.layers
            ]
        )
        positions += sorted(core)
    held = [
        (torch.cat([k for k, _ in layer], 2), torch.cat([v for _, v in layer], 2))
        for layer in zip(*parts, strict=True)
    ]
    tokens: list[int] = []
    reused = torch.tensor(positions, dtype=torch.int64)
    made = steps(model, prompt_ids, reused, held, tokens, NarrowCache(dtype))
    return _generation(made, n_new, forced, tokens)
