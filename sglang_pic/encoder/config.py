"""What a trained encoder is for, and its sizes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sglang_pic.errors import PicConfigError

FORMAT = 1
FILE = "encoder.json"
SAMPLED_ROWS = 256


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """The decoder that an encoder was trained beside.

    Attributes:
        vocab: rows of its embedding as the checkpoint holds them.
        fingerprint: see ``fingerprint``.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    fingerprint: str

    def kv_heads_of(self, ranks: int) -> int:
        """How many each of so many tensor-parallel ranks has: one that is not enough for
        all is on several."""
        return max(1, self.kv_heads // ranks)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder and its cross blocks. Heads are the decoder's.

    Attributes:
        cross_layers: increasing; a cross block stands in front of each of these
            decoder layers and reads the keys and values of the encoder layer of the
            same index, so there are as many encoder layers.
        intermediate_size: of all MLPs.
        rotary_dim: channels of a head that are rotated, the first ones.
        head_norm: the encoder's own attention normalises queries and keys.
        bias: its four projections have biases.
        conv: width of a centred depthwise convolution in front of each encoder
            layer's attention, odd; 0 is none.
        max_tokens: of a segment.
    """

    decoder: DecoderShape
    cross_layers: tuple[int, ...]
    intermediate_size: int
    rope_theta: float = 10000.0
    rotary_dim: int = 0
    head_norm: bool = True
    bias: bool = False
    conv: int = 0
    eps: float = 1e-6
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        shape = self.decoder
        for owner, names in (
            (shape, ("hidden_size", "layers", "heads", "kv_heads", "head_dim", "vocab")),
            (self, ("intermediate_size", "max_tokens")),
        ):
            for name in names:
                value = getattr(owner, name)
                if type(value) is not int or value < 1:
                    raise PicConfigError(f"encoder: {name} is {value!r}, not a positive integer")
        if shape.heads % shape.kv_heads:
            raise PicConfigError(f"encoder: {shape.heads} heads over {shape.kv_heads} kv heads")
        cross = self.cross_layers
        if not cross or list(cross) != sorted({*cross}):
            raise PicConfigError(f"encoder: cross_layers {cross} are not increasing")
        if not 0 <= cross[0] <= cross[-1] < shape.layers:
            raise PicConfigError(f"encoder: cross_layers {cross} of {shape.layers} layers")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= shape.head_dim:
            raise PicConfigError(f"encoder: rotary_dim {self.rotary_dim} of {shape.head_dim}")
        if self.conv and self.conv % 2 == 0:
            raise PicConfigError(f"encoder: conv {self.conv} is not odd")

    @property
    def layers(self) -> int:
        """Of the encoder; as many cross blocks."""
        return len(self.cross_layers)

    def bytes_per_token(self, item: int, ranks: int = 1) -> int:
        """Of a document's keys and values at ``item`` bytes a number, on each of so many
        tensor-parallel ranks."""
        return 2 * self.layers * self.decoder.kv_heads_of(ranks) * self.decoder.head_dim * item

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, fields: Any) -> EncoderConfig:
        """Raises PicConfigError, naming what is wrong."""
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise PicConfigError(f"encoder: not a configuration of format {FORMAT}")
        fields = {name: value for name, value in fields.items() if name != "format"}
        try:
            decoder = DecoderShape(**fields.pop("decoder"))
            cross = tuple(int(layer) for layer in fields.pop("cross_layers"))
            return cls(decoder=decoder, cross_layers=cross, **fields)
        except (KeyError, TypeError) as error:
            raise PicConfigError(f"encoder: bad configuration, {error}") from error

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE).write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> EncoderConfig:
        """Raises PicConfigError, naming the file."""
        path = directory / FILE
        try:
            fields = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise PicConfigError(f"encoder: cannot read {path}, {error}") from error
        return cls.from_json(fields)

    def check_decoder(self, served: DecoderShape) -> None:
        """Raises PicConfigError when trained for another model than ``served``."""
        for field in dataclasses.fields(DecoderShape):
            own, other = getattr(self.decoder, field.name), getattr(served, field.name)
            if own != other:
                raise PicConfigError(
                    f"encoder: trained for another model, whose {field.name} is {own}; "
                    f"the served model's is {other}"
                )


def evenly(layers: int, encoder_layers: int) -> tuple[int, ...]:
    """The paper's places: in front of the last layer of each of ``encoder_layers`` equal parts."""
    step = layers // encoder_layers
    return tuple(range(step - 1, step * encoder_layers, step))


def fingerprint_of(embedding: Tensor) -> str:
    """Of an embedding [vocab, hidden]: whatever the model is called, and whatever its
    dtype as long as that holds the checkpoint's values."""
    rows = torch.linspace(0, len(embedding) - 1, min(SAMPLED_ROWS, len(embedding))).long()
    sample = embedding[rows.to(embedding.device)].detach().float().cpu().contiguous()
    head = f"{tuple(embedding.shape)}".encode()
    return hashlib.sha256(head + sample.numpy().tobytes()).hexdigest()[:32]


def fingerprint(model: Path) -> str:
    """Of the embedding in a Hugging Face directory's safetensors.

    Raises PicConfigError when there is none.
    """
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name.endswith("embed_tokens.weight"):
                    return fingerprint_of(file.get_tensor(name))
    raise PicConfigError(f"encoder: no embed_tokens.weight in {model}/*.safetensors")


def decoder_shape(text: Any, fingerprint: str) -> DecoderShape:
    """Of transformers' configuration of a text model."""
    # On a CPU SGLang adds heads where they do not divide over its ranks.
    heads = getattr(text, "original_num_attention_heads", text.num_attention_heads)
    kv_heads = getattr(
        text, "original_total_num_kv_heads", getattr(text, "num_key_value_heads", None)
    )
    return DecoderShape(
        hidden_size=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        fingerprint=fingerprint,
    )
