"""How pairs are stored between compile and link.

States and matrix operators may be kept in float16: what rounding them costs does
not grow with the number of segments composed, since operators are contractions.
Scalar and vector operators stay float32: beside the states they weigh nothing.
"""

from __future__ import annotations

import dataclasses

import torch

from sglang_pic.kernels.operators.pair import Pair


@dataclasses.dataclass(frozen=True)
class PackedPair:
    """A pair as stored; see ``pack``.

    Attributes:
        operator: matrices [kept, dk, dk]; scalars or vectors as in the pair.
        kept: int64 [kept], which of the layers * heads matrices those are; None
            for scalars and vectors.
        state: [layers, heads, dk, dv].
    """

    operator: torch.Tensor
    kept: torch.Tensor | None
    state: torch.Tensor

    @property
    def nbytes(self) -> int:
        tensors = (self.operator, self.kept, self.state)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def unpack(self) -> Pair:
        """The pair in float32; dropped operators are 0."""
        state = self.state.float()
        if self.kept is None:
            return Pair(self.operator, state)
        layers, heads, dk, _ = state.shape
        operator = state.new_zeros((layers * heads, dk, dk))
        operator[self.kept] = self.operator.float()
        return Pair(operator.unflatten(0, (layers, heads)), state)


def pack(pair: Pair, *, dtype: torch.dtype = torch.float32, threshold: float = 0.0) -> PackedPair:
    """Store a pair.

    Args:
        pair: ``A`` [layers, heads], [layers, heads, dk] or [layers, heads, dk, dk],
            ``B`` [layers, heads, dk, dv].
        dtype: of states and matrices, float32 or a narrower one. Where a tensor
            does not fit the narrower one (a value overflows or is not finite, or
            a head's state is so small that it would lose more than rounding
            costs) that tensor stays float32.
        threshold: heads whose matrix has a Frobenius norm below this are stored
            without it, as if they forgot what came before the stretch. The norm
            bounds what is lost: ``|A S| <= |A| |S|``.
    """
    state = pack_state(pair.B, dtype)
    if pair.A.dim() < pair.B.dim():
        return PackedPair(pair.A.float(), None, state)
    operator = pair.A.float().flatten(0, 1)
    kept = torch.nonzero(~(operator.norm(dim=(-2, -1)) < threshold)).squeeze(1)
    return PackedPair(_narrow(operator[kept], dtype), kept, state)


def pack_state(state: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """States [layers, heads, dk, dv] in ``dtype``, or in float32; see ``pack``."""
    state = state.float().contiguous()
    narrow = _narrow(state, dtype)
    lost = (narrow.float() - state).norm(dim=(-2, -1))
    fits = lost <= torch.finfo(dtype).eps * state.norm(dim=(-2, -1))
    return narrow if bool(fits.all()) else state


def _narrow(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in ``dtype``, or as it is if that would not be finite."""
    narrow = x.to(dtype)
    return narrow if bool(narrow.isfinite().all()) else x
