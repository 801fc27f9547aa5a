"""`quire serve` end to end: the real command with a real Ray, signals, deaths, and what is left of it.

A start takes as long as all that a test does with it, so one server is shared, until a test ends it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tiny_server import Serve, save_tiny_model, until

from quire.deploy.process_tree import Process, descendants, end, is_alive

WAIT_S = 120.0
Flags = tuple[str, ...]

SMALL: Flags = ("--kv-pages", "512", "--threads", "1", "--log-level", "info")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-model")
    save_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def servers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Serve]]:
    """Those of the tests that share one; the last one is it."""
    started: list[Serve] = []
    yield started
    for server in started:
        with server:  # which ends it
            pass


@pytest.fixture
def server(tiny_model: Path, servers: list[Serve], tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """One with two ingresses that is ready and has nothing to do."""
    if not servers or servers[-1].process.poll() is not None:
        log = tmp_path_factory.mktemp("server") / "log"
        own = ("--ingresses", "2", "--grace-s", "3600", "--override-generation-config", '{"temperature": 0}')
        servers.append(Serve(log, "--model", str(tiny_model), *own, *SMALL))
        servers[-1].wait_ready()
    servers[-1].look_below()
    return servers[-1]


def kill(server: Serve, pid: int) -> None:
    """Kills one of its processes and waits until its sockets are gone with it."""
    process = next(p for p in descendants(server.process.pid) if p.pid == pid)
    os.kill(pid, signal.SIGKILL)
    end([process], WAIT_S)
    # A zombie's threads may still be there, and hold its sockets.
    until("it is no zombie either", lambda: not Path(f"/proc/{pid}").exists(), server.stderr, WAIT_S)


def complete(url: str, **body: object) -> httpx.Response:
    """A connection of its own, so that any ingress may get it."""
    name = httpx.get(url + "/v1/models", timeout=WAIT_S).json()["data"][0]["id"]
    wanted = {"model": name, "prompt": "The capital of France is", "temperature": 0, **body}
    return httpx.post(url + "/v1/completions", json=wanted, timeout=WAIT_S)


def test_what_requests_leave_out_is_the_model_s_at_every_ingress(server: Serve) -> None:
    def text(**body: object) -> str:
        return complete(server.url, **body).json()["choices"][0]["text"]

    greedy = text(temperature=0)
    assert [text(temperature=None) for _ in range(8)] == [greedy] * 8
    assert text(temperature=1, seed=1) != greedy


@pytest.fixture
def in_a_ray(server: Serve, monkeypatch: pytest.MonkeyPatch) -> Flags:
    """Flags of a second server in the Ray of the first."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # a local Ray asks for its token; who joins must say so
    return "--ray-address", server.argument("gcs-address"), "--namespace", "two"


def wait_until_it_serves_again(server: Serve, ingress: str, before: str) -> None:
    """Its log said `before` when the ingress was still there."""
    served = f"{ingress} serves"
    until(served, lambda: server.stderr().count(served) != before.count(served), server.stderr, WAIT_S)


def wait_until_gone(processes: list[Process]) -> None:
    until("all are gone", lambda: not any(map(is_alive, processes)), lambda: [p for p in processes if is_alive(p)], 2 * WAIT_S)


