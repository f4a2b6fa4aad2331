"""Typed errors. Each names the request field or the setting that caused it."""

from __future__ import annotations

from typing import Any


class PicRequestError(ValueError):
    """A request is malformed; SGLang answers it with HTTP 400.

    ``field`` is the path of the offending field in the request body, for
    example ``pic.segments[3].end``.
    """

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class PicActionError(PicRequestError):
    """The scheduler does not obey what came with a request.

    ``status`` is the HTTP status: 403 it is not of this server's front, 400 it is
    malformed.
    """

    def __init__(self, status: int, field: str, problem: str):
        super().__init__(field, problem)
        self.status = status


class PicConfigError(ValueError):
    """A server setting is invalid or does not fit the loaded model."""


class PicIntegrityError(RuntimeError):
    """An internal invariant of a plan or of the forest does not hold."""


class PicRefused(RuntimeError):
    """The cache refuses a command.

    ``status`` is the HTTP status that says why: 404 there is no such segment (for
    this tenant), 409 it is in use, 507 it cannot fit, 500 it failed. ``field`` as in
    ``PicRequestError``.
    """

    def __init__(self, status: int, message: str, field: str):
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status, "message": self.message, "field": self.field}
