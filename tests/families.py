"""Models of every family that links, each with the oracle that it is held to."""

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
        model: the same model, in transformers.
        oracle: ``linked_logprobs`` of the family's oracle.
    """

    save: Callable[[Path], Path]
    model: Callable[[], Any]
    oracle: Callable[..., Tensor]

    def linked(self, ids: Any, segments: Any, **where: Any) -> Tensor:
        return self.oracle(self.model(), ids, segments, **where)


def _delta(kind: str) -> Family:
    return Family(
        functools.partial(tiny_hybrid, kind=kind),
        functools.cache(functools.partial(tiny_hybrid_model, kind)),
        hybrid.linked_logprobs,
    )


def _mamba2(kind: str) -> Family:
    return Family(
        functools.partial(tiny_mamba2, kind=kind),
        functools.cache(functools.partial(tiny_mamba2_model, kind)),
        mamba2.linked_logprobs,
    )


FAMILIES = {
    **{kind: _delta(kind) for kind in ("qwen3_5", "qwen3_5_moe", "qwen3_next")},
    **{kind: _mamba2(kind) for kind in ("granite", "falcon_h1", "nemotron_h")},
}
