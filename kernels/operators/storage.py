"""How pairs are stored between compile and link.

States and matrix operators may be kept in float16: what rounding them costs does
not grow with the number of segments composed, since operators are contractions.
Scalar and vector operators stay float32: beside the states they weigh nothing.
"""

from __future__ import annotations

import dataclasses

import torch

from sglang_pic.kernels.operators.pair import Pair

# Added to the address of a float16 matrix: addresses are multiples of 16.
FLAGS = {torch.float32: 0, torch.float16: 1}
ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class PackedPair:
    """A pair as stored; see ``pack``.

    Attributes:
        operator: matrices [kept, dk, dk]; scalars or vectors as in the pair.
        kept: int64 [kept] on the host, which of the layers * heads matrices those
            are; None for scalars and vectors.
        state: [layers, heads, dk, dv].

    Of all matrices the columns are contiguous, each behind the last (``copied_in_columns``).
    """

    operator: torch.Tensor
    kept: torch.Tensor | None
    state: torch.Tensor

    @classmethod
    def of_state(cls, state: torch.Tensor, *, matrices: bool) -> PackedPair:
        """``S <- state``: no operator is kept, or scalars of 0."""
        layers, heads, dk, _ = state.shape
        if not matrices:
            return cls(state.new_zeros(layers, heads, dtype=torch.float32), None, state)
        return cls(state.new_empty(0, dk, dk), torch.empty(0, dtype=torch.int64), state)

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

    def places(self) -> torch.Tensor:
        """Where a kernel finds every head's operator (a matrix or a scalar) and state.

        Returns:
            int64 [layers, 2, heads] on the host, addresses in the memory of the
            tensors' device, plus 1 where float16 stands there; 0 for an operator
            that is not kept. They hold as long as the tensors.
        """
        layers, heads, dk, dv = self.state.shape
        found = torch.zeros(2, layers * heads, dtype=torch.int64)
        if self.kept is None:
            found[0] = _addresses(self.operator.view(-1))
        else:
            found[0, self.kept] = _addresses(self.operator)
        found[1] = _addresses(self.state.view(-1, dk, dv))
        return found.view(2, layers, heads).transpose(0, 1)


def pack(pair: Pair, *, dtype: torch.dtype = torch.float32, threshold: float = 0.0) -> PackedPair:
    """Store a pair: a copy.

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
        operator = pair.A.float().clone(memory_format=torch.contiguous_format)
        return PackedPair(operator, None, state)
    operator = pair.A.float().flatten(0, 1)
    kept = torch.nonzero(~(operator.norm(dim=(-2, -1)) < threshold)).squeeze(1)
    return PackedPair(_narrow(copied_in_columns(operator[kept]), dtype), kept.cpu(), state)


def pack_state(state: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """States [layers, heads, dk, dv] in ``dtype``, or in float32; see ``pack``."""
    state = copied_in_columns(state.float())
    narrow = _narrow(state, dtype)
    lost = (narrow.float() - state).norm(dim=(-2, -1))
    fits = lost <= torch.finfo(dtype).eps * state.norm(dim=(-2, -1))
    return narrow if bool(fits.all()) else state


def copied_in_columns(x: torch.Tensor) -> torch.Tensor:
    """A copy of matrices [..., rows, columns], each column contiguous and behind the
    last: the layout of SGLang's pools and of running states, so that a link's kernel
    reads kept pairs and those of runs by one pattern, whole columns at a time."""
    return x.mT.clone(memory_format=torch.contiguous_format).mT


def _narrow(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in ``dtype``, or as it is if that would not be finite."""
    narrow = x.to(dtype)
    return narrow if bool(narrow.isfinite().all()) else x


def _addresses(x: torch.Tensor) -> torch.Tensor:
    """int64 [n], of n matrices in columns, or of n scalars."""
    matrices = x.dim() > 1
    first, size = x.data_ptr(), x[:1].numel() * x.element_size()
    if not (x.mT if matrices else x).is_contiguous() or first % ALIGNMENT:
        raise ValueError(f"no aligned matrices in columns: {tuple(x.shape)}, {x.stride()}")
    return first + FLAGS[x.dtype] + size * torch.arange(len(x))
