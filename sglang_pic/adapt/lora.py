"""Low-rank changes of a model's linear layers, y + (alpha / r) B A x, in PEFT's format."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_pic.adapt.data import AdaptError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Of every layer of the models that this is for, Llama's and those built like it.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an adapter is apart from its numbers.

    Attributes:
        rank: r.
        alpha: of the factor alpha / r.
        modules: last names of the layers that it changes.
    """

    rank: int = 16
    alpha: int = 32
    modules: tuple[str, ...] = MODULES


class Adapter:
    """A change of a model that does nothing until it is ``on``.

    Args:
        model: a transformers model; it is left as it is.
        shape: of the change.
        seed: of A; B is zero, so that nothing is changed yet.

    Attributes:
        factors: by the layer's name A [r, in] and B [out, r], float32.

    Raises:
        AdaptError: the model has no such layers.
    """

    def __init__(self, model: Any, shape: Shape, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in shape.modules and isinstance(module, torch.nn.Linear):
                into = module.in_features
                a = torch.randn(shape.rank, into, generator=generator) / into**0.5
                made = a.to(module.weight.device), torch.zeros_like(module.weight[:, : shape.rank])
                self.factors[name] = made[0].requires_grad_(), made[1].float().requires_grad_()
        missing = set(shape.modules) - {name.rsplit(".", 1)[-1] for name in self.factors}
        if missing:
            raise AdaptError(f"{type(model).__name__} has no layers {', '.join(sorted(missing))}")

    @property
    def parameters(self) -> list[Tensor]:
        return [factor for pair in self.factors.values() for factor in pair]

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Inside, the model computes with the change."""
        scale = self.shape.alpha / self.shape.rank
        hooks = []
        for name, (a, b) in self.factors.items():

            def change(_: Any, args: Any, y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                (x,) = args
                low = torch.nn.functional.linear(x, a.to(x.dtype))
                return y + scale * torch.nn.functional.linear(low, b.to(x.dtype))

            hooks.append(model.get_submodule(name).register_forward_hook(change))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def save(self, folder: pathlib.Path, base: str) -> None:
        """Write it as PEFT does, what SGLang's ``--lora-paths`` loads.

        Args:
            base: the model's name or path.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.shape.rank,
            "lora_alpha": self.shape.alpha,
            "target_modules": list(self.shape.modules),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
        # Whole or not at all: a server may be about to read it.
        new = folder / f"{WEIGHTS}.new"
        save_file(tensors, new, metadata={"format": "pt"})
        new.replace(folder / WEIGHTS)

    @classmethod
    def load(cls, model: Any, folder: pathlib.Path) -> Adapter:
        """The adapter of a folder.

        Raises:
            AdaptError: it is none, or of another model.
        """
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            modules = tuple(config["target_modules"])
            shape = Shape(config["r"], config["lora_alpha"], modules)
            tensors = load_file(folder / WEIGHTS)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise AdaptError(f"{folder} holds no adapter: {error}") from error
        adapter = cls(model, shape)
        for name, pair in adapter.factors.items():
            for letter, factor in zip("AB", pair, strict=True):
                found = tensors.pop(f"{PREFIX}{name}.lora_{letter}.weight", None)
                if found is None or found.shape != factor.shape:
                    raise AdaptError(f"{folder} is no adapter of this model: see {name}")
                factor.data.copy_(found)
        if tensors:
            raise AdaptError(f"{folder} is no adapter of this model: it changes {min(tensors)}")
        return adapter
