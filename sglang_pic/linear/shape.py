"""Sizes of a model's linear layers.

All layers in one tensor, the family's own order of dimensions: operators
[layers, heads, dk, dk] or, where they are scalars, [layers, heads]; states
[layers, heads, dk, dv], histories of the convolution [layers, channels,
width - 1]. SGLang's pools hold states transposed, [heads, dv, dk], but Lightning's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.store.value import OTHER_SHAPE, BadValue

# Bytes of a number that is not narrowed.
WIDEST = 4


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """Sizes of a model's linear layers, and the kind of their operators.

    While a kernel runs over a stretch of tokens, its pair is one *running state*
    in SGLang's layout: [..., heads, dv + n, dk], B over A, both transposed. A
    matrix takes n = dk rows, a scalar one row that repeats it. Where ``tokens_first``,
    SGLang's pool has histories [width - 1, channels]; where ``keys_first``, states
    [heads, dk, dv].
    """

    layers: int
    heads: int
    dk: int
    dv: int
    channels: int
    history: int
    scalar: bool
    tokens_first: bool = False
    keys_first: bool = False

    @classmethod
    def of_pool(
        cls,
        mamba_pool: Any,
        *,
        scalar: bool,
        tokens_first: bool = False,
        keys_first: bool = False,
    ) -> LinearShape:
        """Read off SGLang's state pool."""
        layers, _, heads, dv, dk = mamba_pool.mamba_cache.temporal.shape
        channels, history = mamba_pool.mamba_cache.conv[0].shape[2:]
        if tokens_first:
            channels, history = history, channels
        if keys_first:
            dk, dv = dv, dk
        return cls(layers, heads, dk, dv, channels, history, scalar, tokens_first, keys_first)

    def histories(self, conv: torch.Tensor) -> torch.Tensor:
        """[..., channels, width - 1], a view of SGLang's pool of histories."""
        return conv.transpose(-1, -2) if self.tokens_first else conv

    def states(self, temporal: torch.Tensor) -> torch.Tensor:
        """[..., heads, dk, dv], a view of SGLang's pool of states."""
        return temporal if self.keys_first else temporal.transpose(-1, -2)

    @property
    def operator(self) -> tuple[int, ...]:
        """Shape of an operator of all layers."""
        return (self.layers, self.heads, *(() if self.scalar else (self.dk, self.dk)))

    def state_nbytes(self, pairs: int, itemsize: int) -> int:
        """Upper bound of the bytes a segment's states take with this many pairs."""
        state = self.layers * self.heads * self.dk * self.dv * itemsize
        operators = math.prod(self.operator)
        operator = operators * 4 if self.scalar else operators * itemsize
        kept = 0 if self.scalar else self.layers * self.heads * 8
        conv_tail = self.layers * self.channels * self.history * 4
        return pairs * (operator + kept + state) + state + conv_tail

    def check_tensors(self, tensors: dict[str, torch.Tensor], heads: Sequence[int]) -> None:
        """Raise ``BadValue`` unless these are the states of a segment, with the pairs of
        cores that begin at ``heads``, in shapes and types that ``adopt`` takes."""
        state = (self.layers, self.heads, self.dk, self.dv)
        floats = (torch.float32, torch.float16)
        expected: dict[str, tuple[tuple[int, ...], Any]] = {"end": (state, floats)}
        expected["conv_tail"] = ((self.layers, self.channels, self.history), None)
        for first in heads:
            expected[f"pair.{first}.state"] = (state, floats)
            if self.scalar:
                expected[f"pair.{first}.operator"] = (self.operator, (torch.float32,))
                continue
            kept = tensors.get(f"pair.{first}.kept", torch.empty(0))
            of_all = self.layers * self.heads
            if kept.dtype != torch.int64 or kept.dim() != 1 or kept.unique().numel() != len(kept):
                raise BadValue(OTHER_SHAPE, "no list of operators")
            if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < of_all:
                raise BadValue(OTHER_SHAPE, "operators of no head")
            expected[f"pair.{first}.kept"] = ((len(kept),), (torch.int64,))
            expected[f"pair.{first}.operator"] = ((len(kept), self.dk, self.dk), floats)
        if expected.keys() != tensors.keys():
            raise BadValue(OTHER_SHAPE, f"it holds {sorted({*expected} ^ {*tensors})[:4]}")
        for name, (shape, dtypes) in expected.items():
            one = tensors[name]
            if tuple(one.shape) != shape or not (
                one.dtype.is_floating_point if dtypes is None else one.dtype in dtypes
            ):
                raise BadValue(OTHER_SHAPE, f"{name} is {tuple(one.shape)} of {one.dtype}")

    def begun(self, count: int, device: torch.device) -> torch.Tensor:
        """float32 [count, heads, dv + n, dk], running states of no tokens."""
        return _begun(self, count, device).clone()

    def running(self, pair: Pair) -> torch.Tensor:
        """float32 [..., heads, dv + n, dk], what ``pair`` reads it from."""
        operator = pair.A.float()
        if self.scalar:
            operator = operator[..., None, None].expand(*operator.shape, self.dk, 1)
        return torch.cat([pair.B.float(), operator], -1).transpose(-1, -2).contiguous()

    def pair(self, running: torch.Tensor) -> Pair:
        """``A`` and ``B`` [..., heads, dk, dv] of a running state."""
        state = running.transpose(-1, -2)
        operator = state[..., 0, self.dv] if self.scalar else state[..., self.dv :]
        return Pair(operator, state[..., : self.dv])


@functools.lru_cache(maxsize=4)
def _begun(shape: LinearShape, count: int, device: torch.device) -> torch.Tensor:
    """The same tensor for all layers; not to be written."""
    ones, eye = torch.ones(1, shape.dk, device=device), torch.eye(shape.dk, device=device)
    operator = ones if shape.scalar else eye
    rows = shape.dv + len(operator)
    begun = torch.zeros(count, shape.heads, rows, shape.dk, device=device)
    begun[:, :, shape.dv :] = operator
    return begun
