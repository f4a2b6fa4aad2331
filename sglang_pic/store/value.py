"""A compiled segment as one value: bytes in the form of a safetensors file.

Nothing in a store is trusted. A value's head carries the *fingerprint* of everything its
content depends on, its name, and a checksum over all of it; where the operator has given
a key, a signature too. What does not match in all of them is refused, and nothing in it
is executed. The head names nobody: whose a value is only its name says, by a hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

FORMAT = 4
# Of a value that was compiled alone.
ALONE = "alone"
MAX_HEAD = 16 << 20
_ALIGN = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# Why a value is refused, for reports and metrics.
DAMAGED = "damaged"
FOREIGN = "foreign"
OTHER_NAME = "other_name"
OTHER_TOKENS = "other_tokens"
OTHER_SHAPE = "other_shape"
UNSIGNED = "unsigned"
SIGNATURE = "other_signature"


class BadValue(ValueError):
    """A value cannot be used: ``reason`` is one of this module's, the message says more."""

    def __init__(self, reason: str, problem: str):
        super().__init__(problem)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class SavedSegment:
    """What a value holds of a segment.

    Attributes:
        path: token ids, compile context first.
        extra_key: SGLang's adapter key.
        salt: the namespace it lives in.
        hits: links that had used it.
        tensors: ``k.<layer>``, ``v.<layer>`` [held, heads, head dim], and what the
            linear layers keep (``PackedStates.tensors``).
        core_end: where its cores end; ``None`` without linear states.
        heads: first tokens of the cores whose linear states it holds.
    """

    path: array
    extra_key: str | None
    salt: str
    hits: int
    tensors: dict[str, torch.Tensor]
    core_end: int | None = None
    heads: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(one.numel() * one.element_size() for one in self.tensors.values())


def fingerprint(**parts: Any) -> dict[str, str]:
    """Everything that the content of a value depends on, each part as text."""
    return {name: str(value) for name, value in sorted(parts.items())}


