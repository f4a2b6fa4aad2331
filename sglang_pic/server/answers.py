"""What comes back from the scheduler, on its way to the client.

Reports are put in order and counted, links that were handed back are told from
answers, and complete answers are offered to calibration and audit.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any, Protocol

import anyio
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.link.policy import AUTO, LinkOptions
from sglang_pic.link.report import COMPOSED
from sglang_pic.metrics.front import counts
from sglang_pic.request.base import LinkRequest
from sglang_pic.request.hints import MISSING
from sglang_pic.server.audit import Audit
from sglang_pic.server.calibrate import Calibration
from sglang_pic.server.compare import Prompt
from sglang_pic.server.exchange import Exchange, noting
from sglang_pic.server.placing import rank_of
from sglang_pic.server.reports import last_reports
from sglang_pic.server.waited import NOTHING, Waited


async def unmarked(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Outputs of a request without a link. SGLang gives every request of a batch a
    place for what one of them reports."""
    async with contextlib.aclosing(outputs):
        async for out in outputs:
            for item in out if isinstance(out, list) else [out]:
                if isinstance(item, dict):
                    item.get("meta_info", {}).pop("pic", None)
            yield out


async def noted(
    outputs: AsyncGenerator[Any, None], exchange: Exchange | None, obj: GenerateReqInput
) -> AsyncGenerator[Any, None]:
    """Outputs of a request; its exchange learns what refuses it."""
    async with contextlib.aclosing(outputs):
        with noting(exchange), leaving(obj):
            async for out in outputs:
                yield out


@contextlib.contextmanager
def leaving(obj: GenerateReqInput) -> Iterator[None]:
    """Leave a request that is refused before SGLang made anything of it as its endpoint
    expects it, which wants to abort what it knows by that name: nothing."""
    try:
        yield
    except Exception:
        if not hasattr(obj, "is_single"):
            obj.is_single, obj.rid = True, None
        raise


def parse_missing(message: str) -> list[int] | None:
    """Indices of segments that are not compiled, if that is what the message says."""
    if not message.startswith(MISSING):
        return None
    return json.loads(message[len(MISSING) :])


def missing_of(out: Any) -> list[int] | None:
    """The same of an output, if it is a link that was handed back."""
    reason = out.get("meta_info", {}).get("finish_reason") if isinstance(out, dict) else None
    if not isinstance(reason, dict) or reason.get("type") != "abort":
        return None
    return parse_missing(reason.get("message") or "")


async def handed_back(
    outputs: AsyncGenerator[Any, None],
) -> tuple[AsyncGenerator[Any, None], Sequence[int]]:
    """All outputs of a strict link, which are to be read; and if it was handed back,
    what is not compiled."""
    try:
        first = await anext(outputs)
    except ValueError as error:
        missing = parse_missing(str(error))
        if missing is None:
            raise
        return outputs, missing
    missing = missing_of(first)
    if missing is not None:
        await outputs.aclose()
        return outputs, missing
    return _all_of(first, outputs), ()


