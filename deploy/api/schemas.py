"""The bodies of requests: names and types only. Bounds are checked once, at the engine's door (`worker.door`).

Types are strict (no true for 1, no "1" for 1; 1.0 is 1), numbers finite, integers of 64 bits, unknown fields refused.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...worker.protocol import BadRequest, SamplingParams

Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Float = Annotated[float, Field(allow_inf_nan=False)]

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; chat has none but the model's
_OF_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Strict(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ToldUsage(Enum):
    """Which chunks of a stream tell its usage."""

    NEVER = auto()
    LAST = auto()  # one after all choices have ended; the others say null
    ALWAYS = auto()  # all: the usage so far


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: with include_usage, each chunk tells the usage so far
    include_obfuscation: bool = False  # padding against traffic analysis: accepted, not added

    @model_validator(mode="before")
    @classmethod
    def null_is_not_given(cls, given: Any) -> Any:
        """As `body` reads a whole request."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class SamplingBody(Strict):
    """What chat and completions have in common: OpenAI's parameters, and vLLM's extras."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None  # its newer name in chat, which load generators also send to completions
    n: Int = 1
    temperature: Float | None = None  # of this, the next three and the repetition penalty the model has defaults of its own
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    presence_penalty: Float = 0.0
    frequency_penalty: Float = 0.0
    repetition_penalty: Float | None = None
    logit_bias: dict[str, Float] = {}
    seed: Int | None = None
    stop: Any = ()
    stop_token_ids: list[Int] = []
    min_tokens: Int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    response_format: Any = None  # this and the next five are read by `structured.read_constraint`
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    priority: Any = None  # this and the next are read by `urgency.read_urgency`
    deadline_ms: Any = None

    def sampling(
        self,
        defaults: SamplingParams,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: str = "",
    ) -> SamplingParams:
        """The engine's parameters, with the model's `defaults` for what is not given.

        Raises:
            BadRequest: `stop` is no string or list of strings, a key of `logit_bias` is no token id, or `stream_options`
                stands without `stream`.
        """
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options", "is only for stream=true")
        given = {name: value for name in _OF_MODEL if (value := getattr(self, name)) is not None}
        return replace(
            defaults,
            **given,
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_token_keys(self.logit_bias),
            seed=self.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=_strings("stop", self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            grammar=grammar,
        )

    def longest(self, default: int | None, context: int) -> int | None:
        """Output tokens at most: both names are bounds, so the lower one counts.

        Raises:
            BadRequest: the other one could never be met in a context of so many tokens. (What counts is checked at the door.)
        """
        longest = min(self._bounds.values(), default=default)
        for name, bound in self._bounds.items():
            if bound != longest and bound >= context:
                raise BadRequest(name, f"{bound} output tokens and a prompt exceed the context of {context} tokens")
        return longest

    @property
    def names(self) -> dict[str, str]:
        """The engine's `max_tokens` -> the name of the bound that counts."""
        return {"max_tokens": min(self._bounds, key=self._bounds.__getitem__, default="max_tokens")}

    @property
    def _bounds(self) -> dict[str, int]:
        given = {"max_tokens": self.max_tokens, "max_completion_tokens": self.max_completion_tokens}
        return {name: bound for name, bound in given.items() if bound is not None}

    @property
    def told_usage(self) -> ToldUsage:
        """Where a stream tells its usage."""
        if self.stream_options is None or not self.stream_options.include_usage:
            return ToldUsage.NEVER
        return ToldUsage.ALWAYS if self.stream_options.continuous_usage_stats else ToldUsage.LAST


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[Any]  # read by `messages.read_messages`
    logprobs: bool = False
    top_logprobs: Int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}  # read by `messages.read_values`
    add_special_tokens: bool = False
    tools: list[Any] = []  # this and the next two are read by `tools.read_tools`
    tool_choice: Any = None
    parallel_tool_calls: bool = True


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Any  # read by `completions.read_prompts`
    logprobs: Int | None = None
    echo: bool = False
    add_special_tokens: bool = True


class TokenizeBody(Strict):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None  # default: with a prompt yes, with messages no (the template has them)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[Any] = []  # read by `tools.read_tools`
    return_token_strs: bool = False


class DetokenizeBody(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Int]


def _token_keys(bias: dict[str, float]) -> dict[int, float]:
    by_id = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 19):
            raise BadRequest("logit_bias", f"{key[:32]!r} is not a token id")
        by_id[int(key)] = value
    return by_id


def _strings(field: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) for s in strings):
        raise BadRequest(field, "must be a string or a list of strings")
    return tuple(strings)
