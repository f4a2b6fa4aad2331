"""What all families of linear layers share: splitting a batch's rows.

A batch splits three ways: rows that compose cores are the family's own work;
all others go through SGLang's code untouched, as a batch of their own;
compiles are among these, and are read beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase

from sglang_pic.attention.rows import by_row
from sglang_pic.attention.ship import to_device
from sglang_pic.kernels.operators.states import used_here
from sglang_pic.kernels.rotate import LayerRope
from sglang_pic.linear.capture import Capture, CaptureRow, CaptureStep, build_capture
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.state import Resumed
from sglang_pic.linear.step import LinkRow, LinkStep, build_link, has_core
from sglang_pic.link.plan import LinkPlan
from sglang_pic.link.policy import LinkOptions

# Per-row fields of a forward batch that SGLang's linear backend reads, tensors and lists.
_ROW_FIELDS = (
    "req_pool_indices",
    "seq_lens",
    "extend_seq_lens",
    "extend_prefix_lens",
    "mamba_track_indices",
    "mamba_track_mask",
    "mamba_track_seqlens",
)
_ROW_LISTS = (
    "rids",
    "extend_seq_lens_cpu",
    "extend_prefix_lens_cpu",
    "mamba_prefill_track_mask_cpu",
    "mamba_track_seqlens_cpu",
)


class PicLinearBackend(MambaAttnBackendBase):
    """Beside one of SGLang's linear backends, in front of it among the bases."""

    scalar_operators = False
    tokens_first = False
    keys_first = False
    # Why rows of this model must not be linked, and what turns its keys, if anything does.
    refusal: str | None = None
    rope: LayerRope | None = None

    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        self._rids: list[str] = []
        self._plans: Sequence[LinkPlan | None] = ()
        self._options: Sequence[LinkOptions | None] = ()
        self._captures: Sequence[Sequence[Capture]] = ()
        self._resumed: Sequence[Resumed | None] = ()
        self._link_step: LinkStep | None = None
        self._capture_step: CaptureStep | None = None
        self._others: Any = None
        self._other_tokens = torch.empty(0, dtype=torch.int64)
        self.shape = LinearShape.of_pool(
            self.req_to_token_pool.mamba_pool,
            scalar=self.scalar_operators,
            tokens_first=self.tokens_first,
            keys_first=self.keys_first,
        )

    def set_rows(
        self,
        rids: Sequence[str],
        plans: Sequence[LinkPlan | None],
        options: Sequence[LinkOptions | None],
        captures: Sequence[Sequence[Capture]],
    ) -> None:
        """Requests of the batch that runs next; called once a forward pass."""
        self._rids, self._plans = list(rids), plans
        self._options = options
        self._captures = captures
        self._resumed = [None] * len(rids)

    def set_checkpoints(
        self, resumed: Sequence[Resumed | None], captures: Sequence[Sequence[Capture]]
    ) -> None:
        """Behind ``set_rows``: which of the ordinary rows go on from a checkpoint, and of
        which states are read off."""
        self._resumed = resumed
        pairs = zip(self._captures, captures, strict=True)
        self._captures = [(*of_segment, *of_prefix) for of_segment, of_prefix in pairs]

    @property
    def captures(self) -> bool:
        """Whether pairs or states are read off any row of the batch that runs next."""
        return any(self._captures)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self._link_step = self._capture_step = None
        self._others = forward_batch
        special = self.captures or any(row is not None for row in (*self._plans, *self._resumed))
        if special and not forward_batch.forward_mode.is_decode_or_idle():
            self._arrange(forward_batch)
        if self._others is not None:
            super().init_forward_metadata(self._others)

    def _arrange(self, batch: Any) -> None:
        """Split the batch's rows."""
        prefixes = [int(n) for n in batch.extend_prefix_lens_cpu]
        extends = [int(n) for n in batch.extend_seq_lens_cpu]
        slots = self.req_to_token_pool.get_mamba_indices(batch.req_pool_indices)
        slots = self._translate_mamba_indices(slots).long()
        linked, compiling, others, at = [], [], [], 0
        rows = zip(
            by_row(self._rids, self._plans, batch),
            by_row(self._rids, self._options, batch),
            by_row(self._rids, self._captures, batch),
            by_row(self._rids, self._resumed, batch),
            strict=True,
        )
        for i, (plan, options, captures, resumed) in enumerate(rows):
            where = (at, prefixes[i], extends[i], i)
            if resumed is not None and prefixes[i] == resumed.depth:
                self._load(resumed.state.end, resumed.state.conv_tail, slots[i : i + 1])
            if plan is not None and has_core(plan, prefixes[i], extends[i]):
                assert options is not None
                linked.append(LinkRow(plan, options, *where))
            else:
                others.append((i, torch.arange(at, at + extends[i])))
                for capture in captures or ():
                    compiling.append(CaptureRow(capture, *where))
                    held = capture.grown_from
                    if held is not None and prefixes[i] == capture.first:
                        # It goes on from where the shorter one's cores end.
                        self._load(held.end, held.conv_tail, slots[i : i + 1])
            at += extends[i]
        if compiling:
            self._capture_step = build_capture(compiling, slots)
        if linked:
            self._link_step = build_link(linked, self.shape, slots, self.rope)
            self._others = _rows_of(batch, [i for i, _ in others]) if others else None
            tokens = [tokens for _, tokens in others]
            self._other_tokens = to_device(torch.cat(tokens), self.device) if tokens else None

    def _load(self, end: torch.Tensor, conv_tail: torch.Tensor, slot: torch.Tensor) -> None:
        """Set a row's state slot, int64 [1], to what stands at a core's end
        (``CoreState``)."""
        used_here(end, conv_tail)
        cache = self.req_to_token_pool.mamba_pool.mamba_cache
        self.shape.states(cache.temporal)[:, slot] = end.to(cache.temporal)[:, None]
        self.shape.histories(cache.conv[0])[:, slot] = conv_tail.to(cache.conv[0])[:, None]


def _rows_of(batch: Any, rows: list[int]) -> Any:
    """The forward batch with these rows alone, as far as linear layers read it."""
    part = copy.copy(batch)
    index = to_device(torch.tensor(rows), batch.req_pool_indices.device)
    part.batch_size = len(rows)
    for name in _ROW_FIELDS:
        value = getattr(batch, name)
        setattr(part, name, None if value is None else value[index.to(value.device)])
    for name in _ROW_LISTS:
        value = getattr(batch, name)
        setattr(part, name, None if value is None else [value[i] for i in rows])
    part.extend_start_loc = part.extend_seq_lens.cumsum(0) - part.extend_seq_lens
    return part
