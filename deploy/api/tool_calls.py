"""How the served model's calls are written: which grammar makes it write them, and how its text is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ...worker.protocol import BadRequest
from ...worker.text.grammar import grammar_of
from ...worker.text.tokenizer import Tokenizer
from ...worker.text.tool_format import FORMATS, HERMES, ToolFormat
from ...worker.text.tool_grammar import ToolSchema, arguments_schema, calls_grammar
from ...worker.text.tool_parser import CallReading
from .schemas import SamplingBody
from .structured import Constraint, EdgeGrammars, read_constraint
from .tools import Choice, Tool, ToolUse

AUTO = "auto"
_ANYTHING: dict[str, object] = {"type": "object"}


@dataclass(frozen=True)
class ToolCalls:
    """The format of one model.

    Attributes:
        format: how it writes calls; None where that is not known.
        special: those markers of the format that are special tokens, and their ids.
    """

    format: ToolFormat | None
    special: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, option: str) -> ToolCalls:
        """The format that the option names, or that the model's chat template shows.

        Raises:
            ValueError: the model has to be told of tools in words, which are those of another format.
        """
        format = tokenizer.tool_format if option == AUTO else FORMATS[option]
        if format is not HERMES and not tokenizer.knows_tools:
            told = f"this model's chat template knows no tools, so that it is told to write calls as {HERMES.name} has them"
            raise ValueError(f"--tool-call-format {option}: {told}")
        ids = {marker: tokenizer.special_id(marker) for marker in (format.markers if format else ())}
        return cls(format, {marker: token for marker, token in ids.items() if token is not None})

    def reading(self, use: ToolUse, skip_special_tokens: bool) -> CallReading | None:
        """How calls are read; None where there can be none.

        Raises:
            BadRequest: that is not known.
        """
        if use.choice is Choice.NONE:
            return None
        hidden = frozenset(self.special if skip_special_tokens else ())
        return CallReading(self._known, frozenset(tool.name for tool in use.callable), hidden, use.forced, use.single)

    async def grammar(self, use: ToolUse, body: SamplingBody, grammars: EdgeGrammars) -> str:
        """The grammar of what `body` asks for; empty when anything may be written.

        Raises:
            BadRequest, Overloaded: as `EdgeGrammars.grammar`; or a tool's schema cannot be followed.
        """
        constraint = read_constraint(body)
        if use.choice is Choice.NONE:
            return await grammars.grammar(constraint)
        if constraint is not None and not constraint.field.startswith("response_format"):
            raise BadRequest(constraint.field, "is not possible together with tools")
        bound = {tool.name: tool for tool in use.callable if use.forced or tool.strict}
        if constraint is None and not bound:
            return ""
        answers = None if use.forced else constraint  # a call leaves no text that could have a format
        schemas = [ToolSchema(tool.name, tool.parameters if tool.name in bound else _ANYTHING) for tool in use.callable]
        make = partial(
            calls_grammar,
            self._known,
            schemas,
            self.special,
            single=use.single,
            or_text=not use.forced and answers is None,
            or_json=_schema(answers),
        )
        parts: dict[str, Callable[[], str]] = {tool.field: partial(_arguments_grammar, tool) for tool in bound.values()}
        if answers is not None:
            parts[answers.field] = answers.grammar
        return await grammars.compiled("tools", make, parts)

    @property
    def _known(self) -> ToolFormat:
        if self.format is None:
            raise BadRequest(
                "tools", f"this model's chat template writes calls in none of the formats {', '.join(FORMATS)} (--tool-call-format)"
            )
        return self.format


def _arguments_grammar(tool: Tool) -> str:
    return grammar_of(json_schema=arguments_schema(tool.parameters))


def _schema(constraint: Constraint | None) -> Mapping[str, object] | None:
    """The schema of a `response_format`."""
    if constraint is None:
        return None
    return constraint.value if constraint.kind == "json_schema" else _ANYTHING
