"""The simulator against the real thing: the same requests on real replicas here, and on simulated ones with a profile measured here.

    python benchmarks/simulator_validation.py                    a replica of SmolLM2-135M on one thread: about 8 minutes on two cores
    python benchmarks/simulator_validation.py --requests 40      a first look

First `quire profile` measures as many engines at once as there will be replicas, since they share the machine. Then `quire serve` starts,
and lone requests, one at a time, tell how long a message between its processes takes (`quire simulate --hop-ms`): a quarter of what their
TTFT has beyond the steps. Then the first requests of the Azure conversation trace, with lengths divided by `--scale`, come at the trace's
times, sped up so that the simulated replicas are busy for `--busy` of what they can do (steady), and for three times as much (flood).
`quire bench` sends them to the server, and `quire simulate` plays them. Goal: TTFT p50 and output tokens/s are within 15 % of each other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_bench import START_TIMEOUT_S, stop, wait_until_ready

QUIRE = [sys.executable, "-m", "quire.deploy.cli"]
GOAL = 0.15
LONE, LONE_TOKENS, LONE_EVERY_S, LONE_SEED = 16, 96, 2, 1000  # requests that come alone: how many, of how many tokens, how often
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


def simulated(args: argparse.Namespace, path: Path, hop_ms: float, played: list[object], out: Path) -> dict[str, Any]:
    """The summary of a simulation of what the flags `played` say."""
    cluster = ["--replicas", args.replicas, "--policy", args.policy, "--speed-profile", path, "--hop-ms", hop_ms]
    quire("simulate", *played, *cluster, "--json", out)
    summary: dict[str, Any] = json.loads(out.read_text())["summary"]
    return summary


def sent(url: str, flags: list[object], seed: int, out: Path) -> dict[str, Any]:
    """The summary of a load on the real cluster, with prompts that no other seed has left in the cache."""
    quire("bench", "--url", url, *flags, "--vocab-size", 10_000, "--seed", seed, "--json", out)
    summary: dict[str, Any] = json.loads(out.read_text())["summary"]
    return summary


@contextmanager
def serving(args: argparse.Namespace, engine: list[object]) -> Iterator[str]:
    """The address of a cluster that is ready and warm."""
    flags = ["--replicas", args.replicas, "--routing", args.policy, *engine, "--max-queue-wait-s", 3600]
    command = [*QUIRE, "serve", "--model", args.model, "--port", "0", "--admin-port", "0", *map(str, flags)]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            url = wait_until_ready(server, begin + START_TIMEOUT_S)
            if url is None:
                raise SystemExit("the server did not become ready")
            quire("bench", "--url", url, "--num-requests", 8, "--input-tokens", 64, "--output-tokens", 8, "--concurrency", 4)
            yield url
        finally:
            stop(server)


def hop_ms(args: argparse.Namespace, path: Path, url: str, out: Path) -> float:
    """What a message takes: a quarter of the TTFT that lone requests have beyond that of a simulation without messages."""
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as lone:
        rows = (f"2023-11-16 00:{i * LONE_EVERY_S // 60:02d}:{i * LONE_EVERY_S % 60:02d}.000000,{LONE_TOKENS},2\n" for i in range(LONE))
        lone.write("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
        lone.flush()
        flags: list[object] = ["--trace", lone.name, "--speedup", 1]
        real, played = sent(url, flags, LONE_SEED, out), simulated(args, path, 0.0, flags, out)
    beyond_ms = real["ttft_ms"]["p50"] - played["ttft_ms"]["p50"]
    print(f"lone requests: TTFT p50 {real['ttft_ms']['p50']:.1f} ms, of which {beyond_ms:.1f} ms are not steps", file=sys.stderr)
    return max(beyond_ms / 4, 0.0)


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
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--scale", type=float, default=8.0)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--kv-pages", type=int, default=512)
    parser.add_argument("--busy", type=float, default=0.4)
    parser.add_argument("--profile-s", type=float, default=60.0)
    parser.add_argument("--json", type=Path, default=here.parent / "results" / "simulator_validation.json")
    args = parser.parse_args()
    engine: list[object] = ["--threads", 1, "--kv-pages", args.kv_pages]
    with tempfile.TemporaryDirectory() as directory:
        path, out = Path(directory) / "profile.json", Path(directory) / "out.json"
        speed, trace = profile(args, engine, path), lengths(args)
        with serving(args, engine) as url:
            hop = hop_ms(args, path, url, out)
            full = simulated(args, path, hop, [*trace, "--speedup", 1e6], out)  # all at once: what the replicas can do
            spans_s = simulated(args, path, hop, trace, out)["duration_s"]
            speedups = {name: spans_s / full["duration_s"] * share for name, share in (("steady", args.busy), ("flood", 3 * args.busy))}
            played, real = {}, {}
            for seed, (name, speedup) in enumerate(speedups.items()):
                print(f"{name}: the trace {speedup:.2f} times as fast", file=sys.stderr)
                flags = [*trace, "--speedup", speedup]
                played[name], real[name] = simulated(args, path, hop, flags, out), sent(url, flags, seed, out)
    found = {name: compare(real[name], played[name]) for name in speedups}
    errors = speed["error"]
    print(f"profile: {errors['steps']:.0f} steps, error of the fit {errors['median']:.1%} median, {errors['p90']:.1%} p90")
    print(f"a message: {hop:.1f} ms\n")
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
    whole = {"arguments": about, "goal": GOAL, "met": met, "hop_ms": hop, "figures": found, "profile": speed}
    args.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
