"""What a server's log says of its start, and what of it was to be expected."""

from __future__ import annotations

import pathlib
import re

# Line by line, all that SGLang says at log level ``warning`` on this plain CPU.
EXPECTED = {
    r".*/site-packages/.*: UserWarning: .*": "of imports, about kernels for GPUs",
    r"  warnings\.warn\(.*": "the second line of each",
    r".*shards: .* Completed .*": "progress",
    r".*Cuda graph is disabled because of using torch native attention backend": "no GPU",
    r".*Cannot detect CUDA architecture\.": "no GPU",
    r".*init_cpu_threads_env and shared memory based AllReduce is disabled.*": "no AMX",
    r".*Fail to set RLIMIT_NOFILE: .*": "a container's limit",
    r".*No HuggingFace chat template found": "the tiny models have no tokenizer",
    r".*Failed to get yes/no token IDs dynamically: .*": "the tiny models have no tokenizer",
    r".*using attn output gate!": "Qwen3-Next's layers say what they are",
    r".*`torch_dtype` is deprecated! Use `dtype` instead!": "SGLang's own call",
    r".*Using fallback token IDs for yes/no .*": "the same",
}
_texts: dict[pathlib.Path, str] = {}


def keep(log: pathlib.Path) -> None:
    """A server has just come up: what it has said by now is of its start."""
    _texts[log] = log.read_text(errors="replace")


def unexpected(log: pathlib.Path) -> list[str]:
    """Lines that somebody who reads the log of a healthy start would have to worry about."""
    known = re.compile("|".join(EXPECTED))
    lines = re.split(r"[\r\n]+", _texts[log])
    return [line for line in lines if line and not known.fullmatch(line)]
