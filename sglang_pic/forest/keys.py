"""Names of segments and of the namespaces they live in.

A compiled segment depends on its tokens, the compile context, the adapter and
the tenant alone. Namespace = (compile context, tenant salt); SGLang's tree adds
the adapter (``extra_key``) and compares tokens one by one, so a hash is only
ever a name, never the proof of identity.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

_PREFIX = "pic\x1f"


def context_digest(context: Sequence[int]) -> str:
    """Short name of a compile context; the empty one has its own."""
    return hashlib.blake2b(array("q", context).tobytes(), digest_size=8).hexdigest()


def namespace(context: Sequence[int], salt: str | None) -> str:
    """Cache salt under which SGLang's tree keeps this tenant's segments."""
    return f"{_PREFIX}{context_digest(context)}\x1f{salt or ''}"


def is_reserved(salt: str | None) -> bool:
    """Whether a client's salt would reach into the segments' namespaces."""
    return salt is not None and salt.startswith(_PREFIX)


def segment_id(space: str, extra_key: str | None, tokens: Sequence[int]) -> str:
    """Stable name of a segment: 32 hex digits over namespace, adapter and tokens."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(space.encode())
    digest.update(b"\x1f" + (extra_key or "").encode() + b"\x1f")
    digest.update(array("q", tokens).tobytes())
    return digest.hexdigest()
