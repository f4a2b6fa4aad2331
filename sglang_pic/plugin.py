"""Entry point that SGLang calls in each of its processes."""


def register() -> None:
    """Register with SGLang; safe to call again."""
    from sglang_pic.sglang_hooks import install

    install()