async def _all_of(first: Any, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    async with contextlib.aclosing(outputs):
        yield first
        async for out in outputs:
            yield out


async def interleaved(
    streams: Sequence[AsyncGenerator[Any, None]], samples: int
) -> AsyncGenerator[Any, None]:
    """Outputs of a batch's prompts as they come, each with the index of its answer
    among all. Each prompt has ``samples`` answers."""
    tasks = {asyncio.create_task(stream.__anext__()): i for i, stream in enumerate(streams)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = tasks.pop(task)
                try:
                    out = task.result()
                except StopAsyncIteration:
                    continue
                out["index"] = i * samples + out.get("index", 0)
                yield out
                tasks[asyncio.create_task(streams[i].__anext__())] = i
    finally:
        for task in tasks:
            task.cancel()
        # Whose client left a stream is cancelled at each ``await`` anew.
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True)


def report_of(out: Any) -> dict[str, Any] | None:
    """The report that the scheduler has put into a prompt's output, if it has."""
    items = out if isinstance(out, list) else [out]
    values = next((item.get("meta_info", {}).get("pic") for item in items), None)
    return values[0] if values else None


class Found(Protocol):
    """What was found in a prompt."""

    @property
    def how(self) -> Sequence[str]:
        """How each of its segments was."""
        ...

    def see(self, report: Mapping[str, Any]) -> None:
        """The report of an answer to it."""
        ...


def tidy(
    out: Any,
    exchange: Exchange | None,
    counted: set[int],
    waited: Sequence[Waited] = (NOTHING,),
    samples: int = 1,
    found: Sequence[Found] = (),
) -> Any:
    """Turn what SGLang holds of a report into the report, and add what its prompt
    waited for. Every chunk of a stream may repeat it: it is handed on, and counted,
    once. ``counted`` holds the answers whose report was; each prompt has ``samples``
    of them. ``found``: of each prompt what is told of it, where segments were found."""
    items = out if isinstance(out, list) else [out]
    for i, item in enumerate(items):
        meta = item.get("meta_info", {})
        values = meta.pop("pic", None)
        index = i if isinstance(out, list) else item.get("index", i)
        if not values or index in counted:
            continue
        counted.add(index)
        prompt = index // samples
        meta["pic"] = {**values[0], **waited[prompt].to_json()}
        if found:
            meta["pic"] = as_found(meta["pic"], found[prompt].how)
            found[prompt].see(meta["pic"])
        counts.observe(meta["pic"])
        if exchange is not None:
            exchange.reports[index] = meta["pic"]
            last_reports.keep(exchange.salt_of(prompt), meta["id"], meta["pic"])
    return out


def as_found(report: dict[str, Any], found: Sequence[str]) -> dict[str, Any]:
    """A report whose segments say how they were found."""
    segments = [{**one, "found": how} for one, how in zip(report["segments"], found, strict=True)]
    return {**report, "segments": segments}


def samples_of(obj: GenerateReqInput) -> int:
    """How many answers each prompt of a request gets, as SGLang counts them: a list of
    prompts may have one set of parameters each, and of beams it makes one answer."""
    params = obj.sampling_params
    if isinstance(params, list):
        params = params[0] if params else None
    if not isinstance(params, dict):
        return getattr(params, "n", 1)
    is_beam = (params.get("beam_width") or 1) > 1
    return 1 if is_beam else params.get("n", 1)


def is_complete(out: Any) -> bool:
    """Whether an output ends an answer, well."""
    items = out if isinstance(out, list) else [out]
    reasons = [item.get("meta_info", {}).get("finish_reason") for item in items]
    return any(reason and reason["type"] != "abort" for reason in reasons)


def most_tokens_of(obj: GenerateReqInput) -> int | None:
    """How many tokens a prompt's answer may have; ``None`` if the request does not say."""
    params = obj.sampling_params
    if isinstance(params, list):
        params = params[0] if params else None
    return params.get("max_new_tokens") if isinstance(params, dict) else None


class Answered:
    """Offers an answer to calibration and audit, when it is complete and was linked.

    Before it is handed on: nobody asks a generator for more than it needs. Only
    requests with one prompt and one sample; and the audit judges the server's own
    options, not those that a client has chosen.

    Args:
        calibration: of a hybrid's state policy, or ``None``.
        usual: the server's own options.
        obj: the request.
        asked, prompts: its prompts and links, as they came and as they were sent.
    """

    def __init__(
        self,
        calibration: Calibration | None,
        audit: Audit,
        usual: LinkOptions,
        obj: GenerateReqInput,
        asked: Sequence[tuple[list[int], LinkRequest]],
        prompts: Sequence[tuple[list[int], LinkRequest]],
    ):
        self._calibration = calibration
        self._audit = audit
        self._usual = usual
        self._obj = obj
        self._prompts = prompts
        self._is_single = len(prompts) == 1 and samples_of(obj) == 1
        self._asked = [link.options for _, link in asked]
        self._report: dict[str, Any] = {}

    def see(self, out: Any) -> None:
        """One output of the request, its report in place."""
        if not self._is_single or not isinstance(out, dict):
            return
        meta = out["meta_info"]
        self._report = meta.get("pic", self._report)
        reason = meta.get("finish_reason")
        if not reason or reason["type"] == "abort" or self._report.get("exactness") != COMPOSED:
            return
        obj, (options,) = self._obj, self._asked
        owner = (obj.cache_salt, obj.extra_key, obj.lora_path)
        prompt = Prompt(*self._prompts[0], *owner, rank_of(obj))
        if self._calibration is not None and options.state == AUTO:
            self._calibration.consider(prompt)
        # Turns are left out of an audit.
        if dataclasses.replace(options, turns=self._usual.turns) == self._usual:
            ids = out.get("output_ids", [])
            # The last piece of a stream in pieces is not all of it.
            complete = len(ids) == meta.get("completion_tokens")
            self._audit.consider(prompt, ids if complete else [])
