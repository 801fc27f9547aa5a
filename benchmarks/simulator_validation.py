"""The simulator against the real thing: the same requests on real replicas here, and on simulated ones with a profile measured here.

    python benchmarks/simulator_validation.py                    two replicas of SmolLM2-135M, one thread each: about 5 minutes on two cores
    python benchmarks/simulator_validation.py --requests 40      a first look

First `quire profile` measures as many engines at once as there will be replicas, since they share the machine. Then the first requests of
the Azure conversation trace, with lengths divided by `--scale`, come at the trace's times, sped up so that the simulated replicas are busy
for `--busy` of what they can do (steady), and for three times as much (flood). `quire bench` sends them to a running `quire serve`, and
`quire simulate` plays them. Goal: TTFT p50 and output tokens/s are within 15 % of each other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serve_bench import START_TIMEOUT_S, stop, wait_until_ready

QUIRE = [sys.executable, "-m", "quire.deploy.cli"]
GOAL = 0.15
KEYS = {"TTFT p50 ms": ("ttft_ms", "p50"), "TTFT p90 ms": ("ttft_ms", "p90"), "TPOT p50 ms": ("tpot_ms", "p50")}


def quire(*arguments: object) -> None:
    """One command, which must succeed."""
    done = subprocess.run([*QUIRE, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"quire {' '.join(map(str, arguments))} failed:\n{done.stdout}")


def profile(args: argparse.Namespace, engine: list[object], path: Path) -> dict[str, Any]:
    """Measured by one of several that run at once."""
    command = [*QUIRE, "profile", "--model", args.model, *map(str, engine), "--seconds", str(args.profile_s), "--name", "here", "--json"]
    others = [
        subprocess.Popen([*command, os.devnull], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(args.replicas - 1)
    ]
    try:
        if subprocess.run([*command, str(path)], check=False).returncode:
            raise SystemExit("quire profile failed")
    finally:
        for other in others:
            other.wait()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def lengths(args: argparse.Namespace) -> list[object]:
    """Flags that both sides get: which requests."""
    return ["--trace", args.trace, "--num-requests", args.requests, "--scale", args.scale, "--max-request-tokens", args.max_tokens]


def simulated(args: argparse.Namespace, path: Path, speedup: float, out: Path) -> dict[str, Any]:
    """The summary of a simulation."""
    cluster = ["--replicas", args.replicas, "--policy", args.policy, "--speed-profile", path]
    quire("simulate", *lengths(args), *cluster, "--speedup", speedup, "--json", out)
    summary: dict[str, Any] = json.loads(out.read_text())["summary"]
    return summary


def live(args: argparse.Namespace, engine: list[object], speedups: dict[str, float], out: Path) -> dict[str, dict[str, Any]]:
    """The summaries of the real cluster, one after the other."""
    flags = ["--replicas", args.replicas, "--routing", args.policy, *engine, "--max-queue-wait-s", 3600]
    command = [*QUIRE, "serve", "--model", args.model, "--port", "0", "--admin-port", "0", *map(str, flags)]
    begin = time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryFile("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            url = wait_until_ready(server, begin + START_TIMEOUT_S)
            if url is None:
                raise SystemExit("the server did not become ready")
            quire("bench", "--url", url, "--num-requests", 8, "--input-tokens", 64, "--output-tokens", 8, "--concurrency", 4)  # warm up
            for seed, (name, speedup) in enumerate(speedups.items()):
                print(f"live, {name}: the trace {speedup:.2f} times as fast", file=sys.stderr)
                prompts = ["--vocab-size", 10_000, "--seed", seed]  # not those that a load before has left in the cache
                quire("bench", "--url", url, *lengths(args), *prompts, "--speedup", speedup, "--json", out)
                found[name] = json.loads(out.read_text())["summary"]
        finally:
            stop(server)
    return found


def compare(real: dict[str, Any], played: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Figure -> both, and how far the simulated one is off."""
    pairs = {name: (real[a][b], played[a][b]) for name, (a, b) in KEYS.items()}
    pairs["output tokens/s"] = real["output_tokens_per_s"], played["output_tokens_per_s"]
    return {name: {"live": a, "simulated": b, "off": b / a - 1} for name, (a, b) in pairs.items()}


def main() -> int:
    here = Path(__file__).resolve()
    data = Path(os.environ.get("QUIRE_DATA", here.parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=data / "traces" / "AzureLLMInferenceTrace_conv.csv.gz")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--scale", type=float, default=8.0)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--kv-pages", type=int, default=512)
    parser.add_argument("--busy", type=float, default=0.6)
    parser.add_argument("--profile-s", type=float, default=30.0)
    parser.add_argument("--json", type=Path, default=here.parent / "results" / "simulator_validation.json")
    args = parser.parse_args()
    engine: list[object] = ["--threads", 1, "--kv-pages", args.kv_pages]
    with tempfile.TemporaryDirectory() as directory:
        path, out = Path(directory) / "profile.json", Path(directory) / "out.json"
        speed = profile(args, engine, path)
        full = simulated(args, path, 1e6, out)  # all at once: what the replicas can do
        spans_s = simulated(args, path, 1.0, out)["duration_s"]
        speedups = {name: spans_s / full["duration_s"] * share for name, share in (("steady", args.busy), ("flood", 3 * args.busy))}
        played = {name: simulated(args, path, speedup, out) for name, speedup in speedups.items()}
        real = live(args, engine, speedups, out)
    found = {name: compare(real[name], played[name]) for name in speedups}
    errors = speed["error"]
    print(f"profile: {errors['steps']:.0f} steps, error of the fit {errors['median']:.1%} median, {errors['p90']:.1%} p90\n")
    print(f"{'':<26}{'live':>12}{'simulated':>12}{'off':>9}")
    met = True
    for name, rows in found.items():
        for what, row in rows.items():
            goal = what in ("TTFT p50 ms", "output tokens/s")
            met &= not goal or abs(row["off"]) <= GOAL
            mark = ("  goal met" if abs(row["off"]) <= GOAL else "  goal missed") if goal else ""
            print(f"{name + ', ' + what:<26}{row['live']:>12.1f}{row['simulated']:>12.1f}{row['off']:>+9.1%}{mark}")
    about = {k: str(v) for k, v in vars(args).items() if k not in ("json", "trace")} | {"trace": args.trace.name, "cpus": os.cpu_count()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"arguments": about, "goal": GOAL, "met": met, "figures": found, "profile": speed}, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
