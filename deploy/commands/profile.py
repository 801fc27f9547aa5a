"""`quire profile`: how fast the engine is on this machine, as a speed profile for `quire simulate`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import CommandError, positive_float, positive_int

if TYPE_CHECKING:
    from ...cluster.simulator.fit import Fit
    from ...cluster.simulator.speed_profile import SpeedProfile

_DESCRIPTION = """\
Measures what steps of the real engine take on this machine, by the tokens, sequences and contexts in them, and fits the formula of
docs/simulator.md to that.

  quire profile --json here.json
  quire profile --model some/directory --threads 1 --seconds 120 --json one-thread.json
"""
_ENGINE = ("dtype", "threads", "quantize", "kv_pages", "max_batch_tokens", "max_running")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="measure this machine for the simulator",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="as `quire serve --model` (default: smollm2)")
    parser.add_argument("--dtype", help="as `quire serve --dtype`; so the next five")
    parser.add_argument("--quantize", choices=("int8",))
    parser.add_argument("--threads", type=positive_int, metavar="N")
    parser.add_argument("--kv-pages", type=positive_int, metavar="N")
    parser.add_argument("--max-batch-tokens", type=positive_int, metavar="N")
    parser.add_argument("--max-running", type=positive_int, metavar="N")
    parser.add_argument("--seconds", type=positive_float, default=60.0, metavar="S", help="to spend on measuring (default: 60)")
    parser.add_argument("--name", help="of the profile (default: model and machine)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the profile")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        profile, found = measured(args)
    except ValueError as error:
        raise CommandError(str(error)) from None
    step = profile.step
    print(f"{profile.name}: {found.steps} steps measured")
    print(f"  base           {1e3 * step.base_s:10.3f} ms a step")
    print(f"  token          {1e6 * step.token_s:10.3f} us, of at least {step.knee_tokens:g} tokens")
    print(f"  sequence       {1e6 * step.sequence_s:10.3f} us")
    print(f"  context token  {1e9 * step.context_token_s:10.3f} ns")
    print(f"  pair           {1e9 * step.pair_s:10.3f} ns of a prompt token and what it attends to")
    print(f"error of the fit: median {found.median_error:.1%}, p90 {found.p90_error:.1%}, worst {found.worst_error:.1%}")
    if args.json is not None:
        try:
            args.json.write_text(profile.to_json(), encoding="utf-8")
        except OSError as error:
            raise CommandError(f"cannot write {error.filename}: {error.strerror}") from None
    return 0


def measured(args: argparse.Namespace) -> tuple[SpeedProfile, Fit]:
    """The profile of this machine, and how well it fits."""
    from tqdm import tqdm

    from ...cluster.simulator.fit import Step, fit
    from ...cluster.simulator.speed_profile import ReplicaShape, SpeedProfile
    from ...worker.llm import LLM
    from ...worker.stopwatch import measure

    options = {name: value for name in _ENGINE if (value := getattr(args, name)) is not None}
    began_s = time.perf_counter()
    engine = LLM(args.model, **options).engine
    startup_s = time.perf_counter() - began_s
    with tqdm(total=100, desc="measuring", unit="%", file=sys.stderr, dynamic_ncols=True) as bar:

        def passed(share: float) -> None:
            bar.update(round(100 * share) - bar.n)

        steps = measure(engine, args.seconds, passed)
    found = fit(Step(*step) for step in steps)
    info, scheduler = engine.info, engine.scheduler
    shape = ReplicaShape(
        pages=info.pool_tokens // info.page_size,
        page_size=info.page_size,
        max_batch_tokens=scheduler.max_batch_tokens,
        max_running=info.max_running,
        max_model_len=info.max_model_len,
        page_bytes=engine.page_bytes,
        gpus=info.tp,
        startup_s=round(startup_s, 3),
    )
    name = args.name or f"{info.name} on {platform.node() or platform.machine()}"
    errors = {"median": found.median_error, "p90": found.p90_error, "worst": found.worst_error, "steps": float(found.steps)}
    return SpeedProfile(name, False, found.cost, shape, _origin(args.model, options), errors), found


def _origin(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Machine and versions."""
    from .env import cpu, devices

    versions = {name: importlib.metadata.version(name) for name in ("quire", "torch")} | {"python": platform.python_version()}
    return {"model": model, "options": options, "cpu": cpu(), "devices": devices(), "versions": versions}
