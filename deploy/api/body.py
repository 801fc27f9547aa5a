"""Request bytes to a checked pydantic model. Whatever is wrong with them becomes a 400 that names the field.

JSON is read strictly: UTF-8, no NaN or Infinity, no lone surrogates, bounded nesting (the parser's own). Null means "not
given", also for fields that do not exist here, because clients send all the fields they know.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from ...worker.protocol import BadRequest
from .errors import CLIENT_GONE, ApiError
from .unsupported import refuse_unsupported

MOST_TOLD = 200  # characters of a field's name, which may be the client's invention

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, of: type[Body]) -> Body:
    """The request's JSON body as an `of`.

    Raises:
        ApiError: not JSON (400), a wrong content type or a compressed body (415), the client left.
        BadRequest: a field is wrong, unknown, or asks for what is not there.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind.startswith("multipart/") or (kind == "application/x-www-form-urlencoded" and not _looks_like_json(await _bytes(request))):
        raise ApiError(415, f"the body must be application/json, not {kind}")
    packed = request.headers.get("content-encoding", "").strip().lower()
    if packed not in ("", "identity"):
        raise ApiError(415, f"the body must not be compressed (Content-Encoding: {packed[:MOST_TOLD]})")
    return parse(await _bytes(request), of)


def parse(raw: bytes, of: type[Body]) -> Body:
    """Like `read_body`, of bytes."""
    body = strict_json(raw)
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    given = refuse_unsupported({name: value for name, value in body.items() if value is not None}, of.model_fields)
    try:
        return of.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:MOST_TOLD]
        raise BadRequest(field, "unknown field" if first["type"] == "extra_forbidden" else first["msg"]) from None


def known(name: str, raw: Any, keys: Collection[str]) -> dict[str, Any]:
    """The field `name`, an object that has no other keys than these, without those that are null.

    Raises:
        BadRequest: it is something else.
    """
    if not isinstance(raw, dict):
        raise BadRequest(name, "must be an object")
    given = {key: value for key, value in raw.items() if value is not None}
    for key in given:
        if key not in keys:
            raise BadRequest(f"{name}.{key[:64]}", f"unknown field; there are {', '.join(keys)}")
    return given


def strict_json(raw: bytes) -> Any:
    """JSON as RFC 8259 has it.

    Raises:
        ApiError: 400, with what is wrong.
    """
    try:
        body = json.loads(raw.decode(), parse_constant=no_constant, parse_float=_number)
        if b"\\u" in raw:  # the only way in for half a surrogate pair, which no tokenizer takes
            json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "the JSON body is nested too deeply") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the JSON body holds half a surrogate pair") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except ValueError as error:  # JSONDecodeError; also integers of thousands of digits
        raise ApiError(400, f"the body is not JSON: {error}") from None
    return body


def _number(text: str) -> int | float:
    """1.0 is 1: JSON has one kind of number, and some clients write every one with a point."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) <= 2**53 else value


def no_constant(name: str) -> NoReturn:
    """For `parse_constant`: NaN and Infinity, which Python takes for numbers of JSON."""
    raise ValueError(f"{name} is not a JSON number")


def _looks_like_json(raw: bytes) -> bool:
    """curl -d sends JSON as a form, and everybody takes it."""
    return raw.lstrip()[:1] == b"{"


async def _bytes(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise ApiError(CLIENT_GONE, "the client left") from None
