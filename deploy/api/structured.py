"""What an answer has to look like: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`, read and compiled.

Whatever of it is wrong is a 400 with the name of the field, before the request is queued.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from ...worker.protocol import BadRequest, Overloaded
from ...worker.text.grammar import Grammars, grammar_of
from ...worker.text.tokenizer import Tokenizer
from .body import known
from .schemas import SamplingBody

MOST_WAITING = 32  # grammars to compile; each takes less than a second
RETRY_AFTER_S = 5.0

FORMATS = ("text", "json_object", "json_schema")
# vLLM's field -> the argument of `grammar_of`.
KINDS = {"json": "json_schema", "json_object": "json_object", "regex": "regex", "choice": "choice", "grammar": "lark"}
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


class Constraint(NamedTuple):
    """What an answer has to follow.

    Attributes:
        field: where the client has written it.
        kind: the argument of `grammar_of` that it is.
        value: as written.
    """

    field: str
    kind: str
    value: Any

    def grammar(self) -> str:
        """The grammar of it; raises BadRequest where it has not the form of one."""
        return grammar_of(**{self.kind: self.value})


def read_constraint(body: SamplingBody) -> Constraint | None:
    """The constraint in a request; None when it has none.

    Raises:
        BadRequest: one is malformed, or there are several.
    """
    given = [
        *_response_format(body.response_format),
        *_structured_outputs(body.structured_outputs),
        *(Constraint(name, KINDS[of], getattr(body, name)) for name, of in GUIDED.items() if getattr(body, name) is not None),
    ]
    if len(given) > 1:
        raise BadRequest(given[1].field, f"is not possible together with {given[0].field}")
    return given[0] if given else None


def _response_format(raw: Any) -> list[Constraint]:
    if raw is None:
        return []
    name = "response_format"
    given = known(name, raw, ("type", "json_schema"))
    kind = given.get("type")
    if kind not in FORMATS:
        raise BadRequest(f"{name}.type", f"must be one of {', '.join(FORMATS)}")
    if kind != "json_schema":
        if "json_schema" in given:
            raise BadRequest(f"{name}.json_schema", "is only for the type json_schema")
        return [Constraint(name, "json_object", True)] if kind == "json_object" else []
    named = known(f"{name}.json_schema", given.get("json_schema"), ("name", "schema", "strict", "description"))
    for key, kinds in {"name": str, "description": str | None, "strict": bool | None}.items():
        if not isinstance(named.get(key), kinds):
            raise BadRequest(f"{name}.json_schema.{key}", f"must be {'true or false' if key == 'strict' else 'a text'}")
    if not isinstance(named.get("schema"), dict):
        raise BadRequest(f"{name}.json_schema.schema", "must be an object")
    return [Constraint(f"{name}.json_schema.schema", "json_schema", named["schema"])]


def _structured_outputs(raw: Any) -> list[Constraint]:
    if raw is None:
        return []
    name = "structured_outputs"
    given = {key: value for key, value in known(name, raw, KINDS).items() if (key, value) != ("json_object", False)}
    if len(given) != 1:
        raise BadRequest(name, f"must hold exactly one of {', '.join(KINDS)}")
    ((key, value),) = given.items()
    if key == "json_object" and value is not True:
        raise BadRequest(f"{name}.{key}", "must be true or false")
    return [Constraint(f"{name}.{key}", KINDS[key], value)]


class EdgeGrammars:
    """Compiles what clients ask for, in a thread of its own, so that neither tokenizing nor streams wait for it."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Collection[int], longest: int) -> None:
        """Args: the model's tokenizer, its end-of-sequence tokens, and how many characters a grammar may have."""
        self._make = partial(Grammars, tokenizer, eos_token_ids)
        self._grammars: Grammars | None = None
        self._longest = longest
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def close(self) -> None:
        """Lets the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def grammar(self, constraint: Constraint | None) -> str:
        """The grammar of a constraint; empty for none.

        Raises:
            BadRequest: it is malformed, too long, too complex, or nothing satisfies it.
            Overloaded: too many are being compiled.
        """
        return "" if constraint is None else await self.compiled(constraint.field, constraint.grammar)

    async def compiled(self, field: str, make: Callable[[], str], parts: Mapping[str, Callable[[], str]] = MappingProxyType({})) -> str:
        """The grammar that `make` makes, once it has been compiled.

        Args:
            field: where the client has written it.
            make: makes it.
            parts: what it is made of, by field: if it cannot be compiled, the first of these that cannot be either is named.

        Raises:
            BadRequest, Overloaded: as `grammar`.
        """
        if self._waiting >= MOST_WAITING:
            raise Overloaded("too many grammars wait to be compiled", RETRY_AFTER_S)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, field, make, parts)
        finally:
            self._waiting -= 1

    def _compile(self, field: str, make: Callable[[], str], parts: Mapping[str, Callable[[], str]]) -> str:
        try:
            return self._checked(make)
        except BadRequest as error:
            for name, part in parts.items():
                try:
                    self._checked(part)
                except BadRequest as fault:
                    raise BadRequest(name, fault.message) from None
            raise BadRequest(field, error.message) from None

    def _checked(self, make: Callable[[], str]) -> str:
        grammar = make()
        if len(grammar) > self._longest:
            raise BadRequest("grammar", f"makes a grammar of {len(grammar)} characters; at most {self._longest} are allowed")
        self._grammars = self._grammars or self._make()
        self._grammars.check(grammar)
        return grammar
