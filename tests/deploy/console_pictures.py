"""Takes the console's pictures for docs/operations.md: python tests/deploy/console_pictures.py docs [--all]

A cluster of the tiny model with three replicas serves two tenants; then one replica is drained. With --all also in the dark, on a narrow
screen, and when the server is gone.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from browser import Page, chromium
from streams import stream
from tiny_server import Serve, save_tiny_model

TENANTS = """tenants:
  - {name: search, keys: [sk-search], weight: 2, max_concurrent: 64, tokens_per_min: 900000}
  - {name: batch, keys: [sk-batch], max_concurrent: 6}
"""
SYSTEM = "You are a careful librarian who answers in one sentence. " * 6


@contextmanager
def load(url: str) -> Iterator[None]:
    """Streams of both tenants that share a beginning, some of them in three choices, and short requests that have ended."""
    for i in range(24):
        body = {"prompt": f"Page {i} " + "of a long book " * 12, "max_tokens": 24, "ignore_eos": True}
        httpx.post(url + "/v1/completions", json=body, headers={"Authorization": "Bearer sk-search"}, timeout=120).raise_for_status()
    with ExitStack() as running:
        for i in range(8):
            running.enter_context(stream(url, f"{SYSTEM} Question {i}", "sk-search", n=1 + 2 * (i % 3 == 0), temperature=0.8, seed=i))
        for i in range(4):
            running.enter_context(stream(url, f"Summary {i} of: " + "lorem ipsum " * 20 * i, "sk-batch", priority="low"))
        yield


def pictures(page: Page, server: Serve, to: Path, everything: bool) -> None:
    admin = server.admin
    page.size(1280, 1000)
    page.open(admin + "/console")
    page.wait("document.querySelectorAll('#requests tr').length >= 10")
    first = "document.querySelector('#requests tr')"
    page.run(f"{first}.cells[6].querySelector('button').click(); document.querySelector('#confirm-yes').click()")
    page.wait("document.querySelector('#moves tr .state[data-state=\"moved\"]')")
    page.wait("!document.querySelector('.tile:nth-child(4) dd').textContent.startsWith('0')")
    page.picture(to / "console.png", whole=True)
    page.click('[data-replica="replica-1"] button')
    if everything:
        page.picture(to / "console-confirm.png")
    page.click("#confirm-yes")
    page.wait("document.querySelectorAll('#moves tr').length >= 3")
    page.picture(to / "console-drain.png")
    if everything:
        page.size(1280, 1000, dark=True)
        page.picture(to / "console-dark.png", whole=True)
        page.size(400, 800)
        page.run("new Promise((ok) => setTimeout(ok, 1500))")  # until it has drawn itself for this width
        page.picture(to / "console-narrow.png", whole=True)
        assert page.run("document.documentElement.scrollWidth") <= 400


def main() -> None:
    to, everything = Path(sys.argv[1]).resolve(), "--all" in sys.argv
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        save_tiny_model(work / "model")
        (work / "tenants.yaml").write_text(TENANTS)
        flags = ["--model", str(work / "model"), "--kv-pages", "768", "--replicas", "3", "--host-memory", "16MB", "--autoscaler", "queue"]
        flags += ["--max-replicas", "4", "--min-replicas", "3", "--api-key-file", str(work / "tenants.yaml"), "--served-model-name", "tiny"]
        with chromium(work / "profile") as page:
            with Serve(work / "log", *flags) as server:
                server.wait_ready()
                with load(server.url):
                    pictures(page, server, to, everything)
            if everything:
                page.size(1280, 700)
                page.wait("!document.querySelector('#banner').hidden")
                page.picture(to / "console-lost.png")


if __name__ == "__main__":
    main()
