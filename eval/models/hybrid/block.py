"""The linked forward in torch: segments compiled alone, seams computed in place.

What the engine does with pages and pools, said once in tensors and with
gradients, to fine-tune and to judge a model by. A prompt is

    prefix | head core last | head core last | ... | questions

Each segment is compiled alone. Of its core, tokens [seam, length - 1), a link
takes keys and values, the pair (A, B) of every linear layer and the last 3
inputs of its convolution; all other tokens are *live* and computed where they
stand. (The server reuses a segment's last token, too, since 2026-11-28; the weights that
ship were made before.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM

from sglang_pic.eval.models.hybrid import model as parts
from sglang_pic.kernels.operators import gated_delta
from sglang_pic.kernels.operators.pair import Pair, apply

Policy = Literal["compose", "add", "last"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of a prompt stand: the same for all rows of a batch."""

    prefix: int
    segments: int
    length: int
    seam: int
    tokens: int

    @property
    def core(self) -> slice:
        """Of a segment."""
        return slice(self.seam, self.length - 1)

    def runs(self) -> list[int]:
        """Lengths of the live runs: one before, between and behind the cores."""
        behind = self.tokens - self.prefix - self.segments * self.length
        return [self.prefix + self.seam, *[1 + self.seam] * (self.segments - 1), 1 + behind]

    def live(self) -> Tensor:
        """Positions of the live tokens, [live]."""
        core = self.reused()
        return torch.tensor(sorted({*range(self.tokens)} - {*core.tolist()}))

    def reused(self) -> Tensor:
        """Positions of the cores' tokens, [segments * core]."""
        starts = self.prefix + torch.arange(self.segments)[:, None] * self.length
        return (starts + torch.arange(self.length)[self.core]).flatten()


class CompiledAttention(NamedTuple):
    """Unrotated keys and values of cores, [rows * segments, heads, core, head_dim]."""

    k: Tensor
    v: Tensor


class CompiledLinear(NamedTuple):
    """Pair [rows * segments, heads, ...] and conv tail [rows * segments, 3, channels]."""

    pair: Pair
    tail: Tensor


Compiled = CompiledAttention | CompiledLinear


def compile_segments(model: Qwen3_5ForCausalLM, ids: Tensor, core: slice) -> list[Compiled]:
    """What every layer keeps of segments [rows, length], each computed alone."""
    return compile_in(model, ids, [0], [core])[0]


def compile_in(
    model: Qwen3_5ForCausalLM, ids: Tensor, starts: Sequence[int], cores: Sequence[slice]
) -> list[list[Compiled]]:
    """What every layer keeps of segments that stand in longer sequences.

    Args:
        ids: [rows, tokens].
        starts: where a segment starts, in all rows alike.
        cores: of a segment; several may be wanted of one prefill.

    Returns:
        One list of layers for each core. Its rows are those of ``ids``, each with its
        segments in the order of ``starts``.
    """
    x = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])
    kept: list[list[Compiled]] = [[] for _ in cores]
    for layer in model.model.layers:
        h = parts.norm(layer.input_layernorm, x)
        if parts.is_linear(layer):
            module = layer.linear_attn
            mixed = module.in_proj_qkv(h)
            q, writes = parts.reads_and_writes(module, h, parts.convolve(module, mixed))
            for own, core in zip(kept, cores, strict=True):
                inside = parts.Writes(*(_at(x, starts, core) for x in writes))
                pair = gated_delta.capture(*inside.packed(), [inside.g.shape[1]] * len(inside.g))
                tail = slice(core.stop - 3, core.stop)
                own.append(CompiledLinear(pair, _at(mixed, starts, tail)))
            x = x + parts.linear_output(module, h, parts.recur(q, writes)[0])
        else:
            module = layer.self_attn
            q, k, v, gate = parts.queries_keys_values(module, h)
            for own, core in zip(kept, cores, strict=True):
                pages = (_at(x.transpose(1, 2), starts, core).transpose(1, 2) for x in (k, v))
                own.append(CompiledAttention(*pages))
            out = parts.attend(parts.rotate(q, positions), parts.rotate(k, positions), v)
            x = x + parts.attention_output(module, out, gate)
        x = parts.feed_forward(layer, x)
    return kept


