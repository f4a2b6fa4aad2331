"""Typed errors. Each names the request field or the setting that caused it."""


class PicRequestError(ValueError):
    """A request is malformed; SGLang answers it with HTTP 400.

    ``field`` is the path of the offending field in the request body, for
    example ``pic.segments[3].end``.
    """

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class PicConfigError(ValueError):
    """A server setting is invalid or does not fit the loaded model."""


class PicIntegrityError(RuntimeError):
    """An internal invariant of a plan or of the forest does not hold."""
