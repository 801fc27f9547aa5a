"""Real processes: replicas that come take over running streams, replicas that go are emptied first; the last one goes, and comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from streams import Reader, numbered
from tiny_server import Serve, save_tiny_model, until

from quire.deploy import cli

WAIT_S = 240.0
LIVE = 6  # streams at once
TOKENS = 2000  # of each


class Load:
    """Keeps `LIVE` streams going until it is told to stop; each has a number, and equal numbers have equal texts."""

    def __init__(self, url: str) -> None:
        self.all: list[tuple[int, Reader]] = []
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        live: dict[int, Reader] = {}
        while not self._stop.is_set():
            for number in range(LIVE):
                if number not in live or not live[number].thread.is_alive():
                    live[number] = numbered(self._url, number, TOKENS)
                    self.all.append((number, live[number]))
            live[0].thread.join(0.05)

    def end(self) -> list[tuple[int, tuple[str, int, str]]]:
        """(number, text, tokens, error) of all of them, when the last has ended."""
        self._stop.set()
        self._thread.join(WAIT_S)
        return [(number, reader.end()) for number, reader in self.all]


def moved(admin: str, *reasons: str) -> float:
    text = httpx.get(admin + "/metrics", timeout=60).text
    found = re.findall(r'quire_migrations_total\{outcome="moved",reason="(\w+)"\} ([0-9.]+)', text)
    return sum(float(count) for reason, count in found if reason in reasons)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_running_streams_go_where_replicas_come_and_leave_where_they_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    scaling = ["--autoscaler", "ongoing", "--target-ongoing", str(LIVE // 2), "--max-replicas", "2", "--scale-up-cooldown-s", "0"]
    with Serve(tmp_path / "log", "--model", str(tmp_path / "model"), "--kv-pages", "512", *scaling) as server:
        server.wait_ready()
        admin = server.admin

        def states() -> dict[str, str]:
            return {row["id"]: row["state"] for row in server.status()["replicas"]}

        def scaling_view() -> dict[str, Any]:
            answer = httpx.get(admin + "/admin/autoscaling", timeout=60)
            return answer.json() if answer.status_code == 200 else {}

        def quire(*words: str) -> tuple[int, dict[str, Any]]:
            status = cli.main([words[0], "--admin-url", admin, *words[1:], "--json"])
            return status, json.loads(capsys.readouterr().out)

        calm = [numbered(server.url, number, TOKENS).end() for number in range(LIVE)]  # one after the other
        assert {error for _, _, error in calm} == {""}
        assert set(states()) == {"replica-0"}

        load = Load(server.url)
        until("a second replica is ready", lambda: states() == {"replica-0": "ready", "replica-1": "ready"}, server.stderr)
        until("it has taken over running streams", lambda: moved(admin, "fill", "rebalance") >= 1, server.stderr)
        up = next(d for d in scaling_view()["decisions"] if d["target"] == 2)
        assert (up["before"], up["why"]) == (1, "policy")
        assert sum(up["inputs"][f"{kind}_requests"] for kind in ("running", "waiting", "queued")) > LIVE // 2
        assert '"target": 2, "why": "policy"' in server.stderr()

        status, view = quire("scale", "1")
        assert (status, view["target"], view["by_hand"]) == (0, 1, True)
        until("one of them is gone", lambda: len(states()) == 1, server.stderr)
        assert moved(admin, "drain") >= 1

        assert quire("scale", "2")[1]["target"] == 2
        until("another has come", lambda: sorted(states().values()) == ["ready", "ready"], server.stderr)
        os.kill(server.status()["controller"]["pid"], signal.SIGKILL)
        until("the controller is back, and knows", lambda: scaling_view().get("target") == 2 and scaling_view()["by_hand"], server.stderr)
        until("both serve", lambda: sorted(states().values()) == ["ready", "ready"], server.stderr)

        ended = load.end()
        assert len(ended) >= LIVE
        assert [(number, found) for number, found in ended if found != calm[number]] == []
        assert httpx.post(admin + "/admin/scale", json={"replicas": 3}, timeout=60).status_code == 409
        assert quire("scale", "auto")[1]["by_hand"] is False


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_last_replica_goes_and_the_next_request_brings_one(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    scaling = ["--autoscaler", "queue", "--min-replicas", "0", "--max-replicas", "1", "--scale-to-zero-s", "1"]
    with Serve(tmp_path / "log", "--model", str(tmp_path / "model"), "--kv-pages", "256", *scaling) as server:
        server.wait_ready()
        until("nothing is left", lambda: server.status()["replicas"] == [], server.stderr)
        assert httpx.get(server.url + "/health", timeout=60).status_code == 200
        first, second = numbered(server.url, 1, 100), numbered(server.url, 1, 100)  # both wait for it
        assert first.end() == second.end()
        assert first.error == ""
        assert first.tokens > 0
