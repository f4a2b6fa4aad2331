"""What a cached token saves and holds, for the eviction order and the metrics."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class PrefillCost:
    """Estimated cost of computing tokens, and bytes of holding them.

    Attributes:
        per_token: FLOPs of one token outside attention: 2 for each weight.
        per_pair: FLOPs of one token's attention to one earlier one, all
            full-attention layers.
        kv_bytes: bytes of K and V of one token, all full-attention layers.
    """

    per_token: float
    per_pair: float
    kv_bytes: int

    def flops(self, start: int, end: int) -> float:
        """Of computing positions [start, end) behind ``start`` cached tokens."""
        n = end - start
        return n * self.per_token + self.per_pair * n * (start + end + 1) / 2

    @classmethod
    def of_model(
        cls, model: Any, pool: Any, *, kv_itemsize: int, kv_heads: int, heads: int
    ) -> PrefillCost:
        """Read off a loaded model.

        Args:
            model: ``torch.nn.Module``; every weight but the embeddings' counts,
                all experts of a mixture included.
            pool: SGLang's KV pool.
            kv_itemsize: bytes of one number in it.
            kv_heads, heads: of one full-attention layer; of MLA one key head.
        """
        weights = sum(
            p.numel() for name, p in model.named_parameters() if "embed" not in name.split(".")[-2]
        )
        sizes = pool.get_kv_size_bytes()
        # Of latent attention one size: its values are nearly all of its keys.
        held, read = (sum(sizes),) * 2 if isinstance(sizes, tuple) else (sizes, 2 * sizes)
        slots = pool.size + pool.page_size
        # Scores take 2 FLOPs for each number of K and query head that shares it,
        # values as many.
        numbers = read / slots / kv_itemsize
        return cls(
            per_token=2.0 * weights,
            per_pair=float(2.0 * numbers * heads / kv_heads),
            kv_bytes=int(held) // slots,
        )
