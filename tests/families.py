"""Models of every family, each with the oracle that it is held to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import tiny_hybrid, tiny_hybrid_model, tiny_mamba2, tiny_mamba2_model
from torch import Tensor

from sglang_pic.eval.oracle import hybrid, mamba2


@dataclasses.dataclass(frozen=True)
class Family:
    """A random model of a family.

    Attributes:
        save: writes it below a directory, and returns where.
        make: the same model, in transformers.
        oracle: ``linked_logprobs`` of the family's oracle; ``None`` where ``refusal`` is not.
        hybrid: has linear layers.
        refusal: part of the reason why a server does not link it.
    """

    save: Callable[[Path], Path]
    make: Callable[[], Any]
    oracle: Callable[..., Tensor] | None
    hybrid: bool = True
    refusal: str | None = None

    def model(self) -> Any:
        return _made(self.make)

    def linked(self, ids: Any, segments: Any, **where: Any) -> Tensor:
        assert self.oracle is not None
        return self.oracle(self.model(), ids, segments, **where)


@functools.cache
def _made(make: Callable[[], Any]) -> Any:
    return make()


def _delta(kind: str) -> Family:
    return Family(
        functools.partial(tiny_hybrid, kind=kind),
        functools.partial(tiny_hybrid_model, kind),
        hybrid.linked_logprobs,
    )


def _mamba2(kind: str) -> Family:
    return Family(
        functools.partial(tiny_mamba2, kind=kind),
        functools.partial(tiny_mamba2_model, kind),
        mamba2.linked_logprobs,
    )


FAMILIES = {
    "qwen3_5": _delta("qwen3_5"),
    "qwen3_5_moe": _delta("qwen3_5_moe"),
    "qwen3_next": _delta("qwen3_next"),
    "granite": _mamba2("granite"),
    "falcon_h1": _mamba2("falcon_h1"),
    "nemotron_h": _mamba2("nemotron_h"),
}
