"""A frontend backend that tells the server which parts of a prompt are segments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams
from sglang.utils import http_request

from sglang_pic.lang.segment import segment_ranges
from sglang_pic.link.policy import ENCODE

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Unmarked:
    """A state's text without its marks, in which nothing is to be found, as far as
    ``RuntimeEndpoint`` reads a state."""

    text_: str
    images_: list[Any] = dataclasses.field(default_factory=list)
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)


class PicRuntimeEndpoint(RuntimeEndpoint):
    """``RuntimeEndpoint`` whose requests name the segments of their text.

    On a server without position-independent caching the same programs give
    what they would give with ``RuntimeEndpoint``: such a server ignores the
    field that names the segments. A fork has the segments so far compiled
    before its branches start.

    Args:
        base_url: of the server, for example ``http://127.0.0.1:30000``.
        seam: seam width in tokens; the server's own setting if ``None``.
        policy: recompute policy, ``none``, ``seam``, ``graded`` or ``full``; the
            server's own if ``None``.
        company: whose company a segment may have been computed in, ``off``, ``subset`` or
            ``tenant``; the server's own if ``None``.
        mode: ``encode``, to have the server's encoder read the segments, instead of linking
            them; the server's own mode of links if ``None``.
        find: find segments in texts that have none, ``off``, ``structure`` or ``content``; the
            server's own if ``None``.
        require_exact: recompute everything that a link would only approximate.
        cache_salt: cached tokens are shared only with requests of equal salt.
        api_key, verify, chat_template_name: as in ``RuntimeEndpoint``.

    Attributes:
        last_report: the exactness report of the answer that came last, from
            whatever program; ``None`` before the first. ``report_of`` gives
            the one of a particular answer.

    Raises:
        RuntimeError: from any call, with the server's answer, if that is not
            a success.
        ValueError: from any call, if a text holds both segments and images.
    """

    last_report: Report | None = None

    def __init__(
        self,
        base_url: str,
        seam: int | None = None,
        policy: str | None = None,
        require_exact: bool = False,
        cache_salt: str | None = None,
        *,
        company: str | None = None,
        find: str | None = None,
        mode: str | None = None,
        api_key: str | None = None,
        verify: str | None = None,
        chat_template_name: str | None = None,
    ):
        super().__init__(base_url, api_key, verify, chat_template_name)
        # The route that would append branches on the server is gone from SGLang.
        self.support_concate_and_append = False
        self._cache_salt = cache_salt
        self._options: dict[str, Any] = {}
        if seam is not None:
            self._options["seam"] = seam
        if policy is not None:
            self._options["policy"] = policy
        if company is not None:
            self._options["company"] = company
        if mode is not None:
            self._options["mode"] = mode
        if require_exact:
            self._options["require_exact"] = True
        self._finding = {} if find is None else {"find": find}

    def pic_info(self) -> dict[str, Any] | None:
        """The server's version and settings; ``None`` if it links no segments."""
        res = http_request(self.base_url + "/pic/info", api_key=self.api_key, verify=self.verify)
        if res.status_code == 404:
            return None
        self._assert_success(res)
        return res.json()

    def compile_company(self, state: ProgramState) -> list[dict[str, Any]]:
        """Have the segments of a state's text compiled in each other's company, for
        programs that name them all, in any order, behind the same opening.

        Returns:
            What ``POST /pic/compile`` says of each company.

        Raises:
            ValueError: the text has no segments.
        """
        ranges = segment_ranges(state)
        if not ranges:
            raise ValueError("a state without segments has no company")
        text = state.stream_executor.text_
        body = {
            "text": [text[start:end] for start, end in ranges if start < end],
            "opening": text[: ranges[0][0]],
            "company": True,
            "cache_salt": self._cache_salt,
        }
        res = http_request(
            self.base_url + "/pic/compile", json=body, api_key=self.api_key, verify=self.verify
        )
        self._assert_success(res)
        return res.json()["companies"]

    def generate(self, s: StreamExecutor, sampling_params: SglSamplingParams) -> tuple[str, Any]:
        """Generate behind ``s``, linking its segments.

        A program that asks for log-probabilities of a segment's tokens is computed
        in full by the server, and its report says so.
        """
        text, meta_info = super().generate(s, sampling_params)
        self.last_report = meta_info.get("pic", self.last_report)
        return text, meta_info

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, Any]]:
        """As ``generate``, piece by piece; from the first that brings the
        report on, every piece's ``meta_info`` holds it."""
        report = None
        for text, meta_info in super().generate_stream(s, sampling_params):
            report = meta_info.get("pic", report)
            if report is not None:
                meta_info["pic"] = self.last_report = report
            yield text, meta_info

    def _generate_http_request(self, s: StreamExecutor, data: dict[str, Any]) -> Any:
        """What ``select`` asks by: of several choices the last one's report is kept."""
        answers = super()._generate_http_request(s, data)
        for answer in answers if isinstance(answers, list) else [answers]:
            self.last_report = answer["meta_info"].get("pic", self.last_report)
        return answers

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        """As ``RuntimeEndpoint``; of a text that is documents alone nothing is to be
        computed before a row follows them."""
        documents = sum(end - start for start, end in segment_ranges(s))
        if self._options.get("mode") != ENCODE or documents < len(s.text_):
            super().commit_lazy_operations(s)

    def cache_prefix(self, prefix_str: str) -> None:
        """Have a plain text computed and cached for this endpoint's tenant."""
        super().commit_lazy_operations(_Unmarked(prefix_str))

    def _add_images(self, s: StreamExecutor, data: dict[str, Any]) -> None:
        """The one place where ``RuntimeEndpoint`` lets every body it posts pass."""
        super()._add_images(s, data)
        if self._cache_salt is not None:
            data["cache_salt"] = self._cache_salt
        # ``select`` scores choices without their context, too: ids without a text.
        pic = self._pic(s) if "text" in data else None
        if pic is not None:
            texts = data["text"]
            data["pic"] = [pic] * len(texts) if isinstance(texts, list) else pic

    def _pic(self, s: StreamExecutor) -> dict[str, Any] | None:
        ranges = segment_ranges(s)
        if ranges and s.images_:
            raise ValueError("a prompt with images cannot be linked: use no segments in it")
        if ranges:
            segments = [{"start": start, "end": end} for start, end in ranges]
            return {"segments": segments, **self._options}
        if self._finding and not s.images_ and not isinstance(s, _Unmarked):
            return {**self._options, **self._finding}
        return None


def report_of(state: ProgramState, name: str) -> Report | None:
    """The exactness report of the answer kept under ``name``; waits for it.

    ``None`` if the answer's text had no segments, if it came from ``select`` (whose
    scoring ``last_report`` tells of), or if the server links none.
    """
    return (state.get_meta_info(name) or {}).get("pic")
