"""Recorded traces: when requests came, and how long they were. Text and tokens are not in them."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

MOONCAKE_BLOCK_TOKENS = 512


class WorkloadError(ValueError):
    """The file cannot be used; the message names it and the line."""


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

    @property
    def block_tokens(self) -> int:
        """Tokens of a Mooncake block."""
        return scaled(MOONCAKE_BLOCK_TOKENS, self.scale)


class TraceRow(NamedTuple):
    """One request of a trace.

    Attributes:
        at_s: when it came, on the trace's own clock.
        blocks: ids of the prompt's blocks (Mooncake): the same id means the same tokens, there and before. Empty in Azure's.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def trace_rows(path: Path, count: int | None, options: TraceOptions) -> list[TraceRow]:
    """The first `count` usable requests of an Azure (CSV) or Mooncake (JSONL) trace, which its first line tells apart; None: all.

    Raises:
        WorkloadError: it is neither, or no request in it is short enough.
    """
    numbered = lines(path)
    _, first = next(numbered, (1, ""))
    whole = itertools.chain([(1, first)], numbered)
    if first.startswith("TIMESTAMP,"):
        rows = _azure(whole, path, options)
    elif first.startswith("{") and "hash_ids" in first:
        rows = _mooncake(whole, path, options)
    else:
        raise WorkloadError(f"{path} is neither an Azure trace (CSV with TIMESTAMP,...) nor a Mooncake trace (JSONL with hash_ids)")
    fitting = (row for row in rows if options.max_tokens is None or row.prompt_tokens + row.output_tokens <= options.max_tokens)
    chosen = list(itertools.islice(fitting, count))
    if not chosen:
        raise WorkloadError(f"{path} has no request of at most {options.max_tokens} tokens; try a larger --scale")
    return chosen


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file or a gzipped one.

    Raises:
        WorkloadError: it cannot be read.
    """
    try:
        file: TextIO
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from None


def json_object(line: str, path: Path, number: int) -> dict[str, Any]:
    """One line of JSON.

    Raises:
        WorkloadError: it is none, or no object.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise WorkloadError(f"{path}:{number}: is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise WorkloadError(f"{path}:{number}: is not a JSON object")
    return row


def scaled(tokens: int, scale: float) -> int:
    """A length divided by `scale`, rounded up."""
    return max(1, math.ceil(tokens / scale))


def _azure(numbered: Iterable[tuple[int, str]], path: Path, options: TraceOptions) -> Iterator[TraceRow]:
    for number, row in enumerate(csv.DictReader(line for _, line in numbered), start=2):
        try:
            at_s = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp()  # microseconds; the trace has one digit more
            context, generated = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise WorkloadError(f"{path}:{number}: {error!r}") from None
        yield TraceRow(at_s, scaled(context, options.scale), scaled(generated, options.scale))


def _mooncake(numbered: Iterable[tuple[int, str]], path: Path, options: TraceOptions) -> Iterator[TraceRow]:
    for number, line in numbered:
        row = json_object(line, path, number)
        try:
            length, output = scaled(row["input_length"], options.scale), scaled(row["output_length"], options.scale)
            blocks, at_s = tuple(row["hash_ids"]), row["timestamp"] / 1000
        except (KeyError, TypeError) as error:
            raise WorkloadError(f"{path}:{number}: {error!r}") from None
        session = list(blocks[:2])  # the first block is common to most of the trace
        if not random.Random(f"{options.seed}:session:{session}").randrange(options.one_session_in):
            yield TraceRow(at_s, length, output, blocks)
