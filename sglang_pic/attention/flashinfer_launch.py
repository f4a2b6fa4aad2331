"""FlashInfer's launches over spans: planned once a step, run in every layer.

Queries are gathered for every span they see and turned back by its offset, one launch
attends, partial results are merged. ``Launcher`` runs any batch, eagerly; FlashInfer is
imported when one is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from sglang_pic.attention.kernels import kernels_for
from sglang_pic.attention.ragged import Layout, Layouts, Pages, pages_of
from sglang_pic.attention.ship import pinned, ship
from sglang_pic.attention.step import StepRow
from sglang_pic.kernels.rotate import LayerRope, angles

LN2 = math.log(2.0)
BACKEND = "fa2"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of every attention layer, on one rank: heads, ``head_dim``, tokens a ``page`` of
    the pool, ``dtype`` of queries and of the pool."""

    heads: int
    kv_heads: int
    head_dim: int
    page: int
    dtype: torch.dtype

    @property
    def query_nbytes(self) -> int:
        """Bytes that one gathered query takes in a layer: itself, its partial result and
        that one's log-sum-exp."""
        return self.heads * (2 * self.head_dim * self.dtype.itemsize + 4)

    def plan(self, wrapper: Any, qo_indptr: torch.Tensor, pages: Pages) -> None:
        """Plan a launch; ``qo_indptr`` int32 [requests + 1] on the host. The scores'
        scale comes with each layer, in ``attend``."""
        device = pages.indices.device
        wrapper.plan(
            pinned(qo_indptr, device),
            pinned(pages.indptr, device),
            pages.indices,
            pinned(pages.last, device),
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.page,
            sm_scale=1.0,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )

    def paged(self, pool: torch.Tensor) -> torch.Tensor:
        """[slots, kv_heads, head_dim] as [pages, page, kv_heads, head_dim], no copy."""
        return pool[: pool.shape[0] // self.page * self.page].unflatten(0, (-1, self.page))


def natural(lse: torch.Tensor) -> torch.Tensor:
    """FlashInfer's log-sum-exp, base 2, as a natural one; in place."""
    return lse.mul_(LN2)


def attend(
    wrapper: Any,
    shape: Shape,
    gathered: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *ranges: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run what was planned.

    Args:
        wrapper: one of FlashInfer's, planned.
        shape: it was planned for.
        gathered: [n, heads, head_dim].
        keys, values: [slots, kv_heads, head_dim], SGLang's buffers of one layer.
        scale: multiplies the scores.
        ranges: ``sees`` of the layout, for the wrapper that takes it.

    Returns:
        partial [n, heads, head_dim] in the dtype of the queries; lse float32 [n, heads],
        natural.
    """
    pool = shape.paged(keys), shape.paged(values)
    # The scale of the queries multiplies the planned one, 1.
    partial, lse = wrapper.run(
        gathered, pool, *ranges, q_scale=scale, out=torch.empty_like(gathered), return_lse=True
    )
    return partial, natural(lse)


class Launcher:
    """Launches of eager passes.

    Args:
        shape: of the layers.
        workspace: uint8, on the device; may be shared with SGLang's own wrappers.

    Attributes:
        token: int64 [queries], the planned tokens of the batch, on the device.

    Making one compiles FlashInfer's kernel with ranges unless it was compiled before;
    the plain one, if SGLang has not used it yet, is compiled by the first ``plan``.
    """

    def __init__(self, shape: Shape, workspace: torch.Tensor):
        import flashinfer

        self.shape = shape
        # Rows with one new token need no mask; no tile is masked for them.
        self._dense = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "NHD", backend=BACKEND
        )
        self._ranged = flashinfer.BatchPrefillWithCausalBidirectionalRangesWrapper(
            workspace,
            "NHD",
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            head_dim_qk=shape.head_dim,
            head_dim_vo=shape.head_dim,
        )
        self._layouts = Layouts()
        self._layout: Layout | None = None
        self.token = torch.empty(0, dtype=torch.int64)
        self._held: dict[str, torch.Tensor] = {}
        self._angles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def plan(
        self, rows: Sequence[StepRow], req_to_token: torch.Tensor, pool_rows: torch.Tensor
    ) -> None:
        """Prepare one forward pass.

        Args:
            rows: every row of the batch, one of them linked at least.
            req_to_token, pool_rows: as in ``ragged.pages_of``.
        """
        layout, length = self._layouts.of(rows)
        if layout is not self._layout:
            self._layout = layout
            names = ("token", "query", "offset", "merge_indptr", "merge_index", "sees")
            columns = {name: getattr(layout, name) for name in names}
            self._held = ship(columns, req_to_token.device)
            self.token = self._held["token"].long()
            self._angles.clear()
        pages = pages_of(layout, length, self.shape.page, req_to_token, pool_rows)
        wrapper = self._ranged if layout.causal else self._dense
        self.shape.plan(wrapper, layout.qo_indptr, pages)

    def run(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rope: LayerRope | None,
        scale: float,
    ) -> torch.Tensor:
        """One layer of the planned pass.

        Args:
            query: [tokens, heads, head_dim], the whole batch's.
            keys, values, scale: as in ``attend``; the pass's own are written already.
            rope: of the layer.

        Returns:
            float32 [queries, heads, head_dim], in the order of ``token``.
        """
        assert self._layout is not None
        held, kernels = self._held, kernels_for(query)
        if rope is None:
            gathered = query[held["query"]]
        else:
            cos, sin = self._turns(rope)
            gathered = kernels.gather_rotate(query, held["query"], cos, sin, neox=rope.neox)
        causal = self._layout.causal
        wrapper, ranges = (self._ranged, (held["sees"],)) if causal else (self._dense, ())
        partial, lse = attend(wrapper, self.shape, gathered, keys, values, scale, *ranges)
        return kernels.merge(partial, lse, held["merge_indptr"], held["merge_index"])

    def _turns(self, rope: LayerRope) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles of the pass, computed for the first layer that asks."""
        key = id(rope.cos_sin_cache)
        if key not in self._angles:
            self._angles[key] = angles(rope.cos_sin_cache, -self._held["offset"].long())
        return self._angles[key]
