"""What a chat request says of tools: which there are, and whether they may or must be called. Checked here, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ...worker.protocol import BadRequest
from .body import known

MOST_TOOLS = 128  # OpenAI's limit
NAME = "[a-zA-Z0-9_-]{1,64}"
_RULE = "must be 1 to 64 letters (a-z, A-Z), digits, underscores and dashes"
_CHOICES = "none, auto, required, or functions by name"


class Choice(Enum):
    """Who decides whether tools are called."""

    NONE = "none"  # they are not
    AUTO = "auto"  # the model
    REQUIRED = "required"  # they are: one at least
    NAMED = "named"  # the one that the client names is, once


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        field: where the request has its schema.
        name, description, parameters: as the client says; the last is a JSON schema.
        strict: its arguments have to satisfy the schema also where the model is free to call it.
    """

    field: str
    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool

    @property
    def told(self) -> dict[str, Any]:
        """What chat templates take."""
        described = {"description": self.description} if self.description is not None else {}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.parameters}}


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request.

    Attributes:
        tools: all that the model is told of; none where none may be called.
        choice: who decides.
        callable: those of them that can be called.
        single: at most one call is wanted.
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice = Choice.NONE
    callable: tuple[Tool, ...] = ()
    single: bool = False

    @property
    def forced(self) -> bool:
        """Whether the answer is calls and nothing else."""
        return self.choice in (Choice.REQUIRED, Choice.NAMED)

    @property
    def told(self) -> list[dict[str, Any]]:
        """What chat templates take."""
        return [tool.told for tool in self.tools]


def read_tools(raw: list[Any], choice: Any = None, parallel: bool = True) -> ToolUse:
    """The tools that may be called.

    Args:
        raw: `tools`.
        choice: `tool_choice`; None: the model's, where there are tools.
        parallel: `parallel_tool_calls`.

    Raises:
        BadRequest: with the path of what is wrong, for example `tools.2.function.name`.
    """
    if len(raw) > MOST_TOOLS:
        raise BadRequest("tools", f"{len(raw)} tools; at most {MOST_TOOLS} are allowed")
    tools = tuple(_tool(f"tools.{i}", tool) for i, tool in enumerate(raw))
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in names:
            raise BadRequest(f"tools.{i}.function.name", f"{tool.name!r} is the name of an earlier tool, too")
        names.add(tool.name)
    if isinstance(choice, dict):
        decides, chosen = _chosen(choice, names)
        return ToolUse(tools, decides, tuple(tool for tool in tools if tool.name in chosen), decides is Choice.NAMED or not parallel)
    if choice not in (None, "none", "auto", "required"):
        raise BadRequest("tool_choice", f"must be {_CHOICES}")
    if choice == "required" and not tools:
        raise BadRequest("tool_choice", "needs tools")
    if choice == "none" or not tools:
        return ToolUse()
    return ToolUse(tools, Choice(choice or "auto"), tools, not parallel)


def _tool(path: str, raw: Any) -> Tool:
    if isinstance(raw, dict) and raw.get("type") != "function":
        raise BadRequest(f"{path}.type", "must be function")
    given = known(path, raw, ("type", "function"))
    path += ".function"
    function = known(path, given.get("function"), ("name", "description", "parameters", "strict"))
    name, description, strict = function.get("name"), function.get("description"), function.get("strict", False)
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise BadRequest(f"{path}.name", _RULE)
    if not isinstance(description, str | None):
        raise BadRequest(f"{path}.description", "must be a text")
    if not isinstance(strict, bool):
        raise BadRequest(f"{path}.strict", "must be true or false")
    path += ".parameters"
    parameters = function.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(parameters, dict):
        raise BadRequest(path, "must be a JSON schema: an object")
    if parameters.get("type", "object") != "object":
        raise BadRequest(f"{path}.type", "must be object, since arguments have names")
    return Tool(path, name, description, parameters, strict)


def _chosen(choice: dict[str, Any], names: Collection[str]) -> tuple[Choice, set[str]]:
    """Who decides, among which tools: the one that is to be called, or those that are allowed of all that the model is told of."""
    if choice.get("type") == "function":
        return Choice.NAMED, {_name("tool_choice", choice, names)}
    if choice.get("type") != "allowed_tools":
        raise BadRequest("tool_choice.type", "must be function or allowed_tools")
    path = "tool_choice.allowed_tools"
    allowed = known(path, known("tool_choice", choice, ("type", "allowed_tools")).get("allowed_tools"), ("mode", "tools"))
    mode, listed = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise BadRequest(f"{path}.mode", "must be auto or required")
    if not isinstance(listed, list) or not listed:
        raise BadRequest(f"{path}.tools", "must be a list of functions by name, and not empty")
    return Choice(mode), {_name(f"{path}.tools.{i}", each, names) for i, each in enumerate(listed)}


def _name(path: str, raw: Any, names: Collection[str]) -> str:
    """The name in `{"type": "function", "function": {"name": ...}}`, which has to be a tool's."""
    given = known(path, raw, ("type", "function"))
    if given.get("type") != "function":
        raise BadRequest(f"{path}.type", "must be function")
    name = known(f"{path}.function", given.get("function"), ("name",)).get("name")
    if not isinstance(name, str) or name not in names:
        raise BadRequest(f"{path}.function.name", f"{str(name)[:64]!r} is not among the tools")
    return name
