"""The routing policies against each other: recorded sessions on four real replicas, the same requests under each policy.

    python benchmarks/routing.py                               all four policies: about 17 minutes on two cores
    python benchmarks/routing.py --policies cost --one-session-in 120    a first look

The requests are sessions of Mooncake's conversation trace (one in 40, whole; kvcache-ai/Mooncake, FAST25-release/traces), with lengths
divided by 16: a 512-token block of the trace is one 32-token page here. Requests beyond 2,048 tokens are left out. The hour of the trace
is compressed so that requests arrive at 70 % of the rate that the replicas keep up with when nothing is reused, which a closed loop
without common prefixes measures first; under each policy it runs first, as a warm-up. The model is a Llama with random weights, large
enough that prefill, and not the way there, is what a first token waits for (8 layers, hidden size 512). Each replica has one thread, and
512 pages: a fraction of what the sessions' prompts fill.

Quire is started anew for each policy. A shared machine is not the same from minute to minute; the rate without reuse, which every run
prints, shows by how much, and `--rounds 2` runs all policies again, in reverse order. TTFT is seen by the client; the hit
rate is cached prompt tokens over prompt tokens, as the server's `usage` says. The goal: `cost` has the lowest TTFT, p50 and p99.
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

from quire.cluster.policies import POLICIES
from quire.deploy.load.report import percentile
from quire.deploy.load.traces import TraceOptions
from quire.deploy.load.workload import LoadRequest, trace_file

SCALE, MAX_TOKENS, VOCAB = 16, 2048, 257
LOAD = 0.7  # of what the replicas keep up with when nothing is reused
WARM_UP, STREAMS = 64, 16
QUIRE = [sys.executable, "-m", "quire.deploy.cli"]


def save_model(path: Path) -> None:
    """A Llama with random weights, and a tokenizer with one token for each byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * MAX_TOKENS,
        eos_token_id=VOCAB - 1,
        bos_token_id=VOCAB - 1,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def bench(url: str, *flags: object) -> dict[str, Any]:
    """What `quire bench` finds."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        command = [*QUIRE, "bench", "--url", url, "--vocab-size", str(VOCAB), "--json", report.name, *map(str, flags)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")
        found: dict[str, Any] = json.load(report)
    return found


def run_policy(policy: str, args: argparse.Namespace, model: Path, trace: list[LoadRequest], duration_s: float | None) -> dict[str, Any]:
    """One policy's figures. The first run is not told how long the trace is to take, and finds out."""
    flags = ["--replicas", args.replicas, "--routing", policy, "--threads", 1, "--kv-pages", args.kv_pages, "--page-size", 32]
    command = [*QUIRE, "serve", "--model", model, "--port", 0, "--admin-port", 0, *flags]
    print(f"{policy}: starting {args.replicas} replicas", file=sys.stderr)
    log = Path(tempfile.mkstemp(prefix=f"quire-routing-{policy}-", suffix=".log")[1])
    begin = time.monotonic()
    with log.open("w") as stderr:
        server = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        url = wait_until_ready(server, begin + START_TIMEOUT_S)
        if url is None:
            raise SystemExit(f"the server did not become ready:\n{log.read_text()[-3000:]}")
        inputs, outputs = (sum(lengths) // len(trace) for lengths in zip(*((len(r.prompt), r.output_tokens) for r in trace), strict=True))
        warm_up = ["--num-requests", WARM_UP, "--input-tokens", inputs, "--output-tokens", outputs, "--concurrency", STREAMS]
        per_s = bench(url, *warm_up)["summary"]["requests_per_s"]
        duration_s = duration_s or len(trace) / (per_s * args.load)
        print(f"{policy}: {per_s:.1f} requests/s without reuse; {len(trace)} requests in {duration_s:.0f} s", file=sys.stderr)
        sessions = ["--trace", args.trace, "--scale", SCALE, "--max-request-tokens", MAX_TOKENS, "--one-session-in", args.one_session_in]
        speedup = trace[-1].arrival_s / duration_s
        found = bench(url, *sessions, "--num-requests", len(trace), "--speedup", speedup, "--seed", args.seed)
    finally:
        stop(server)
    log.unlink()
    summary = found["summary"]
    return {
        "policy": policy,
        "prefix_hit_rate": round(summary["cached_tokens"] / summary["input_tokens"], 3),
        "output_tokens_per_s": round(summary["output_tokens_per_s"], 1),
        "input_tokens_per_s": round(summary["input_tokens_per_s"], 1),
        "requests_per_s": round(summary["requests_per_s"], 2),
        "tpot_p50_ms": round(summary["tpot_ms"]["p50"], 1),
        "without_reuse_requests_per_s": round(per_s, 2),
        "duration_s": duration_s,
        "ttft_ms": sorted(round(request["ttft_s"] * 1e3, 1) for request in found["requests"]),
    }


def pooled(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """All rounds of one policy as one: TTFT over all requests, the mean of everything else."""
    times = sorted(ms for row in rounds for ms in row["ttft_ms"])
    names = [name for name, value in rounds[0].items() if isinstance(value, float)]
    means = {name: round(sum(row[name] for row in rounds) / len(rounds), 3) for name in names}
    ttft = {f"ttft_p{p}_ms": round(percentile(times, p), 1) for p in (50, 99)}
    each = [round(percentile(row["ttft_ms"], 50), 1) for row in rounds]
    return {"policy": rounds[0]["policy"], **ttft, "ttft_p50_ms_of_rounds": each, **means, "ttft_ms": times}


def write_png(path: Path, figures: list[dict[str, Any]]) -> None:
    """What share of the requests had its first token by when."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for row in figures:
        times = row["ttft_ms"]
        axes.plot(
            times, [(i + 1) / len(times) for i in range(len(times))], label=f"{row['policy']} (hit rate {row['prefix_hit_rate']:.0%})"
        )
    axes.set(xscale="log", xlabel="time to first token, ms", ylabel="share of requests", ylim=(0, 1))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> int:
    here = Path(__file__).resolve()
    data = Path(os.environ.get("QUIRE_DATA", here.parents[2] / "shared" / "data"))
    results = here.parent / "results"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=data / "traces" / "mooncake_conversation_trace.jsonl.gz")
    parser.add_argument("--policies", nargs="+", choices=sorted(POLICIES), default=["round_robin", "power_of_two", "least_loaded", "cost"])
    parser.add_argument("--rounds", type=int, default=1, help="of all policies, every other one in reverse order")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--kv-pages", type=int, default=512, help="of each replica")
    parser.add_argument("--one-session-in", type=int, default=40, help="which excerpt of the trace")
    parser.add_argument("--load", type=float, default=LOAD, help="arrivals, as a share of what is kept up with when nothing is reused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=results / "routing.json")
    parser.add_argument("--png", type=Path, default=results / "routing.png")
    args = parser.parse_args()

    options = TraceOptions(SCALE, MAX_TOKENS, args.one_session_in, VOCAB, args.seed)
    trace = trace_file(args.trace, 100_000, options)
    tokens = sum(len(request.prompt) for request in trace)
    print(f"{len(trace)} requests, {tokens} prompt tokens, lengths / {SCALE}", file=sys.stderr)
    found: dict[str, list[dict[str, Any]]] = {policy: [] for policy in args.policies}
    duration_s = None
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory))
        for number in range(args.rounds):
            for policy in args.policies[:: 1 if number % 2 == 0 else -1]:
                found[policy].append(run_policy(policy, args, Path(directory), trace, duration_s))
                duration_s = found[policy][-1]["duration_s"]
    figures = [pooled(rounds) for rounds in found.values()]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: value for name, value in row.items() if name != "ttft_ms"} for row in figures]
    about = {
        "trace": args.trace.name,
        "requests": len(trace),
        "prompt_tokens": tokens,
        "scale": SCALE,
        "one_session_in": args.one_session_in,
    }
    about |= {"rounds": args.rounds, "replicas": args.replicas, "kv_pages": args.kv_pages, "load": args.load, "cpus": os.cpu_count()}
    args.json.write_text(json.dumps({"workload": about, "figures": rows}, indent=1) + "\n")
    write_png(args.png, figures)
    print(f"{'policy':<13} {'TTFT p50':>9} {'TTFT p99':>9} {'hit rate':>9} {'out tok/s':>10}")
    for row in rows:
        print(f"{row['policy']:<13} {row['ttft_p50_ms']:>6.0f} ms {row['ttft_p99_ms']:>6.0f} ms", end=" ")
        print(f"{row['prefix_hit_rate']:>9.1%} {row['output_tokens_per_s']:>10.1f}")
    best = [min(rows, key=lambda row: row[name])["policy"] for name in ("ttft_p50_ms", "ttft_p99_ms")]
    print(f"lowest TTFT: p50 {best[0]}, p99 {best[1]} (goal: cost, both)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
