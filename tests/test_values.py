"""A segment as one value: what is read is what was written, or nothing."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from sglang_pic.store import value as values
from sglang_pic.store.value import BadValue, Codec, SavedSegment

MARKS = {"weights": "a", "page_size": "1"}
KEY = b"0123456789abcdef"
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]


def saved_of(path: list[int], tensors: dict[str, torch.Tensor], **more: Any) -> SavedSegment:
    return SavedSegment(array("q", path), None, "space", 3, tensors, **more)


def written(codec: Codec, saved: SavedSegment) -> tuple[str, Any]:
    name = codec.name(saved.salt, saved.path, saved.heads)
    return name, codec.encode(name, saved)


@st.composite
def segments(draw: Any) -> SavedSegment:
    torch.manual_seed(draw(st.integers(0, 99)))
    names = draw(st.lists(st.text(min_size=1, max_size=6), max_size=5, unique=True))
    shapes = st.lists(st.integers(0, 4), max_size=3)
    tensors = {
        f"t.{name}": (torch.rand(draw(shapes)) * 200).to(draw(st.sampled_from(TYPES)))
        for name in names
    }
    path = draw(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=9))
    heads = tuple(draw(st.lists(st.integers(0, 99), max_size=2)))
    return saved_of(path, tensors, core_end=draw(st.none() | st.integers(0, 99)), heads=heads)


@given(segments(), st.sampled_from([None, KEY]))
def test_what_is_read_is_what_was_written(saved: SavedSegment, key: bytes | None) -> None:
    codec = Codec(MARKS, key)
    name, value = written(codec, saved)
    found = codec.decode(value.tobytes(), name, salt="space", path=saved.path)
    assert (found.path, found.hits, found.core_end, found.heads) == (
        saved.path,
        saved.hits,
        saved.core_end,
        saved.heads,
    )
    # A safetensors file as others read it.
    for loaded in (found.tensors, {k: v for k, v in load(value.tobytes()).items() if k != "path"}):
        assert loaded.keys() == saved.tensors.keys()
        for key_, one in loaded.items():
            assert one.dtype == saved.tensors[key_].dtype
            assert torch.equal(one, saved.tensors[key_])


def example() -> SavedSegment:
    torch.manual_seed(0)
    return saved_of(list(range(7)), {"k.0": torch.rand(7, 1, 2), "v.0": torch.rand(7, 1, 2)})


def test_servers_of_two_formats_name_their_values_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    named = Codec(MARKS).name("space", range(7), (4,))
    assert Codec(MARKS).name("space", range(7), (4,)) == named
    monkeypatch.setattr(values, "FORMAT", values.FORMAT + 1)
    assert Codec(MARKS).name("space", range(7), (4,)) != named


def reason_of(codec: Codec, value: Any, name: str, **where: Any) -> str:
    with pytest.raises(BadValue) as refused:
        codec.decode(value, name, **{"salt": "space", "path": range(7), **where})
    return refused.value.reason


def test_a_flipped_bit_and_a_cut_are_seen() -> None:
    codec, draw = Codec(MARKS), random.Random(0)
    name, value = written(codec, example())
    for at in range(len(value)):
        changed = bytearray(value.tobytes())
        changed[at] ^= 1 << draw.randrange(8)
        assert reason_of(codec, changed, name) in (
            values.DAMAGED,
            values.FOREIGN,
            values.OTHER_NAME,
        )
        if at % 7 == 0:
            assert reason_of(codec, value.tobytes()[:at], name) == values.DAMAGED
    assert reason_of(codec, value.tobytes() + b"0", name) == values.DAMAGED


def test_what_is_of_others_is_refused() -> None:
    codec = Codec(MARKS)
    saved = example()
    name, value = written(codec, saved)
    other = Codec({**MARKS, "weights": "b"})
    assert reason_of(other, value, name) == values.FOREIGN
    assert other.name("space", saved.path, ()) != name
    # Under the name of another tenant's, another seam's, other tokens' value.
    for where in (("else", saved.path, ()), ("space", saved.path, (3,)), ("space", [1], ())):
        taken = codec.name(*where)
        assert reason_of(codec, value, taken, salt=where[0]) == values.OTHER_NAME
        forged = codec.encode(taken, saved)
        if where[0] == "space":
            assert reason_of(codec, forged, taken) == values.OTHER_NAME
    # Its name would do; its tokens are compared all the same.
    assert reason_of(codec, value, name, path=range(8)) == values.OTHER_TOKENS


def test_what_is_not_signed_with_the_operators_key_is_refused() -> None:
    signed, plain, other = Codec(MARKS, KEY), Codec(MARKS), Codec(MARKS, KEY + b"x")
    name, value = written(signed, example())
    assert reason_of(other, value, name) == values.SIGNATURE
    assert reason_of(signed, plain.encode(name, example()), name) == values.UNSIGNED
    assert signed.decode(value, name, salt="space").hits == 3
    # Without a key nobody can tell.
    assert plain.decode(value, name, salt="space").hits == 3


@given(st.binary(max_size=200))
def test_anything_else_is_no_value(content: bytes) -> None:
    codec = Codec(MARKS)
    assert reason_of(codec, content, "0" * 49) == values.DAMAGED


def test_another_programs_file_is_no_value() -> None:
    assert reason_of(Codec(MARKS), save({"a": torch.zeros(3)}), "0" * 49) == values.DAMAGED


def test_a_servers_own_value_is_told_from_segments() -> None:
    codec = Codec(MARKS, KEY)
    name = codec.own_name("pins")
    value = codec.encode_own(name, [["salt", 3, "name"]])
    assert codec.decode_own(value, name) == [["salt", 3, "name"]]
    with pytest.raises(BadValue):
        codec.decode_own(value, codec.own_name("others"))
    assert reason_of(codec, value, name) == values.DAMAGED
    of_segment, segment = written(codec, example())
    with pytest.raises(BadValue):
        codec.decode_own(segment, of_segment)
