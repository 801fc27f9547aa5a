"""`quire admin`: it waits for a controller, serves while there is one, and ends on a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import urllib.request

import pytest
from admin_peer import FakePort

from quire.deploy import cli
from quire.deploy.admin import standalone

pytestmark = pytest.mark.usefixtures("clean_environment")
ARGV = ["admin", "--ray-address", "somewhere:6379", "--namespace", "quire-a", "--admin-port", "0", "--admin-token", "sesame"]


class Cluster:
    """Controllers that come and go: `ports` are those that there will be; None: there is none when it is asked."""

    def __init__(self, *ports: FakePort | None) -> None:
        self.ports = list(ports)
        self.joined: list[str | None] = []

    def port(self, namespace: str) -> FakePort:
        assert namespace == "quire-a"
        port = self.ports.pop(0)
        if port is None:
            raise ValueError("there is no controller")
        return port


def run(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list]:
    """Runs the command until it has served each port's status; its exit code and the statuses."""
    alive = [port for port in cluster.ports if port is not None]
    monkeypatch.setattr(standalone, "join", lambda options: cluster.joined.append(options.cluster.ray_address))
    monkeypatch.setattr(standalone, "AdminPort", cluster.port)
    monkeypatch.setattr(standalone, "POLL_S", 0.02)
    monkeypatch.setattr(standalone, "ABSENT_S", 0.05)
    statuses: list = []
    real_start = standalone.start_admin

    def start(port, options):
        running = real_start(port, options)

        def use() -> None:
            request = urllib.request.Request(f"{running.url}/admin/status", headers={"Authorization": "Bearer sesame"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                statuses.append(json.load(answer))
            if port is alive[-1]:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                port.lost = True

        threading.Thread(target=use).start()
        return running

    monkeypatch.setattr(standalone, "start_admin", start)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        return cli.main(ARGV), statuses
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_it_waits_for_a_controller_and_follows_the_next_one(monkeypatch):
    cluster = Cluster(None, None, FakePort(), None, FakePort())
    status, answers = run(cluster, monkeypatch)
    assert (status, cluster.ports, cluster.joined) == (0, [], ["somewhere:6379"])
    assert [answer["controller"]["pid"] for answer in answers] == [100, 100]


def test_what_cannot_work_is_said(monkeypatch, capsys):
    assert cli.main(["admin"]) == 2
    assert "--ray-address must name a Ray cluster" in capsys.readouterr().err
    monkeypatch.setattr(standalone, "join", lambda options: (_ for _ in ()).throw(ConnectionError("no Ray at somewhere:6379")))
    assert cli.main(ARGV) == 1
    assert re.search("no Ray at somewhere:6379", capsys.readouterr().err)
    assert cli.main(["admin", "--ray-address", "x", "--admin-host", "0.0.0.0"]) == 1
    assert "set --admin-token" in capsys.readouterr().err
