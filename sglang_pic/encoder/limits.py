"""How much the encoder does at once."""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that it reads in one go, padded to the longest document: it runs on the scheduler's
# thread, between two steps.
ENCODE_TOKENS = 8192


def fits(lengths: Sequence[int], max_tokens: int) -> bool:
    """Whether documents of these lengths may be encoded in one go.

    Args:
        max_tokens: of the encoder.
    """
    if not lengths or min(lengths) < 1:
        return False
    return max(lengths) <= max_tokens and len(lengths) * max(lengths) <= ENCODE_TOKENS
