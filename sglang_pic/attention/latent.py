"""Where SGLang's pools hold what positions turn, in latent attention (MLA) too.

There a token's row is one key that all heads share, ``[latent | rotary slice]``; its values
are the latent, a part of the same memory. Queries come *absorbed*: multiplied into the
latent's space, so that attention is one of a single key head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def stored(pool: Any, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer's pool holds, without overlap: what positions turn, and the rest.

    Keys and values, [slots, kv_heads, head_dim]; of latent attention the rotary slice and
    the latent, views of one row.
    """
    keys, values = pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id)
    if keys.data_ptr() == values.data_ptr():
        keys = keys[..., values.shape[-1] :]
    return keys, values


def absorbed_where_linked(choose: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """SGLang's choice of a form of MLA, but for batches with linked rows, which are computed
    absorbed: in another form a row sees all of its prefix, and in row order.

    Args:
        choose: one of SGLang's handlers, of an attention module and a ``ForwardBatch``.
    """
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    @functools.wraps(choose)
    def chosen(module: Any, batch: Any) -> Any:
        form = choose(module, batch)
        if form == AttnForwardMethod.MLA:
            return form
        links = getattr(forward_mha.resolve_attn_backend(batch), "links", None)
        return AttnForwardMethod.MLA if links is not None and links(batch) else form

    return chosen
