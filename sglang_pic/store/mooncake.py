"""Mooncake Store as a store: memory of many machines, by RDMA or TCP.

SGLang's ``HiCacheStorage`` is not gone through: its Mooncake form takes pointers into
pages of SGLang's own host pool, which it registers (``set`` and ``get`` assert them), its
file form must be told a value's size to read it, ``batch_exists`` counts hits only up to
the first miss, and nothing of it removes a value or tells its size. A segment is one blob
of its own length, so Mooncake's client is used directly.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sglang_pic.errors import PicConfigError
from sglang_pic.store.base import ABSENT, REFUSED, UNLISTED, Problem, buffer, too_large

# Of keys, so that others may share the pool.
PREFIX = "sglang_pic/"
PROTOCOLS = ("tcp", "rdma")
# MiB: that this server lends to the pool, and that its own transfers go through.
LENT_MIB, BUFFER_MIB = 0, 512
PACKAGES = "libibverbs1 libnuma1 librdmacm1 liburing2"
FIELDS = ("metadata", "protocol", "host", "device", "lent_mib", "buffer_mib")
_NO_SUCH_KEY = -704


def load() -> Any:
    """Mooncake's client class.

    Raises:
        PicConfigError: it is not installed, or lacks a library of the system's.
    """
    try:
        from mooncake.store import MooncakeDistributedStore
    except ModuleNotFoundError as error:
        raise PicConfigError(
            f"a mooncake:// store needs pip install 'sglang-pic[store]': {error}"
        ) from error
    except ImportError as error:
        raise PicConfigError(
            f"Mooncake's client does not load, it needs the Debian packages {PACKAGES}: {error}"
        ) from error
    return MooncakeDistributedStore


def check(master: str, fields: Mapping[str, str]) -> None:
    """Raise ``PicConfigError`` unless such a store can be named so."""
    if not master.rpartition(":")[2].isdigit():
        raise PicConfigError(f"a mooncake:// store names its master's port, got {master!r}")
    unknown = sorted({*fields} - {*FIELDS})
    if unknown:
        raise PicConfigError(f"a mooncake:// store knows no {unknown[0]!r}, only {FIELDS}")
    if not fields.get("metadata"):
        raise PicConfigError("a mooncake:// store needs metadata=, the metadata server's address")
    if fields.get("protocol", PROTOCOLS[0]) not in PROTOCOLS:
        raise PicConfigError(f"a mooncake:// store's protocol is one of {PROTOCOLS}")
    for name in ("lent_mib", "buffer_mib"):
        if not fields.get(name, "0").isdigit():
            raise PicConfigError(f"a mooncake:// store's {name} is a number of MiB")


def connect(master: str, fields: Mapping[str, str]) -> Mooncake:
    """Join the pool.

    Args:
        master: host and port of Mooncake's master.
        fields: of the address (``FIELDS``), as ``check`` has seen them.

    Raises:
        PicConfigError: it cannot be joined.
    """
    client = load()()
    host = fields.get("host") or socket.gethostname()
    lent = int(fields.get("lent_mib", LENT_MIB)) << 20
    through = int(fields.get("buffer_mib", BUFFER_MIB)) << 20
    code = client.setup(
        host,
        fields["metadata"],
        lent,
        through,
        fields.get("protocol", PROTOCOLS[0]),
        fields.get("device", ""),
        master,
    )
    if code != 0:
        raise PicConfigError(f"Mooncake's master at {master} cannot be joined: code {code}")
    return Mooncake(client, through)


class Mooncake:
    """Values in a Mooncake pool, which evicts by itself and lists nothing.

    Args:
        client: ``MooncakeDistributedStore``, set up.
        through: bytes of its buffer; no larger value passes.
    """

    def __init__(self, client: Any, through: int):
        self._client = client
        self._through = through

    def put(self, name: str, value: np.ndarray) -> Problem | None:
        if len(value) > self._through:
            return too_large(len(value), self._through)
        # A name stands for one content: what is there stays.
        code = self._client.put(PREFIX + name, value.data)
        return None if code == 0 else Problem(REFUSED, f"put: code {code}")

    def get(self, name: str, most: int) -> np.ndarray | Problem:
        size = self.size(name)
        if isinstance(size, Problem):
            return size
        if size > min(most, self._through):
            return too_large(size, min(most, self._through))
        held = self._client.get_buffer(PREFIX + name)
        if held is None:
            return Problem(ABSENT)
        found = np.frombuffer(held, dtype=np.uint8)
        value = buffer(len(found))
        value[:] = found
        return value

    def exist(self, names: Sequence[str]) -> list[bool] | Problem:
        codes = self._client.batch_is_exist([PREFIX + name for name in names])
        if len(codes) != len(names) or any(code < 0 for code in codes):
            return Problem(REFUSED, f"batch_is_exist: codes {sorted(set(codes))[:8]}")
        return [code == 1 for code in codes]

    def size(self, name: str) -> int | Problem:
        size = int(self._client.get_size(PREFIX + name))
        if size == _NO_SUCH_KEY:
            return Problem(ABSENT)
        return size if size >= 0 else Problem(REFUSED, f"get_size: code {size}")

    def remove(self, name: str) -> Problem | None:
        code = self._client.remove(PREFIX + name, True)
        return None if code in (0, _NO_SUCH_KEY) else Problem(REFUSED, f"remove: code {code}")

    def names(self, group: str) -> Problem:
        return Problem(UNLISTED, "Mooncake lists no names")
