"""What following a grammar costs a step: computing the masks, and applying them on the CPU. SmolLM2's 49,152 tokens, no model.

    python benchmarks/structured_outputs.py [--streams 1,8,32,256]

Each stream has a schema of its own and writes a list of people that follows it, token by token. Milliseconds of a step for all streams
together: CPU time of all threads, which a busy machine does not change much, and wall time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from quire import SamplingParams, grammar_of
from quire.worker import sampler
from quire.worker.constraint import Constraints, Wanted
from quire.worker.plan import NewSequence
from quire.worker.text.source import resolve_model
from quire.worker.text.tokenizer import load_tokenizer

PEOPLE = 6


def schema(stream: int) -> dict[str, Any]:
    """A list of people."""
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40 + stream},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "role": {"enum": ["doctor", "teacher", "smith", f"number {stream}"]},
            "address": {"type": "object", "properties": {"street": {"type": "string"}, "city": {"type": "string"}}},
        },
        "required": ["name", "age", "role", "address"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": person}


def people(stream: int) -> str:
    """What the stream writes."""
    draw = random.Random(stream)
    return json.dumps(
        [
            {
                "name": draw.choice(["Ann Smith", "Robert Miller", "Jo", "Maria del Mar", "Wei Chen"]),
                "age": draw.randint(1, 99),
                "role": draw.choice(["doctor", "teacher", "smith", f"number {stream}"]),
                "address": {"street": draw.choice(["12 High Street", "4 Rue de la Paix", "Hauptstr. 9"]), "city": "Paris"},
            }
            for _ in range(PEOPLE)
        ]
    )


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """(CPU ms, wall ms, result)."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    result = work()
    return (time.process_time() - cpu_s) * 1000, (time.perf_counter() - wall_s) * 1000, result


def measure(streams: int) -> None:
    """Print the row of so many streams."""
    tokenizer = load_tokenizer(resolve_model("smollm2"))
    constraints = Constraints(lambda: tokenizer, (2,), tokenizer.vocab_size)
    params = [SamplingParams(grammar=grammar_of(json_schema=schema(stream))) for stream in range(streams)]
    texts = [np.array(tokenizer.encode(people(stream)), np.int32) for stream in range(streams)]
    masks, applied = [], []
    logits = torch.randn(streams, tokenizer.vocab_size)
    for stream, one in enumerate(params):
        constraints.learn(NewSequence(stream, (), 0, (), one, 0))
    for length in range(min(map(len, texts))):
        wanted = {stream: Wanted(stream, one, texts[stream][:length]) for stream, one in enumerate(params)}
        cpu_ms, wall_ms, allowed = timed(lambda wanted=wanted: constraints.allowed(wanted))
        masks.append((cpu_ms, wall_ms))
        tokens = [sampler.SamplingRow(one, 0, length, 0, texts[stream][:length], allowed[stream]) for stream, one in enumerate(params)]
        applied.append(timed(lambda tokens=tokens: sampler._mask(logits, tokens))[:2])
    constraints.close()
    (cpu_ms, wall_ms), (apply_cpu_ms, _) = np.median(masks, axis=0), np.median(applied, axis=0)
    slow_ms = np.quantile([cpu_ms for cpu_ms, _ in masks], 0.99)
    print(f"| {streams} | {cpu_ms:.2f} | {slow_ms:.2f} | {wall_ms:.2f} | {apply_cpu_ms:.2f} |")


def main() -> None:
    """Print a row for each number of streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,8,32,256")
    args = parser.parse_args()
    print("| streams | masks, CPU ms | 99th percentile | masks, wall ms | applying them, CPU ms |\n|---|---|---|---|---|")
    for streams in map(int, args.streams.split(",")):
        measure(streams)


if __name__ == "__main__":
    main()
