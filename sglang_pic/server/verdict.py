"""What a self-check at start-up found, and that it is found once."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from sglang_pic.checks import Check
from sglang_pic.errors import PicRefused

logger = logging.getLogger(__name__)

PENDING, PASSED, FAILED, UNTESTED = "pending", "passed", "failed", "untested"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found: ``result`` is one of the constants above."""

    result: str = PENDING
    why: str | None = None
    checks: dict[str, Check] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """``{"result", "why", "checks": {name: {"found", "bound"}}}``."""
        checks = {name: check.to_json() for name, check in self.checks.items()}
        return {"result": self.result, "why": self.why, "checks": checks}


class UntestedError(Exception):
    """This server cannot hold what a check needs."""


class Once:
    """Has something checked by who comes first; others wait for it.

    Args:
        name: of the check, in the log.
        check: what is found; raises ``UntestedError`` or ``PicRefused`` where it can't be.
        limit_s: after so many seconds it is given up.
        failed: told why, where a check is above its bound or cannot be computed.
    """

    def __init__(
        self,
        name: str,
        check: Callable[[], Awaitable[dict[str, Check]]],
        limit_s: float,
        failed: Callable[[str], None],
    ):
        self._name = name
        self._check = check
        self._limit_s = limit_s
        self._failed = failed
        self._task: asyncio.Task[None] | None = None
        self._checking: asyncio.Future[dict[str, Check]] | None = None
        self.verdict = Verdict()

    async def settle(self) -> None:
        """Wait for the verdict."""
        if self.verdict.result == PENDING:
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._run())
            await asyncio.shield(self._task)

    async def _run(self) -> None:
        checking = self._checking = asyncio.ensure_future(self._check())
        try:
            await asyncio.wait({checking}, timeout=self._limit_s)
            if not checking.done():
                # It tidies up by itself, if it ever can.
                checking.cancel()
                raise UntestedError(f"took longer than {self._limit_s:g} s")
            verdict = _judged(checking.result())
        except (UntestedError, PicRefused) as error:
            verdict = Verdict(UNTESTED, str(error))
            logger.warning("sglang_pic: %s tested nothing: %s", self._name, error)
        except Exception as error:
            logger.exception("sglang_pic: %s failed", self._name)
            verdict = Verdict(FAILED, f"it could not be computed: {error!r}")
        if verdict.result == FAILED:
            self._failed(str(verdict.why))
        elif verdict.result == PASSED:
            found = verdict.to_json()["checks"]
            logger.info("sglang_pic: %s passed: %s", self._name, found)
        self.verdict = verdict


def _judged(checks: dict[str, Check]) -> Verdict:
    failed = [name for name, check in checks.items() if not check.passed]
    why = ", ".join(
        f"{name} is {checks[name].found:.3g}, at most {checks[name].bound:.3g} is sound"
        for name in failed
    )
    return Verdict(FAILED, why, checks) if failed else Verdict(PASSED, None, checks)
