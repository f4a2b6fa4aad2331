"""What is planned on the host, on its way to the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Triton compiles a kernel anew for arrays that do not begin at a multiple of 16 bytes.
_ALIGNED = 4


def pinned(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A host tensor whose copy to the device need not be waited for."""
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A host tensor on the device, without waiting for what runs there."""
    return pinned(tensor, device).to(device, non_blocking=True)


def ship(
    columns: Mapping[str, torch.Tensor], device: torch.device | str
) -> dict[str, torch.Tensor]:
    """int32 columns in one copy, each at a multiple of 16 bytes.

    Args:
        columns: integers of any type that fit into int32, any shapes.
    """
    flat = [column.to(torch.int32).reshape(-1) for column in columns.values()]
    lengths = [-(-column.numel() // _ALIGNED) * _ALIGNED for column in flat]
    packed = torch.zeros(sum(lengths), dtype=torch.int32)
    for piece, column in zip(packed.split(lengths), flat, strict=True):
        piece[: column.numel()] = column
    there = to_device(packed, device).split(lengths)
    return {
        name: piece[: column.numel()].view(column.shape)
        for (name, column), piece in zip(columns.items(), there, strict=True)
    }
