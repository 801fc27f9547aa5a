"""What a load test sends: prompts from a file, fixed lengths, or the lengths and times of a recorded trace.

Everything drawn at random comes from the seed, so a run can be repeated. A prompt is text, or token ids where the
length matters: traces give lengths only, and the ids are random (the model's answer is not looked at).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .traces import TraceOptions, TraceRow, WorkloadError, json_object, lines, trace_rows

# Below these ids tokenizers keep their special tokens.
_FIRST_TOKEN = 256


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request to send.

    Attributes:
        prompt: text or token ids.
        output_tokens: tokens asked for.
        exact: end-of-sequence is ignored, so that exactly `output_tokens` come.
        arrival_s: seconds after the first request, by the trace; 0 elsewhere.
    """

    prompt: str | tuple[int, ...]
    output_tokens: int
    exact: bool
    arrival_s: float = 0.0


def fixed_lengths(count: int, input_tokens: int, output_tokens: int, options: TraceOptions) -> list[LoadRequest]:
    """`count` prompts of random token ids, no two with a common prefix to speak of."""
    draw = random.Random(f"{options.seed}:fixed")
    return [LoadRequest(_random_tokens(draw, input_tokens, options.vocab_size), output_tokens, exact=True) for _ in range(count)]


def prompts_file(path: Path, count: int, output_tokens: int) -> list[LoadRequest]:
    """The first `count` prompts of a file, from the start again when it has fewer.

    A line is text, or JSON with one of the keys `prompt`, `question` (gsm8k) or `turns` (MT-bench: the first turn). `.gz` is unpacked.

    Raises:
        WorkloadError: the file cannot be read, or has no prompt.
    """
    prompts = [_prompt_of(line, path, number) for number, line in lines(path) if line.strip()]
    if not prompts:
        raise WorkloadError(f"{path} has no prompt")
    return [LoadRequest(prompt, output_tokens, exact=False) for prompt in itertools.islice(itertools.cycle(prompts), count)]


def trace_file(path: Path, count: int, options: TraceOptions) -> list[LoadRequest]:
    """The first `count` usable requests of an Azure (CSV) or Mooncake (JSONL) trace, which its first line tells apart.

    In Mooncake's, requests that share `hash_ids` get the same tokens there, so prefixes are shared as recorded.

    Raises:
        WorkloadError: it is neither, or no request in it is short enough.
    """
    rows = trace_rows(path, count, options)
    random_tokens, blocks = random.Random(f"{options.seed}:trace"), _Blocks(options)
    prompts = (blocks.tokens(r) if r.blocks else _random_tokens(random_tokens, r.prompt_tokens, options.vocab_size) for r in rows)
    return [LoadRequest(prompt, row.output_tokens, True, row.at_s - rows[0].at_s) for row, prompt in zip(rows, prompts, strict=True)]


def arrivals(requests: Sequence[LoadRequest], rate: float | None, speedup: float | None, seed: int) -> list[float] | None:
    """When each request is sent, in seconds after the start: Poisson at `rate` a second, or the trace's times, `speedup` times as
    fast. None, when neither is given, is a closed loop."""
    if speedup is not None:
        return [request.arrival_s / speedup for request in requests]
    if rate is None:
        return None
    draw = random.Random(f"{seed}:arrivals")
    gaps = (draw.expovariate(rate) for _ in requests[1:])
    return list(itertools.accumulate(gaps, initial=0.0))


class _Blocks:
    """The tokens of Mooncake's blocks, which are the same wherever a block stands."""

    def __init__(self, options: TraceOptions) -> None:
        self._options = options
        self._known: dict[int, tuple[int, ...]] = {}

    def tokens(self, row: TraceRow) -> tuple[int, ...]:
        """The prompt of a request."""
        options = self._options
        for block in row.blocks:
            if block not in self._known:
                draw = random.Random(f"{options.seed}:{block}")
                self._known[block] = _random_tokens(draw, options.block_tokens, options.vocab_size)
        return tuple(itertools.islice(itertools.chain.from_iterable(self._known[block] for block in row.blocks), row.prompt_tokens))


def _random_tokens(draw: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    first = _FIRST_TOKEN if vocab_size >= 2 * _FIRST_TOKEN else 0
    return tuple(draw.choices(range(first, vocab_size), k=count))


def _prompt_of(line: str, path: Path, number: int) -> str:
    if not line.startswith("{"):
        return line.strip()
    row = json_object(line, path, number)
    prompt = row.get("prompt") or row.get("question") or next(iter(row.get("turns") or ()), None)
    if not isinstance(prompt, str):
        raise WorkloadError(f"{path}:{number}: has none of the keys prompt, question, turns")
    return prompt
