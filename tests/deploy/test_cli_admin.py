"""`quire status`, `top`, `restart`, `migrate`, `drain`, `rebalance`, `scale` and `log-level` against a live admin API."""

from __future__ import annotations

import json
import os
import pty
import selectors
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from admin_peer import MOVED, STATUS, FakePort, running_admin

from quire.deploy import cli
from quire.deploy.admin.server import RunningAdmin

pytestmark = pytest.mark.usefixtures("clean_environment")
Admin = tuple[FakePort, RunningAdmin]


@pytest.fixture(scope="module")
def _running() -> Iterator[Admin]:
    with running_admin("sesame") as running:
        yield running


@pytest.fixture
def admin(_running: Admin, monkeypatch: pytest.MonkeyPatch) -> Admin:
    monkeypatch.setenv("QUIRE_ADMIN_TOKEN", "sesame")
    _running[0].calls.clear()
    return _running


def run(admin: Admin, *argv: str) -> int:
    return cli.main([argv[0], "--admin-url", admin[1].url, *argv[1:]])


def test_status_as_json_is_what_the_api_says(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "status", "--json") == 0
    assert json.loads(capsys.readouterr().out) == STATUS.as_json()


def test_scale(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "scale", "4") == 0
    assert run(admin, "scale", "auto") == 0
    assert admin[0].calls == [("scale", "4"), ("scale", "None")]
    out = "4 replicas are to be, by hand; 1 are ready\n3 replicas are to be, by the autoscaler (slo); 1 are ready\n"
    assert capsys.readouterr().out == out
    assert run(admin, "scale", "9") == 2
    assert "must be from 1 to 8" in capsys.readouterr().err
    assert run(admin, "scale", "more") == 2
    assert "must be a number or auto" in capsys.readouterr().err


def test_status_for_people(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "status") == 0
    out = capsys.readouterr().out
    assert "controller  pid 100" in out
    assert "cmpl-2   -          batch   queued" in out


def test_restart_and_log_level(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "restart", "replica-0") == 0
    assert run(admin, "log-level", "warning") == 0
    assert admin[0].calls == [("restart", "replica-0"), ("log-level", "warning")]
    assert capsys.readouterr().out == "replica-0 is restarting\nlog level is warning\n"


def test_migrate(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "migrate", "cmpl-1", "--to", "replica-1") == 0
    assert capsys.readouterr().out == "cmpl-1  replica-0 -> replica-1  operator: moved (3 pages, 300 bytes, 12.5 ms)\n"
    assert run(admin, "migrate", "cmpl-1", "--to", "replica-1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == MOVED._asdict()
    assert run(admin, "migrate", "cmpl-1", "--to", "replica-0") == 1
    assert "refused (no seat)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("request_id", "to", "says"),
    [
        ("cmpl-2", "replica-1", "HTTP 409: cmpl-2 waits for a replica"),
        ("cmpl/9", "replica-1", "there is no"),
        ("cmpl-9", "replica-1", "HTTP 404: no replica has a request 'cmpl-9'"),
        ("cmpl-1", "replica-9", "HTTP 404: there is no replica 'replica-9'"),
    ],
)
def test_what_cannot_be_moved(admin: Admin, request_id: str, to: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "migrate", request_id, "--to", to) == 2
    assert says in capsys.readouterr().err


def test_drain_waits_until_the_replica_is_empty(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "drain", "replica-0", "--json") == 0
    assert admin[0].calls == [("drain", "replica-0 False 5")] * 2
    drained = {"replica": "replica-0", "state": "drained", "requests": 0, "moved": 5, "pages": 40, "bytes": 4096, "downtime_ms": 12.5}
    assert json.loads(capsys.readouterr().out) == {"outcome": "drained", **drained}
    assert run(admin, "drain", "replica-0", "--undo") == 0
    assert capsys.readouterr().out.startswith("replica-0 is ready: ")
    assert run(admin, "drain", "replica-1") == 2
    assert "replica-1 is starting" in capsys.readouterr().err


def test_drain_need_not_be_waited_for(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "drain", "replica-0", "--no-wait") == 0
    assert capsys.readouterr().out == (
        "replica-0 is draining: 5 requests moved (40 pages, 4096 bytes), 2 left; the longest pause was 12.5 ms\n"
    )


def test_drain_of_a_node_empties_what_can_be_drained_there(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "drain", "--node", "node-a", "--json") == 0
    assert admin[0].calls == [("drain", "replica-0 False 5")] * 2  # replica-1 only starts
    assert [drain["outcome"] for drain in json.loads(capsys.readouterr().out)] == ["drained"]
    assert run(admin, "drain", "--node", "node-b") == 0
    assert capsys.readouterr().out == "no replica to drain on node-b\n"


