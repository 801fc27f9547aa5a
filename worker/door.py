"""The engine's door: one check of a request, whatever front end it came through. Pure.

Everything that multiplies work is bounded here, and every refusal names the field and the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from .config import LimitOptions
from .protocol import BadRequest, GenerateRequest, ModelInfo, SamplingParams


@dataclass(frozen=True, slots=True)
class Door:
    """What this engine can take.

    Attributes:
        limits: the operator's bounds.
        vocab_size: token ids are in [0, vocab_size).
        max_model_len: prompt and output tokens of one sequence at most.
        pool_tokens: tokens that the whole page pool holds; a sequence that needs more can never run.
        max_sequences: sequences that run or wait at most; a request of more can never be admitted whole.
    """

    limits: LimitOptions
    vocab_size: int
    max_model_len: int
    pool_tokens: int
    max_sequences: int

    @staticmethod
    def of(info: ModelInfo, limits: LimitOptions) -> Door:
        """The door of a replica that serves the model in `info`."""
        return Door(limits, info.vocab_size, info.max_model_len, info.pool_tokens, info.max_sequences)

    def check(self, request: GenerateRequest) -> GenerateRequest:
        """The request in canonical form (`top_k` of -1 becomes 0; lists become tuples; nothing goes on past the end of a grammar).

        Raises:
            BadRequest: a value has the wrong type, is out of bounds, or can never fit.
        """
        _is_string("request_id", request.request_id, 1, 256)
        _is_string("tenant", request.tenant, 0, 256)
        _is_integer("priority", request.priority, -(2**31), 2**31 - 1)
        _is_integer("attempt", request.attempt, 0, 2**31 - 1)
        if request.seed is not None:
            _is_integer("seed", request.seed, 0, 2**64 - 1)
        if request.deadline_ms is not None:
            _is_integer("deadline_ms", request.deadline_ms, 0, 2**31 - 1)
        params = self._check_params(request.params)
        prompts = self._check_prompts(request.prompts, params)
        choices = len(prompts) * params.n
        most = min(self.limits.max_choices, self.max_sequences)
        if choices > most:
            what = f"{len(prompts)} prompts x n = {params.n} make {choices} sequences"
            raise BadRequest("n", f"{what}; at most {most} are allowed in one request")
        return replace(request, prompts=prompts, params=params, resume=self._check_resume(request.resume, prompts, params))

    def longest(self, prompt_len: int) -> int:
        """Output tokens that a prompt of `prompt_len` tokens leaves room for."""
        return min(self.max_model_len, self.pool_tokens) - prompt_len

    def _check_prompts(self, prompts: Any, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not isinstance(prompts, list | tuple) or not prompts:
            raise BadRequest("prompt", "must hold at least one prompt")
        if len(prompts) > self.limits.max_prompts:
            raise BadRequest("prompt", f"{len(prompts)} prompts; at most {self.limits.max_prompts} are allowed in one request")
        return tuple(self._check_prompt(prompt, params) for prompt in prompts)

    def _check_prompt(self, prompt: Any, params: SamplingParams) -> tuple[int, ...]:
        if not isinstance(prompt, list | tuple) or not prompt:
            raise BadRequest("prompt", "must hold at least one token")
        room = self.longest(len(prompt))
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if wanted > room:
            what = "the model's context" if self.max_model_len <= self.pool_tokens else "the KV pool"
            limit = f"{what} of {min(self.max_model_len, self.pool_tokens)} tokens"
            field = "max_tokens" if room >= 1 and params.max_tokens is not None else "prompt"
            raise BadRequest(field, f"{len(prompt)} prompt tokens and {wanted} output tokens exceed {limit}")
        for token in prompt:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise BadRequest("prompt", f"token id {_shown(token)} is not an integer in [0, {self.vocab_size - 1}]")
        return tuple(prompt)

    def _check_resume(self, resume: Any, prompts: tuple[tuple[int, ...], ...], params: SamplingParams) -> dict[int, tuple[int, ...]] | None:
        if resume is None:
            return None
        if not isinstance(resume, dict) or not resume:
            raise BadRequest("resume", "must be a map from at least one choice to its output tokens")
        return {choice: self._check_output(choice, output, prompts, params) for choice, output in resume.items()}

    def _check_output(self, choice: Any, output: Any, prompts: tuple[tuple[int, ...], ...], params: SamplingParams) -> tuple[int, ...]:
        _is_integer("resume", choice, 0, len(prompts) * params.n - 1)
        most = self.longest(len(prompts[choice // params.n])) if params.max_tokens is None else params.max_tokens
        tokens = _bounded("resume", output, most - 1)
        for token in tokens:
            _is_integer("resume", token, 0, self.vocab_size - 1)
        return tokens

    def _check_params(self, params: SamplingParams) -> SamplingParams:
        limits = self.limits
        for name, check in _SCALARS.items():
            check(name, getattr(params, name))
        _is_integer("n", params.n, 1, limits.max_n)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(params, name) is not None:
                _is_integer(name, getattr(params, name), 0, min(limits.max_logprobs, self.vocab_size))
        if params.max_tokens is not None:
            _is_integer("max_tokens", params.max_tokens, 1, self.max_model_len)
            if params.min_tokens > params.max_tokens:
                raise BadRequest("min_tokens", f"must be at most max_tokens = {params.max_tokens}, not {params.min_tokens}")
        _is_integer("min_tokens", params.min_tokens, 0, self.max_model_len)
        if params.seed is not None:
            _is_integer("seed", params.seed, -(2**63), 2**64 - 1)
        _is_string("grammar", params.grammar, 0, limits.max_grammar)
        return replace(
            params,
            ignore_eos=params.ignore_eos and not params.grammar,
            top_k=max(params.top_k, 0),
            stop=self._check_stop(params.stop),
            stop_token_ids=self._check_stop_ids(params.stop_token_ids),
            logit_bias=self._check_bias(params.logit_bias),
        )

    def _check_stop(self, given: Any) -> tuple[str, ...]:
        stop: tuple[str, ...] = _bounded("stop", given, self.limits.max_stop)
        for text in stop:
            _is_string("stop", text, 1, self.limits.max_stop_chars)
        return stop

    def _check_stop_ids(self, given: Any) -> tuple[int, ...]:
        ids: tuple[int, ...] = _bounded("stop_token_ids", given, self.limits.max_stop)
        for token in ids:
            _is_integer("stop_token_ids", token, 0, self.vocab_size - 1)
        return ids

    def _check_bias(self, bias: Any) -> dict[int, float]:
        if not isinstance(bias, dict):
            raise BadRequest("logit_bias", "must be a map from token id to bias")
        if len(bias) > self.limits.max_logit_bias:
            raise BadRequest("logit_bias", f"{len(bias)} entries; at most {self.limits.max_logit_bias} are allowed")
        for token, value in bias.items():
            _is_integer("logit_bias", token, 0, self.vocab_size - 1)
            _is_number("logit_bias", value, -100.0, 100.0)
        return {token: float(value) for token, value in bias.items()}


def check_default(name: str, value: Any) -> None:
    """Refuse a default of the sampling parameter `name` that no request could have given, whatever the model.

    Raises:
        BadRequest: it has the wrong type, or is out of bounds.
    """
    if name == "max_tokens":
        _is_integer(name, value, 1, 2**31 - 1)
    else:
        _SCALARS[name](name, value)


def _shown(value: Any) -> str:
    if type(value) is int and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _is_integer(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(name, f"must be an integer in [{low}, {high}], not {_shown(value)}")


def _is_number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    # NaN and infinities fail the comparison.
    if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
        raise BadRequest(name, f"must be a number in {'(' if above else '['}{low:g}, {high:g}], not {_shown(value)}")


def _is_string(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, str) or not low <= len(value) <= high:
        raise BadRequest(name, f"must be a string of {low} to {high} characters, not {_shown(value)}")


def _bounded(name: str, values: Any, most: int) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise BadRequest(name, "must be a list")
    if len(values) > most:
        raise BadRequest(name, f"{len(values)} entries; at most {most} are allowed")
    return tuple(values)


def _is_flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise BadRequest(name, f"must be true or false, not {_shown(value)}")


_SCALARS: dict[str, Callable[[str, Any], None]] = {
    "temperature": lambda name, value: _is_number(name, value, 0.0, 100.0),
    "top_p": lambda name, value: _is_number(name, value, 0.0, 1.0, above=True),
    "top_k": lambda name, value: _is_integer(name, value, -1, 2**31 - 1),
    "min_p": lambda name, value: _is_number(name, value, 0.0, 1.0),
    "presence_penalty": lambda name, value: _is_number(name, value, -2.0, 2.0),
    "frequency_penalty": lambda name, value: _is_number(name, value, -2.0, 2.0),
    "repetition_penalty": lambda name, value: _is_number(name, value, 0.0, 100.0, above=True),
    "min_tokens": lambda name, value: _is_integer(name, value, 0, 2**31 - 1),
    "ignore_eos": _is_flag,
}

_ELSEWHERE = {"n", "max_tokens", "logprobs", "prompt_logprobs", "seed", "stop", "stop_token_ids", "logit_bias", "grammar"}
if _SCALARS.keys() | _ELSEWHERE != {f.name for f in fields(SamplingParams)}:
    raise TypeError("a sampling parameter has no check at the door")
