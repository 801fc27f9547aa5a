"""The shapes of all answers, as JSON Schema: the `components` of the document that `openapi` puts together."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_LOGPROB: Schema = {"type": "number"}
_MAYBE_STRING: Schema = {"type": ["string", "null"]}


def _object(properties: dict[str, Schema], *optional: str) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _envelope(kind: str, choice: str, *optional: str) -> Schema:
    head = {"id": _STRING, "object": {"const": kind}, "created": _COUNT, "model": _STRING, "system_fingerprint": _STRING}
    return _object({**head, "choices": _list(_ref(choice)), "usage": _maybe(_ref("Usage"))}, *optional)


_ENDS: Schema = {"enum": ["stop", "length", None]}
_CHAT_ENDS: Schema = {"enum": ["stop", "length", "tool_calls", None]}
_FUNCTION: dict[str, Schema] = {"name": _STRING, "arguments": _STRING}
_CALL: dict[str, Schema] = {"id": _STRING, "type": {"const": "function"}}
_STOP_REASON: Schema = {"type": ["string", "integer", "null"], "description": "the stop string, or the id of the stop token, that ended it"}
_TOKEN: dict[str, Schema] = {"token": _STRING, "logprob": _LOGPROB, "bytes": _list({"type": "integer", "minimum": 0, "maximum": 255})}
_MODEL = {"id": _STRING, "object": {"const": "model"}, "created": _COUNT, "owned_by": _STRING, "max_model_len": _COUNT}
_TOP = {"type": "object", "additionalProperties": _LOGPROB}

SCHEMAS: dict[str, Schema] = {
    "Error": _object({"error": _object({"message": _STRING, "type": _STRING, "param": _MAYBE_STRING, "code": _MAYBE_STRING})}),
    "Usage": _object(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
        }
    ),
    "ChatLogprobs": _object(
        {"content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))})), "refusal": {"type": "null"}},
    ),
    "ChatChoice": _object(
        {
            "index": _COUNT,
            "message": _object(
                {
                    "role": {"const": "assistant"},
                    "content": _MAYBE_STRING,
                    "refusal": {"type": "null"},
                    "tool_calls": _list(_object({**_CALL, "function": _object(_FUNCTION)})),
                },
                "tool_calls",
            ),
            "logprobs": _maybe(_ref("ChatLogprobs")),
            "finish_reason": _CHAT_ENDS,
            "stop_reason": _STOP_REASON,
        }
    ),
    "ChatChunkChoice": _object(
        {
            "index": _COUNT,
            "delta": _object(
                {
                    "role": {"const": "assistant"},
                    "content": _MAYBE_STRING,
                    "tool_calls": _list(_object({"index": _COUNT, **_CALL, "function": _object(_FUNCTION, "name")}, "id", "type")),
                },
                "role",
                "content",
                "tool_calls",
            ),
            "logprobs": _maybe(_ref("ChatLogprobs")),
            "finish_reason": _CHAT_ENDS,
            "stop_reason": _STOP_REASON,
        },
        "stop_reason",
    ),
    "ChatCompletion": _envelope("chat.completion", "ChatChoice"),
    "ChatCompletionChunk": _envelope("chat.completion.chunk", "ChatChunkChoice", "usage"),
    "CompletionLogprobs": _object(
        {
            "text_offset": _list(_COUNT),
            "token_logprobs": _list(_maybe(_LOGPROB)),
            "tokens": _list(_STRING),
            "top_logprobs": _list(_maybe(_TOP)),
        }
    ),
    "CompletionChoice": _object(
        {
            "index": _COUNT,
            "text": _STRING,
            "logprobs": _maybe(_ref("CompletionLogprobs")),
            "finish_reason": _ENDS,
            "stop_reason": _STOP_REASON,
        },
        "stop_reason",
    ),
    "Completion": _envelope("text_completion", "CompletionChoice", "usage"),
    "Model": _object(_MODEL),
    "ModelList": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Tokens": _object({"count": _COUNT, "max_model_len": _COUNT, "tokens": _list(_COUNT), "token_strs": _list(_STRING)}, "token_strs"),
    "Text": _object({"prompt": _STRING}),
    "Status": _object({"status": _STRING}),
    "Version": _object({"version": _STRING}),
    "Document": {"type": "object"},
}
