"""The cross block: a frozen decoder's residual stream looks at encoded documents.

Neither queries nor keys are rotated, so what a row reads is a set of documents:
their order, and where they would have stood, do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_pic.encoder.config import EncoderConfig
from sglang_pic.encoder.encoder import Mlp, Writing

Span = tuple[int, int]


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    documents: Sequence[Sequence[Span]],
) -> Tensor:
    """Each row's queries over all tokens of its documents: the reference, row by row.

    Args:
        q: [tokens, heads, head_dim] of all rows, one behind the other.
        keys, values: [kept, kv heads, head_dim], one encoder layer's.
        lengths: tokens of each row.
        documents: of each row, (first, tokens) in ``keys``; a row without any reads zeros.

    Returns:
        [tokens, heads, head_dim].
    """
    outputs = []
    for own, spans in zip(q.split(list(lengths)), documents, strict=True):
        if not spans:
            outputs.append(torch.zeros_like(own))
            continue
        k, v = (torch.cat([t[i : i + n] for i, n in spans]) for t in (keys, values))
        own, k, v = (t.transpose(0, 1)[None] for t in (own, k, v))
        out = F.scaled_dot_product_attention(own, k, v, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class CrossBlock(nn.Module):
    """In front of a decoder layer: cross attention and an MLP, each behind a tanh gate.

    Gates start at 0, which changes nothing. A row without documents skips the
    whole block, its MLP too.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        shape = config.decoder
        width = shape.heads * shape.head_dim
        self.head_dim = shape.head_dim
        self.attention_norm = nn.RMSNorm(shape.hidden_size, config.eps)
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, config.eps)
        self.o_proj = Writing(width, shape.hidden_size)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_norm = nn.RMSNorm(shape.hidden_size, config.eps)
        self.mlp = Mlp(shape.hidden_size, config.intermediate_size)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def queries(self, x: Tensor) -> Tensor:
        """Residual stream [..., hidden] to queries [..., heads, head_dim]."""
        q = self.q_proj(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim))
        return self.q_norm(q)

    def write(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream [..., hidden] behind the block, given what ``x`` read
        [..., heads, head_dim]."""
        x = x + self.attention_gate.tanh() * self.o_proj(attended.flatten(-2))
        return x + self.mlp_gate.tanh() * self.mlp(self.mlp_norm(x))

    def forward(self, x: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """``read`` takes queries to what they attend to, such as ``attend`` with its
        documents filled in. Every row of ``x`` [..., hidden] has a document."""
        return self.write(x, read(self.queries(x)))
