"""One forward pass of linked rows through the linear layers, as ragged arrays.

In position order a linked row is cores, which are composed, and *runs* of
computed tokens between them, which the layer's own kernel walks:

    core  run  core  core  run  ...  core  run
    S <- A S + B           S <- kernel(S)

Where a layer turns its keys by their positions, B is turned by the core's offset first.
The last token of a prompt is computed, so every core has a run behind it. What a run
does to the state is a pair as well, so all states in front of all runs follow from
pairs alone (HYPIC's composition), and the kernel then walks every run from its true
state in one launch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch

from sglang_pic.attention.ship import ship
from sglang_pic.kernels.operators.pair import Pair, identity_like
from sglang_pic.kernels.operators.states import Cores, Walk
from sglang_pic.kernels.operators.storage import PackedPair, pack
from sglang_pic.kernels.rotate import LayerRope, angles, rotate
from sglang_pic.linear.kernels import kernels_for
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.state import CoreState
from sglang_pic.link.plan import LinkPlan
from sglang_pic.link.policy import LinkOptions


@dataclasses.dataclass(frozen=True)
class LinkRow:
    """A linked request's part of one forward pass: row entries ``[prefix,
    prefix + extend)``, which begin at ``first_query`` among the batch's tokens;
    ``row`` of the batch."""

    plan: LinkPlan
    options: LinkOptions
    first_query: int
    prefix: int
    extend: int
    row: int


@dataclasses.dataclass(frozen=True)
class Core:
    """A core of ``length`` tokens, which now stands ``moved`` positions behind where it was
    compiled."""

    state: CoreState
    length: int
    moved: int


@dataclasses.dataclass(frozen=True)
class Run:
    """``length`` computed tokens in a row, and the cores in front of them."""

    length: int
    cores: tuple[Core, ...] = ()


def runs_of(plan: LinkPlan, prefix: int, extend: int) -> list[Run]:
    """Runs of a row's entries ``[prefix, prefix + extend)``, with the cores that
    stand between them and behind what was computed before."""
    done = prefix - plan.reused
    before: dict[int, list[Core]] = {done: []}
    # In position order: a plan has those of earlier turns last.
    for span in sorted(plan.spans, key=lambda span: span.end):
        # Tokens generated since the plan was made follow all cores.
        if span.state is not None and done <= span.first_seer < done + extend:
            # An earlier turn has the history of all that precedes its end.
            length = span.n_tokens if span.among is None else span.end
            core = Core(span.state, length, span.moved)
            before.setdefault(span.first_seer, []).append(core)
    edges = [*sorted(before), done + extend]
    return [Run(stop - start, tuple(before[start])) for start, stop in itertools.pairwise(edges)]


def has_core(plan: LinkPlan, prefix: int, extend: int) -> bool:
    """Whether a core must be composed among these row entries; without one the
    request's slot holds the right state and the row is an ordinary one."""
    return any(run.cores for run in runs_of(plan, prefix, extend))


@dataclasses.dataclass(frozen=True)
class LinkStep:
    """Arrays of one forward pass for all its linked rows.

    Attributes:
        tokens: int64 [t], their tokens among the batch's, row by row.
        slots: int64 [rows], state slots.
        lengths: tokens of each run.
        last: int64 [rows], last run of each row.
        walk: cores and inner runs in the order in which they act.
        borrowed: int64 [b], tokens among ``tokens`` that stand in the history of a
            run other than their own: cores may be shorter than the history.
        before: int64 [runs, width - 1], where the history of each run lies in
            [the rows' slots | the cores' tails | ``borrowed``].
        inner: int64 [p], tokens among ``tokens`` of all runs but the rows' last.
        inner_lengths: tokens of each of those runs.
        cores: what they do, read where the plans' ``CoreState`` keep it: the step, and
            the requests behind it, refer to that until the pass has run.
        shape: of the linear layers.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    lengths: list[int]
    last: torch.Tensor
    walk: Walk
    borrowed: torch.Tensor
    before: torch.Tensor
    inner: torch.Tensor
    inner_lengths: list[int]
    cores: Cores
    shape: LinearShape

    def incoming(self, layer: int, slot_states: torch.Tensor, inner: Pair | None) -> torch.Tensor:
        """States in front of all runs.

        Args:
            layer: index among the linear layers.
            slot_states: float32 [rows, heads, dk, dv], states of the slots.
            inner: pairs of the inner runs, ``None`` where there is none.

        Returns:
            float32 [runs, heads, dk, dv].
        """
        return kernels_for(slot_states).states_before(
            self.cores, layer, inner, self.walk, slot_states
        )

    def history(self, layer: int, conv: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Histories in front of all runs, [runs, channels, width - 1].

        Args:
            layer: index among the linear layers.
            conv: [slots, channels, width - 1], the layer's pool.
            inputs: [t, channels], the convolution's inputs at ``tokens``.
        """
        return kernels_for(conv).histories_before(
            self.before, conv, self.slots, self.cores, layer, inputs, self.borrowed
        )


