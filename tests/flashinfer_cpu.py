"""FlashInfer without a GPU: its own Python, its own planner, attention in torch."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch

HERE = pathlib.Path(__file__).parent
BUILD = HERE.parent / "build" / "flashinfer"
LOG2E = 1.4426950408889634
PLAN_NUMBERS = 15


@functools.cache
def planner() -> Any:
    """The planner of the installed wheel, compiled in seconds, once; ``None`` without nvcc."""
    import flashinfer

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    sources = sorted((HERE / "flashinfer_planner").iterdir())
    text = "".join(source.read_text() for source in sources) + flashinfer.__version__
    library = BUILD / f"planner-{hashlib.sha256(text.encode()).hexdigest()[:12]}.so"
    if not library.exists():
        data = pathlib.Path(flashinfer.__file__).parent / "data"
        parts = ("include", "cccl/libcudacxx/include", "cccl/cub", "cccl/thrust")
        include = [f"-I{data / part}" for part in parts]
        BUILD.mkdir(parents=True, exist_ok=True)
        half = library.with_suffix(f".{id(text)}.so")
        flags = "-O1 -std=c++17 -arch=sm_90 -shared -cudart none -Xcompiler -fPIC"
        # PyTorch may have loaded the real CUDA runtime.
        flags += " -Xlinker -Bsymbolic"
        subprocess.run([nvcc, *flags.split(), *include, "-o", half, *sources], check=True)
        half.rename(library)
    return ctypes.CDLL(str(library))


def plan(
    ints: torch.Tensor, float_bytes: int, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor,
    rows: int, requests: int, heads: int, kv_heads: int, page: int, graph: bool, head_dim: int,
) -> list[int]:  # fmt: skip
    """``PrefillPlan``; its arrays are written to ``ints``, uint8 on the host."""
    numbers = (ctypes.c_long * PLAN_NUMBERS)()
    error = ctypes.create_string_buffer(400)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (qo_indptr, kv_indptr, ints)]
    assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
    failed = planner().plan(
        *pointers[:2], rows, requests, heads, kv_heads, head_dim, page, int(graph), pointers[2],
        ctypes.c_long(ints.numel()), ctypes.c_long(float_bytes), numbers, error, len(error),
    )  # fmt: skip
    if failed:
        raise RuntimeError(error.value.decode())
    return list(numbers)


class Module:
    """Where FlashInfer's wrappers have a compiled module: plans are the real planner's,
    where it could be compiled; attention is dense, over the pages that each request names.

    Attributes:
        mask_modes: of every launch: 0 none, 2 the variant's own.
        plans: arguments of every plan that say how much there is to do.
    """

    def __init__(self) -> None:
        self.mask_modes: list[int] = []
        self.plans: list[dict[str, Any]] = []

    def ragged_run(self, *_: Any) -> None:
        raise NotImplementedError

    def plan(
        self, floats: Any, ints: Any, host_ints: Any, qo_indptr: Any, kv_indptr: Any, kv_lens: Any,
        rows: int, requests: int, heads: int, kv_heads: int, page: int, graph: bool,
        head_dim: int, head_dim_vo: int, causal: bool, window_left: int, *rest: Any,
    ) -> list[int]:  # fmt: skip
        assert qo_indptr.device.type == kv_indptr.device.type == "cpu"
        assert not causal and window_left == -1 and head_dim == head_dim_vo
        assert requests == len(qo_indptr) - 1 == len(kv_indptr) - 1 == len(kv_lens)
        assert bool((qo_indptr.diff() >= 0).all()) and bool((kv_indptr.diff() >= 0).all())
        self.plans.append({"qo": qo_indptr, "kv": kv_indptr, "lens": kv_lens, "ints": host_ints})
        if planner() is None:
            return [rows]
        return plan(
            host_ints, floats.numel(), qo_indptr, kv_indptr, rows, requests, heads, kv_heads,
            page, graph, head_dim,
        )  # fmt: skip

    def paged_run(
        self, floats: Any, ints: Any, plan: Any, q: Any, k_pages: Any, v_pages: Any,
        qo_indptr: Any, kv_indptr: Any, indices: Any, last: Any, out: Any, lse: Any,
        mask_mode: int, layout: int, window_left: int, pdl: bool, *extra: Any,
    ) -> None:  # fmt: skip
        assert (layout, window_left) == (0, -1)
        self.mask_modes.append(mask_mode)
        ranges = None
        if mask_mode == 2:
            ranges, causal_window, range_window, scale = extra
            assert (causal_window, range_window) == (-1, 0)
            ranges = ranges.view(-1, 2)
        else:
            assert mask_mode == 0
            scale = extra[7]
        page, kv_heads = k_pages.shape[1:3]
        group = q.shape[1] // kv_heads
        assert bool((last >= 1).all()) and bool((last <= page).all())
        bounds, kv_bounds, lasts = qo_indptr.tolist(), kv_indptr.tolist(), last.tolist()
        for i in range(len(lasts)):
            first, end = bounds[i], bounds[i + 1]
            if first == end:
                continue
            here = indices[kv_bounds[i] : kv_bounds[i + 1]].long()
            length = (len(here) - 1) * page + lasts[i]
            key, value = (
                x[here].flatten(0, 1)[:length].repeat_interleave(group, 1).double()
                for x in (k_pages, v_pages)
            )
            scores = torch.einsum("nhd,mhd->nhm", q[first:end].double(), key) * scale
            if ranges is not None:
                at = torch.arange(length)
                own = length - (end - first) + torch.arange(end - first)
                low, high = ranges[first:end, :1], ranges[first:end, 1:]
                seen = (at <= own[:, None]) | ((at >= low) & (at <= high))
                scores.masked_fill_(~seen[:, None], -torch.inf)
            lse[first:end] = torch.logsumexp(scores, -1) * LOG2E
            out[first:end] = torch.einsum("nhm,mhd->nhd", scores.softmax(-1), value).to(out.dtype)


def substitute() -> Iterator[Module]:
    """FlashInfer's wrappers on a CPU, in float32 too; a fixture's body."""
    from flashinfer import prefill
    from flashinfer.jit import utils

    module = Module()
    empty = torch.empty

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", unpinned)
        patch.setattr(prefill, "get_batch_prefill_module", lambda *_: module)
        patch.setattr(prefill, "get_customize_batch_prefill_module", lambda *_, **__: module)
        patch.setattr(prefill, "get_batch_prefill_jit_module", lambda _, found: found)
        for names in (utils.filename_safe_dtype_map, utils.dtype_map_kv, utils.dtype_map):
            patch.setitem(names, torch.float32, "float")
        yield module
