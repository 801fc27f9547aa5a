"""`quire simulate`: a recorded trace on a cluster in virtual time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...worker.config import AutoscalingOptions, EngineOptions, ParallelOptions
from ..options import add_flags, build
from .arguments import CommandError, nonnegative_float, positive_float, positive_int

if TYPE_CHECKING:
    from ...cluster.simulator.jobs import Job
    from ...cluster.simulator.simulation import SimulationOptions
    from ...cluster.simulator.speed_profile import SpeedProfile
    from ..load.playing import Played

DEFAULT_PROFILE = "h200-llama-8b"
AUTOSCALING = frozenset(f.name for f in fields(AutoscalingOptions))  # as `quire serve` has them

_DESCRIPTION = """\
Plays a recorded trace on a cluster in virtual time: the real queue, routing, migration and autoscaling over replicas whose steps
take the time that a speed profile says (`quire profile` measures one; some are shipped). docs/simulator.md tells what is modelled.

  quire simulate --trace AzureLLMInferenceTrace_conv.csv.gz --replicas 2
  quire simulate --trace mooncake_trace.jsonl.gz --replicas 8 --policy round_robin --slo-ttft-ms 2000
  quire simulate --trace azure.csv.gz --multiply 20 --replicas 4 --autoscaler slo --target-ttft-ms 300 --max-replicas 20
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "simulate",
        help="play a trace on a simulated cluster",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is played")
    what.add_argument("--trace", type=Path, metavar="FILE", required=True, help="an Azure (CSV) or Mooncake (JSONL) trace, .gz too")
    what.add_argument("--num-requests", type=positive_int, metavar="N", help="at most the first N usable requests (default: all)")
    what.add_argument("--from-s", type=nonnegative_float, default=0.0, metavar="S", help="begin at this second of the trace (default: 0)")
    what.add_argument("--until-s", type=positive_float, default=float("inf"), metavar="S", help="leave out what comes later")
    what.add_argument("--speedup", type=positive_float, default=1.0, metavar="X", help="at the trace's times, X times as fast (default: 1)")
    what.add_argument(
        "--multiply",
        type=positive_float,
        default=1.0,
        metavar="X",
        help="X times as many requests, copies come within a minute (default: 1)",
    )
    what.add_argument("--scale", type=positive_float, default=1.0, metavar="X", help="divide the lengths by this (default: 1)")
    what.add_argument(
        "--max-request-tokens", type=positive_int, metavar="N", help="leave out longer requests (default: what a replica holds)"
    )
    what.add_argument("--one-session-in", type=positive_int, default=1, metavar="N", help="of a Mooncake trace, whole sessions, one in N")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of everything drawn at random (default: 0)")
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument(
        "--speed-profile", default=DEFAULT_PROFILE, metavar="NAME", help=f"a shipped profile or a file (default: {DEFAULT_PROFILE})"
    )
    cluster.add_argument("--replicas", type=positive_int, default=1, metavar="N", help="that are ready at the beginning (default: 1)")
    cluster.add_argument("--policy", default="cost", metavar="NAME", help="which replica takes a request, as `quire serve --routing`")
    cluster.add_argument("--queue-order", default="fair", choices=("fair", "fcfs"), help="as `quire serve --queue-order`")
    cluster.add_argument("--prefill-replicas", type=int, default=0, metavar="N", help="as `quire serve --prefill-replicas`")
    cluster.add_argument(
        "--migration", action=argparse.BooleanOptionalAction, default=True, help="running requests may move (default: yes)"
    )
    cluster.add_argument("--max-queue-wait-s", type=positive_float, metavar="S", help="refuse what would wait longer (default: nothing)")
    cluster.add_argument(
        "--hop-ms",
        type=nonnegative_float,
        default=1.0,
        metavar="MS",
        help="that a message from one process to another takes; a request's way there and back has four (default: 1)",
    )
    cluster.add_argument("--startup-s", type=nonnegative_float, metavar="S", help="of a replica (default: as the profile says)")
    add_flags(parser, AUTOSCALING)
    report = parser.add_argument_group("report")
    report.add_argument("--slo-ttft-ms", type=positive_float, metavar="MS", help="for goodput: first token within this")
    report.add_argument("--slo-tpot-ms", type=positive_float, metavar="MS", help="for goodput: mean time per later token within this")
    report.add_argument("--json", type=Path, metavar="FILE", help="write all figures, the timeline and every request")
    report.add_argument("--png", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when every request was served, 1 otherwise."""
    from ..load import playing
    from ..load.report import Slo
    from ..load.traces import WorkloadError

    try:
        options = _options(args)
        jobs = _jobs(args, options.profile)
    except (ValueError, WorkloadError) as error:
        raise CommandError(str(error)) from None
    begin_s = time.perf_counter()
    played = _played(options, jobs)
    took_s = time.perf_counter() - begin_s
    figures = played.figures(Slo(args.slo_ttft_ms, args.slo_tpot_ms))
    derived = "derived from a data sheet, not measured" if options.profile.derived else "measured"
    print(f"{args.trace.name} on {args.replicas} x {options.profile.name} ({derived}), policy {args.policy}\n\n{playing.table(figures)}")
    print(f"\n{played.end_s:.0f} s of the cluster in {took_s:.1f} s", file=sys.stderr)
    _write(args, options, played, figures, took_s)
    return 0 if figures["succeeded"] == figures["requests"] else 1


def _options(args: argparse.Namespace) -> SimulationOptions:
    from dataclasses import replace

    from ...cluster.autoscaling_setup import autoscaler_of
    from ...cluster.policies import POLICIES
    from ...cluster.simulator.simulation import NO_LIMITS, SimulationOptions
    from ...cluster.simulator.speed_profile import load

    profile = load(args.speed_profile)
    if args.startup_s is not None:
        profile = replace(profile, replica=replace(profile.replica, startup_s=args.startup_s))
    if args.policy not in POLICIES:
        raise CommandError(f"--policy: must be one of {', '.join(sorted(POLICIES))} (got {args.policy!r})")
    if not 0 <= args.prefill_replicas < args.replicas:
        raise CommandError(f"--prefill-replicas: must be from 0 to {args.replicas - 1} (got {args.prefill_replicas})")
    given = {name: value for name, value in vars(args).items() if name in AUTOSCALING or name == "config"}
    parallel = replace(EngineOptions(), parallel=ParallelOptions(tp=profile.replica.gpus))
    quire = replace(build(given), engine=parallel)
    scales = autoscaler_of(quire) is not None
    limits = NO_LIMITS if args.max_queue_wait_s is None else replace(NO_LIMITS, max_wait_s=args.max_queue_wait_s)
    return SimulationOptions(
        profile,
        args.replicas,
        args.policy,
        args.migration,
        args.prefill_replicas,
        args.queue_order,
        limits,
        hop_s=args.hop_ms / 1000,
        seed=args.seed,
        autoscaler=(lambda: autoscaler_of(quire)) if scales else None,
    )


def _jobs(args: argparse.Namespace, profile: SpeedProfile) -> list[Job]:
    from ..load.playing import Pace, jobs_of
    from ..load.traces import TraceOptions, trace_rows

    shape = profile.replica
    holds = min(shape.max_model_len, shape.pages * shape.page_size)
    options = TraceOptions(args.scale, min(args.max_request_tokens or holds, holds), args.one_session_in, seed=args.seed)
    jobs = jobs_of(
        trace_rows(args.trace, args.num_requests, options), options, Pace(args.from_s, args.until_s, args.speedup, args.multiply, args.seed)
    )
    if not jobs:
        raise CommandError(f"--from-s, --until-s: {args.trace} has no request in that time")
    return jobs


def _played(options: SimulationOptions, jobs: list[Job]) -> Played:
    from tqdm import tqdm

    from ..load.playing import play

    with tqdm(total=len(jobs), unit="request", file=sys.stderr, dynamic_ncols=True, mininterval=0.5) as bar:

        def done(job: Job) -> None:
            bar.update()

        return play(options, jobs, done)


def _write(args: argparse.Namespace, options: SimulationOptions, played: Played, figures: dict[str, Any], took_s: float) -> None:
    title = f"{args.trace.name}, {args.policy}"
    try:
        if args.json is not None:
            whole = {
                "trace": args.trace.name,
                "profile": asdict(options.profile),
                "policy": args.policy,
                "took_s": took_s,
                "summary": figures,
                "decisions": [d.as_json() for d in played.simulation.fleet.decisions],
                "timeline": [s._asdict() for s in played.simulation.timeline.samples],
                "requests": [asdict(o) for o in played.outcomes()],
            }
            args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        if args.png is not None:
            from ..load.playing_plot import write_png

            write_png(args.png, title, played, figures)
    except OSError as error:
        raise CommandError(f"cannot write {error.filename}: {error.strerror}") from None
    except ImportError:
        raise CommandError("--png needs matplotlib: pip install 'quire[bench]'") from None
