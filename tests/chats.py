"""SGLang's chat serving without a server: real templates, a tokenizer that is watched."""

from __future__ import annotations

import collections
import contextlib
import inspect
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.parser.jinja_template_utils import detect_jinja_template_content_format
from sglang.srt.parser.python_chat_template import PythonChatTemplate

from sglang_pic.link.policy import LinkOptions
from sglang_pic.server import chat
from sglang_pic.server.exchange import Exchange, carry
from sglang_pic.server.marks import mark_messages
from sglang_pic.server.resolve import Resolver


class Watched:
    """A tokenizer with another chat template, which notes every text it is given."""

    def __init__(self, tokenizer: Any, template: str | None = None):
        self._tokenizer = tokenizer
        self.chat_template = template
        self.special_tokens_map = tokenizer.special_tokens_map
        self.bos_token_id = tokenizer.bos_token_id
        self.is_fast = tokenizer.is_fast
        self.given: list[str] = []

    def __call__(self, text: str, **kwargs: Any) -> Any:
        self.given.append(text)
        return self._tokenizer(text, **kwargs)

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        self.given.append(text)
        return self._tokenizer.encode(text, **kwargs)

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return self._tokenizer.decode(ids, **kwargs)

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **kwargs: Any) -> Any:
        assert not tokenize
        kwargs.setdefault("chat_template", self.chat_template)
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


class Chat:
    """One server's chat endpoint, as far as it makes prompts.

    Args:
        tokenizer: a Hugging Face one.
        template: in Jinja.
        python: one of SGLang's own, instead.
        conversation: the name of one of SGLang's own, instead.
        spec: of SGLang's chat encodings in Python, instead.
        multimodal: as SGLang serves a model that takes images.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        *,
        python: PythonChatTemplate | None = None,
        conversation: str | None = None,
        spec: str | None = None,
        multimodal: bool = False,
    ):
        self.tokenizer = Watched(tokenizer, template)
        format = "string" if python is None else python.content_format
        reorders = python is not None and python.may_reorder_tool_results
        if template is not None:
            format = detect_jinja_template_content_format(template)
        model = types.SimpleNamespace(context_len=1 << 20)
        serving: Any = OpenAIServingChat.__new__(OpenAIServingChat)
        serving.tokenizer_manager = types.SimpleNamespace(
            tokenizer=self.tokenizer, model_config=model, served_model_name="x"
        )
        serving.template_manager = types.SimpleNamespace(
            jinja_template_content_format=format,
            jinja_template_may_reorder_tool_results=reorders,
            python_chat_template=python,
            chat_template_name=conversation,
            reasoning_config=None,
        )
        serving.chat_encoding_spec = spec
        serving._encoding_adapter = None
        serving.is_minimax_m3 = serving._prompt_text_round_trip_is_lossy = False
        serving._tokenizer_auto_adds_specials = len(tokenizer.encode("")) > 0
        serving._chat_template_cache = collections.OrderedDict()
        serving._reasoning_detector = serving.reasoning_parser = None
        serving.default_chat_template_kwargs = {}
        self.serving = serving
        self._multimodal = multimodal
        self.marks: Any = None
        self._resolver = Resolver(serving.tokenizer_manager, LinkOptions())

    def _apply(self, request: ChatCompletionRequest, wrap: Any) -> Any:
        tools = [tool.model_dump() for tool in request.tools] if request.tools else None
        if self.serving.template_manager.chat_template_name is None:
            made, arguments = OpenAIServingChat._apply_jinja_template, (tools, self._multimodal)
        else:
            made, arguments = OpenAIServingChat._apply_conversation_template, (self._multimodal,)
        return wrap(inspect.unwrap(made), self.serving, request, *arguments)

    def stock(self, body: dict[str, Any]) -> list[int]:
        """The prompt that SGLang makes; flags in the body are ignored by its models."""
        request = ChatCompletionRequest(model="x", **body)
        return self._apply(request, lambda original, *args: original(*args)).prompt_ids

    def marked(self, body: dict[str, Any], pic: dict[str, Any] | None = None) -> Exchange:
        """The same with segments, as ``marks`` has them. ``body`` loses its flags.

        Raises:
            PicRequestError: it cannot carry them.
        """
        self.marks = mark_messages(body["messages"], [], body.get("tools"))
        exchange = Exchange(pic or {}, self.marks)
        request = ChatCompletionRequest(model="x", **body)
        self.tokenizer.given.clear()
        with self._served(), carry(exchange):
            result = self._apply(request, chat.build)
        assert result.prompt_ids == exchange.ids
        return exchange

    @contextlib.contextmanager
    def _served(self) -> Iterator[None]:
        finding = types.SimpleNamespace(is_asked=lambda pic: False)
        funnel = types.SimpleNamespace(resolver=self._resolver, finding=finding)
        with mock.patch.object(chat, "funnel_of", lambda manager: funnel):
            yield
