"""A decoder of transformers that looks at encoded documents through hooks on its layers.

For training and for judging weights: rows are padded, everything has gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_pic.encoder.config import DecoderShape, decoder_shape, fingerprint_of
from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.encoder.weights import EncoderModules


class Seen(NamedTuple):
    """Which encoder tokens each row reads: ``index`` int64 [rows, most], ``valid`` bool."""

    index: Tensor
    valid: Tensor


def shape_of(model: Any) -> DecoderShape:
    """Of a loaded model of transformers."""
    return decoder_shape(model.config, fingerprint_of(model.get_input_embeddings().weight))


def seen_by(lengths: Sequence[int], documents: Sequence[Sequence[int]]) -> Seen:
    """Of each row the indices of its documents, of these lengths, to tokens."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    rows = [[t for d in own for t in range(starts[d], starts[d + 1])] for own in documents]
    most = max(1, *map(len, rows))
    index = torch.tensor([row + [0] * (most - len(row)) for row in rows])
    return Seen(index, torch.arange(most) < torch.tensor([len(row) for row in rows])[:, None])


def encode(model: Any, modules: EncoderModules, documents: Sequence[Sequence[int]]) -> EncoderKV:
    """Documents as token ids to what is cached of them."""
    ids = torch.tensor([token for document in documents for token in document])
    return modules.encoder(model.get_input_embeddings()(ids), [len(d) for d in documents])


def read(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """Queries [rows, tokens, heads, dim] over keys [kept, kv heads, dim]."""
    k, v = (t[seen.index].transpose(1, 2) for t in (k, v))
    mask = seen.valid[:, None, None, :]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


@contextlib.contextmanager
def looking(model: Any, modules: EncoderModules, kv: EncoderKV, seen: Seen) -> Iterator[None]:
    """Within, a forward of ``model`` over [rows, tokens] reads each row's documents."""
    has = seen.valid.any(1)[:, None, None]
    safe = Seen(seen.index, seen.valid | ~seen.valid.any(1, keepdim=True))  # no empty softmax

    def hook(i: int) -> Any:
        def before(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            block = modules.cross[i]
            x = block(args[0], lambda q: read(q, kv.k[i], kv.v[i], safe))
            return (torch.where(has, x, args[0]), *args[1:]), kwargs

        return before

    layers = model.get_decoder().layers
    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(modules.config.cross_layers):
            handle = layers[layer].register_forward_pre_hook(hook(i), with_kwargs=True)
            stack.callback(handle.remove)
        yield
