"""What a model's makers advise: the defaults of sampling parameters that a request leaves out. Pure.

They stand in generation_config.json, or in the metadata of a GGUF file. As in vLLM the names below are all that counts: `do_sample: false`
does not make a request greedy, and null is as if it were not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .config import ModelOptions
from .door import check_default
from .protocol import BadRequest

# The name in `SamplingParams` -> the name there.
HUGGING_FACE = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {"max_tokens": "max_new_tokens"}
_LLAMA_CPP = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "penalty_repeat"}
GGUF = {name: f"general.sampling.{theirs}" for name, theirs in _LLAMA_CPP.items()}
_OVERRIDE = "override_generation_config"

Defaults = dict[str, float | None]  # name in `SamplingParams` -> value


def read_defaults(found: Mapping[str, Any], names: Mapping[str, str], where: str) -> Defaults:
    """The defaults among what was found in `where` (a file's name), under the `names` that they have there.

    Raises:
        ValueError: a value is of the wrong type or out of bounds; names the place, the field and the limit.
    """
    defaults = {name: found[theirs] for name, theirs in names.items() if theirs in found}
    for name, value in defaults.items():
        try:
            if value is not None:
                check_default(name, value)
        except BadRequest as error:
            raise ValueError(f"{where}: {names[name]} {error.message}") from None
    return defaults


def read_override(options: ModelOptions) -> Defaults:
    """What the operator says instead; null: nothing is to be the default.

    Raises:
        ValueError: it is not a JSON object, has another field than generation_config.json's, or as `read_defaults`.
    """
    text = options.override_generation_config
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f'{_OVERRIDE}: must be a JSON object such as {{"temperature": 0.6}} (got {text[:200]!r})')
    for field in found:
        if field not in HUGGING_FACE.values():
            raise ValueError(f"{_OVERRIDE}: {field} has no default; these have: {', '.join(HUGGING_FACE.values())}")
    return read_defaults(found, HUGGING_FACE, _OVERRIDE)
