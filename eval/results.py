"""Every evaluation's JSON: the command, what made it, and flat rows."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
from typing import Any

import psutil


def versions() -> dict[str, str]:
    """Versions of what a figure depends on, and the commit if there is one."""
    found = {"python": platform.python_version()}
    for name in ("sglang-pic", "sglang", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
        check=False,
    )
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and memory (bytes) of this machine."""
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {
        "processor": name,
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
    }


def write_json(path: pathlib.Path, config: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write one evaluation's result."""
    result = {
        "command": sys.argv,
        "versions": versions(),
        "machine": machine(),
        "config": config,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
