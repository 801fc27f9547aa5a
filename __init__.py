"""Quire serves large language models on a cluster and keeps their keys and values in pages.

    from quire import LLM, SamplingParams
    print(LLM("smollm2").generate("A quire is", SamplingParams(max_tokens=16))[0].text)

Names are loaded when they are first used, so `import quire` is cheap and pulls in no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deploy.handle import connect
    from .worker.llm import LLM
    from .worker.protocol import BadRequest, Overloaded, ReplicaLost, SamplingParams
    from .worker.text.grammar import grammar_of

__version__ = "0.1.0"

__all__ = ["LLM", "BadRequest", "Overloaded", "ReplicaLost", "SamplingParams", "__version__", "connect", "grammar_of"]

_HOME = {
    "LLM": ".worker.llm",
    "connect": ".deploy.handle",
    "SamplingParams": ".worker.protocol",
    "BadRequest": ".worker.protocol",
    "Overloaded": ".worker.protocol",
    "ReplicaLost": ".worker.protocol",
    "grammar_of": ".worker.text.grammar",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
