"""Every block that says so is run, in the order of its page, against one server with the default model.

A block of shell runs in bash -euo pipefail in a directory that it shares with the others, `quire` and `python` being those of this
interpreter. The documented ports stand for the server's own: in addresses, and as defaults of `quire`. Where a block marked `output`
follows, each of its lines must have been printed, numbers and names aside.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from documents import PAGES, Block
from tiny_server import Serve

from quire.deploy import cli

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BLOCK_TIMEOUT_S = 600.0  # of which a quiet machine needs ten seconds
RUN = [block for page in PAGES for block in page.blocks if block.mark == "run"]
EXPECTED = {
    block.where: after.text for page in PAGES for block, after in pairwise(page.blocks) if block.mark == "run" and after.mark == "output"
}
COMMANDS = next(action.choices for action in cli.parser()._actions if action.dest == "command")


@dataclass(frozen=True)
class Place:
    """Where blocks run: a directory, and the server's addresses."""

    path: Path
    url: str
    admin_url: str

    def rewritten(self, text: str) -> str:
        for documented, real in (("127.0.0.1:8000", self.url), ("127.0.0.1:8001", self.admin_url)):
            text = text.replace(documented, real.removeprefix("http://"))
        return text

    def run(self, block: Block) -> str:
        """What the block prints on stdout; it must succeed."""
        script = self.path / ("block.py" if block.language == "python" else "block.sh")
        script.write_text(self.rewritten(block.text))
        command = [sys.executable] if block.language == "python" else ["bash", "-euo", "pipefail"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("QUIRE_")}
        path = f"{self.path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        with (self.path / "stdout").open("w") as stdout, (self.path / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [*command, script],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=self.path,
                env={**environment, "PATH": path},
                start_new_session=True,
            )
            try:
                status = process.wait(BLOCK_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        said = (self.path / "stdout").read_text()
        assert status == 0, f"{block.where}: {said}\n{(self.path / 'stderr').read_text()}"
        return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    path = tmp_path_factory.mktemp("documents")
    (block,) = [block for page in PAGES for block in page.blocks if block.mark == "run: serve"]
    ((name, serve, *flags),) = block.commands()
    assert (name, serve) == ("quire", "serve")
    with Serve(path / "serve.log", *flags) as server:
        server.wait_ready()
        place = Place(path, server.url, server.admin)
        _put_quire(place)
        yield place
        server.look_below()
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        assert server.left_behind(within_s=30.0) == []


def _put_quire(place: Place) -> None:
    """A `quire` that finds the server where it is, as it would on its documented ports."""
    lines = ["#!/bin/bash", 'case "$1" in']
    for name, parser in COMMANDS.items():
        known = parser._option_string_actions
        where = f"--admin-url {place.admin_url}" if "--admin-url" in known else f"--url {place.url}" if "--url" in known else ""
        lines.append(f'{name}) exec {sys.executable} -m quire.deploy.cli "$@" {where};;')
    (place.path / "bin").mkdir()
    script = place.path / "bin" / "quire"
    script.write_text("\n".join([*lines, "esac", ""]))
    script.chmod(0o755)


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.where)
def test_a_documented_block_runs(place: Place, block: Block):
    said = place.run(block)
    printed = {_shape(line) for line in said.splitlines()}
    expected = [line for line in EXPECTED.get(block.where, "").splitlines() if line.strip()]
    assert [line for line in expected if _shape(line) not in printed] == [], said


def _shape(line: str) -> str:
    """A line whose words that hold digits are all alike."""
    return re.sub(r"[\w.-]*\d[\w.-]*", "#", " ".join(line.split()))


def test_shapes_tell_lines_apart():
    assert _shape("2 replicas are to be; 1 are  ready") == _shape("10 replicas are to be; 3 are ready")
    assert _shape("replica-1 is drained") != _shape("replica-1 is draining")
