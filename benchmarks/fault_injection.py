"""Thousands of clusters in virtual time, each with faults of its own: does every one of them keep the invariants?

    python benchmarks/fault_injection.py --runs 10000
    python benchmarks/fault_injection.py --seed 123 -v     # one of them, told as it happens

What is simulated, what goes wrong and what must hold is said in tests/cluster/fault_simulation.py. The data are random prompts of a
model that is a hash of its context. The limit is 0 broken runs.
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "cluster"), str(TESTS / "worker")]

from fault_simulation import Result, simulate  # noqa: E402 (from the tests' folders)


def run_seed(seed: int) -> tuple[int, Result | None, str]:
    """(seed, what it came to, what was wrong)."""
    logging.disable(logging.CRITICAL)
    try:
        return seed, simulate(seed), ""
    except Exception as error:  # noqa: BLE001  whatever a bug raises is the finding
        return seed, None, f"{type(error).__name__}: {error}"


def show(seed: int, verbose: bool) -> None:
    """One run, in this process, with what happens in it."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="         %(message)s", stream=sys.stdout)
    print(simulate(seed, verbose))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, help="only this one, in this process")
    parser.add_argument("-v", "--verbose", action="store_true", help="with --seed: tell what happens")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    args = parser.parse_args()
    if args.seed is not None:
        show(args.seed, args.verbose)
        return 0
    started_s = time.perf_counter()
    outcomes: Counter[str] = Counter()
    results: list[Result] = []
    migrations: Counter[str] = Counter()
    broken: dict[int, str] = {}
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        seeds = range(args.first, args.first + args.runs)
        for seed, result, wrong in tqdm(pool.imap_unordered(run_seed, seeds, chunksize=8), total=args.runs, unit="run"):
            if result is None:
                broken[seed] = wrong
                tqdm.write(f"seed {seed}: {wrong}\n    python benchmarks/fault_injection.py --seed {seed} -v")
            else:
                results.append(result)
                outcomes.update(result.outcomes)
                migrations.update(result.migrations)
    figures: dict[str, Any] = {
        "runs": args.runs,
        "broken": len(broken),
        "requests": outcomes.total(),
        "outcomes": dict(outcomes.most_common()),
        "migrations": dict(migrations.most_common()),
        "replica_deaths": sum(r.deaths for r in results),
        "requests_that_lost_their_replica": sum(r.lost for r in results),
        "requests_resumed": sum(r.resumed for r in results),
        "virtual_seconds_median": round(statistics.median(r.end_s for r in results), 1) if results else None,
        "wall_seconds": round(time.perf_counter() - started_s, 1),
    }
    print(f"{args.runs - len(broken)} of {args.runs} runs keep every invariant (limit: all of them)")
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures | {"broken_seeds": broken}, indent=2) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
