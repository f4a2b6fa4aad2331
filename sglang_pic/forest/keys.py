"""Names of segments and of the namespaces they live in.

A compiled segment depends on its tokens, the compile context, the adapter and
the tenant alone. Namespace = (compile context, tenant salt); SGLang's tree adds
the adapter (``extra_key``) and compares tokens one by one, so a hash is only
ever a name, never the proof of identity.
"""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Collection, Sequence
from typing import Any

from sglang_pic.errors import PicRequestError

# Characters of a client's salt or key: they are hashed and compared at every match.
MAX_SALT = 1024

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


def check_salt(value: Any, field: str) -> None:
    """Raise ``PicRequestError`` unless a client may name this salt, or this key.

    No control characters: ours are told from theirs by one.
    """
    if value is None:
        return
    if not isinstance(value, str):
        raise PicRequestError(field, f"must be a text, got {value!r:.80}")
    if len(value) > MAX_SALT:
        raise PicRequestError(field, f"{len(value)} characters are too many, at most {MAX_SALT}")
    if is_reserved(value):
        raise PicRequestError(field, "this prefix is reserved for compiled segments")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in value):
        raise PicRequestError(field, "must not hold control characters")


def owner_of(space: str, extra_key: str | None) -> tuple[str, str]:
    """Whose a segment's linear states are: kept beside them and compared, since what
    finds them is a hash."""
    return space, extra_key or ""


def _named(*parts: bytes) -> str:
    """32 hex digits over the parts, each behind its length, so that no two lists of them
    are written alike."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def segment_id(space: str, extra_key: str | None, tokens: Sequence[int]) -> str:
    """Stable name of a segment, of its namespace, adapter and tokens: 32 hex digits."""
    return _named(space.encode(), (extra_key or "").encode(), array("q", tokens).tobytes())


def document_id(tenant: str | None, tokens: Sequence[int]) -> str:
    """Stable name of a document that an encoder reads, of its tenant's salt and tokens: 32
    hex digits. The encoder is a server's one, and compared beside it."""
    return _named(b"document", (tenant or "").encode(), array("q", tokens).tobytes())


def order_key(tokens: Sequence[int]) -> bytes:
    """What the segments of a company are put in order by: their tokens alone, so that
    the front and every scheduler find the same one."""
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16).digest()


def company_id(
    space: str,
    extra_key: str,
    opening: Sequence[int],
    members: Collection[str],
    guests: Collection[str] = (),
) -> str:
    """Name of a company, of its tenant's namespace, its adapter, the tokens it stands
    behind, and the sets of its members' and guests' names: 32 hex digits."""
    return _named(
        space.encode(),
        extra_key.encode(),
        array("q", opening).tobytes(),
        *(name.encode() for name in sorted(members)),
        b"",
        *(name.encode() for name in sorted(guests)),
    )


def company_space(space: str, company: str, segment: str, *, whole: bool) -> str:
    """Namespace of the pages of one segment of a company: of one order of that, or of the
    mean of both. A segment's own: one may begin with the tokens of another."""
    return f"{space}\x1f{'company' if whole else 'half'}\x1f{company}\x1f{segment}"
