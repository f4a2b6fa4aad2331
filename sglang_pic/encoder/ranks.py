"""An encoder on several tensor-parallel ranks.

Each has the weights of its own heads, cut as those of SGLang's attention layers are, and
of its own channels of the MLPs. What it writes to the residual stream is a part of a sum,
which all ranks get. Norms, gates and convolutions are whole on each.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from sglang_pic.encoder.config import DecoderShape
from sglang_pic.encoder.encoder import Mlp, Reduce, Writing, whole
from sglang_pic.encoder.weights import EncoderModules
from sglang_pic.errors import PicConfigError


@dataclasses.dataclass(frozen=True)
class Rank:
    """One of several tensor-parallel ranks, or one that is alone.

    Attributes:
        index: from 0.
        count: of all.
        reduce: sums a tensor over all; every rank must call it at the same point.
    """

    index: int = 0
    count: int = 1
    reduce: Reduce = whole

    def part(self, length: int) -> slice:
        """Its own of so many, which need not divide."""
        return slice(length * self.index // self.count, length * (self.index + 1) // self.count)

    def kv_heads(self, shape: DecoderShape) -> slice:
        """Its own: those that its query heads look with."""
        first = shape.kv_heads * self.index // self.count
        return slice(first, first + shape.kv_heads_of(self.count))


ALONE = Rank()


def check(shape: DecoderShape, ranks: int) -> None:
    """Raises PicConfigError where the heads do not divide over so many ranks."""
    heads, kv_heads = shape.heads, shape.kv_heads
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise PicConfigError(f"encoder: {heads} heads, {kv_heads} kv heads over {ranks} ranks")


@torch.no_grad()
def cut(modules: EncoderModules, rank: Rank) -> EncoderModules:
    """Leave of the modules what one rank has, in place.

    Returns:
        The same.

    Raises:
        PicConfigError: the heads do not divide.
    """
    shape = modules.config.decoder
    check(shape, rank.count)
    own = _channels(rank.part(shape.heads), shape.head_dim)
    own_kv = _channels(rank.kv_heads(shape), shape.head_dim)
    for layer in modules.encoder.layers:
        _outputs(layer.attention.q_proj, own)
        for proj in (layer.attention.k_proj, layer.attention.v_proj, layer.k_proj, layer.v_proj):
            _outputs(proj, own_kv)
        _inputs(layer.attention.o_proj, own, rank)
        _mlp(layer.mlp, rank)
    for block in modules.cross:
        _outputs(block.q_proj, own)
        _inputs(block.o_proj, own, rank)
        _mlp(block.mlp, rank)
    return modules


def _channels(heads: slice, dim: int) -> slice:
    return slice(heads.start * dim, heads.stop * dim)


def _mlp(mlp: Mlp, rank: Rank) -> None:
    own = rank.part(mlp.gate_proj.out_features)
    _outputs(mlp.gate_proj, own)
    _outputs(mlp.up_proj, own)
    _inputs(mlp.down_proj, own, rank)


def _outputs(linear: nn.Linear, own: slice) -> None:
    linear.weight = _kept(linear.weight[own])
    if linear.bias is not None:
        linear.bias = _kept(linear.bias[own])
    linear.out_features = len(linear.weight)


def _inputs(linear: Writing, own: slice, rank: Rank) -> None:
    linear.weight = _kept(linear.weight[:, own])
    linear.in_features = linear.weight.shape[1]
    linear.reduce = rank.reduce
    if linear.bias is not None and rank.index:
        # One rank adds it to the sum.
        linear.bias.zero_()


def _kept(own: Tensor) -> nn.Parameter:
    """With memory of its own: the whole is let go."""
    return nn.Parameter(own.clone(memory_format=torch.contiguous_format), requires_grad=False)