def _at(x: Tensor, starts: Sequence[int], core: slice) -> Tensor:
    """Cores of [rows, tokens, ...], [rows * segments, core, ...]."""
    found = [x[:, start + core.start : start + core.stop] for start in starts]
    return torch.stack(found, 1).flatten(0, 1)


def linked(
    model: Qwen3_5ForCausalLM,
    ids: Tensor,
    layout: Layout,
    where: Tensor,
    policy: Policy = "compose",
    keep: list[parts.Memory] | None = None,
    compiled: Sequence[Compiled] | None = None,
) -> Tensor:
    """Logits at ``where``, a mask [rows, tokens] that holds only behind the segments.

    Args:
        ids: [rows, tokens].
        keep: gets what ``ask`` needs to go on behind these tokens.
        policy: what a core does to the state; ``add`` and ``last`` are wrong
            on purpose, with the identity and with zero in place of A.
        compiled: what every layer keeps of the segments; by default each is compiled
            alone.
    """
    rows = ids.shape[0]
    live, reused = layout.live(), layout.reused()
    positions = torch.cat([live, reused])
    visible = live[:, None] >= positions
    if compiled is None:
        segments = ids[:, layout.prefix : layout.prefix + layout.segments * layout.length]
        compiled = compile_segments(model, segments.reshape(-1, layout.length), layout.core)
    x = model.model.embed_tokens(ids[:, live])
    for layer, kept in zip(model.model.layers, compiled, strict=True):
        h = parts.norm(layer.input_layernorm, x)
        if isinstance(kept, CompiledLinear):
            module = layer.linear_attn
            memory: parts.Memory
            out, memory = _walk(module, h, kept, layout, policy)
            x = x + parts.linear_output(module, h, out)
        else:
            module = layer.self_attn
            q, k, v, gate = parts.queries_keys_values(module, h)
            k, v = (
                torch.cat([own, _by_row(shared, rows).transpose(1, 2).flatten(2, 3)], 2)
                for own, shared in ((k, kept.k), (v, kept.v))
            )
            q, k = parts.rotate(q, live), parts.rotate(k, positions)
            memory = parts.AttentionMemory(k, v)
            x = x + parts.attention_output(module, parts.attend(q, k, v, visible), gate)
        if keep is not None:
            keep.append(memory)
        x = parts.feed_forward(layer, x)
    return parts.logits(model, x[where[:, live]])


def _walk(
    module: torch.nn.Module, h: Tensor, kept: CompiledLinear, layout: Layout, policy: Policy
) -> tuple[Tensor, parts.LinearMemory]:
    """Runs and cores in the order of their positions: outputs of the live tokens."""
    rows = h.shape[0]
    tails = _by_row(kept.tail, rows).unbind(1)
    operators, ends = (_by_row(x, rows).unbind(1) for x in (kept.pair.A, kept.pair.B))
    mixed = module.in_proj_qkv(h).split(layout.runs(), 1)
    convolved = [
        parts.convolve(module, run, history)
        for run, history in zip(mixed, (None, *tails), strict=True)
    ]
    q, writes = parts.reads_and_writes(module, h, torch.cat(convolved, 1))
    outputs, state, start = [], None, 0
    for index, run in enumerate(layout.runs()):
        here = slice(start, start + run)
        out, state = parts.recur(q[:, here], writes.at(here), state)
        outputs.append(out)
        start += run
        if index == layout.segments:
            break
        pair = Pair(operators[index], ends[index])
        if policy == "compose":
            state = apply(pair, state)
        else:
            state = state + pair.B if policy == "add" else pair.B
    tail = torch.cat([tails[-1], mixed[-1]], 1)[:, -3:]
    return torch.cat(outputs, 1), parts.LinearMemory(state, tail)


def _by_row(x: Tensor, rows: int) -> Tensor:
    """[rows * segments, ...] to [rows, segments, ...]."""
    return x.unflatten(0, (rows, -1))