@pytest.mark.ray
def test_a_dead_replica_is_started_again_and_its_stream_waits_for_it(server: Serve) -> None:
    name = httpx.get(server.url + "/v1/models", timeout=WAIT_S).json()["data"][0]["id"]
    body = {"model": name, "prompt": "a", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    calm = httpx.post(server.url + "/v1/completions", json=body, timeout=WAIT_S).json()["choices"][0]["text"]
    with httpx.stream("POST", server.url + "/v1/completions", json={**body, "stream": True}, timeout=WAIT_S) as stream:
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        text = json.loads(next(lines))["choices"][0]["text"]
        killed = server.status()["replicas"][0]["ranks"][0]["pid"]
        os.kill(killed, signal.SIGKILL)
        for line in lines:
            if line != "[DONE]":
                text += "".join(choice["text"] for choice in json.loads(line)["choices"])
    assert text == calm
    replica = server.status()["replicas"][0]
    assert replica["state"] == "ready"
    assert replica["ranks"][0]["pid"] != killed


@pytest.mark.ray
def test_of_two_ingresses_one_dies_and_is_started_again_on_the_port_that_they_share(server: Serve) -> None:
    before = server.stderr()
    ingresses = {row["id"]: row["pid"] for row in server.status()["ingresses"]}
    assert sorted(ingresses) == ["ingress-0", "ingress-1"]
    kill(server, ingresses["ingress-1"])
    for _ in range(20):  # of the sockets on the port only the living one's is left
        assert complete(server.url, max_tokens=2, ignore_eos=True).status_code == 200
    wait_until_it_serves_again(server, "ingress-1", before)
    assert "ingress-1: the process of the HTTP server has died; it is started again in 0.5 s" in server.stderr().removeprefix(before)
    again = {row["id"]: row["pid"] for row in server.status()["ingresses"]}
    assert again["ingress-0"] == ingresses["ingress-0"]
    assert again["ingress-1"] != ingresses["ingress-1"]
    before = server.stderr()
    kill(server, again["ingress-0"])
    assert complete(server.url, max_tokens=2, ignore_eos=True).status_code == 200
    wait_until_it_serves_again(server, "ingress-0", before)  # the next test must not take its process for one of its own


@pytest.mark.ray
def test_in_a_ray_that_was_there_before_only_ours_goes(tiny_model: Path, tmp_path: Path, server: Serve, in_a_ray: Flags) -> None:
    with Serve(tmp_path / "second", "--model", str(tiny_model), *in_a_ray, *SMALL) as second:
        second.wait_ready()
        assert complete(second.url, max_tokens=3, ignore_eos=True).status_code == 200
        brought = server.brought()
        assert len(brought) >= 3
        second.signal(signal.SIGTERM)
        assert second.wait() == 0
    wait_until_gone(brought)
    assert complete(server.url, max_tokens=3, ignore_eos=True).status_code == 200


@pytest.mark.ray
@pytest.mark.slow
def test_in_a_ray_that_goes_on_a_killed_command_leaves_nothing_after_its_lease(
    tiny_model: Path, tmp_path: Path, server: Serve, in_a_ray: Flags
) -> None:
    with Serve(tmp_path / "second", "--model", str(tiny_model), *in_a_ray, "--replicas", "2", *SMALL) as second:
        second.wait_ready()
        brought = server.brought()
        assert len(brought) >= 4
        second.signal(signal.SIGKILL)
        second.process.wait(WAIT_S)
    wait_until_gone(brought)
    assert complete(server.url, max_tokens=3, ignore_eos=True).status_code == 200


@pytest.mark.ray
def test_a_missing_accelerator_is_named_and_so_is_a_missing_label(tiny_model: Path, tmp_path: Path) -> None:
    with Serve(tmp_path / "log", "--model", str(tiny_model), "--accelerator-type", "H200") as server:
        assert server.wait() == 1
        assert "quire: error: replica-0: the Ray cluster has no place for it: a node with a H200" in server.stderr()
    with Serve(tmp_path / "log", "--model", str(tiny_model), "--node-label", "pool=fast") as server:
        assert server.wait() == 1
        assert "no place for it: a node with the label pool=fast (none of 1 has it)" in server.stderr()


@pytest.mark.ray
def test_sigterm_finishes_what_runs_refuses_what_comes_and_leaves_nothing(server: Serve) -> None:
    before = server.stderr()
    assert httpx.get(server.url + "/health", timeout=WAIT_S).status_code == 200
    answer = complete(server.url, max_tokens=5, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 5
    body = {"model": answer["model"], "prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True, "temperature": 0}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=WAIT_S) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        server.signal(signal.SIGTERM)
        refused = httpx.post(server.url + "/v1/completions", json={"model": answer["model"], "prompt": "b"}, timeout=WAIT_S)
        while refused.status_code == 200:  # the signal is noticed within a fraction of a second
            refused = httpx.post(server.url + "/v1/completions", json={"model": answer["model"], "prompt": "b"}, timeout=WAIT_S)
        assert refused.status_code == 503
        *_, last, done = lines
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.wait() == 0
    assert server.left_behind() == []
    assert "Traceback" not in server.stderr().removeprefix(before)


@pytest.mark.ray
def test_a_second_signal_cuts_off_what_runs(server: Serve) -> None:
    name = httpx.get(server.url + "/v1/models", timeout=WAIT_S).json()["data"][0]["id"]
    body = {"model": name, "prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=WAIT_S) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()  # kept: when it goes, the connection is closed
        next(lines)
        server.signal_group(signal.SIGINT)
        until("it knows of the first", lambda: "a second signal" in server.stderr(), server.stderr, WAIT_S)
        server.signal_group(signal.SIGINT)
        assert server.wait() == 0
    assert server.left_behind() == []


@pytest.mark.ray
def test_when_the_command_itself_is_killed_everything_goes(server: Serve) -> None:
    # Ray's two agents look for their raylet every few seconds only, and try to tell its head first: they take a minute.
    server.below = [p for p in server.below if p.pid not in (server.pid_of("ray::DashboardAgent"), server.pid_of("ray::RuntimeEnvAgent"))]
    assert len(server.below) >= 6
    server.signal(signal.SIGKILL)
    server.process.wait(WAIT_S)
    assert server.left_behind(within_s=WAIT_S) == []


@pytest.mark.ray
def test_ctrl_c_ends_a_server_with_the_real_model_and_leaves_nothing(tmp_path: Path) -> None:
    with Serve(tmp_path / "log", "--kv-pages", "64", "--max-model-len", "1024") as server:
        server.wait_ready()
        assert " Paris" in complete(server.url, max_tokens=4).json()["choices"][0]["text"]
        server.signal_group(signal.SIGINT)
        assert server.wait() == 0
        assert server.left_behind() == []
        assert "Traceback" not in server.stderr()
        assert "ready after" in server.stderr()


@pytest.mark.ray
def test_a_model_that_is_not_supported_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in tiny_model.iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    config = json.loads((odd / "config.json").read_text()) | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (odd / "config.json").write_text(json.dumps(config))
    with Serve(tmp_path / "log", "--model", str(odd)) as server:
        assert server.wait() == 1
        assert "mamba" in server.stderr().lower()
        assert "quire: error: " in server.stderr()


@pytest.mark.ray
def test_a_missing_resource_is_named(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with Serve(tmp_path / "log", "--model", str(tiny_model), "--device", "cuda") as server:
        assert server.wait() == 1
        assert "no place for it: 1 GPU (the largest node has 0)" in server.stderr()


def test_a_port_in_use_is_said_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Serve(tmp_path / "log", "--port", str(port)) as server:
            assert server.wait() == 1
            assert server.stderr() == f"quire: error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_model_that_is_not_there_is_said_before_anything_is_started(tmp_path: Path) -> None:
    with Serve(tmp_path / "log", "--model", "./nowhere.gguf") as server:
        assert server.wait() == 1
        assert server.stderr().startswith("quire: error: ./nowhere.gguf: no such directory or .gguf file")


def test_the_process_tree_is_found_and_ended() -> None:
    shell = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", shell], stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        tree = descendants(os.getpid())
        assert {parent.pid, child} <= {p.pid for p in tree}
        mine = [p for p in tree if p.pid in (parent.pid, child)]
        assert [p.pid for p in descendants(parent.pid)] == [child]
        end(mine, grace_s=0)
        parent.wait(WAIT_S)
    while any(is_alive(p) for p in mine):
        time.sleep(0.01)
