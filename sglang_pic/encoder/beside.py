"""``BesideModel``: an encoder and its cross blocks beside a model that SGLang serves.

The blocks stand in front of decoder layers as forward pre-hooks of torch. What a layer
is given is an output that still has to be added to the residual stream, which SGLang keeps
with the batch; a block's contribution is added to that output, for the tokens alone whose
rows have documents. So all other rows stay as SGLang computes them, to the last bit.

On several tensor-parallel ranks SGLang leaves the sum over them to whoever reads the output,
where one kernel may do both; here it is made first, for all rows of the batch. Then every rank
adds the whole of what the block contributes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual
from torch import nn

from sglang_pic.encoder.config import decoder_shape, fingerprint
from sglang_pic.encoder.cross import CrossBlock
from sglang_pic.encoder.digest import digest_of
from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.encoder.ranks import ALONE, Rank, cut
from sglang_pic.encoder.step import Steps
from sglang_pic.encoder.weights import EncoderModules, load


class Crossing:
    """In front of one decoder layer.

    Args:
        index: of the block, and of the encoder layer that it reads.
        layer: of the decoder.
        steps: which tokens see what.
    """

    def __init__(self, index: int, block: CrossBlock, layer: nn.Module, steps: Steps):
        self._index = index
        self._block = block
        self._steps = steps
        self._names = tuple(inspect.signature(layer.forward).parameters)

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        batch = given["forward_batch"]
        step = self._steps.read(batch)
        if step is None:
            return None
        output = residual.complete_output(given["hidden_states"], batch)
        stream = residual.snapshot(output, batch)[step.tokens]
        seen = self._block(stream, lambda queries: step.attend(queries, self._index))
        output.index_add_(0, step.tokens, seen - stream)
        return (), {**given, "hidden_states": output}


class BesideModel:
    """Not among the model's own modules: SGLang loads, counts and wraps those.

    Args:
        model: SGLang's, as it was made; weights may not be loaded yet.
        config: transformers' configuration of it.
        directory: of the encoder.
        model_path: of the model.
        rank: which of the tensor-parallel ranks this is.

    Attributes:
        config: the encoder's.
        digest: names its weights.
        steps: of the batch that runs next.

    Raises:
        PicConfigError: the encoder cannot be read, or was trained for another model.
    """

    def __init__(
        self, model: Any, config: Any, directory: str, model_path: str, rank: Rank = ALONE
    ):
        self._model = model
        self._ranks = rank.count
        served = decoder_shape(config, fingerprint(Path(model_path)))
        weights = model.get_input_embeddings().weight
        self.modules: EncoderModules = cut(load(Path(directory), served), rank).to(
            device=weights.device, dtype=weights.dtype
        )
        self.modules.requires_grad_(False)
        self.config = self.modules.config
        self.digest = digest_of(Path(directory))
        self.steps = Steps()
        for index, at in enumerate(self.config.cross_layers):
            layer = model.model.layers[at]
            crossing = Crossing(index, self.modules.cross[index], layer, self.steps)
            layer.register_forward_pre_hook(crossing, with_kwargs=True)

    @property
    def bytes_per_token(self) -> int:
        """Of what is kept of a document on this rank."""
        item = next(self.modules.parameters()).element_size()
        return self.config.bytes_per_token(item, self._ranks)

    def room(self, tokens: int, device: str | None = None) -> EncoderKV:
        """Not initialised, for what is kept of a document of so many tokens; by default
        where the encoder is. On ``meta`` it takes no memory."""
        weights, shape = next(self.modules.parameters()), self.config.decoder
        heads = shape.kv_heads_of(self._ranks)
        size = (self.config.layers, tokens, heads, shape.head_dim)
        where = weights.device if device is None else device
        return EncoderKV(*(torch.empty(size, dtype=weights.dtype, device=where) for _ in "kv"))

    @torch.no_grad()
    def encode(self, documents: Sequence[Sequence[int]]) -> list[EncoderKV]:
        """Keys and values of each document, of this rank's heads, with memory of its own.

        Args:
            documents: token ids of each; see ``fits``.
        """
        lengths = [len(ids) for ids in documents]
        device = next(self.modules.parameters()).device
        ids = torch.tensor([token for one in documents for token in one], device=device)
        found = self.modules.encoder(self._model.get_input_embeddings()(ids), lengths)
        keys, values = found.k.split(lengths, 1), found.v.split(lengths, 1)
        own = torch.contiguous_format
        return [
            EncoderKV(k.clone(memory_format=own), v.clone(memory_format=own))
            for k, v in zip(keys, values, strict=True)
        ]
