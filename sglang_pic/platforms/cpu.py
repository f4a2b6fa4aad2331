"""Plain CPU platform: stock SGLang without CUDA, AMX or compiled kernels.

SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``) calls kernels built for
AMX. This one runs every operator's ``native`` form and attention in torch, on
any machine that torch runs on. It needs no flag: without an accelerator
SGLang finds it, serves on it and takes its defaults.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_pic.platforms import unpinned

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

DEFAULT_MAX_TOTAL_TOKENS = 32768


def activate() -> str | None:
    """Qualified name of the platform class; None where this platform steps aside.

    It does so for any accelerator that torch can use, and for those who asked
    for SGLang's own CPU engine.
    """
    if torch.accelerator.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return f"{__name__}.{PlainCpuPlatform.__qualname__}"


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """One process, one CPU device, no graphs, no Triton, no pinned memory."""

    # Out-of-tree: as PlatformEnum.CPU it would be taken for the AMX engine.
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int | None = None) -> str:
        """The default of ``--device``, which SGLang treats as text."""
        return "cpu"

    def is_pin_memory_available(self, device: torch.device | str | None = None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Replace SGLang's defaults, made for AMX and for GPUs; the user's choices stay.

        SGLang calls this once a launch, before it starts its sub-processes.
        """
        if server_args.attention_backend == "intel_amx":
            server_args.attention_backend = self.get_default_attention_backend()
        if server_args.dtype == "auto":
            # For a float32 checkpoint "auto" means float16, in which most CPUs
            # compute a prompt some ten times slower.
            server_args.dtype = "float32"
        if server_args.hicache_io_backend == "kernel":
            # The default, of Triton kernels too.
            server_args.hicache_io_backend = "direct"
            server_args.hicache_mem_layout = "layer_first"
        if server_args.lora_backend == "csgmv":
            # The default, of Triton kernels.
            server_args.lora_backend = "torch_native"
        if server_args.max_total_tokens is None:
            # Otherwise the KV cache takes most of the machine's memory.
            server_args.max_total_tokens = DEFAULT_MAX_TOTAL_TOKENS
        # An idle scheduler would keep a whole core busy with polling.
        server_args.sleep_on_idle = True
        # OpenMP's threads spin while they wait for each other. Where another
        # process wants the same cores, a matrix product takes 20 times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        if not server_args.enable_torch_compile:
            # SGLang compiles small helpers of its own when the first request needs
            # one. All others wait for it, and without a C++ compiler it ends the server.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # Histories of the convolution before a linear layer, bfloat16 otherwise.
        os.environ.setdefault("SGLANG_MAMBA_CONV_DTYPE", "float32")

    def support_mamba_cache_extra_buffer(self) -> bool:
        """States of hybrids may be kept on a grid of tokens, as page sizes above 1 need."""
        return True

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        from sglang_pic.platforms import drafts

        return drafts.cache_locs

    def init_backend(self) -> None:
        """Let code that was made for GPUs run: see ``unpinned``."""
        unpinned.install()
