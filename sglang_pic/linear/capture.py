"""Capture: operators and end states of a segment while it is compiled, or the state of an
ordinary prompt behind one of its tokens.

A compile is an ordinary prefill of ``compile context + segment`` in chunks of
any length. Beside it every linear layer runs its own kernel once more over the
core's tokens, on running states (``LinearShape``): from zero for B, and for A
from the identity, or by the sum of log decays where A is a scalar. A chunk goes
on where the last one stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from sglang_pic.attention.ship import ship
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.state import SegmentState

# Key of the state at the core's end with everything before it, beside those of
# pairs, which are the core's first token.
END = -1


class Capture:
    """Running states of one compile request.

    Args:
        shape: of the linear layers.
        start: tokens of the compile context, in front of the segment.
        heads: first tokens of the cores wanted, relative to the segment.
        core_end: where all of them end, relative to the segment.
        first: the prompt's first token that is computed, unless it is ``grown_from`` the
            states of a shorter segment that this one begins with; its cores are gone on
            from.
        opens: the state behind all that precedes the cores' end is wanted too.
    """

    def __init__(
        self,
        shape: LinearShape,
        *,
        start: int,
        heads: Sequence[int],
        core_end: int,
        first: int = 0,
        grown_from: SegmentState | None = None,
        opens: bool = True,
    ):
        self.shape = shape
        self.start = start
        self.heads = tuple(heads)
        self.core_end = core_end
        self._first = first
        self.grown_from = grown_from
        self.opens = opens
        self.conv_tail: torch.Tensor | None = None
        self.running: dict[int, torch.Tensor] = {}

    @property
    def first(self) -> int:
        """The prompt's first token that is computed."""
        if self.grown_from is None:
            return self._first
        return self.start + self.grown_from.core_end

    def restart(self, device: torch.device) -> None:
        """Begin with the first token."""
        begun = self.shape.begun(self.shape.layers, device)
        self.running = dict.fromkeys(self.heads, begun)
        if self.opens:
            self.running[END] = torch.zeros_like(begun)
        self.conv_tail = None
        if self.grown_from is not None:
            for head in self.heads:
                pair = self.grown_from.pairs[head].unpack()
                self.running[head] = self.shape.running(pair).to(device)

    @property
    def complete(self) -> bool:
        return self.conv_tail is not None

    def pairs(self) -> dict[int, Pair]:
        """By first token: ``A`` [layers, heads(, dk, dk)], ``B`` [layers, heads, dk, dv],
        views of running states."""
        return {head: self.shape.pair(self.running[head]) for head in self.heads}

    def end(self) -> torch.Tensor:
        """[layers, heads, dk, dv], a view of a running state."""
        return self.shape.pair(self.running[END]).B


@dataclasses.dataclass(frozen=True)
class CaptureRow:
    """A compile request's part of one forward pass: its tokens ``[prefix,
    prefix + extend)`` begin at ``first_query`` among the batch's; ``row`` of the batch."""

    capture: Capture
    first_query: int
    prefix: int
    extend: int
    row: int


@dataclasses.dataclass(frozen=True)
class CaptureStep:
    """Arrays of one forward pass for all its compile requests.

    Attributes:
        tokens: int64 [t], their tokens among the batch's, row by row.
        lengths: tokens of each row.
        slots: int64 [rows], state slots.
        picked: int64 [p], tokens of every captured stretch among ``tokens``.
        stretch_lengths: tokens of each stretch.
        running: float32 [stretches, layers, heads, dv + n, dk], updated in place.
        from_slot: int64 [e], stretches that run from the request's own state.
        from_slot_row: int64 [e], their rows.
        tail_index: int64 [tails, width - 1], where the inputs before a core's
            end lie in [all rows' histories | tokens].
        tails: float32 [tails, layers, channels, width - 1], filled layer by layer.
    """

    tokens: torch.Tensor
    lengths: list[int]
    slots: torch.Tensor
    picked: torch.Tensor
    stretch_lengths: list[int]
    running: torch.Tensor
    from_slot: torch.Tensor
    from_slot_row: torch.Tensor
    tail_index: torch.Tensor
    tails: torch.Tensor

    def keep_tails(self, layer: int, history: torch.Tensor, inputs: torch.Tensor) -> None:
        """Fill ``tails`` of a layer.

        Args:
            layer: index among the linear layers.
            history: [rows, channels, width - 1], in front of these tokens.
            inputs: [t, channels], the convolution's inputs at ``tokens``.
        """
        both = torch.cat([history.transpose(1, 2).flatten(0, 1), inputs.to(history.dtype)])
        self.tails[:, layer] = both[self.tail_index].transpose(1, 2).float()


