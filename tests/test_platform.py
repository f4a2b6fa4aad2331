"""The CPU platform steps aside where something better is there."""

from __future__ import annotations

import os
from unittest import mock

import torch

from sglang_pic.platforms import cpu


def test_it_serves_a_machine_without_an_accelerator() -> None:
    assert cpu.activate() == "sglang_pic.platforms.cpu.PlainCpuPlatform"


def test_it_steps_aside_for_accelerators_and_the_amx_engine() -> None:
    with mock.patch.object(torch.accelerator, "is_available", lambda: True):
        assert cpu.activate() is None
    with mock.patch.dict(os.environ, {"SGLANG_USE_CPU_ENGINE": "1"}):
        assert cpu.activate() is None
