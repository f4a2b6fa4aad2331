"""The application of one of several tokenizer workers (``--tokenizer-worker-num``).

Each is a process of its own that imports an application by its name and loads no
plug-ins. ``sglang_hooks.install_http`` has it import this one: SGLang's, with ours in it.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.entrypoints import http_server
from sglang.srt.managers.multi_tokenizer_mixin import (
    get_main_process_id,
    read_from_shared_memory,
)
from sglang.srt.plugins import load_plugins

from sglang_pic.sglang_hooks import install_app


def _prepared() -> Any:
    load_plugins()
    _, server_args, _ = read_from_shared_memory(f"multi_tokenizer_args_{get_main_process_id()}")
    install_app(server_args)
    return http_server.app


app = _prepared()
