"""Position-independent caching for stock SGLang."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "pic_segment"]


def __getattr__(name: str) -> Any:
    # The frontend language pulls in SGLang; server processes never need it.
    if name == "pic_segment":
        from sglang_pic.lang.segment import pic_segment

        return pic_segment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
