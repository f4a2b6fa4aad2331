"""The chunk form that all families share: matrix products where the recurrence
has a loop over tokens, for sequences of any lengths packed one behind the other.

Every family is

    S_t = (I - b_t k_t k_t^T) diag(e^{g_t}) S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

with a decay a head (gated delta rule) or a channel (KDA), or the same without
the erasure, ``S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T`` (GLA, SSD, Lightning).
With ``G_t = g_1 + ... + g_t`` inside a chunk that starts at S,

    S_t = e^{G_t} S + sum_{j<=t} e^{G_t - G_j} k_j w_j^T

where w_t is v_t, or with erasure what is left of it after reading the state:

    w_t = b_t (v_t - k_t^T e^{G_t} S - sum_{j<t} (k_t^T e^{G_t - G_j} k_j) w_j),

a unit triangular system (WY form; arXiv 2406.06484, 2412.06464, 2510.26692).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_pic.kernels.operators.pair import Pair

CHUNK = 64
BLOCK = 16


def chunkwise(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    state: torch.Tensor,
    lengths: Sequence[int],
    *,
    size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Many sequences at once.

    Args:
        q: [tokens, heads, dk], the sequences one behind the other, or None where
            only states are wanted.
        k: [tokens, heads, dk].
        v: [tokens, heads, dv].
        g: log decay, at most 0, of heads [tokens, heads] or channels [tokens, heads, dk].
        beta: [tokens, heads], strength of erasing and writing, or None to erase nothing.
        state: [sequences, heads, dk, dv].
        lengths: tokens of each sequence, any of them may be 0.
        size: tokens a chunk, a power of two; by default as the longest
            sequence needs, at most ``CHUNK``.

    Returns:
        Outputs [tokens, heads, dv] (none without queries), end states as
        ``state``, and the states at the start of every chunk, [chunks, heads, dk,
        dv], sequence by sequence.
    """
    dk, dv = k.shape[-1], v.shape[-1]
    longest = max(lengths, default=0)
    if longest == 0:
        return v[:0], state, state.new_empty((0, *state.shape[1:]))
    if size is None:
        size = min(CHUNK, max(8, 1 << (longest - 1).bit_length()))
    table = Chunks(lengths, size, k.device)
    k, v = table.cut(k), table.cut(v)
    # Differences of sums that may be large: a float32 sum would lose the small ones.
    g = table.cut(g if g.dim() == 3 else g[..., None]).double().cumsum(-2)
    since_start = g.to(k.dtype).exp()
    until_end = (g[..., -1:, :] - g).to(k.dtype).exp()
    through = since_start[..., -1:, :].transpose(-1, -2)
    k_out = (k * until_end).transpose(-1, -2)

    rows = []
    if beta is not None:
        beta = table.cut(beta)[..., None]
        rows.append(k * beta)
    if q is not None:
        q = table.cut(q)
        rows.append(q)
    inner = products(rows, k, g)
    if beta is not None:
        right = torch.cat([v * beta, k * beta * since_start], -1)
        solved = torch.linalg.solve_triangular(inner[0], right, upper=False, unitriangular=True)
        v, erased = solved.split([dv, dk], -1)
    if q is not None:
        q = q * since_start

    running = state[table.sequences]
    outputs, starts = [], []
    for first, count in table.ranks:
        here = slice(first, first + count)
        before = running[:count]
        starts.append(before)
        written = v[here] if beta is None else v[here] - erased[here] @ before
        if q is not None:
            outputs.append(q[here] @ before + inner[-1][here] @ written)
        after = before * through[here] + k_out[here] @ written
        running = torch.cat([after, running[count:]])
    out = table.join(torch.cat(outputs)) if outputs else v.new_empty((0, v.shape[1], dv))
    ends = torch.empty_like(state).index_copy(0, table.sequences, running)
    return out, ends, torch.cat(starts)[table.chunk_order]


