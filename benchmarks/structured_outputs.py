"""What following a grammar costs a decode step: SmolLM2 on this CPU, so many streams, without grammars and with one for each.

    python benchmarks/structured_outputs.py [--streams 1,8,32] [--steps 60]

Steps are timed whole, and in them the masks (llguidance: taking in the last token, computing which may follow) and their application to
the logits. Each stream has a schema of its own and writes a long array of objects; a second round has them all at once, compiled already.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from quire import LLM, SamplingParams, grammar_of
from quire.worker import sampler
from quire.worker.constraint import Constraints


def schema(stream: int) -> dict[str, Any]:
    """An array that no answer comes to the end of."""
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
    return {"type": "array", "items": person, "minItems": 1000}


class Clock:
    """Milliseconds that calls of a function take, summed up until they are taken."""

    def __init__(self, owner: Any, name: str) -> None:
        self.ms = 0.0
        timed: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return timed(*args)
            finally:
                self.ms += (time.perf_counter() - began_s) * 1000

        setattr(owner, name, call)

    def take(self) -> float:
        ms, self.ms = self.ms, 0.0
        return ms


def decode_steps(llm: LLM, params: list[SamplingParams], clocks: list[Clock]) -> list[tuple[float, ...]]:
    """(the whole, each clock) of every step in which all streams decode, in milliseconds."""
    found: list[tuple[float, ...]] = []
    step = llm.engine.step

    def timed() -> Any:
        began_s = time.perf_counter()
        outputs = step()
        whole_ms = (time.perf_counter() - began_s) * 1000
        parts = [clock.take() for clock in clocks]
        if len(outputs) == len(params):
            found.append((whole_ms, *parts))
        return outputs

    llm.engine.step = timed  # type: ignore[method-assign]
    llm.generate([f"A list of people in town number {i} as JSON: " for i in range(len(params))], params)
    llm.engine.step = step  # type: ignore[method-assign]
    return found[2:]  # the first ones have prefills behind them


def main() -> None:
    """Print a row for each number of streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    llm = LLM("smollm2", progress=False, max_running=64)
    clocks = [Clock(Constraints, "allowed"), Clock(sampler, "_mask")]
    print("| streams | step without, ms | step with, ms | masks, ms | slowest masks, ms | applying them, ms |")
    print("|---|---|---|---|---|---|")
    for streams in map(int, args.streams.split(",")):
        free = [SamplingParams(max_tokens=args.steps, seed=i, ignore_eos=True) for i in range(streams)]
        bound = [SamplingParams(max_tokens=args.steps, seed=i, grammar=grammar_of(json_schema=schema(i))) for i in range(streams)]
        without = decode_steps(llm, free, clocks)
        decode_steps(llm, bound, clocks)
        follow = decode_steps(llm, bound, clocks)
        medians = [statistics.median(column) for column in zip(*follow, strict=True)]
        base = statistics.median(whole for whole, *_ in without)
        worst = max(masks for _, masks, _ in follow)
        print(f"| {streams} | {base:.1f} | {medians[0]:.1f} | {medians[1]:.2f} | {worst:.1f} | {medians[2]:.2f} |")


if __name__ == "__main__":
    main()
