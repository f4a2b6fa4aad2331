"""Which batches a captured graph may run, and which of its kinds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_pic.attention.graphs import LINKED, ORDINARY, LinkedVariants, can_run_graph
from sglang_pic.linear.hybrid import PicHybridBackend


class Backend:
    """A backend with or without linked rows; ``room``: the largest batch its graphs take."""

    def __init__(self, linked: bool, room: int = 0):
        self._linked, self._room = linked, room

    def links(self, batch: Any) -> bool:
        return self._linked

    def fits_graph(self, batch: Any, batch_size: int) -> bool:
        return batch_size <= self._room


def runner_of(backend: Any, variants: Any = None, model: Any = None) -> Any:
    return SimpleNamespace(
        model_runner=SimpleNamespace(attn_backend=backend, model=model),
        attention_graph_variants=variants,
        max_bs=8,
        capture_bs=[2, 4, 8],
        _pad_to_bucket=lambda size, buckets: min(n for n in buckets if n >= size),
    )


def asked(runner: Any, size: int = 3) -> bool:
    return can_run_graph(lambda *_: True, runner, SimpleNamespace(batch_size=size))


def test_sglangs_graphs_run_no_linked_row() -> None:
    assert asked(runner_of(Backend(linked=False)))
    assert not asked(runner_of(Backend(linked=True, room=8)))
    # Somebody else's variants know nothing of spans either, nor a backend of links.
    assert not asked(runner_of(Backend(linked=True, room=8), variants=object()))
    assert asked(runner_of(object()))


def test_no_graph_runs_a_row_with_documents() -> None:
    beside = SimpleNamespace(steps=SimpleNamespace(has=lambda batch: batch.batch_size == 3))
    runner = runner_of(Backend(linked=False), model=SimpleNamespace(pic=beside))
    assert not asked(runner, 3)
    assert asked(runner, 4)


@pytest.mark.parametrize(("size", "room", "runs"), [(3, 4, True), (3, 3, False), (9, 99, False)])
def test_ours_run_what_fits(size: int, room: int, runs: bool) -> None:
    variants = LinkedVariants()
    assert asked(runner_of(Backend(linked=True, room=room), variants), size) == runs
    if runs:
        assert variants.select(None) == LINKED
    assert asked(runner_of(Backend(linked=False), variants), size)
    assert variants.select(None) == ORDINARY
    assert set(variants.capture_labels) == {ORDINARY, LINKED}


def test_a_backend_without_graphs_of_its_own_runs_eagerly() -> None:
    backend = SimpleNamespace(links=lambda batch: True)
    assert not asked(runner_of(backend, LinkedVariants()))


@pytest.mark.parametrize("captures", [False, True])
def test_a_hybrids_compiles_are_read_eagerly(captures: bool) -> None:
    """Pairs are read off in Python, which a graph would not run again."""
    backend = object.__new__(PicHybridBackend)
    backend.full_attn_backend = Backend(linked=False, room=4)
    backend.linear_attn_backend = SimpleNamespace(captures=captures)
    assert asked(runner_of(backend)) == (not captures)
    assert backend.fits_graph(None, 4) and not backend.fits_graph(None, 5)
