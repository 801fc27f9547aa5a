"""A real server as its operators see it: status, log, trace, tenant, restart."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from otlp_collector import Collector
from tiny_server import Serve, save_tiny_model

from quire.deploy import cli

WAIT_S = 120.0
KEY = "sk-very-secret"
TENANTS = f"tenants: [{{name: search, keys: [{KEY}], weight: 2, max_concurrent: 8}}]"
STATUS = {
    "controller": {"pid": int},
    "ingresses": [{"id": str, "pid": int}],
    "replicas": [
        {
            "id": str,
            "state": str,
            "model": str,
            "ranks": [{"rank": int, "pid": int, "node": str}],
            "pages": {"total": int, "free": int, "cached": int, "active": int, "host": int},
            "running": int,
            "waiting": int,
        }
    ],
    "requests": [{"id": str, "replica": str, "tenant": str, "prompt_tokens": int, "output_tokens": int, "state": str}],
}


def shape(value: Any) -> Any:
    """Types in place of values, and one entry in place of a list of like ones."""
    if isinstance(value, dict):
        return {name: shape(item) for name, item in value.items()}
    if isinstance(value, list):
        shapes = [shape(item) for item in value]
        assert all(one == shapes[0] for one in shapes)
        return shapes[:1]
    return type(value)


@pytest.mark.ray
@pytest.mark.slow
def test_a_server_under_its_operators_eyes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "tenants.yaml").write_text(TENANTS)

    def status() -> dict[str, Any]:
        assert cli.main(["status", "--json", "--admin-url", admin_url]) == 0
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    with Collector() as collector:
        flags = [
            "--model",
            str(tmp_path / "model"),
            "--kv-pages",
            "512",
            "--threads",
            "1",
            "--api-key-file",
            str(tmp_path / "tenants.yaml"),
        ]
        with Serve(tmp_path / "log", *flags, "--log-format", "json", "--otlp-endpoint", collector.endpoint) as server:
            server.wait_ready()
            admin_url = server.admin
            ask = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True, "deadline_ms": 60_000, "priority": "high"}
            headers = {"Authorization": f"Bearer {KEY}"}
            with httpx.stream("POST", server.url + "/v1/completions", json=ask, headers=headers, timeout=WAIT_S) as stream:
                lines = stream.iter_lines()  # kept, for the stream ends with it
                request_id = json.loads(next(lines).removeprefix("data: "))["id"]
                seen = status()
            assert shape(seen) == STATUS
            assert [(r["id"], r["tenant"], r["replica"], r["state"]) for r in seen["requests"]] == [
                (request_id, "search", "replica-0", "running")
            ]
            pids = {seen["controller"]["pid"], seen["ingresses"][0]["pid"], seen["replicas"][0]["ranks"][0]["pid"]}
            assert pids <= {process.pid for process in server.below}
            deadline_s = time.monotonic() + WAIT_S
            while (left := status())["requests"]:  # the client has gone
                assert time.monotonic() < deadline_s
            assert left["replicas"][0]["pages"]["active"] == 0
            assert cli.main(["top", "--once", "--admin-url", admin_url]) == 0
            assert "replica-0  ready" in capsys.readouterr().out
            whole = {"prompt": "b", "max_tokens": 3}
            done = httpx.post(server.url + "/v1/completions", json=whole, headers=headers, timeout=WAIT_S).json()["id"]
            spans = collector.wait_for_trace(done, {"POST /v1/completions", "admission", "queue", "prefill", "decode"})
            root = next(span for span in spans if span.name == "POST /v1/completions")
            assert {span.parent_span_id for span in spans if span is not root} == {root.span_id}
            assert cli.main(["log-level", "debug", "--admin-url", admin_url]) == 0
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
        logged = [json.loads(line) for line in server.stderr().splitlines()]
    told = next(line for line in logged if line.get("request_id") == done and "status" in line)
    assert (told["tenant"], told["ingress"], told["status"], told["output_tokens"]) == ("search", "ingress-0", 200, 3)
    assert KEY not in server.stderr()
