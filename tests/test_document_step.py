"""Which tokens of a batch see which documents: arranged, and attended to, without a server."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.encoder.limits import ENCODE_TOKENS, fits
from sglang_pic.encoder.step import Steps, make_step
from sglang_pic.errors import PicIntegrityError

LAYERS, KV_HEADS, HEADS, DIM = 2, 2, 4, 8


@dataclasses.dataclass
class Batch:
    rids: list[str] | None


def kv_of(name: str, tokens: int) -> EncoderKV:
    made = torch.Generator().manual_seed(int(name))
    shape = (LAYERS, tokens, KV_HEADS, DIM)
    return EncoderKV(torch.randn(shape, generator=made), torch.randn(shape, generator=made))


def dense(queries: torch.Tensor, documents: Sequence[EncoderKV], layer: int) -> torch.Tensor:
    """One token's softmax over all tokens of its documents, in float64: [heads, head_dim]."""
    k = torch.cat([one.k[layer] for one in documents]).double()
    v = torch.cat([one.v[layer] for one in documents]).double()
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    scores = torch.einsum("hd,nhd->hn", queries.double(), k) * DIM**-0.5
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), v)


rows = st.lists(
    st.tuples(st.one_of(st.none(), st.lists(st.integers(0, 4), max_size=4)), st.integers(0, 5)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(rows=rows, sizes=st.lists(st.integers(1, 40), min_size=5, max_size=5), data=st.data())
def test_every_token_sees_its_documents_and_no_other(
    rows: list[tuple[list[int] | None, int]], sizes: list[int], data: Any
) -> None:
    documents = [
        None if names is None else {str(n): kv_of(str(n), sizes[n]) for n in names}
        for names, _ in rows
    ]
    lengths = [length for _, length in rows]
    step = make_step(documents, lengths, "cpu")
    starts = [0, *itertools.accumulate(lengths)]
    seeing = [
        (token, row)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=False))
        for token in range(start, start + length)
        if documents[row]
    ]
    if not seeing:
        assert step is None
        return
    assert step is not None
    assert step.tokens.tolist() == [token for token, _ in seeing]
    # One read of a document serves all rows that see it.
    assert len(step.parts) == len({n for names, count in rows if names and count for n in names})
    queries = torch.randn(len(seeing), HEADS, DIM)
    layer = data.draw(st.integers(0, LAYERS - 1))
    found = step.attend(queries, layer)
    for i, (_, row) in enumerate(seeing):
        mine = list((documents[row] or {}).values())
        torch.testing.assert_close(
            found[i].double(), dense(queries[i], mine, layer), atol=1e-5, rtol=1e-5
        )


def test_the_order_of_documents_changes_no_bit() -> None:
    documents = {str(n): kv_of(str(n), 7 + n) for n in range(4)}
    queries = torch.randn(3, HEADS, DIM)
    found = [
        made.attend(queries, 1)
        for order in itertools.permutations(documents)
        if (made := make_step([{name: documents[name] for name in order}], [3], "cpu")) is not None
    ]
    assert len(found) == 24
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_step_is_of_its_batch_alone() -> None:
    steps = Steps()
    assert steps.read(Batch(["a"])) is None
    step = make_step([{"1": kv_of("1", 3)}], [1], "cpu")
    steps.set(["a"], step)
    # SGLang runs a copy of the batch that it made.
    assert steps.read(dataclasses.replace(Batch(["a"]))) is step
    assert steps.read(Batch(["b"])) is steps.read(Batch(None)) is None
    steps.set(["a"], None)
    assert steps.read(Batch(["a"])) is None


def test_a_step_that_nobody_read_is_noticed() -> None:
    steps = Steps()
    steps.set(["a"], make_step([{"1": kv_of("1", 3)}], [1], "cpu"))
    assert steps.has(Batch(["a"]))
    with pytest.raises(PicIntegrityError, match="without its documents"):
        steps.set(["a"], None)
    steps.set(["a"], None)


@pytest.mark.parametrize(
    ("lengths", "held"),
    [
        ([], False),
        ([0, 3], False),
        ([3, 3], True),
        ([101], False),
        ([100] * (ENCODE_TOKENS // 100), True),
        # Padded to the longest.
        ([100, *[1] * (ENCODE_TOKENS // 100)], False),
    ],
)
def test_what_is_encoded_in_one_go_is_bounded(lengths: list[int], held: bool) -> None:
    assert fits(lengths, 100) is held
