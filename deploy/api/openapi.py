"""GET /openapi.json: the API as an OpenAPI 3.1 document, with this server's own model and limits in it.

Requests are read by `body`, not by FastAPI, so the document is put together here: names and types from `schemas`, bounds from the limits
that the door checks, and every status that a route can answer with.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ... import __version__
from . import openapi_answers as answers
from .context import Api
from .info_routes import READS
from .messages import HARMLESS, NOT_THERE, OF_ROLE
from .schemas import COMPLETION_MAX_TOKENS, ChatBody, CompletionBody, DetokenizeBody, SamplingBody, StreamOptions, Strict, TokenizeBody
from .structured import FORMATS, GUIDED
from .tools import MOST_TOOLS, NAME, Choice
from .unsupported import IGNORED, NEUTRAL
from .urgency import DEADLINES_MS, NAMED, PRIORITIES

router = APIRouter()

Schema = dict[str, Any]

_READS = (400, 404, 408, 413, 415, 500)
_GENERATES = (*_READS, 429, 503, 504)
_TOLD_LATER = (429, 503)  # with Retry-After
_NULL: Schema = {"type": "null"}
_STRING: Schema = {"type": "string"}
_VALUES: Schema = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}


@router.api_route("/openapi.json", methods=READS)
async def openapi(request: Request) -> JSONResponse:
    """This document."""
    return JSONResponse(document(request.app.state.api))


def document(api: Api) -> Schema:
    """The whole document."""
    keys = bool(api.options.api_key or api.options.api_key_file)
    about = {"title": "Quire", "version": __version__, "description": "Serves a large language model behind OpenAI's API."}
    components: Schema = {"schemas": answers.SCHEMAS}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    paths = {
        "/v1/chat/completions": _post("Continues a conversation.", _chat(api), "ChatCompletion", _GENERATES, streams="ChatCompletionChunk"),
        "/v1/completions": _post("Continues prompts.", _completion(api), "Completion", _GENERATES, streams="Completion"),
        "/tokenize": _post("Token ids of a prompt, or of messages as the chat template writes them.", _tokenize(api), "Tokens", _READS),
        "/detokenize": _post("The text of token ids.", _detokenize(api), "Text", _READS),
        "/v1/models": _get("The models that this server has.", "ModelList"),
        "/v1/models/{name}": _get("One model.", "Model", 404, parameters=[_path_parameter("name")]),
        "/live": _get("The process answers.", "Status", open_to_all=keys),
        "/health": _get("Requests would be served.", "Status", 503, open_to_all=keys),
        "/metrics": _get("Prometheus text.", None),
        "/version": _get("Quire's version.", "Version"),
        "/openapi.json": _get("This document.", "Document"),
    }
    if keys:
        for operation in (operation for path in paths.values() for operation in path.values()):
            if operation.get("security") != []:
                operation["responses"]["401"] = _error(401)
    return {"openapi": "3.1.0", "info": about, "paths": paths, "components": components, **({"security": [{"key": []}]} if keys else {})}


def _post(summary: str, body: Schema, answer: str, failures: tuple[int, ...], streams: str | None = None) -> Schema:
    good: Schema = {"description": "The answer.", "content": {"application/json": {"schema": _ref(answer)}}}
    if streams is not None:
        good["description"] = f"The whole answer; with stream=true, events whose data are each a {streams}, and at the end [DONE]."
        good["content"]["text/event-stream"] = {}
        good["headers"] = {"X-Request-Id": {"schema": _STRING, "description": "the id of the answer"}}
    responses = {"200": good, **{str(status): _error(status) for status in failures}}
    request = {"required": True, "content": {"application/json": {"schema": body}}}
    return {"post": {"summary": summary, "requestBody": request, "responses": responses}}


def _get(summary: str, answer: str | None, *failures: int, open_to_all: bool = False, parameters: list[Schema] | None = None) -> Schema:
    content = {"text/plain": {"schema": _STRING}} if answer is None else {"application/json": {"schema": _ref(answer)}}
    responses = {"200": {"description": "The answer.", "content": content}}
    responses |= {str(status): _error(status) for status in (400, *failures, 413, 500)}
    operation: Schema = {"summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if open_to_all:
        operation["security"] = []
    silent = {status: {name: told for name, told in response.items() if name != "content"} for status, response in responses.items()}
    return {"get": operation, "head": {**operation, "responses": silent}}


def _error(status: int) -> Schema:
    error: Schema = {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": _ref("Error")}}}
    if status in _TOLD_LATER:
        error["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds"}}
    return error


def _path_parameter(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


# --- what is asked ---


def _chat(api: Api) -> Schema:
    given = {
        "messages": _array(_message(), 1),
        "chat_template_kwargs": _VALUES,
        "top_logprobs": _integer(0, api.limits.max_logprobs),
        "tools": _array(_tool(), 0, MOST_TOOLS),
        "tool_choice": _tool_choice(),
    }
    return _generating(api, ChatBody, given, _needs("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs"))


def _completion(api: Api) -> Schema:
    text = {"type": "string", "minLength": 1}
    ids = _array(_token(api), 1, api.context - 1)
    several = [_array(each, 1, api.limits.max_prompts) for each in (text, ids)]
    longest = {**_integer(0, api.context - 1), "default": COMPLETION_MAX_TOKENS, "description": "0 with echo"}
    given = {
        "prompt": {"anyOf": [text, ids, *several]},
        "logprobs": _integer(0, api.limits.max_logprobs),
        "max_tokens": longest,
        "max_completion_tokens": longest,
    }
    nothing = [_needs(name, {"const": 0}, "echo") for name in ("max_tokens", "max_completion_tokens")]
    return _generating(api, CompletionBody, given, *nothing)


def _generating(api: Api, of: type[SamplingBody], given: dict[str, Schema], *needs: Schema) -> Schema:
    """A body that asks for text; with the fields that are ignored, or may only say that they are not used."""
    body = _body(of, {**_sampling(api), **given})
    neutral: dict[str, Schema] = {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    neutral["best_of"] = {"enum": [None], "description": "taken too where it equals n"}
    body["properties"] = neutral | {name: {} for name in sorted(IGNORED)} | body["properties"]
    body["allOf"] = [_needs("stream_options", {"type": "object"}, "stream"), *needs]
    return body


def _needs(field: str, such: Schema, flag: str) -> Schema:
    """Whoever gives `field` a value like `such` must give `flag` the value true."""
    given = {"required": [field], "properties": {field: such}}
    return {"anyOf": [{"not": given}, {"required": [flag], "properties": {flag: {"const": True}}}]}


def _tokenize(api: Api) -> Schema:
    prompt, messages, tools = _STRING, _array(_message(), 1), _array(_tool(), 0, MOST_TOOLS)
    one = [
        {"required": ["prompt"], "properties": {"prompt": prompt, "messages": _NULL}},
        {"required": ["messages"], "properties": {"prompt": _NULL, "messages": messages}},
    ]
    return {
        **_body(
            TokenizeBody, {"model": _model(api), "prompt": prompt, "messages": messages, "chat_template_kwargs": _VALUES, "tools": tools}
        ),
        "anyOf": one,
    }


def _detokenize(api: Api) -> Schema:
    return _body(DetokenizeBody, {"model": _model(api), "tokens": _array(_token(api))})


def _sampling(api: Api) -> dict[str, Schema]:
    """The fields of `SamplingBody` that have bounds."""
    limits, penalty = api.limits, _number(-2, 2)
    stop = {"type": "string", "minLength": 1, "maxLength": limits.max_stop_chars}
    longest = _integer(1, api.context - 1)
    return {
        "model": _model(api),
        "stream_options": {**_body(StreamOptions, {}), "description": "only with stream=true"},
        "max_tokens": longest,
        "max_completion_tokens": longest,
        "n": _integer(1, limits.max_n),
        "temperature": _number(0, 100),
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": _integer(-1, 2**31 - 1),
        "min_p": _number(0, 1),
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,18}$"},
            "additionalProperties": _number(-100, 100),
            "maxProperties": limits.max_logit_bias,
            "description": f"token ids to {api.info.vocab_size - 1}",
        },
        "seed": _integer(-(2**63), 2**63 - 1),
        "stop": {"anyOf": [stop, _array(stop, 0, limits.max_stop)]},
        "stop_token_ids": _array(_token(api), 0, limits.max_stop),
        **_constraints(),
        "min_tokens": _integer(0, api.context - 1),
        "priority": {"anyOf": [_integer(*PRIORITIES), {"enum": list(NAMED)}]},
        "deadline_ms": _integer(*DEADLINES_MS),
    }


def _constraints() -> dict[str, Schema]:
    """The fields that `structured.read_constraint` reads. At most one of them may ask for something."""
    flag: Schema = {"type": ["boolean", "null"]}
    named = {"name": _STRING, "schema": {"type": "object"}, "strict": flag, "description": {"type": ["string", "null"]}}
    plain = _object({"type": {"enum": [kind for kind in FORMATS if kind != "json_schema"]}}, "type")
    schema = _object({"type": {"const": "json_schema"}, "json_schema": _object(named, "name", "schema")}, "type", "json_schema")
    text = {"type": "string", "minLength": 1}
    kinds: dict[str, Schema] = {
        "json": {"type": ["object", "string"], "description": "a JSON schema, or the JSON of one"},
        "json_object": {"const": True},
        "regex": {**text, "description": "matches the whole answer; Rust's syntax without look-around"},
        "choice": _array(_STRING, 1),
        "grammar": {**text, "description": "llguidance's variant of Lark, or GBNF"},
    }
    one = {"anyOf": [_object({key: value}, key) for key, value in kinds.items()]}
    guided = {name: kinds[of] for name, of in GUIDED.items()}
    return {"response_format": {"anyOf": [plain, schema]}, "structured_outputs": one, **guided}


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": _NULL}


def _message() -> Schema:
    parts = _array({"type": "object", "properties": {"type": {"const": "text"}, "text": _STRING}, "required": ["type", "text"]}, 1)
    content: Schema = {"anyOf": [_STRING, parts]}
    nothing: Schema = {"enum": [None, []]}
    anything: Schema = {}
    others = dict.fromkeys((*NOT_THERE, *OF_ROLE), nothing) | dict.fromkeys(HARMLESS, anything)
    function = _object({"name": _STRING, "arguments": _STRING}, "name", "arguments")
    call = _object({"id": _STRING, "type": {"enum": ["function", None]}, "function": function, "index": anything}, "id", "function")
    forms: list[tuple[list[str], Schema, list[str]]] = [
        (["system", "developer", "user"], {"content": content}, ["content"]),
        (["assistant"], {"content": _or_null(content), "tool_calls": _or_null(_array(call))}, []),
        (["tool"], {"content": content, "tool_call_id": _STRING}, ["content", "tool_call_id"]),
    ]
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"role": {"enum": roles}, **others, **own},
                "required": ["role", *required],
                "additionalProperties": _NULL,
            }
            for roles, own, required in forms
        ]
    }


def _tool() -> Schema:
    """What `tools.read_tools` takes."""
    parameters: Schema = {"type": "object", "properties": {"type": {"const": "object"}}, "description": "a JSON schema of an object"}
    optional = {"description": _STRING, "parameters": parameters, "strict": {"type": "boolean"}}
    function = {"name": {"type": "string", "pattern": f"^{NAME}$"}, **{name: _or_null(schema) for name, schema in optional.items()}}
    return _object({"type": {"const": "function"}, "function": _object(function, "name")}, "type", "function")


def _tool_choice() -> Schema:
    named = _object({"type": {"const": "function"}, "function": _object({"name": _STRING}, "name")}, "type", "function")
    allowed = _object({"mode": {"enum": ["auto", "required"]}, "tools": _array(named, 1)}, "mode", "tools")
    several = _object({"type": {"const": "allowed_tools"}, "allowed_tools": allowed}, "type", "allowed_tools")
    return {"anyOf": [{"enum": [choice.value for choice in Choice if choice is not Choice.NAMED]}, named, several]}


def _body(of: type[Strict], bounded: dict[str, Schema]) -> Schema:
    """A body as `read_body` takes it: null for what is not given, whatever its name. `bounded` is what to say instead of pydantic's schema
    of a field, which has only its type."""
    plain = of.model_json_schema()["properties"].items()
    required = [name for name, field in of.model_fields.items() if field.is_required()]
    properties = {name: bounded.get(name) or {key: value for key, value in schema.items() if key != "title"} for name, schema in plain}
    properties = {name: schema if name in required else _or_null(schema) for name, schema in properties.items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": _NULL}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


def _model(api: Api) -> Schema:
    return {"enum": [api.info.name]}


def _token(api: Api) -> Schema:
    return _integer(0, api.info.vocab_size - 1)


def _integer(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _number(least: float, most: float) -> Schema:
    return {"type": "number", "minimum": least, "maximum": most}


def _array(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    return {"type": "array", "items": items, "minItems": least, **({"maxItems": most} if most is not None else {})}
