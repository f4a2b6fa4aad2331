"""Compiled segments as files: one safetensors file a segment.

A file is complete or not there: it is written under another name, flushed to the
disk and renamed. Its metadata carries the *fingerprint* of everything its content
depends on, and a checksum over metadata and tensors. A file that does not match
in both is refused; nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from array import array
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = 2
SUFFIX = ".segment"
_PART = ".part"


class BadFile(ValueError):
    """A file cannot be loaded; the message says why."""


@dataclasses.dataclass(frozen=True)
class SavedSegment:
    """What a file holds of a segment.

    Attributes:
        path: token ids, compile context first.
        extra_key: SGLang's adapter key.
        salt: the namespace it lives in.
        hits: links that had used it.
        tensors: ``k.<layer>``, ``v.<layer>`` [held, heads, head dim], and what the
            linear layers keep (``StateStore.tensors``).
        core_end: where its cores end; ``None`` without linear states.
    """

    path: array
    extra_key: str | None
    salt: str
    hits: int
    tensors: dict[str, torch.Tensor]
    core_end: int | None = None


def fingerprint(**parts: Any) -> dict[str, str]:
    """Everything that the content of a file depends on, each part as text."""
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


def write(
    directory: pathlib.Path, name: str, saved: SavedSegment, marks: dict[str, str]
) -> pathlib.Path:
    """Write one segment, replacing what is there.

    Args:
        name: the segment's id.
        marks: the fingerprint.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        **{key: value.detach().cpu().contiguous() for key, value in saved.tensors.items()},
        "path": torch.tensor(list(saved.path), dtype=torch.int64),
    }
    head = {
        "format": str(FORMAT),
        "fingerprint": json.dumps(marks),
        "segment": json.dumps([saved.extra_key, saved.salt, saved.hits, saved.core_end]),
    }
    file, part = directory / (name + SUFFIX), directory / f"{name}.{os.getpid()}{_PART}"
    try:
        save_file(tensors, part, metadata={**head, "checksum": _checksum(head, tensors)})
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
    _flush(directory)
    return file


def read(file: pathlib.Path, marks: dict[str, str]) -> SavedSegment:
    """Read one segment.

    Raises:
        BadFile: it is no such file, damaged, or of another model, setting or version.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            head = dict(opened.metadata() or {})
            checksum = head.pop("checksum", "")
            if head.get("format") != str(FORMAT):
                raise BadFile(f"format {head.get('format')}, expected {FORMAT}")
            theirs = json.loads(head["fingerprint"])
            other = sorted(key for key in {*marks, *theirs} if marks.get(key) != theirs.get(key))
            if other:
                key = other[0]
                raise BadFile(f"made for {key} {theirs.get(key)}, here it is {marks.get(key)}")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if checksum != _checksum(head, tensors):
            raise BadFile("the checksum does not match")
        extra_key, salt, hits, core_end = json.loads(head["segment"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"not a saved segment: {error}") from error
    path = array("q", tensors.pop("path").tolist())
    return SavedSegment(path, extra_key, salt, hits, tensors, core_end)


def listed(directory: pathlib.Path) -> list[pathlib.Path]:
    """Complete files, by name."""
    return sorted(directory.glob("*" + SUFFIX))


def _checksum(head: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps(head, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _flush(directory: pathlib.Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