def test_drain_of_a_node_tells_all_replicas_before_it_waits_for_one(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [STATUS.replicas[0], STATUS.replicas[0]._replace(id="replica-2")]
    monkeypatch.setattr(admin[0], "now", replace(STATUS, replicas=tuple(both)))
    assert run(admin, "drain", "--node", "node-a") == 0
    assert admin[0].calls[:2] == [("drain", "replica-0 False 0"), ("drain", "replica-2 False 0")]


def test_drain_does_not_wait_longer_than_it_is_told(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "drain", "replica-0", "--wait-s", "0.001") == 1
    assert admin[0].calls == [("drain", "replica-0 False 0.001")]
    assert capsys.readouterr().out.startswith("replica-0 is draining: ")


def test_drain_needs_a_replica_or_a_node(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["replica-0", "--node", "node-a"]):
        with pytest.raises(SystemExit):
            run(admin, "drain", *words)
    assert "one of the arguments REPLICA --node is required" in capsys.readouterr().err


def test_rebalance(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "rebalance", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["moves"] == [MOVED._replace(cause="rebalance")._asdict()]
    assert {name: told[name] for name in told if name != "moves"} == {
        "outcome": "1 of 1 moved",
        "pages": 3,
        "bytes": 300,
        "downtime_ms": 12.5,
    }


def test_an_unknown_replica(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "restart", "replica/../9") == 2
    assert "there is no" in capsys.readouterr().err
    assert run(admin, "restart", "replica-9") == 2
    assert "there is no replica 'replica-9'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["status"], ["top", "--once"], ["restart", "replica-0"], ["log-level", "info"]])
def test_no_server_and_a_wrong_token_are_said_plainly(admin: Admin, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--admin-url", "http://127.0.0.1:1"]) == 2
    assert "no server answers at http://127.0.0.1:1" in (error := capsys.readouterr().err)
    assert "--admin-url" in error
    assert cli.main([*command, "--admin-url", admin[1].url, "--admin-token", "wrong"]) == 2
    assert "HTTP 401: a valid admin token is needed (--admin-token" in capsys.readouterr().err


def test_top_prints_one_frame_into_a_pipe(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(admin, "top", "--once") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "2 requests   3 queued" in out
    assert "█" * 12 + "▓" * 4 + "▒" * 16 + "·" * 32 in out


def command(admin: Admin) -> list[str]:
    return [sys.executable, "-m", "quire.deploy.cli", "top", "--interval-s", "0.05", "--admin-url", admin[1].url]


def test_top_goes_on_into_a_pipe_until_nobody_reads(admin: Admin) -> None:
    with subprocess.Popen(command(admin), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as top:
        assert top.stdout is not None
        heads = 0
        while heads < 3:
            heads += top.stdout.readline().startswith("2 requests")
        top.stdout.close()
        assert top.wait(60) == 141
        assert top.stderr is not None
        assert top.stderr.read() == ""


@pytest.mark.parametrize("leave", ["q", "ctrl-c"])
def test_top_in_a_terminal_leaves_it_as_it_was(admin: Admin, leave: str) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(ours)
    selector = selectors.DefaultSelector()  # `select` knows only the first 1,024 descriptors of a process
    selector.register(ours, selectors.EVENT_READ)
    with (
        selector,
        subprocess.Popen(command(admin), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as top,
        ExitStack() as end,
    ):
        os.close(theirs)
        end.callback(top.kill)  # nobody reads its output after a failure
        seen, deadline_s = b"", time.monotonic() + 60
        while seen.count(b"\x1b[H") < 2:
            assert time.monotonic() < deadline_s, seen
            seen += os.read(ours, 65536) if selector.select(1) else b""
        assert termios.tcgetattr(ours) != before  # keys come without Enter
        if leave == "q":
            os.write(ours, b"q")
        else:
            top.send_signal(signal.SIGINT)
        while top.poll() is None or selector.select(0):
            assert time.monotonic() < deadline_s, seen
            try:
                seen += os.read(ours, 65536) if selector.select(0.1) else b""
            except OSError:  # the other end is closed
                break
        assert top.wait(60) == 0
    assert termios.tcgetattr(ours) == before
    os.close(ours)
    assert seen.startswith(b"\x1b[?1049h\x1b[?25l")
    assert seen.endswith(b"\x1b[?25h\x1b[?1049l")
    assert b"Traceback" not in seen
