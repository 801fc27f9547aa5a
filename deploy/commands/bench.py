"""`quire bench`: load a running server and report latency, throughput and goodput."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import CommandError, add_server_arguments, nonnegative_float, positive_float, positive_int, server_of

if TYPE_CHECKING:
    from ..load.client import Outcome
    from ..load.http import Server
    from ..load.workload import LoadRequest

_DESCRIPTION = """\
Loads the completions endpoint of a running server (Quire's, or any that speaks OpenAI's API) and reports time to first
token (TTFT), time per output token (TPOT), latency, throughput, and goodput under limits that you name.

  quire bench                                              128 tokens in, 128 out, 8 at a time
  quire bench --prompts questions.jsonl.gz --output-tokens 64
  quire bench --trace AzureLLMInferenceTrace_conv.csv.gz --speedup 2 --slo-ttft-ms 500 --slo-tpot-ms 50
  quire bench --trace mooncake_trace.jsonl.gz --scale 16 --rate 4 --json out.json --png out.png
"""


def add_parser(commands: Any, api_key: str | None) -> None:
    """`api_key` is the default of --api-key."""
    parser = commands.add_parser(
        "bench", help="measure a running server under load", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_arguments(parser, api_key)
    what = parser.add_argument_group("what is sent")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line: text, or JSON as in MT-bench or gsm8k (.gz too)")
    source.add_argument("--trace", type=Path, metavar="FILE", help="lengths and times of an Azure (CSV) or Mooncake (JSONL) trace")
    what.add_argument("--num-requests", type=positive_int, default=64, metavar="N", help="how many requests (default: 64)")
    what.add_argument("--input-tokens", type=positive_int, default=128, metavar="N", help="tokens in, without a file (default: 128)")
    what.add_argument("--output-tokens", type=positive_int, default=128, metavar="N", help="tokens out, without a trace (default: 128)")
    what.add_argument("--scale", type=positive_float, default=1.0, metavar="X", help="divide the lengths of a trace by this (default: 1)")
    what.add_argument(
        "--max-request-tokens", type=positive_int, metavar="N", help="leave out longer requests of a trace (default: what /v1/models says)"
    )
    what.add_argument(
        "--one-session-in",
        type=positive_int,
        default=1,
        metavar="N",
        help="of a Mooncake trace, take whole sessions, one in N (default: 1)",
    )
    what.add_argument("--vocab-size", type=positive_int, default=10_000, metavar="N", help="bound of random token ids (default: 10000)")
    what.add_argument("--temperature", type=nonnegative_float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of everything drawn at random (default: 0)")
    what.add_argument("--priority", choices=("high", "normal", "low"), help="of every request (Quire's own field; default: none is sent)")
    what.add_argument("--deadline-ms", type=positive_int, metavar="MS", help="how long a request may wait for its turn (Quire's own field)")
    when = parser.add_argument_group("when (one of)").add_mutually_exclusive_group()
    when.add_argument("--concurrency", type=positive_int, default=8, metavar="N", help="closed loop: so many at any time (default: 8)")
    when.add_argument("--rate", type=positive_float, metavar="X", help="open loop: so many a second on average (Poisson)")
    when.add_argument("--speedup", type=positive_float, metavar="X", help="open loop: at the trace's own times, so many times as fast")
    report = parser.add_argument_group("report")
    report.add_argument("--slo-ttft-ms", type=positive_float, metavar="MS", help="for goodput: first token within this")
    report.add_argument("--slo-tpot-ms", type=positive_float, metavar="MS", help="for goodput: mean time per later token within this")
    report.add_argument("--json", type=Path, metavar="FILE", help="write all figures and every request")
    report.add_argument("--png", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when every request succeeded, 1 otherwise."""
    if args.speedup is not None and args.trace is None:
        raise CommandError("--speedup needs --trace: only a trace has times of its own")
    import uvloop  # light enough not to be what is measured

    from ..load.http import HttpError
    from ..load.traces import WorkloadError

    server = server_of(args)
    try:
        model, max_tokens = uvloop.run(_served_model(server, args.model))
        requests = _requests(args, max_tokens)
        outcomes, duration_s = uvloop.run(_load(server, requests, args, model))
    except (HttpError, WorkloadError) as error:
        raise CommandError(str(error)) from None
    return _report(args, model, outcomes, duration_s)


