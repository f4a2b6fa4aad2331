"""``--pic-store``: which store, by its address.

``DIR`` or ``file:///DIR?mib=N``; ``mooncake://MASTER:PORT?metadata=...&protocol=tcp``.
"""

from __future__ import annotations

import pathlib
import tempfile
from urllib.parse import parse_qsl, urlsplit

from sglang_pic.errors import PicConfigError
from sglang_pic.store import mooncake
from sglang_pic.store.base import Guarded, SegmentStore
from sglang_pic.store.directory import Directory

FILE, MOONCAKE = "file", "mooncake"


def _read(address: str) -> tuple[str, str, dict[str, str]]:
    """Form, place and fields of an address."""
    if "://" not in address:
        return FILE, address, {}
    parts = urlsplit(address)
    if parts.scheme not in (FILE, MOONCAKE):
        raise PicConfigError(f"there is no store {parts.scheme}://, only file and mooncake")
    try:
        fields = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise PicConfigError(f"the fields of a store are name=value: {error}") from error
    if parts.scheme == FILE:
        if parts.netloc or not parts.path:
            raise PicConfigError("a file:// store has three slashes and a path: file:///PATH")
        return FILE, parts.path, dict(fields)
    if parts.path.strip("/"):
        raise PicConfigError("a mooncake:// store has no path")
    return MOONCAKE, parts.netloc, dict(fields)


def _budget(fields: dict[str, str]) -> int | None:
    unknown = sorted({*fields} - {"mib"})
    if unknown:
        raise PicConfigError(f"a file:// store knows no {unknown[0]!r}, only mib")
    mib = fields.get("mib")
    if mib is None:
        return None
    if not mib.isdigit() or int(mib) < 1:
        raise PicConfigError(f"a file:// store's mib is a number of MiB, got {mib!r}")
    return int(mib) << 20


def check_address(address: str) -> None:
    """Refuse now what would be refused when SGLang has loaded the model.

    Raises:
        PicConfigError: there is no such store, or it cannot be used here.
    """
    form, place, fields = _read(address)
    if form == MOONCAKE:
        mooncake.check(place, fields)
        mooncake.load()
        return
    _budget(fields)
    try:
        pathlib.Path(place).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise PicConfigError(str(error)) from error


def open_store(address: str) -> SegmentStore:
    """The store of an address; nothing it does raises.

    Raises:
        PicConfigError: there is no such store, or it cannot be joined.
    """
    form, place, fields = _read(address)
    if form == MOONCAKE:
        return Guarded(mooncake.connect(place, fields))
    return Guarded(Directory(pathlib.Path(place), _budget(fields)))


def read_key(file: str | None) -> bytes | None:
    """The operator's key for signatures: what the file holds, without white space around.

    Raises:
        PicConfigError: it cannot be read, or is shorter than 16 bytes.
    """
    if file is None:
        return None
    try:
        key = pathlib.Path(file).read_bytes().strip()
    except OSError as error:
        raise PicConfigError(str(error)) from error
    if len(key) < 16:
        raise PicConfigError(f"a key of {len(key)} bytes is too short, at least 16")
    return key
