"""K and V of segments between the pool's pages and tensors of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sglang_pic.attention.latent import stored
from sglang_pic.store.value import OTHER_SHAPE, BadValue, SavedSegment


class KvPages:
    """Pages of the full-attention layers.

    Args:
        pool: SGLang's, of KV.
        layers: ids of those layers.
    """

    def __init__(self, pool: Any, layers: Sequence[int]):
        self._pool = pool
        self._layers = layers

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """``k.<layer>`` and ``v.<layer>``, [slots, heads, head dim] each: what positions
        turn, and the rest."""
        for layer in self._layers:
            keys, values = stored(self._pool, layer)
            yield f"k.{layer}", keys
            yield f"v.{layer}", values

    def check(self, saved: SavedSegment, held: int) -> None:
        """Raise ``BadValue`` unless a value holds K and V of exactly so many tokens."""
        for name, buffer in self.buffers():
            one = saved.tensors.get(name)
            shape = (held, *buffer.shape[1:])
            if one is None or tuple(one.shape) != shape or one.dtype != buffer.dtype:
                raise BadValue(OTHER_SHAPE, f"{name} is not what its tokens need")
        of_layers = [name for name in saved.tensors if name[:2] in ("k.", "v.")]
        if len(of_layers) != 2 * len(self._layers):
            raise BadValue(OTHER_SHAPE, "it holds layers that this model has not")

    def fill(self, saved: SavedSegment, slots: torch.Tensor, first: int, end: int) -> None:
        """Write K and V of tokens [first, end) of a value into their slots.

        Args:
            slots: int64, of all of its tokens.
        """
        for name, buffer in self.buffers():
            part = saved.tensors[name][first:end]
            buffer[slots[first:end]] = part.to(buffer.device, non_blocking=True)
