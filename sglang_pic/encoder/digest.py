"""What names an encoder, whatever it is called."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sglang_pic.encoder import config, weights


def digest_of(directory: Path) -> str:
    """Of its files: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (config.FILE, weights.FILE):
        with (directory / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
