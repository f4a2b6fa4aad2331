"""What SGLang lacks to run latent attention (MLA) on a plain CPU.

Its ``torch_native`` backend reads keys and values from the pool, where only the absorbed
form of MLA has them; and on a CPU it makes rotary embeddings for DeepSeek's YaRN alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.layers.rotary_embedding.factory import get_rope


def register() -> None:
    """Make the absorbed form that of ``torch_native``, for prompts as for decode."""
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    absorbed = handlers.AttnForwardMethod.MLA
    handlers.AttentionBackendRegistry.register("torch_native", lambda *_: absorbed)


def get_rope_wrapper(
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: int,
    is_neox_style: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    dtype: Any = None,
    partial_rotary_factor: float = 1.0,
    device: str | None = None,
) -> Any:
    """In place of SGLang's: the embeddings that it makes for other devices."""
    return get_rope(
        head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, dtype,
        partial_rotary_factor,
    )  # fmt: skip


KERNELS: dict[str, Callable[..., Any]] = {
    "sglang.srt.layers.rotary_embedding.factory.get_rope_wrapper": get_rope_wrapper,
}
