"""SGLang's wrapper over a full and a linear backend, handing both their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend

from sglang_pic.kernels.rotate import LayerRope
from sglang_pic.linear.capture import Capture
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.state import Resumed
from sglang_pic.link.plan import LinkPlan
from sglang_pic.link.policy import LinkOptions


class PicHybridBackend(HybridLinearAttnBackend):
    """A full backend over spans and a linear backend that composes."""

    @property
    def ropes(self) -> Any:
        return self.full_attn_backend.ropes

    @property
    def shape(self) -> LinearShape:
        """Of the linear layers."""
        return self.linear_attn_backend.shape

    @property
    def refusal(self) -> str | None:
        return self.full_attn_backend.refusal or self.linear_attn_backend.refusal

    @property
    def linear_rope(self) -> LayerRope | None:
        """What turns the linear layers' keys, if anything does."""
        return self.linear_attn_backend.rope

    def links(self, batch: Any) -> bool:
        """As in ``SpanBackend``; nor may a graph run what is captured for a segment."""
        return self.full_attn_backend.links(batch) or self.linear_attn_backend.captures

    def fits_graph(self, batch: Any, batch_size: int) -> bool:
        """As in the full backend: to linear layers decode is ordinary."""
        full = self.full_attn_backend
        return hasattr(full, "fits_graph") and full.fits_graph(batch, batch_size)

    def set_rows(
        self,
        rids: Sequence[str],
        plans: Sequence[LinkPlan | None],
        options: Sequence[LinkOptions | None],
        captures: Sequence[Sequence[Capture]],
    ) -> None:
        """Requests of the batch that runs next; called once a forward pass."""
        self.full_attn_backend.set_plans(rids, plans)
        self.linear_attn_backend.set_rows(rids, plans, options, captures)

    def set_checkpoints(
        self, resumed: Sequence[Resumed | None], captures: Sequence[Sequence[Capture]]
    ) -> None:
        """As in the linear backend; to full attention they are ordinary rows."""
        self.linear_attn_backend.set_checkpoints(resumed, captures)