def build_link(
    rows: Sequence[LinkRow],
    shape: LinearShape,
    slots: torch.Tensor,
    rope: LayerRope | None = None,
) -> LinkStep:
    """Arrange one batch of rows that each compose at least one core.

    Args:
        slots: int64 [batch], state slots of all its rows, on the device.
        rope: what turns the layers' keys, if anything does.
    """
    runs = [
        (i, rank, run)
        for i, row in enumerate(rows)
        for rank, run in enumerate(runs_of(row.plan, row.prefix, row.extend))
    ]
    last = [i for i, (row, *_) in enumerate(runs) if i + 1 == len(runs) or runs[i + 1][0] != row]
    inner = sorted(set(range(len(runs))) - set(last))
    starts = [0]
    for *_, run in runs:
        starts.append(starts[-1] + run.length)
    borrowed, before = _histories(runs, len(rows), shape.history)

    def ranges(bounds: Sequence[tuple[int, int]]) -> torch.Tensor:
        return torch.cat([torch.arange(0), *(torch.arange(*one) for one in bounds)])

    index = {
        "tokens": ranges([(row.first_query, row.first_query + row.extend) for row in rows]),
        "rows": torch.tensor([row.row for row in rows]),
        "last": torch.tensor(last),
        "borrowed": torch.tensor(borrowed, dtype=torch.int64),
        "before": torch.tensor(before),
        "inner": ranges([(starts[i], starts[i + 1]) for i in inner]),
    }
    walk = _walk(runs, len(rows))
    there = ship({**index, **walk}, slots.device)
    index = {name: there[name].long() for name in index}
    cores = _cores(
        [(core, rows[row].options) for row, _, run in runs for core in run.cores], shape, rope
    )
    cores.used_here()
    return LinkStep(
        tokens=index["tokens"],
        slots=slots[index["rows"]],
        lengths=[run.length for *_, run in runs],
        last=index["last"],
        walk=Walk(**{name: there[name] for name in walk}, runs=len(runs)),
        borrowed=index["borrowed"],
        before=index["before"],
        inner=index["inner"],
        inner_lengths=[runs[i][2].length for i in inner],
        cores=cores,
        shape=shape,
    )


def _walk(runs: Sequence[tuple[int, int, Run]], rows: int) -> dict[str, torch.Tensor]:
    """Tables of ``Walk``: the pieces in front of runs (row, rank, run): between two runs
    of a row the first one, and in front of a run its cores."""
    bounds, opening = [0], [-1] * rows
    source: list[int] = []
    target: list[int] = []
    cores = inner = 0
    for i, (row, rank, run) in enumerate(runs):
        if rank == 0 and row > 0:
            bounds.append(len(source))
        if rank > 0:
            inner += 1
            source.append(-inner)
            target.append(-1)
        source += range(cores, cores + len(run.cores))
        target += [-1] * len(run.cores)
        cores += len(run.cores)
        if rank == 0 and not run.cores:
            opening[row] = i
        else:
            target[-1] = i
    bounds.append(len(source))

    made = {"bounds": bounds, "source": source, "target": target, "opening": opening}
    return {name: torch.tensor(values, dtype=torch.int32) for name, values in made.items()}


def _histories(
    runs: Sequence[tuple[int, int, Run]], rows: int, width: int
) -> tuple[list[int], list[list[int]]]:
    """``borrowed`` and ``before`` of runs (row, rank, run), for histories of ``width``."""
    cores = rows * width
    tokens = cores + width * sum(len(run.cores) for *_, run in runs)
    before, recent = [], []
    core_end, run_end = cores, tokens
    for row, rank, run in runs:
        if rank == 0:
            recent = list(range(row * width, (row + 1) * width))
        for core in run.cores:
            core_end += width
            recent += range(core_end - min(core.length, width), core_end)
        before.append(recent[-width:])
        run_end += run.length
        recent = [*recent[-width:], *range(run_end - min(run.length, width), run_end)]
    borrowed = sorted({i - tokens for found in before for i in found if i >= tokens})
    place = {tokens + token: tokens + i for i, token in enumerate(borrowed)}
    return borrowed, [[place.get(i, i) for i in found] for found in before]


def _cores(
    cores: Sequence[tuple[Core, LinkOptions]], shape: LinearShape, rope: LayerRope | None
) -> Cores:
    pairs, tails = [], []
    for core, options in cores:
        tail = core.state.conv_tail
        tails.append(torch.zeros_like(tail) if options.ablation == "no_conv_tail" else tail)
        pair = _pair(core.state, options, shape)
        if rope is not None and core.moved:
            pair = dataclasses.replace(pair, state=turned(pair.state, rope, core.moved))
        pairs.append(pair)
    return Cores(pairs, tails)


def turning(rope: LayerRope | None) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """``turned``, of layers that turn their keys if any do."""
    return lambda state, offset: state if rope is None else turned(state, rope, offset)


def turned(state: torch.Tensor, rope: LayerRope, offset: int) -> torch.Tensor:
    """States [layers, heads, dk, dv] of tokens that stand ``offset`` positions further on:
    what turns a key turns what it wrote. Scalar operators commute with that."""
    cos, sin = angles(rope.cos_sin_cache, torch.tensor([offset], device=state.device))
    columns = state.mT.flatten(0, 1)
    count = len(columns)
    found = rotate(columns, cos.expand(count, -1), sin.expand(count, -1), neox=rope.neox)
    return found.unflatten(0, state.shape[:2]).mT


def _pair(core: CoreState, options: LinkOptions, shape: LinearShape) -> PackedPair:
    """A core's pair under the request's state policy: as it is stored, or for an ablation
    a copy."""
    if core.pair is None:
        assert core.end is not None
        return PackedPair.of_state(core.end, matrices=not shape.scalar)
    stored = core.pair
    if options.ablation == "float16_pairs":
        pair = stored.unpack()
        stored = pack(Pair(pair.A.half().float(), pair.B.half().float()))
    if options.state == "last":
        return PackedPair.of_state(stored.state, matrices=not shape.scalar)
    if options.ablation == "identity_operator":
        pair = stored.unpack()
        return pack(Pair(identity_like(pair).A, pair.B))
    return stored
