"""An encoder and its cross blocks as files: ``encoder.json`` and ``encoder.safetensors``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sglang_pic.encoder.config import DecoderShape, EncoderConfig
from sglang_pic.encoder.cross import CrossBlock
from sglang_pic.encoder.encoder import Encoder
from sglang_pic.errors import PicConfigError

FILE = "encoder.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class EncoderModules(nn.Module):
    """All that is trained. Weights are named ``encoder.layers.0...`` and ``cross.0...``."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.cross = nn.ModuleList(CrossBlock(config) for _ in range(config.layers))


def save(modules: EncoderModules, directory: Path) -> None:
    """Write configuration and weights."""
    modules.config.save(directory)
    tensors = {name: t.detach().cpu().contiguous() for name, t in modules.state_dict().items()}
    save_file(tensors, directory / FILE)
    (directory / FILE).chmod(0o644)


def load(directory: Path, served: DecoderShape | None = None) -> EncoderModules:
    """Modules in evaluation mode, in the file's dtype.

    Args:
        served: the model beside which they will run, if it is to be checked.

    Raises:
        PicConfigError: trained for another model, files that cannot be read, or
            names, shapes or dtypes that are not the configuration's.
    """
    config = EncoderConfig.load(directory)
    if served is not None:
        config.check_decoder(served)
    path = directory / FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PicConfigError(f"encoder: cannot read {path}, {error}") from error
    with torch.device("meta"):
        modules = EncoderModules(config)
    expected = modules.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise PicConfigError(f"encoder: {path} lacks {missing[0]} ({len(missing)} in all)")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise PicConfigError(f"encoder: {path} has {unknown[0]} ({len(unknown)} in all)")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, not {list(expected[name].shape)}"
            raise PicConfigError(f"encoder: {name} in {path} is {shapes}")
        if tensor.dtype not in DTYPES or tensor.dtype != next(iter(tensors.values())).dtype:
            raise PicConfigError(f"encoder: {name} in {path} is {tensor.dtype}")
    modules.load_state_dict(tensors, assign=True)
    return modules.eval()
