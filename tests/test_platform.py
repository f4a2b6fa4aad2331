"""The CPU platform steps aside where something better is there, and what it puts in
the place of torch's and SGLang's parts passes for them."""

from __future__ import annotations

import os
import pathlib
import struct
import subprocess
import sys
from unittest import mock

import torch

from sglang_pic.platforms import cpu, unpinned
from sglang_pic.platforms.sampling_kernels import murmur_hash32


def test_it_serves_a_machine_without_an_accelerator() -> None:
    assert cpu.activate() == "sglang_pic.platforms.cpu.PlainCpuPlatform"


def test_it_steps_aside_for_accelerators_and_the_amx_engine() -> None:
    with mock.patch.object(torch.accelerator, "is_available", lambda: True):
        assert cpu.activate() is None
    with mock.patch.dict(os.environ, {"SGLANG_USE_CPU_ENGINE": "1"}):
        assert cpu.activate() is None


def test_every_factory_of_torch_that_pins_is_known() -> None:
    """Public, dense ones; in torch's own list of what its operators take."""
    pins = {"tensor"}
    for name in dir(torch._C._VariableFunctions):
        packet = getattr(torch.ops.aten, name, None) if hasattr(torch, name) else None
        if packet is None or name.startswith("_") or "sparse" in name or "quantized" in name:
            continue
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        if any(one.name == "pin_memory" for schema in schemas for one in schema.arguments):
            pins.add(name)
    # From a file there is nothing to pin.
    assert pins - {"from_file"} == set(unpinned.FACTORIES)
    methods = {name for name in dir(torch.Tensor) if name.startswith("new_")}
    documented = {name for name in methods if "pin_memory" in getattr(torch.Tensor, name).__doc__}
    assert documented == set(unpinned.METHODS)


def run(program: str, folder: pathlib.Path, env: dict[str, str] | None = None) -> None:
    """Run a Python program in a process of its own: it patches torch."""
    # From a file: TorchScript reads the source.
    file = folder / "program.py"
    file.write_text(program)
    made = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, timeout=600, env=env
    )
    assert made.returncode == 0, made.stderr[-6000:]


USE = """
import copy, pickle, torch

def use_torch(backend):
    assert torch.get_device_module() is torch.cpu
    torch._dynamo.reset()

    @torch.compile(dynamic=True, fullgraph=True, backend=backend)
    def compiled(x):
        module = torch.get_device_module()
        made = torch.zeros(3, pin_memory=True) + torch.ones(3) + torch.full((3,), 2.0)
        made = made + torch.tensor([1.0, 2.0, 3.0], pin_memory=True) + torch.arange(3)
        made = made + torch.zeros_like(made) + x.new_ones(3) + torch.empty(3).fill_(1)
        return x * made + (1 if module is torch.cpu else 1000)

    expected = torch.tensor([6.0, 8.0, 10.0]) + 1
    assert torch.equal(compiled(torch.ones(3)), expected), compiled(torch.ones(3))

    @torch.jit.script
    def scripted(n: int):
        return torch.zeros(n) + torch.arange(n) + torch.ones(n)

    assert scripted(2).tolist() == [1, 2]
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.tensor([1]).is_meta and torch.zeros(2).is_meta
    for name in ("empty", "tensor", "zeros"):
        assert pickle.loads(pickle.dumps(getattr(torch, name))) is getattr(torch, name)
    pinned = torch.tensor([1], pin_memory=True).pin_memory().new_zeros(2, pin_memory=True)
    assert pinned.tolist() == [0, 0]
    assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).shape == (1, 2)
"""

