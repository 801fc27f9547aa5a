"""What a load test sends: prompts from a file, fixed lengths, or the lengths and times of a recorded trace.

Everything drawn at random comes from the seed, so a run can be repeated. A prompt is text, or token ids where the
length matters: traces give lengths only, and the ids are random (the model's answer is not looked at).
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

MOONCAKE_BLOCK_TOKENS = 512
# Below these ids tokenizers keep their special tokens.
_FIRST_TOKEN = 256


class WorkloadError(ValueError):
    """The file cannot be used; the message names it and the line."""


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


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a trace is cut to size: lengths are divided by `scale`; requests beyond `max_tokens` in all are left out.

    Of a Mooncake trace, `one_session_in` N takes one session in N and leaves out the others: the requests that follow each other in
    a session, and share a prefix, stay together, so that a small excerpt reuses as much as the whole.
    """

    scale: float = 1.0
    max_tokens: int | None = None
    one_session_in: int = 1
    vocab_size: int = 10_000
    seed: int = 0


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
    prompts = [_prompt_of(line, path, number) for number, line in _lines(path) if line.strip()]
    if not prompts:
        raise WorkloadError(f"{path} has no prompt")
    return [LoadRequest(prompt, output_tokens, exact=False) for prompt in itertools.islice(itertools.cycle(prompts), count)]


def trace_file(path: Path, count: int, options: TraceOptions) -> list[LoadRequest]:
    """The first `count` usable requests of an Azure (CSV) or Mooncake (JSONL) trace, which its first line tells apart.

    In Mooncake's, requests that share `hash_ids` get the same tokens there, so prefixes are shared as recorded.

    Raises:
        WorkloadError: it is neither, or no request in it is short enough.
    """
    lines = _lines(path)
    _, first = next(lines, (1, ""))
    if first.startswith("TIMESTAMP,"):
        rows = _azure(itertools.chain([(1, first)], lines), path, options)
    elif first.startswith("{") and "hash_ids" in first:
        rows = _mooncake(itertools.chain([(1, first)], lines), path, options)
    else:
        raise WorkloadError(f"{path} is neither an Azure trace (CSV with TIMESTAMP,...) nor a Mooncake trace (JSONL with hash_ids)")
    fitting = (row for row in rows if options.max_tokens is None or len(row.prompt) + row.output_tokens <= options.max_tokens)
    chosen = list(itertools.islice(fitting, count))
    if not chosen:
        raise WorkloadError(f"{path} has no request of at most {options.max_tokens} tokens; try a larger --scale")
    start_s = chosen[0].arrival_s
    return [LoadRequest(row.prompt, row.output_tokens, True, row.arrival_s - start_s) for row in chosen]


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


def _azure(lines: Iterable[tuple[int, str]], path: Path, options: TraceOptions) -> Iterator[LoadRequest]:
    draw = random.Random(f"{options.seed}:azure")
    for number, row in enumerate(csv.DictReader(line for _, line in lines), start=2):
        try:
            at_s = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp()  # microseconds; the trace has one digit more
            context, generated = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise WorkloadError(f"{path}:{number}: {error!r}") from None
        tokens = _random_tokens(draw, _scaled(context, options.scale), options.vocab_size)
        yield LoadRequest(tokens, _scaled(generated, options.scale), True, at_s)


def _mooncake(lines: Iterable[tuple[int, str]], path: Path, options: TraceOptions) -> Iterator[LoadRequest]:
    block_tokens = _scaled(MOONCAKE_BLOCK_TOKENS, options.scale)
    blocks: dict[int, tuple[int, ...]] = {}
    for number, line in lines:
        row = _json_object(line, path, number)
        try:
            length, output = _scaled(row["input_length"], options.scale), _scaled(row["output_length"], options.scale)
            hashes, at_s = row["hash_ids"], row["timestamp"] / 1000
        except (KeyError, TypeError) as error:
            raise WorkloadError(f"{path}:{number}: {error!r}") from None
        if options.max_tokens is not None and length + output > options.max_tokens:
            continue  # before its tokens are made
        session = hashes[:2]  # the first block is common to most of the trace
        if random.Random(f"{options.seed}:session:{session}").randrange(options.one_session_in):
            continue
        for block in hashes:
            if block not in blocks:
                blocks[block] = _random_tokens(random.Random(f"{options.seed}:{block}"), block_tokens, options.vocab_size)
        tokens = tuple(itertools.islice(itertools.chain.from_iterable(blocks[block] for block in hashes), length))
        yield LoadRequest(tokens, output, True, at_s)


def _scaled(tokens: int, scale: float) -> int:
    return max(1, math.ceil(tokens / scale))


def _random_tokens(draw: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    first = _FIRST_TOKEN if vocab_size >= 2 * _FIRST_TOKEN else 0
    return tuple(draw.choices(range(first, vocab_size), k=count))


def _prompt_of(line: str, path: Path, number: int) -> str:
    if not line.startswith("{"):
        return line.strip()
    row = _json_object(line, path, number)
    prompt = row.get("prompt") or row.get("question") or next(iter(row.get("turns") or ()), None)
    if not isinstance(prompt, str):
        raise WorkloadError(f"{path}:{number}: has none of the keys prompt, question, turns")
    return prompt


def _json_object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise WorkloadError(f"{path}:{number}: is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise WorkloadError(f"{path}:{number}: is not a JSON object")
    return row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file or a gzipped one."""
    try:
        file: TextIO
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from None
