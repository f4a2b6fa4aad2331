"""A stand-in for Mooncake's client, with the answers that the real one gives."""

from __future__ import annotations

from typing import Any


class Client:
    """One pool of values. ``gone``: its master is."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.gone = False

    def setup(self, *args: Any) -> int:
        self.args = args
        return 0

    def put(self, key: str, value: Any) -> int:
        if self.gone:
            return -900
        self.values.setdefault(key, bytes(value))
        return 0

    def get_size(self, key: str) -> int:
        if self.gone:
            return -900
        return len(self.values[key]) if key in self.values else -704

    def get_buffer(self, key: str) -> memoryview | None:
        return memoryview(self.values[key]) if key in self.values else None

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        return [-900 if self.gone else int(key in self.values) for key in keys]

    def remove(self, key: str, force: bool = False) -> int:
        if self.gone:
            return -900
        assert force  # else a value that was read lately is refused
        return 0 if self.values.pop(key, None) is not None else -704
