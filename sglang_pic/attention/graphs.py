"""CUDA graphs of decode with linked rows: a second set beside SGLang's own.

SGLang captures several graphs for each batch size where attention needs it, and asks
before each replay which one fits (``AttentionGraphVariants``). A batch that fits none of
ours runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from sglang_pic.faults import faults

ORDINARY, LINKED = "ordinary", "linked"


class LinkedVariants:
    """SGLang's graphs, and the same with linked rows."""

    capture_labels: ClassVar[tuple[str, ...]] = (ORDINARY, LINKED)

    def __init__(self) -> None:
        self._label = ORDINARY

    def choose(self, *, linked: bool) -> None:
        """Which graph the batch takes that is replayed next."""
        self._label = LINKED if linked else ORDINARY

    def select(self, forward_batch: Any) -> str:
        return self._label


def can_run_graph(original: Callable[..., Any], runner: Any, forward_batch: Any) -> Any:
    """Around SGLang's: no graph runs a linked row but one that knows of spans, and none a
    row with documents. A batch
    that cannot be judged runs without a graph.

    Args:
        original: SGLang's ``can_run_graph``.
        runner: its graph runner, of decode or prefill.
        forward_batch: the batch that runs next.
    """
    try:
        may_run = _choose(runner, forward_batch)
    except Exception:
        faults.note("graphs", forward_batch.rids or ())
        return False
    return original(runner, forward_batch) if may_run else False


def _choose(runner: Any, batch: Any) -> bool:
    """Whether a graph may run the batch; of those with variants, which one."""
    beside = getattr(runner.model_runner.model, "pic", None)
    if beside is not None and beside.steps.has(batch):
        return False
    backend = runner.model_runner.attn_backend
    linked = hasattr(backend, "links") and backend.links(batch)
    variants = getattr(runner, "attention_graph_variants", None)
    if not isinstance(variants, LinkedVariants):
        return not linked
    if linked and not _fits(runner, batch):
        return False
    variants.choose(linked=linked)
    return True


def _fits(runner: Any, batch: Any) -> bool:
    backend = runner.model_runner.attn_backend
    if not hasattr(backend, "fits_graph") or batch.batch_size > runner.max_bs:
        return False
    return backend.fits_graph(batch, runner._pad_to_bucket(batch.batch_size, runner.capture_bs))
