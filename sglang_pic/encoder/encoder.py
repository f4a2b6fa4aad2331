"""The encoder: documents, each read alone and in both directions, to keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_pic.encoder.config import EncoderConfig

Reduce = Callable[[Tensor], Tensor]


class EncoderKV(NamedTuple):
    """What is cached of documents: [encoder layers, tokens, kv heads, head_dim] each."""

    k: Tensor
    v: Tensor


def whole(x: Tensor) -> Tensor:
    """The sum over one rank."""
    return x


class Writing(nn.Linear):
    """A projection back to the residual stream.

    Attributes:
        reduce: sums over tensor-parallel ranks what each has computed of it (``ranks``).
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__(inputs, outputs, bias)
        self.reduce: Reduce = whole

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(super().forward(x))


class Mlp(nn.Module):
    """The gated MLP of Llama and its kin."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = Writing(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x: Tensor, theta: float, width: int) -> Tensor:
    """RoPE at positions 0.. on the first ``width`` channels of [rows, tokens, heads, head_dim]."""
    if not width:
        return x
    inverse = theta ** -(torch.arange(0, width, 2, device=x.device).float() / width)
    angle = torch.arange(x.shape[1], device=x.device).float()[:, None, None] * inverse
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x.split([width // 2, width // 2, x.shape[-1] - width], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class EncoderAttention(nn.Module):
    """Attention in both directions over rows padded at their ends."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        shape, self.config = config.decoder, config
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        hidden, bias = shape.hidden_size, config.bias
        self.q_proj = nn.Linear(hidden, width, bias)
        self.k_proj = nn.Linear(hidden, kv_width, bias)
        self.v_proj = nn.Linear(hidden, kv_width, bias)
        self.o_proj = Writing(width, hidden, bias)
        if config.head_norm:
            self.q_norm = nn.RMSNorm(shape.head_dim, config.eps)
            self.k_norm = nn.RMSNorm(shape.head_dim, config.eps)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """``x`` [rows, tokens, hidden]; ``valid`` [rows, tokens], false where padded."""
        config, dim = self.config, self.config.decoder.head_dim
        q, k, v = (p(x).unflatten(-1, (-1, dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if config.head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(t, config.rope_theta, config.rotary_dim) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        seen = valid[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class EncoderLayer(nn.Module):
    """A layer of the decoder's shape, and the projections behind it that are cached."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        shape = config.decoder
        kv_width = shape.kv_heads * shape.head_dim
        self.head_dim = shape.head_dim
        self.attention_norm = nn.RMSNorm(shape.hidden_size, config.eps)
        self.attention = EncoderAttention(config)
        if config.conv:
            self.conv = nn.Conv1d(
                shape.hidden_size,
                shape.hidden_size,
                config.conv,
                padding=config.conv // 2,
                groups=shape.hidden_size,
                bias=False,
            )
        self.has_conv = bool(config.conv)
        self.mlp_norm = nn.RMSNorm(shape.hidden_size, config.eps)
        self.mlp = Mlp(shape.hidden_size, config.intermediate_size)
        self.kv_norm = nn.RMSNorm(shape.hidden_size, config.eps)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.k_norm = nn.RMSNorm(shape.head_dim, config.eps)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """[rows, tokens, hidden] to the same."""
        h = self.attention_norm(x)
        if self.has_conv:
            inside = h * valid[..., None]
            h = h + self.conv(inside.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(h, valid)
        return x + self.mlp(self.mlp_norm(x))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] to [tokens, kv heads, head_dim] each."""
        h = self.kv_norm(x)
        k, v = (p(h).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        return self.k_norm(k), v


class Encoder(nn.Module):
    """All layers. The decoder's embedding is not among the weights: it is handed in."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.decoder.hidden_size, config.eps)

    def hidden(self, embedded: Tensor, lengths: Sequence[int]) -> tuple[EncoderKV, Tensor]:
        """As ``forward``, with the last layer's normalised rows [tokens, hidden] too: what a
        masked-token loss needs."""
        self._check(embedded, lengths)
        sizes = torch.tensor(lengths, device=embedded.device)
        valid = torch.arange(max(lengths), device=embedded.device) < sizes[:, None]
        x = embedded.new_zeros((*valid.shape, embedded.shape[-1])).masked_scatter(
            valid[..., None], embedded
        )
        keys, values = [], []
        for layer in self.layers:
            x = layer(x, valid)
            k, v = layer.keys_values(x[valid])
            keys.append(k)
            values.append(v)
        return EncoderKV(torch.stack(keys), torch.stack(values)), self.norm(x[valid])

    def forward(self, embedded: Tensor, lengths: Sequence[int]) -> EncoderKV:
        """Keys and values of documents, none of which sees another.

        Args:
            embedded: [tokens, hidden], the decoder's embedding of all documents, one
                behind the other.
            lengths: tokens of each, 1 to ``max_tokens``; they sum to ``tokens``.

        Raises:
            ValueError: a document is empty or too long, or the lengths do not fit.
        """
        return self.hidden(embedded, lengths)[0]

    def _check(self, embedded: Tensor, lengths: Sequence[int]) -> None:
        if not lengths or min(lengths) < 1 or max(lengths) > self.config.max_tokens:
            raise ValueError(
                f"documents of {list(lengths)[:8]} tokens, not 1 to {self.config.max_tokens}"
            )
        if sum(lengths) != len(embedded):
            raise ValueError(f"{len(embedded)} tokens in documents of {sum(lengths)}")
