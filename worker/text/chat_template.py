"""The model's chat template: messages to the text that the model continues. Templates come from the model, never from clients.

Where it knows nothing of tools they are put in words before it sees the messages (`tool_prompt.in_words`).

Rendered in Jinja's immutable sandbox with what transformers gives templates: `raise_exception`, `strftime_now`, the
`tojson` filter, loop controls, and the `generation` tag (which marks nothing here).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..protocol import BadRequest
from .tool_format import HERMES, ToolFormat, format_of
from .tool_prompt import in_words, uses_tools, with_short_ids

MAX_RENDERED_CHARS = 64 * 2**20
NOTHING: Mapping[str, Any] = MappingProxyType({})
_PROBE = "quire-probe"
# What a template's own code can raise on messages that it does not expect.
_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """One template, compiled once.

    Attributes:
        exists: whether the model brought one.
        knows_tools: it shows tools that it is given.
        tool_format: how the model writes calls, as far as the template says; None where that is no format that can be read.
    """

    def __init__(self, source: str | None, special_tokens: dict[str, str]) -> None:
        """Args: the template's text (None: the model has none) and what it sees as `bos_token`, `eos_token`, ..."""
        self._special_tokens = dict(special_tokens)
        self._template: jinja2.Template | None = None
        self._missing = "this model has no chat template; use completions with a plain prompt"
        self.knows_tools = False
        if source is not None:
            try:
                self._template = _environment().from_string(source)
                self.knows_tools = any(name.name == "tools" for name in _environment().parse(source).find_all(nodes.Name))
            except jinja2.TemplateError as error:
                self._missing = f"this model's chat template cannot be compiled: {error}"
        self.tool_format: ToolFormat | None = format_of(source) if source is not None and self.knows_tools else HERMES
        self._takes_parts = self._template is not None and self._shows_parts(self._template)
        self._has_system = self._template is not None and self._shows_system(self._template)

    @property
    def exists(self) -> bool:
        """Whether `render` can work at all."""
        return self._template is not None

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        values: Mapping[str, Any] = NOTHING,
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        """The text of a conversation.

        Args:
            messages: dicts with `role` and `content`; a content is a string, None, or a list of `{"type": "text", "text": ...}`. Calls and
                their answers are as transformers has them: OpenAI's, but with arguments that are objects.
            add_generation_prompt: end with the opening of the assistant's turn.
            values: what else the template is to see, by name, for example `enable_thinking`; of what it sees anyway, they change nothing.
            tools: what the model may call, in OpenAI's form.

        Raises:
            BadRequest: no template, content that is not text, messages that the template rejects, or far too much text.
        """
        if self._template is None:
            raise BadRequest("messages", self._missing)
        told = uses_tools(messages, tools) and not self.knows_tools
        takes_parts = self._takes_parts and not told
        plain = [{**message, "content": _content(i, message.get("content"), takes_parts)} for i, message in enumerate(messages)]
        try:
            if self.tool_format is not None and self.tool_format.id_length:
                plain = with_short_ids(plain, self.tool_format.id_length)
            if told:
                return self._run(self._template, in_words(plain, tools, self._has_system), add_generation_prompt, values)
            return self._run(self._template, plain, add_generation_prompt, values, tools)
        except _TEMPLATE_FAULTS as error:
            raise BadRequest("messages", f"the model's chat template rejects them: {error}") from None

    def _run(
        self,
        template: jinja2.Template,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        values: Mapping[str, Any],
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        chunks, size = [], 0
        given = {**values, **self._special_tokens, "messages": messages, "add_generation_prompt": add_generation_prompt}
        for chunk in template.generate({**given, **template.globals, "tools": list(tools) or None, "documents": None}):
            size += len(chunk)
            if size > MAX_RENDERED_CHARS:
                raise jinja2.TemplateError(f"more than {MAX_RENDERED_CHARS} characters came out")
            chunks.append(chunk)
        return "".join(chunks)

    def _shows_parts(self, template: jinja2.Template) -> bool:
        """Whether the template reads lists of parts itself, rather than printing them as Python would."""
        parts = [{"type": "text", "text": _PROBE}]
        try:
            shown = self._run(template, [{"role": "user", "content": parts}], True, NOTHING)
        except _TEMPLATE_FAULTS:
            return False
        return _PROBE in shown and "'type'" not in shown and '"type"' not in shown

    def _shows_system(self, template: jinja2.Template) -> bool:
        """Whether a conversation may begin with a message of the system's."""
        try:
            return _PROBE in self._run(template, [{"role": "system", "content": _PROBE}, {"role": "user", "content": ""}], True, NOTHING)
        except _TEMPLATE_FAULTS:
            return False


def _content(index: int, content: Any, takes_parts: bool) -> Any:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    field = f"messages[{index}].content"
    if not isinstance(content, list):
        raise BadRequest(field, "must be a string or a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRequest(field, 'only parts of the form {"type": "text", "text": "..."} are supported')
    return content if takes_parts else "\n".join(part["text"] for part in content)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which training code uses to find the assistant's tokens: its body, unchanged."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
