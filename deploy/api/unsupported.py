"""What other servers have and this one does not, refused by name; and what may be ignored without changing the answer.

One table: field -> values that mean "do not use it". Anything else in such a field is a 400, because an answer that
silently lacks what was asked for is worse than none. What a route has after all is none of this there.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from ...worker.protocol import BadRequest

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "reasoning_effort": (),
    "verbosity": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "prompt_embeds": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "session_id",
        "spaces_between_special_tokens",  # the tokenizers here have no such choice
        "include_reasoning",  # there is none to leave out
    }
)


# What is asked for by another name here.
INSTEAD = {"functions": "tools", "function_call": "tool_choice"}


def refuse_unsupported(body: dict[str, Any], fields: Container[str]) -> dict[str, Any]:
    """`body` without the fields that change nothing, except those that are among its own `fields`.

    Raises:
        BadRequest: a field asks for something that is not there.
    """
    best_of = body.pop("best_of", None)
    if best_of is not None and best_of != body.get("n", 1):
        raise BadRequest("best_of", "is not supported unless it equals n")
    for name in sorted(name for name in body.keys() & NEUTRAL.keys() if name not in fields):
        value = body.pop(name)
        if not any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[name]):
            raise BadRequest(name, "is not supported" + (f"; use {INSTEAD[name]}" if name in INSTEAD else ""))
    return {name: value for name, value in body.items() if name in fields or name not in IGNORED}