ALL_PARTS = (
    USE
    + """
# Before: what dynamo remembers of torch's functions, it has looked up by now.
assert torch.compile(lambda x: torch.zeros(1) + x, backend="eager")(torch.ones(1)) == 1
# Torch's own, and what of SGLang is imported in front of the plug-in.
stock = {name: getattr(torch, name) for name in dir(torch)}
methods = {name: getattr(torch.Tensor, name) for name in dir(torch.Tensor)}
import sglang.srt.managers.scheduler, sglang.srt.entrypoints.engine
import sglang.srt.entrypoints.http_server
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
stock_backends = dict(ATTENTION_BACKENDS)
from sglang.srt.plugins import load_plugins
load_plugins()

import functools, inspect, pkgutil
from sglang_pic import sglang_hooks
from sglang_pic.platforms import latent_attention, linear_kernels, mamba2_kernels, sampling_kernels
pairs = [(f"torch.{n}", old, getattr(torch, n)) for n, old in stock.items()]
pairs += [(f"Tensor.{n}", old, getattr(torch.Tensor, n)) for n, old in methods.items()]
pairs = [pair for pair in pairs if callable(pair[1]) and pair[1] is not pair[2]]
replaced = {name for name, *_ in pairs}
assert {"torch.get_device_module", "torch.tensor", "Tensor.pin_memory"} <= replaced, replaced
hooks = [hook.target for hook in (*sglang_hooks.ENGINE_HOOKS, *sglang_hooks.FRONT_HOOKS)]
kernels = linear_kernels.KERNELS | mamba2_kernels.KERNELS | sampling_kernels.KERNELS
kernels |= latent_attention.KERNELS
for target in (*hooks, *kernels):
    found = pkgutil.resolve_name(target)
    pairs.append((target, found.__wrapped__, found))
for name in sglang_hooks._BACKENDS:
    old, new = stock_backends[name], ATTENTION_BACKENDS[name]
    pairs.append((name, getattr(new, "__wrapped__", old), new))

def public(thing):
    return {n for n in dir(thing) if not n.startswith("_") or n in ("__wrapped__", "__name__")}

def signature(thing):
    try:
        return inspect.signature(thing, follow_wrapped=False)
    except ValueError:  # a builtin's is not known
        return None

problems = []
for name, old, new in pairs:
    problems += [f"{name} lacks {n}" for n in public(old) if not hasattr(new, n)]
    own_words = name in kernels or name == "torch.get_device_module"
    if new.__name__ != old.__name__ or (new.__doc__ != old.__doc__ and not own_words):
        problems.append(f"{name} calls itself {new.__name__}: {new.__doc__}")
    if isinstance(old, functools._lru_cache_wrapper):
        if isinstance(new, functools._lru_cache_wrapper):
            inside = [list(signature(cached.__wrapped__).parameters) for cached in (new, old)]
            problems += [f"{name} takes {inside}"] * (inside[0] != inside[1])
        else:
            problems.append(f"{name} is not cached")
for target, ours in kernels.items():
    theirs = inspect.signature(pkgutil.resolve_name(target).__wrapped__)
    mine = signature(ours)
    anything = any(p.kind is p.VAR_KEYWORD for p in mine.parameters.values())
    for name, parameter in theirs.parameters.items():
        if name not in mine.parameters:
            problems += [f"{target} takes no {name}"] * (not anything)
        elif parameter.default not in (parameter.empty, mine.parameters[name].default):
            problems.append(f"{target} has another default for {name}")
assert not problems, problems
use_torch("eager")
use_torch("inductor")

# The arithmetic that SGLang compiles for a request.
from sglang.srt.layers.sampler import multinomial_with_seed
from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties
logits = torch.ones(2, 8)
apply_scaling_penalties(logits, torch.full((2, 8), 2.0))
assert logits.eq(0.5).all()
seed = torch.tensor([1, 2])
assert multinomial_with_seed(logits, seed, seed).shape == (2, 1)
"""
)


def test_all_that_stands_in_keeps_its_interface(tmp_path: pathlib.Path) -> None:
    run(ALL_PARTS, tmp_path)


def test_torch_compiles_over_the_stand_ins_from_the_first(tmp_path: pathlib.Path) -> None:
    start = "from sglang_pic.platforms import unpinned\n" + 2 * "unpinned.install()\n"
    run(f"{start}{USE}\nuse_torch('eager')", tmp_path)


def test_penalties_and_seeds_need_no_compiler(tmp_path: pathlib.Path) -> None:
    """A machine that serves on its CPU need not have a C++ compiler."""
    with mock.patch.dict(os.environ):
        args = mock.Mock(enable_torch_compile=False)
        cpu.PlainCpuPlatform().apply_server_args_defaults(args)
        env = dict(os.environ)
    program = ALL_PARTS.replace('use_torch("eager")\nuse_torch("inductor")\n', "")
    assert program != ALL_PARTS
    run(program, tmp_path, env | {"CXX": "/nowhere/g++", "PATH": "/nowhere"})


def test_seeds_hash_as_on_a_gpu() -> None:
    """Against MurmurHash3 as it is written down, over bytes."""
    seeds, positions, columns = [0, 7, -1, 2**63 - 1, -(2**63)], [0, 1, 4095, 7, 3], [0, 5, 151935]
    found = murmur_hash32(torch.tensor(seeds), torch.tensor(positions), torch.tensor(columns))
    assert found.dtype == torch.uint32
    for i, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for j, column in enumerate(columns):
            data = struct.pack("<qII", seed, position, column)
            assert int(found[i, j]) == murmur3(data)


def murmur3(data: bytes) -> int:
    """Of whole blocks of four bytes, from seed 0."""
    low, h = 0xFFFFFFFF, 0
    for (k,) in struct.iter_unpack("<I", data):
        k = k * 0xCC9E2D51 & low
        k = (k << 15 | k >> 17) & low
        h ^= k * 0x1B873593 & low
        h = (h << 13 | h >> 19) & low
        h = h * 5 + 0xE6546B64 & low
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & low
    h = (h ^ h >> 13) * 0xC2B2AE35 & low
    return h ^ h >> 16
