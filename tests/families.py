"""Models of every family that links, each with the oracle that it is held to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import (
    tiny_bailing,
    tiny_bailing_model,
    tiny_hybrid,
    tiny_hybrid_model,
    tiny_kimi,
    tiny_kimi_model,
    tiny_mamba2,
    tiny_mamba2_model,
    tiny_mla,
    tiny_mla_model,
    tiny_windowed,
    tiny_windowed_model,
)
from torch import Tensor

from sglang_pic.eval.oracle import dense, hybrid, lightning, mamba2


@dataclasses.dataclass(frozen=True)
class Family:
    """A random model of a family.

    Attributes:
        save: writes it below a directory, and returns where.
        model: the same model, in transformers.
        oracle: ``linked_logprobs`` of the family's oracle.
        linear: whether it has linear layers.
    """

    save: Callable[[Path], Path]
    model: Callable[[], Any]
    oracle: Callable[..., Tensor]
    linear: bool = True

    def linked(self, ids: Any, segments: Any, **where: Any) -> Tensor:
        return self.oracle(self.model(), ids, segments, **where)

    def plain(self, ids: Any, forced: Any) -> Tensor:
        """Of the model by itself; by its oracle, where transformers has no such model."""
        model = self.model()
        if isinstance(model, lightning.Bailing):
            return self.linked(ids, [], seam=0, page=1, state="compose", forced=forced)
        return dense.full_logprobs(model, ids, len(forced), forced=forced).full_logprobs


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


def _full_attention(
    model: Any, ids: Any, segments: Any, *, forced: Any, state: str, **layout: Any
) -> Tensor:
    """The dense oracle; without linear layers there is no ``state``."""
    made = dense.linked_logprobs(model, ids, segments, n_new=len(forced), forced=forced, **layout)
    return made.full_logprobs


def _attention(save: Callable[..., Path], model: Callable[..., Any], kind: str) -> Family:
    return Family(
        functools.partial(save, kind=kind),
        functools.cache(functools.partial(model, kind)),
        _full_attention,
        linear=False,
    )


FAMILIES = {
    **{
        kind: _attention(tiny_mla, tiny_mla_model, kind)
        for kind in ("deepseek_v2", "deepseek_v2_yarn")
    },
    **{kind: _attention(tiny_windowed, tiny_windowed_model, kind) for kind in ("gemma3", "olmo3")},
    **{kind: _delta(kind) for kind in ("qwen3_5", "qwen3_5_moe", "qwen3_next")},
    "ling": Family(tiny_bailing, functools.cache(tiny_bailing_model), lightning.linked_logprobs),
    "kimi": Family(tiny_kimi, functools.cache(tiny_kimi_model), hybrid.linked_logprobs),
    **{kind: _mamba2(kind) for kind in ("granite", "falcon_h1", "nemotron_h")},
}
