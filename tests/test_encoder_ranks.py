"""An encoder cut over tensor-parallel ranks, in lockstep here: the whole one's results."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_pic.encoder.config import DecoderShape, EncoderConfig, decoder_shape
from sglang_pic.encoder.cross import attend
from sglang_pic.encoder.ranks import Rank, check, cut
from sglang_pic.encoder.weights import EncoderModules
from sglang_pic.errors import PicConfigError
from sglang_pic.eval.encoder.initial import fresh

T = TypeVar("T")
HIDDEN, WIDE = 24, 1e-9


class Lockstep:
    """So many ranks, each a thread; a sum waits for all of them."""

    def __init__(self, count: int):
        self.count = count
        self._barrier = threading.Barrier(count, timeout=30)
        self._given: list[Tensor] = [torch.empty(0)] * count
        self.sums = 0

    def rank(self, index: int) -> Rank:
        return Rank(index, self.count, lambda part: self._reduce(index, part))

    def _reduce(self, index: int, part: Tensor) -> Tensor:
        self._given[index] = part
        self._barrier.wait()
        total = torch.stack(self._given).sum(0)
        self.sums += index == 0
        self._barrier.wait()
        return total

    def run(self, work: Callable[[int], T]) -> list[T]:
        def one(index: int) -> T:
            try:
                with torch.no_grad():
                    return work(index)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


@st.composite
def shapes(draw: Any) -> tuple[EncoderConfig, int]:
    """A configuration, and a number of ranks that its heads divide over."""
    ranks = draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = draw(st.sampled_from([n for n in range(1, 9) if not (n % ranks and ranks % n)]))
    group = draw(st.sampled_from([n for n in range(1, 9) if kv_heads * n % ranks == 0]))
    dim = draw(st.sampled_from([2, 4, 6]))
    shape = DecoderShape(HIDDEN, 3, kv_heads * group, kv_heads, dim, 50, "")
    config = EncoderConfig(
        shape,
        cross_layers=(0, 2),
        intermediate_size=draw(st.integers(1, 13)),
        rotary_dim=draw(st.sampled_from([0, 2, dim])),
        head_norm=draw(st.booleans()),
        bias=draw(st.booleans()),
        conv=draw(st.sampled_from([0, 3])),
        max_tokens=12,
    )
    return config, ranks


def modules_of(config: EncoderConfig, seed: int) -> EncoderModules:
    torch.manual_seed(seed)
    modules = EncoderModules(config)
    fresh(modules, 0.7)
    for name, weight in modules.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
    return modules.double().eval().requires_grad_(False)


@settings(max_examples=40, deadline=None)
@given(
    made=shapes(),
    seed=st.integers(0, 3),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    rows=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=3),
)
def test_ranks_together_are_the_whole(
    made: tuple[EncoderConfig, int], seed: int, lengths: list[int], rows: list[tuple[int, int]]
) -> None:
    config, count = made
    whole, ranks = modules_of(config, seed), Lockstep(count)
    parts = [cut(copy.deepcopy(whole), ranks.rank(i)) for i in range(count)]
    for part in parts:
        assert part.state_dict().keys() == whole.state_dict().keys()
        for weight in part.parameters():
            assert weight.untyped_storage().nbytes() == weight.nbytes
    embedded = torch.randn(sum(lengths), HIDDEN, dtype=torch.float64)
    expected = whole.encoder(embedded, lengths)
    found = ranks.run(lambda i: parts[i].encoder(embedded, lengths))
    assert ranks.sums == 2 * config.layers
    each = config.decoder.kv_heads_of(count)
    for i, kv in enumerate(found):
        own = ranks.rank(i).kv_heads(config.decoder)
        assert own.stop - own.start == each
        for one, all_of_it in zip(kv, expected, strict=True):
            torch.testing.assert_close(one, all_of_it[:, :, own], atol=WIDE, rtol=WIDE)
        assert sum(one[:, 0].nbytes for one in kv) == config.bytes_per_token(8, count)
    # Rows over the first documents of the batch, each over as many as it says.
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    spans = list(zip(starts, lengths, strict=True))
    tokens, seen = [n for n, _ in rows], [spans[:count_] for _, count_ in rows]
    x = torch.randn(sum(tokens), HIDDEN, dtype=torch.float64)
    for layer in range(config.layers):

        def block(modules: EncoderModules, kv: Any, layer: int = layer) -> Tensor:
            made: Tensor = modules.cross[layer](
                x, lambda q: attend(q, kv.k[layer], kv.v[layer], tokens, seen)
            )
            return made

        after = block(whole, expected)
        for one in ranks.run(lambda i, block=block: block(parts[i], found[i])):
            torch.testing.assert_close(one, after, atol=WIDE, rtol=WIDE)


def test_a_rank_without_its_sum_is_something_else() -> None:
    """So that the comparison above says something."""
    shape = DecoderShape(HIDDEN, 3, 4, 2, 4, 50, "")
    whole = modules_of(EncoderConfig(shape, (0, 2), 12, bias=True), 0)
    part = cut(copy.deepcopy(whole), Rank(0, 2))
    embedded = torch.randn(5, HIDDEN, dtype=torch.float64)
    expected, found = whole.encoder(embedded, [5]), part.encoder(embedded, [5])
    assert (found.k - expected.k[:, :, :1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "divides"),
    [
        (4, 2, 2, True),
        (4, 2, 4, True),
        (32, 8, 16, True),
        (6, 3, 2, False),
        (6, 2, 4, False),
        (12, 3, 4, False),
        (12, 4, 6, False),
    ],
)
def test_heads_divide_or_are_refused(heads: int, kv_heads: int, ranks: int, divides: bool) -> None:
    shape = DecoderShape(HIDDEN, 3, heads, kv_heads, 4, 50, "")
    if divides:
        check(shape, ranks)
        return
    with pytest.raises(PicConfigError, match=f"{heads} heads, {kv_heads} kv heads over {ranks}"):
        cut(EncoderModules(EncoderConfig(shape, (0, 2), 12)), Rank(0, ranks))


def test_heads_that_sglang_adds_on_a_cpu_are_none_of_the_models() -> None:
    """``adjust_config_with_unaligned_cpu_tp``."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9, "head_dim": None}
    text = SimpleNamespace(
        **sizes,
        num_attention_heads=8,
        num_key_value_heads=2,
        original_num_attention_heads=4,
        original_total_num_kv_heads=1,
    )
    plain = SimpleNamespace(**sizes, num_attention_heads=4, num_key_value_heads=1)
    assert decoder_shape(text, "") == decoder_shape(plain, "")
    assert decoder_shape(plain, "").head_dim == 16
