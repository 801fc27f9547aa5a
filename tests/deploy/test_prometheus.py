"""A real Prometheus beside a real server under load: every rule is evaluated, and no query of a dashboard is empty."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from eyes import RULES, alert_queries, alerts, dashboard_queries, with_all
from promql import selectors
from tiny_server import Serve, save_tiny_model, until

PROMETHEUS = shutil.which("prometheus")
WAIT_S = 240.0
SCRAPE_S = 2
TENANTS = """
tenants:
  - {name: search, keys: [sk-search], weight: 2, requests_per_s: 100, tokens_per_min: 10000000, max_concurrent: 16, max_pages: 4096}
  - {name: batch, keys: [sk-batch], requests_per_s: 1, tokens_per_min: 10000000, max_concurrent: 4, max_pages: 2048}
"""
ADMIN_TOKEN = "sesame"
STREAMS = 6  # at once, of some 30 pages each; a pool has 64
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not here (Debian: apt-get install --no-install-recommends prometheus)"),
]


class Prometheus:
    """A Prometheus that scrapes both ports."""

    def __init__(self, path: Path, server: str, admin: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._client = httpx.Client(base_url=f"http://{address}", timeout=60)
        targets = {"quire": (server, "sk-search"), "quire-admin": (admin, ADMIN_TOKEN)}
        jobs = [
            {"job_name": job, "authorization": {"credentials": key}, "static_configs": [{"targets": [url.removeprefix("http://")]}]}
            for job, (url, key) in targets.items()
        ]
        every = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), f"{SCRAPE_S}s")
        (path / "prometheus.yml").write_text(yaml.safe_dump({"global": every, "rule_files": [str(RULES)], "scrape_configs": jobs}))
        self._log = path / "prometheus.log"
        command = [
            PROMETHEUS or "",
            f"--config.file={path / 'prometheus.yml'}",
            f"--storage.tsdb.path={path / 'data'}",
            f"--web.listen-address={address}",
        ]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer; fails when it is an error."""
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        found: list[dict[str, Any]] = self.get("query", query=query)["result"]
        return found

    def number(self, query: str) -> float:
        """The one value of a query; NaN when there is none."""
        found = self.ask(query)
        return float(found[0]["value"][1]) if found else math.nan

    def wait_ready(self) -> None:
        until("prometheus serves", lambda: self._ready() or self._process.poll() is not None, self._log.read_text)
        assert self._process.poll() is None, self._log.read_text()

    def stop(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(WAIT_S)

    def _ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


class Load:
    """Streams of both tenants, and requests that are refused, until it is told to stop."""

    def __init__(self, url: str) -> None:
        self.statuses: Counter[int] = Counter()
        self._url = url
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def add(self, streams: int) -> None:
        """So many streams more."""
        for _ in range(streams):
            number = len(self._threads)
            self._threads.append(threading.Thread(target=self._run, args=(number,), daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()

    def refused(self) -> None:
        """A request of each kind that is none of the engine's."""
        self._send("sk-batch", {"prompt": "a", "max_tokens": -1})
        self._send("sk-batch", {"prompt": "a", "model": "none"})
        self._send("sk-wrong", {"prompt": "a"})
        for _ in range(3):
            self._send("sk-batch", {"prompt": "a", "max_tokens": 1})

    def _send(self, key: str, body: dict[str, Any]) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        self._count(httpx.post(self._url + "/v1/completions", json=body, headers=headers, timeout=WAIT_S).status_code)

    def _run(self, number: int) -> None:
        headers = {"Authorization": "Bearer " + ("sk-search" if number % 3 else "sk-batch")}
        body = {"prompt": f"{number}: " + "abc " * 60, "max_tokens": 700, "ignore_eos": True, "stream": True}
        while not self._ended.is_set():
            with httpx.stream("POST", self._url + "/v1/completions", json=body, headers=headers, timeout=WAIT_S) as answer:
                self._count(answer.status_code)
                for _ in answer.iter_lines():
                    pass
            self._ended.wait(0.2)

    def _count(self, status: int) -> None:
        with self._lock:
            self.statuses[status] += 1


class World:
    """A server, its load and its Prometheus."""

    def __init__(self, server: Serve, load: Load, prometheus: Prometheus) -> None:
        self.server, self.load, self.prometheus = server, load, prometheus
        self.admin = server.admin

    def act(self, path: str, **body: Any) -> dict[str, Any]:
        """What the admin API answers to a POST."""
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        answer: dict[str, Any] = httpx.post(self.admin + path, json=body, headers=headers, timeout=WAIT_S).json()
        return answer

    def status(self) -> dict[str, Any]:
        answer = httpx.get(self.admin + "/admin/status", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}, timeout=WAIT_S)
        found: dict[str, Any] = answer.json() if answer.status_code == 200 else {"replicas": [], "requests": []}
        return found

    def both_ready(self) -> bool:
        return [row["state"] for row in self.status()["replicas"]] == ["ready", "ready"]

    def busy(self) -> str:
        """A replica that runs something."""
        return next((row["replica"] for row in self.status()["requests"] if row["state"] == "running"), "")

    def moved(self) -> bool:
        """Whether a stream could be moved by hand."""
        for row in self.status()["requests"]:
            if row["state"] == "running":
                to = "replica-1" if row["replica"] == "replica-0" else "replica-0"
                if self.act(f"/admin/requests/{row['id']}/migrate", to=to).get("outcome") == "moved":
                    return True
        return False

    def drained(self) -> bool:
        """Whether a stream has left a replica because that drained; it takes requests again then."""
        if not (source := self.busy()):
            return False
        moved = self.act(f"/admin/replicas/{source}/drain", wait_s=5.0).get("moved")
        self.act(f"/admin/replicas/{source}/drain", undo=True)
        return bool(moved)

    def resumed(self) -> bool:
        """Whether a stream went on elsewhere; until then, whenever all is well, what runs something ends."""
        if self.seen("quire_streams_resumed_total"):
            return True
        if self.both_ready():
            self.act(f"/admin/replicas/{self.busy()}/restart")
        return False

    def seen(self, metric: str) -> bool:
        """Whether Prometheus has seen it happen."""
        return self.prometheus.number(f"max(max_over_time({metric}[10m]))") > 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everything has happened once: moves, a drain, a death, pages that ran out, requests that were refused. And it goes on."""
    path = tmp_path_factory.mktemp("prometheus")
    save_tiny_model(path / "model", max_model_len=2048)
    (path / "tenants.yaml").write_text(TENANTS)
    flags = ["--model", str(path / "model"), "--kv-pages", "64", "--host-memory", "4MiB", "--threads", "1", "--replicas", "2"]
    flags += ["--ingresses", "2", "--api-key-file", str(path / "tenants.yaml"), "--admin-token", ADMIN_TOKEN]
    flags += ["--autoscaler", "ongoing", "--target-ongoing", "100", "--min-replicas", "2", "--max-replicas", "2"]
    with Serve(path / "log", *flags) as server:
        server.wait_ready()
        load, prometheus = Load(server.url), Prometheus(path, server.url, server.admin)
        try:
            prometheus.wait_ready()
            world = World(server, load, prometheus)
            load.add(2)
            until("a stream is moved by hand", world.moved, server.stderr)
            until("a stream leaves a replica that drains", world.drained, server.stderr)
            load.add(STREAMS - 2)
            load.refused()
            until("pages have run out", lambda: world.seen("quire_preemptions_total"), server.stderr)
            until("streams of a replica that dies go on elsewhere", world.resumed, server.stderr)
            until("both replicas are ready", world.both_ready, server.stderr)
            yield world
        finally:
            load.stop()
            prometheus.stop()


def test_no_query_of_a_dashboard_is_empty_under_load(world: World) -> None:
    """Each has a series, and not all that it says is NaN."""
    queries = dashboard_queries()
    assert len(queries) > 70

    def answered() -> bool:
        queries[:] = [query for query in queries if not any(map(is_number, world.prometheus.ask(with_all(query.text))))]
        return not queries

    until("every query has an answer", answered, lambda: [query.where for query in queries])


def test_every_alert_is_evaluated_over_series_that_exist(world: World) -> None:
    series = set()
    for alert in alert_queries():
        world.prometheus.ask(alert.text)  # fails when it cannot be evaluated
        for name, matchers, _ in selectors(alert.text):
            fixed = (f'{label}{operator}"{value}"' for label, operator, value in matchers if label != "status")  # no request has failed
            series.add(f"{name}{{{','.join(fixed)}}}")
    assert [one for one in sorted(series) if not world.prometheus.ask(f"last_over_time({one}[10m])")] == []


def test_every_rule_is_healthy(world: World) -> None:
    def rules() -> dict[str, tuple[str, str]]:
        groups = world.prometheus.get("rules")["groups"]
        return {rule["name"]: (rule["health"], rule.get("lastError", "")) for group in groups for rule in group["rules"]}

    assert rules().keys() == {alert["alert"] for alert in alerts()}
    until("every rule has been evaluated", lambda: set(rules().values()) == {("ok", "")}, rules)


def test_both_servers_of_the_port_are_seen_and_each_request_counts_once(world: World) -> None:
    world.load.stop()
    last = 'max by (ingress, status) (max_over_time(quire_http_requests_total{route="/v1/completions"}[30m]))'

    def counts() -> dict[int, float]:
        return {int(row["metric"]["status"]): float(row["value"][1]) for row in world.prometheus.ask(f"sum by (status) ({last})")}

    sent = {status: float(count) for status, count in world.load.statuses.items() if status != 401}  # 401 has no route
    assert {200, 400, 404, 429} <= sent.keys()
    until("Prometheus has counted what was sent", lambda: counts() == sent, lambda: (counts(), sent))
    assert {row["metric"]["ingress"] for row in world.prometheus.ask(last)} == {"ingress-0", "ingress-1"}


def is_number(row: dict[str, Any]) -> bool:
    return not math.isnan(float(row["value"][1]))