async def _served_model(server: Server, wanted: str | None) -> tuple[str, int | None]:
    """Name of the model to ask for, and its length limit where the server tells."""
    models = await server.models()
    name = wanted or next(iter(models))
    return name, models.get(name, {}).get("max_model_len")


def _requests(args: argparse.Namespace, max_model_tokens: int | None) -> list[LoadRequest]:
    from ..load import workload
    from ..load.traces import TraceOptions

    if args.prompts is not None:
        return workload.prompts_file(args.prompts, args.num_requests, args.output_tokens)
    max_tokens = args.max_request_tokens or max_model_tokens
    options = TraceOptions(args.scale, max_tokens, args.one_session_in, args.vocab_size, args.seed)
    if args.trace is not None:
        return workload.trace_file(args.trace, args.num_requests, options)
    return workload.fixed_lengths(args.num_requests, args.input_tokens, args.output_tokens, options)


async def _load(server: Server, requests: list[LoadRequest], args: argparse.Namespace, model: str) -> tuple[list[Outcome], float]:
    from tqdm import tqdm

    from ..load.client import LoadRun, Sampling
    from ..load.workload import arrivals

    sampling = Sampling(model, args.temperature, args.seed if args.temperature else None, args.priority, args.deadline_ms)
    times_s = arrivals(requests, args.rate, args.speedup, args.seed)
    failed = output_tokens = 0
    with tqdm(total=len(requests), unit="request", file=sys.stderr, dynamic_ncols=True) as bar:

        def done(outcome: Outcome) -> None:
            nonlocal failed, output_tokens
            failed += outcome.error is not None
            output_tokens += outcome.output_tokens
            bar.set_postfix(tokens=output_tokens, failed=failed, refresh=False)
            bar.update()

        load = LoadRun(server, sampling, done)
        outcomes = await (load.closed(requests, args.concurrency) if times_s is None else load.open(requests, times_s))
    return outcomes, max(outcome.start_s + outcome.latency_s for outcome in outcomes)


def _report(args: argparse.Namespace, model: str, outcomes: list[Outcome], duration_s: float) -> int:
    from ..load import report

    summary = report.summarize(outcomes, duration_s, report.Slo(args.slo_ttft_ms, args.slo_tpot_ms))
    what = _what(args)
    print(f"{model} at {args.url}: {what}\n\n{report.table(summary)}")
    messages = {outcome.error: outcome.message for outcome in outcomes if outcome.error is not None}
    for kind, message in messages.items():
        print(f"{kind}: for example: {message}", file=sys.stderr)
    try:
        if args.json is not None:
            figures = {"model": model, "url": args.url, "workload": what, "summary": summary, "requests": [asdict(o) for o in outcomes]}
            args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        if args.png is not None:
            from ..load.plot import write_png

            write_png(args.png, f"{model}: {what}", outcomes, summary)
    except OSError as error:
        raise CommandError(f"cannot write {error.filename}: {error.strerror}") from None
    except ImportError:
        raise CommandError("--png needs matplotlib: pip install 'quire[bench]'") from None
    return 0 if summary["succeeded"] == summary["requests"] else 1


def _what(args: argparse.Namespace) -> str:
    """The workload in words."""
    if args.prompts is not None:
        lengths = f"prompts of {args.prompts.name}, at most {args.output_tokens} tokens out"
    elif args.trace is not None:
        lengths = f"trace {args.trace.name}" + (f", lengths / {args.scale:g}" if args.scale != 1 else "")
    else:
        lengths = f"{args.input_tokens} tokens in, {args.output_tokens} out"
    if args.speedup is not None:
        return f"{lengths}, at the trace's times x {args.speedup:g}"
    return f"{lengths}, {args.rate:g} a second" if args.rate is not None else f"{lengths}, {args.concurrency} at a time"
