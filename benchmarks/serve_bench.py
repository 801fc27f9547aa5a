"""One command for a first figure: start `quire serve` on a free port, run `quire bench` against it, stop it.

    python benchmarks/serve_bench.py                          a minute or so with SmolLM2-135M on two cores
    python benchmarks/serve_bench.py --rate 2 --png out.png   arguments are those of `quire bench`
    python benchmarks/serve_bench.py --serve '--quantize int8' --concurrency 1

Without arguments it sends 32 requests of 128 tokens in and 128 out, 8 at a time.
"""

from __future__ import annotations

import argparse
import selectors
import shlex
import signal
import subprocess
import sys
import time

READY = "Quire is ready on "
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
DEFAULTS = ["--num-requests", "32", "--concurrency", "8"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", default="", metavar="FLAGS", help="flags for `quire serve`, in one string")
    args, bench = parser.parse_known_args()
    quire = [sys.executable, "-m", "quire.deploy.cli"]
    begin = time.monotonic()
    command = [*quire, "serve", "--port", "0", "--admin-port", "0", *shlex.split(args.serve)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = wait_until_ready(server, begin + START_TIMEOUT_S)
        if url is None:
            print("the server did not become ready", file=sys.stderr)
            return 1
        print(f"ready after {time.monotonic() - begin:.1f} s", file=sys.stderr)
        return subprocess.run([*quire, "bench", "--url", url, *(bench or DEFAULTS)], check=False).returncode
    finally:
        stop(server)


def wait_until_ready(server: subprocess.Popen[str], deadline: float) -> str | None:
    """The address in the server's ready line; None when it ends, or says nothing until `deadline`."""
    assert server.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(server.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            line = server.stdout.readline()
            if not line:
                return None
            if line.startswith(READY):
                return line.removeprefix(READY).strip()
    return None


def stop(server: subprocess.Popen[str]) -> None:
    """As a user would, and by force when that does not help."""
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