def digest_of_weights(model: Any, samples: int = 256) -> str:
    """Tells models of one architecture apart: names, shapes, dtypes and evenly
    spaced values of all weights. Values of a tensor, at most ``samples``."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        picked = flat[:: max(1, flat.numel() // samples)][:samples]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(picked.double().cpu().numpy().tobytes())
    return digest.hexdigest()


class Codec:
    """Names, writes and reads the values of one server.

    Args:
        marks: its fingerprint.
        key: the operator's, for signatures, not empty; ``None`` for none.
    """

    def __init__(self, marks: dict[str, str], key: bytes | None = None):
        self._marks = marks
        self._key = key
        # Servers of two formats do not write over each other's values.
        made_for = json.dumps([FORMAT, marks])
        self._seed = hashlib.blake2b(made_for.encode(), digest_size=16).digest()

    # -- names --------------------------------------------------------------------------

    def group(self, space: str) -> str:
        """What the names of a namespace's values begin with: 16 hex digits, of the
        fingerprint too. What follows is alike on all tensor-parallel ranks."""
        return _hash(self._seed, 8, space.encode())

    def name(self, space: str, path: Sequence[int], heads: Sequence[int]) -> str:
        """Name of the value of a segment that was compiled alone, in a namespace, with
        the linear states of these cores: 16 and 32 hex digits.

        Args:
            path: token ids, compile context first.
        """
        which = json.dumps([ALONE, sorted(heads)]).encode()
        tokens = array("q", path).tobytes()
        return f"{self.group(space)}-{_hash(b'', 16, space.encode(), which, tokens)}"

    def own_name(self, purpose: str) -> str:
        """Name of a value that is of a server, not of a segment."""
        return f"{_hash(self._seed, 8, b'own', b'')}-{_hash(b'', 16, b'own', purpose.encode())}"

    # -- values -------------------------------------------------------------------------

    def encode(self, name: str, saved: SavedSegment) -> np.ndarray:
        """uint8, the value of a segment whose tensors are on the host.

        No copy is made while Python's lock is held: the scheduler's thread goes on.
        """
        tensors = {
            **{key: value.contiguous() for key, value in saved.tensors.items()},
            "path": torch.tensor(saved.path, dtype=torch.int64),
        }
        content = json.dumps([saved.hits, saved.core_end, list(saved.heads)])
        return self.sealed(name, {"segment": content}, tensors)

    def decode(
        self, value: Any, name: str, *, salt: str, path: Sequence[int] | None = None
    ) -> SavedSegment:
        """What a value holds; its tensors are views of ``value``.

        Args:
            value: buffer of bytes, not to be changed afterwards.
            name: that it was found under.
            salt: the namespace that it was looked for in.
            path: token ids that it must be of; ``None`` where only its name is known.

        Raises:
            BadValue: it is no such value, damaged, of another model, setting, version,
                tenant, seam or text, or not signed with the operator's key.
        """
        head, tensors = self.opened(value, name)
        try:
            hits, core_end, heads = json.loads(head["segment"])
            found = array("q", tensors.pop("path").tolist())
            if not isinstance(hits, int) or not isinstance(core_end, int | None):
                raise TypeError(f"{hits!r:.80}, {core_end!r:.80}")
            if self.name(salt, found, heads) != name:
                raise BadValue(OTHER_NAME, "its name is not that of the segment it holds")
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, BadValue):
                raise
            raise BadValue(DAMAGED, f"not a segment: {error!r}") from error
        if path is not None and found != array("q", path):
            raise BadValue(OTHER_TOKENS, "it holds other tokens")
        return SavedSegment(found, None, salt, hits, tensors, core_end, tuple(heads))

    def encode_own(self, name: str, content: Any) -> np.ndarray:
        """uint8, a value of a server's own: JSON."""
        return self.sealed(name, {"content": json.dumps(content)}, {})

    def decode_own(self, value: Any, name: str) -> Any:
        """What ``encode_own`` was given.

        Raises:
            BadValue: as ``decode``.
        """
        head, _ = self.opened(value, name)
        try:
            return json.loads(head["content"])
        except (KeyError, ValueError) as error:
            raise BadValue(DAMAGED, f"not of a server: {error!r}") from error

    def sealed(
        self, name: str, head: dict[str, str], tensors: dict[str, torch.Tensor]
    ) -> np.ndarray:
        """uint8, a value of this server's with what its kind says in its head.

        Args:
            tensors: contiguous, on the host.
        """
        head = {"format": str(FORMAT), "fingerprint": json.dumps(self._marks), "name": name, **head}
        # The widest first, so that each begins at a multiple of its own width.
        order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
        layout, at = {}, 0
        for key in order:
            tensor = tensors[key]
            end = at + tensor.numel() * tensor.element_size()
            shape, dtype = list(tensor.shape), _NAMES[tensor.dtype]
            layout[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
            at = end
        # As long as they will be.
        seals = {"checksum": "0" * 64, **({} if self._key is None else {"signature": "0" * 64})}
        front = _ALIGN + len(_written({**head, **seals}, layout))
        made = np.empty(front + at, dtype=np.uint8)
        data = torch.from_numpy(made)[front:]
        for key in order:
            first, end = layout[key]["data_offsets"]
            data[first:end] = tensors[key].reshape(-1).view(torch.uint8)
        digest = _digest(head, layout, made[front:])
        seals["checksum"] = digest.hex()
        if self._key is not None:
            seals["signature"] = self._sign(digest)
        written = _written({**head, **seals}, layout)
        made[:_ALIGN] = np.frombuffer(len(written).to_bytes(_ALIGN, "little"), np.uint8)
        made[_ALIGN:front] = np.frombuffer(written, np.uint8)
        return made

    def opened(self, value: Any, name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        """Head and tensors of a value that is whole, ours and signed; views of it.

        Raises:
            BadValue: it is not.
        """
        whole = np.frombuffer(value, dtype=np.uint8)
        if not whole.flags.writeable:
            whole = whole.copy()
        head, layout, data = _parsed(whole)
        if head.get("format") != str(FORMAT):
            raise BadValue(FOREIGN, f"format {head.get('format')}, expected {FORMAT}")
        self._check_marks(head)
        if head.get("name") != name:
            raise BadValue(OTHER_NAME, "it was written under another name")
        checksum, signature = head.pop("checksum", ""), head.pop("signature", None)
        digest = _digest(head, layout, data)
        if checksum != digest.hex():
            raise BadValue(DAMAGED, "the checksum does not match")
        if self._key is not None:
            if signature is None:
                raise BadValue(UNSIGNED, "it is not signed")
            if not hmac.compare_digest(signature.encode(), self._sign(digest).encode()):
                raise BadValue(SIGNATURE, "it is signed with another key")
        return head, _tensors(layout, data)

    def _check_marks(self, head: dict[str, str]) -> None:
        try:
            theirs = json.loads(head["fingerprint"])
            keys = sorted({*self._marks, *theirs})
            other = [key for key in keys if self._marks.get(key) != theirs.get(key)]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise BadValue(DAMAGED, f"no fingerprint: {error!r}") from error
        if other:
            key = other[0]
            here = self._marks.get(key)
            raise BadValue(FOREIGN, f"made for {key} {theirs.get(key)}, here it is {here}")

    def _sign(self, digest: bytes) -> str:
        assert self._key is not None
        return hmac.new(self._key, digest, hashlib.sha256).hexdigest()


def _hash(seed: bytes, size: int, *parts: bytes) -> str:
    digest = hashlib.blake2b(seed, digest_size=size)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _written(head: dict[str, str], layout: dict[str, Any]) -> bytes:
    written = json.dumps({"__metadata__": head, **layout}).encode()
    return written + b" " * (-len(written) % _ALIGN)


def _digest(head: dict[str, str], layout: dict[str, Any], data: np.ndarray) -> bytes:
    digest = hashlib.sha256()
    digest.update(json.dumps([head, layout], sort_keys=True).encode() + b"\n")
    digest.update(data.data)
    return digest.digest()


def _parsed(whole: np.ndarray) -> tuple[dict[str, str], dict[str, Any], np.ndarray]:
    """Metadata, layout and data of a safetensors file.

    Raises:
        BadValue: it is none, or its tensors do not cover its data each byte once.
    """
    try:
        length = int.from_bytes(whole[:_ALIGN].tobytes(), "little")
        if len(whole) < _ALIGN or length > min(MAX_HEAD, len(whole) - _ALIGN):
            raise ValueError("it is cut short")
        layout = json.loads(whole[_ALIGN : _ALIGN + length].tobytes())
        head = layout.pop("__metadata__")
        if not all(isinstance(text, str) for text in head.values()):
            raise ValueError("metadata that is no text")
        data = whole[_ALIGN + length :]
        at = 0
        for key, entry in sorted(layout.items(), key=lambda item: item[1]["data_offsets"]):
            first, end = entry["data_offsets"]
            shape = entry["shape"]
            if not all(type(n) is int and n >= 0 for n in (*shape, first, end)):
                raise ValueError(f"{key} is of no shape")
            if first != at or end - first != math.prod(shape) * _DTYPES[entry["dtype"]].itemsize:
                raise ValueError(f"{key} is not where it should be")
            at = end
        if at != len(data):
            raise ValueError("it is cut short")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadValue(DAMAGED, f"not a saved segment: {error}") from error
    return head, layout, data


def _tensors(layout: dict[str, Any], data: np.ndarray) -> dict[str, torch.Tensor]:
    found = {}
    for key, entry in layout.items():
        dtype, (first, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
        if first == end:
            found[key] = torch.empty(entry["shape"], dtype=dtype)
            continue
        part = torch.frombuffer(data, dtype=torch.uint8, count=end - first, offset=first)
        # Of a file of other hands a tensor may begin anywhere.
        part = part if part.data_ptr() % dtype.itemsize == 0 else part.clone()
        found[key] = part.view(dtype).reshape(entry["shape"])
    return found
