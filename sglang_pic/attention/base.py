"""What every attention backend over spans shares: plans in, rows out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

from sglang_pic.attention.drafts import drafts_of
from sglang_pic.attention.rope import has_windows, layer_ropes
from sglang_pic.attention.rows import by_row
from sglang_pic.attention.ship import to_device
from sglang_pic.attention.step import StepRow
from sglang_pic.errors import PicIntegrityError
from sglang_pic.kernels.rotate import LayerRope
from sglang_pic.link.plan import LinkPlan


class SpanBackend:
    """Stands in front of one of SGLang's attention backends among the bases.

    Attributes:
        ropes: rotary table by layer id, ``None`` for a layer without positions.
        refusal: why this model must not be linked, or ``None``.
        verifies: whether it takes drafts of speculative decoding.
    """

    verifies = False
    ropes: dict[int, LayerRope | None]
    refusal: str | None
    # Whether a layer may see a window of positions alone, and whether one does.
    sees_windows = False
    _windows = False
    # SGLang's.
    token_to_kv_pool: Any
    req_to_token_pool: Any

    def __init__(self, model_runner: Any, *args: Any, **kwargs: Any):
        super().__init__(model_runner, *args, **kwargs)  # type: ignore[call-arg]
        self.ropes, self.refusal = layer_ropes(model_runner.model)
        self._windows = has_windows(model_runner.model)
        if self._windows and not self.sees_windows and self.refusal is None:
            self.refusal = f"sliding windows on {type(self).__name__} are not supported"
        self._plans: list[LinkPlan | None] = []
        self._rids: list[str] = []

    def shared_read_ends(self, fm: Any) -> SharedReadEnds:
        """A linked pass reads SGLang's table of rows in every layer: under overlap
        scheduling nobody may write it before the pass has ended."""
        ends: SharedReadEnds = super().shared_read_ends(fm)  # type: ignore[misc]
        if not any(plan is not None for plan in self._plans):
            return ends
        late = SharedReadEnds.POST_REPLAY if fm.is_decode() else SharedReadEnds.UNKNOWN
        return SharedReadEnds.max_of((ends, late))

    def set_plans(self, rids: Sequence[str], plans: Sequence[LinkPlan | None]) -> None:
        """Plans of the batch that runs next, one a request; called once a forward pass."""
        self._rids, self._plans = list(rids), list(plans)

    def links(self, batch: Any) -> bool:
        """Whether any row of the batch must see spans; no graph of SGLang's may run it."""
        planned = any(plan is not None for plan in self._plans)
        return planned and any(plan is not None for plan in self._live_plans(batch))

    def _live_plans(self, batch: Any) -> list[LinkPlan | None]:
        """One a row."""
        plans = by_row(self._rids, self._plans, batch)
        if batch.forward_mode.is_extend_without_speculative() or self._windows:
            return plans
        # Decode of relocated rows: their keys are in place, stock attention is right,
        # but for a window, which it would count in row order.
        return [None if plan is not None and plan.relocated else plan for plan in plans]

    def planned_rows(self, batch: Any) -> list[StepRow] | None:
        """The batch's rows, or ``None`` if none is linked.

        Args:
            batch: SGLang's ``ForwardBatch``.
        """
        if not self.links(batch):
            return None
        lengths = batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu
        totals = lengths.tolist()
        plans = self._live_plans(batch)
        if batch.forward_mode.is_target_verify():
            n = batch.spec_info.draft_token_num
            verified = zip(plans, totals, drafts_of(batch), strict=True)
            return [
                StepRow(plan, i * n, total, n, tree=tree)
                for i, (plan, total, tree) in enumerate(verified)
            ]
        decode = batch.forward_mode.is_decode()
        extends = [1] * len(totals) if decode else [int(n) for n in batch.extend_seq_lens_cpu]
        rows = []
        at = 0
        for plan, total, extend in zip(plans, totals, extends, strict=True):
            rows.append(StepRow(plan, at, total - extend, extend))
            at += extend
        return rows

    def pool_of(self, layer: Any, batch: Any) -> tuple[torch.Tensor, ...]:
        """Keys, values, req_to_token, pool_rows, as in ``kernels.rows.walk_rows``."""
        return (
            *self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            batch.req_pool_indices,
        )

    @staticmethod
    def refuse_extras(extras: dict[str, Any]) -> None:
        """Raise ``PicIntegrityError`` if a layer asks for more than attention (sinks,
        modified scores): linked rows would go without."""
        asked = sorted(name for name, value in extras.items() if value is not None)
        if asked:
            raise PicIntegrityError(f"linked rows cannot attend with {', '.join(asked)}")

    def without_linked(self, batch: Any) -> Any:
        """The batch as SGLang's own kernels shall see it: linked rows, whose result is
        replaced, have no keys but their new ones."""
        part = copy.copy(batch)
        plans = self._live_plans(batch)
        linked = torch.tensor([plan is not None for plan in plans])
        decode = batch.forward_mode.is_decode()
        extends = [1] * len(plans) if decode else [int(n) for n in batch.extend_seq_lens_cpu]
        extend = torch.tensor(extends)
        if batch.seq_lens_cpu is not None:
            part.seq_lens_cpu = torch.where(linked, extend, batch.seq_lens_cpu)
            part.seq_lens_sum = int(part.seq_lens_cpu.sum())
        device = batch.seq_lens.device
        here = to_device(linked, device)
        new = to_device(extend.to(batch.seq_lens.dtype), device)
        part.seq_lens = torch.where(here, new, batch.seq_lens)
        if not decode:
            part.extend_prefix_lens = batch.extend_prefix_lens.masked_fill(here, 0)
            prefixes = zip(batch.extend_prefix_lens_cpu, plans, strict=True)
            part.extend_prefix_lens_cpu = [0 if plan else int(n) for n, plan in prefixes]
        return part
