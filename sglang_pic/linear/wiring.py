"""Which linear backends of SGLang can compose."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention.hybrid_linear_attn_backend import (
    HybridLinearAttnBackend,
    Mamba2AttnBackend,
)
from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend
from sglang.srt.layers.attention.linear.kda_backend import KDAAttnBackend
from sglang.srt.layers.attention.linear.lightning_backend import LightningAttentionBackend

from sglang_pic.linear.gdn import PicGDNBackend
from sglang_pic.linear.hybrid import PicHybridBackend
from sglang_pic.linear.kda import PicKDABackend
from sglang_pic.linear.lightning import PicLightningBackend
from sglang_pic.linear.mamba2 import PicMamba2Backend
from sglang_pic.linear.rows import PicLinearBackend

# By exact class: what a subclass changes we do not know.
LINEAR_BACKENDS: dict[type, type[PicLinearBackend]] = {
    GDNAttnBackend: PicGDNBackend,
    KDAAttnBackend: PicKDABackend,
    LightningAttentionBackend: PicLightningBackend,
    Mamba2AttnBackend: PicMamba2Backend,
}


def wire(runner: Any, backend: Any) -> Any:
    """SGLang's hybrid backend with its linear part replaced by ours.

    Args:
        runner: SGLang's model runner.
        backend: what its wrapper made of the full backend.

    Returns:
        A ``PicHybridBackend`` where both parts can link; ``backend`` itself
        otherwise, which ``forest.build`` then refuses to link on.
    """
    if type(backend) is not HybridLinearAttnBackend:
        return backend
    linear = LINEAR_BACKENDS.get(type(backend.linear_attn_backend))
    if linear is None or not hasattr(backend.full_attn_backend, "set_plans"):
        return backend
    return PicHybridBackend(backend.full_attn_backend, linear(runner), backend.full_attn_layers)