def build_capture(rows: Sequence[CaptureRow], slots: torch.Tensor) -> CaptureStep | None:
    """Arrange one batch; ``None`` if no row has anything to capture in it.

    Args:
        slots: int64 [batch], state slots of all its rows, on the device.
    """
    device = slots.device
    stretches: list[tuple[Capture, int, int, int, int]] = []  # capture, key, row, from, to
    ending: list[tuple[Capture, int, int]] = []  # capture, row, core end within the chunk
    # Several captures may be of one row, whose tokens are taken once.
    taken: list[CaptureRow] = []
    places: dict[int, int] = {}
    starts, at = [], 0
    for row in rows:
        capture = row.capture
        if row.prefix == capture.first:
            capture.restart(device)
        begin, stop = row.prefix, row.prefix + row.extend
        core_end = capture.start + capture.core_end
        place = places.get(row.row, len(taken))
        here = []
        for key in capture.running:
            first = capture.start + key if key != END else 0
            low, high = max(begin, first), min(stop, core_end)
            # The end state is the request's own until the last chunk with core tokens.
            if low < high and (key != END or core_end <= stop):
                here.append((capture, key, place, low - begin, high - begin))
        if not here:
            continue
        stretches += here
        if core_end <= stop:
            ending.append((capture, place, core_end - begin))
        if row.row not in places:
            places[row.row] = place
            taken.append(row)
            starts.append(at)
            at += row.extend
    if not stretches:
        return None
    rows = taken
    running = torch.stack([capture.running[key] for capture, key, *_ in stretches])
    for i, (capture, key, *_) in enumerate(stretches):
        capture.running[key] = running[i]
    shape = rows[0].capture.shape
    tails = torch.zeros(len(ending), shape.layers, shape.channels, shape.history, device=device)
    tail_index = torch.empty(len(ending), shape.history, dtype=torch.int64)
    for i, (capture, row_index, stop) in enumerate(ending):
        capture.conv_tail = tails[i]
        place = torch.arange(stop - shape.history, stop)
        in_history = row_index * shape.history + shape.history + place
        in_tokens = len(rows) * shape.history + starts[row_index] + place
        tail_index[i] = torch.where(place < 0, in_history, in_tokens)
    own = [i for i, (_, key, *_) in enumerate(stretches) if key == END]
    queries = [torch.arange(row.first_query, row.first_query + row.extend) for row in rows]
    picked = [torch.arange(starts[r] + low, starts[r] + high) for _, _, r, low, high in stretches]
    index = {
        "tokens": torch.cat(queries),
        "rows": torch.tensor([row.row for row in rows]),
        "picked": torch.cat(picked),
        "from_slot": torch.tensor(own, dtype=torch.int64),
        "from_slot_row": torch.tensor([stretches[i][2] for i in own], dtype=torch.int64),
        "tail_index": tail_index,
    }
    there = {name: shipped.long() for name, shipped in ship(index, device).items()}
    return CaptureStep(
        lengths=[row.extend for row in rows],
        slots=slots[there.pop("rows")],
        stretch_lengths=[high - low for *_, low, high in stretches],
        running=running,
        tails=tails,
        **there,
    )