def products(rows: list[torch.Tensor], k: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """``sum_c x_ic k_jc e^{G_ic - G_jc}`` for j <= i, one matrix for each x.

    No exponent above 0 is ever taken, so nothing overflows however strong the
    decay: with a decay a channel, which does not factor out of the sum, blocks
    of ``BLOCK`` tokens meet earlier ones over the decay at their border, and
    only inside a block the exponents are formed pair by pair.

    Args:
        rows: x, each [..., size, dk].
        k: [..., size, dk].
        g: float64 [..., size, dk] or [..., size, 1], running sums of log decay.

    Returns:
        [..., size, size] each, 0 above the diagonal.
    """
    if not rows:
        return []
    size = k.shape[-2]
    if g.shape[-1] == 1:
        future = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
        decay = (g - g.transpose(-1, -2)).to(k.dtype).masked_fill(future, -torch.inf).exp()
        return [x @ k.transpose(-1, -2) * decay for x in rows]
    x = torch.stack(rows)
    out = x.new_zeros((*x.shape[:-1], size))
    block = min(BLOCK, size)
    x_in, k_in, g_in = (t.unflatten(-2, (-1, block)) for t in (x, k, g))
    inside = x.new_zeros((*x_in.shape[:-1], block))
    for j in range(block):
        decay = (g_in[..., j:, :] - g_in[..., j : j + 1, :]).to(k.dtype).exp()
        inside[..., j:, j] = (x_in[..., j:, :] * (k_in[..., j : j + 1, :] * decay)).sum(-1)
    for first in range(0, size, block):
        here = slice(first, first + block)
        out[..., here, here] = inside[..., first // block, :, :]
        if first > 0:
            border = g[..., first - 1 : first, :]
            late = x[..., here, :] * (g[..., here, :] - border).to(k.dtype).exp()
            early = k[..., :first, :] * (border - g[..., :first, :]).to(k.dtype).exp()
            out[..., here, :first] = late @ early.transpose(-1, -2)
    return list(out)


def capture_matrix(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    lengths: Sequence[int],
    before: Pair | None,
) -> Pair:
    """Pairs of stretches of a family that erases. The recurrence is linear in
    (v, S): the state [B | A], begun at [0 | I], under values [v | 0], ends at the
    pair of the tokens it saw.

    Args:
        k, v, g, beta, lengths: as in ``chunkwise``.
        before: pairs of the tokens that precede each stretch, to go on from.

    Returns:
        ``A`` [stretches, heads, dk, dk] and ``B`` [stretches, heads, dk, dv].
    """
    heads, dk, dv = k.shape[1], k.shape[2], v.shape[2]
    if before is None:
        eye = torch.eye(dk, dtype=k.dtype, device=k.device).expand(len(lengths), heads, dk, dk)
        before = Pair(eye, k.new_zeros((len(lengths), heads, dk, dv)))
    state = torch.cat([before.B, before.A], -1)
    values = torch.cat([v, v.new_zeros((*v.shape[:-1], dk))], -1)
    _, end, _ = chunkwise(None, k, values, g, beta, state, lengths)
    return Pair(end[..., dv:], end[..., :dv])


def capture_diagonal(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    lengths: Sequence[int],
    before: Pair | None,
) -> Pair:
    """Pairs of stretches of a family that only decays: ``A`` is the decay over
    the stretch, ``B`` the end state from zero.

    Args:
        k, v, g, lengths: as in ``chunkwise``.
        before: pairs of the tokens that precede each stretch, to go on from.

    Returns:
        ``A`` [stretches, heads, dk] or, for a decay a head, [stretches, heads],
        and ``B`` [stretches, heads, dk, dv].
    """
    heads, dk, dv = k.shape[1], k.shape[2], v.shape[2]
    owner = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)
    )
    total = g.new_zeros((len(lengths), *g.shape[1:]), dtype=torch.float64)
    operator = total.index_add_(0, owner.to(g.device), g.double()).to(k.dtype).exp()
    state = k.new_zeros((len(lengths), heads, dk, dv))
    if before is not None:
        operator, state = operator * before.A, before.B
    return Pair(operator, chunkwise(None, k, v, g, None, state, lengths)[1])


class Chunks:
    """How packed sequences are cut into chunks, the first chunks of all sequences
    first, then the second ones, so that one step of the recurrence over chunks
    is a contiguous slice.

    Attributes:
        sequences: int64 [sequences], longest first; where a step's states belong.
        index: int64 [chunks, size], token of every place, one past the last for none.
        ranks: (first chunk, chunks) of each step.
        place: int64 [tokens], where each token's output lies among all places.
        chunk_order: int64 [chunks], sequence by sequence.
    """

    def __init__(self, lengths: Sequence[int], size: int, device: torch.device):
        length = torch.tensor(lengths)
        start = length.cumsum(0) - length
        chunks = (length + size - 1) // size
        order = torch.argsort(chunks, descending=True, stable=True)
        ranked = chunks[order]
        steps = int(ranked[0])
        counts = [int((ranked > rank).sum()) for rank in range(steps)]
        rank = torch.repeat_interleave(torch.arange(steps), torch.tensor(counts))
        owner = torch.cat([order[:count] for count in counts])
        inside = rank[:, None] * size + torch.arange(size)
        valid = inside < length[owner][:, None]
        index = torch.where(valid, start[owner][:, None] + inside, int(length.sum()))
        place = torch.empty(int(length.sum()), dtype=torch.int64)
        place[index[valid]] = torch.nonzero(valid.reshape(-1)).squeeze(1)
        firsts = [0]
        for count in counts:
            firsts.append(firsts[-1] + count)
        self.sequences = order.to(device)
        self.index = index.to(device)
        self.ranks = list(zip(firsts[:-1], counts, strict=True))
        self.place = place.to(device)
        self.chunk_order = torch.argsort(owner * steps + rank).to(device)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, heads, ...] to [chunks, heads, size, ...], zeros behind a sequence's end."""
        padded = torch.cat([x, x.new_zeros((1, *x.shape[1:]))])
        return padded[self.index].transpose(1, 2)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """[chunks, heads, size, dv] back to [tokens, heads, dv]."""
        return x.transpose(1, 2).flatten(0, 1)[self.place]
