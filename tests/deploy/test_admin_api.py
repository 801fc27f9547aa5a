"""The admin API: who is let in, what it answers, and that nothing else is there."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import httpx
import pytest
from admin_peer import STATUS, FakePort, running_admin
from prometheus_client.parser import text_string_to_metric_families

from quire.cluster.autoscaling_guard import Why
from quire.cluster.rebalancing import Reason
from quire.cluster.tally import REFUSALS
from quire.deploy.admin.figures import OUTCOMES, exposition
from quire.deploy.admin.guard import check_admin
from quire.deploy.admin.server import RunningAdmin, start_admin
from quire.worker.config import AdminOptions

Admin = tuple[FakePort, RunningAdmin]


@pytest.fixture(scope="module")
def _open() -> Iterator[Admin]:
    with running_admin() as running:
        yield running


@pytest.fixture
def admin(_open: Admin) -> Admin:
    _open[0].calls.clear()
    _open[0].lost = False
    return _open


@pytest.fixture(scope="module")
def closed() -> Iterator[Admin]:
    with running_admin("sesame") as running:
        yield running


def test_status_has_exactly_the_promised_fields(admin: Admin) -> None:
    status = httpx.get(admin[1].url + "/admin/status").json()
    assert status == {
        "controller": {"pid": 100},
        "ingresses": [{"id": "ingress-0", "pid": 200}],
        "replicas": [
            {
                "id": "replica-0",
                "state": "ready",
                "model": "tiny",
                "ranks": [{"rank": 0, "pid": 300, "node": "node-a"}, {"rank": 1, "pid": 301, "node": "node-a"}],
                "pages": {"total": 64, "free": 32, "cached": 16, "active": 16, "host": 0},
                "running": 2,
                "waiting": 1,
            },
            {
                "id": "replica-1",
                "state": "starting",
                "model": "",
                "ranks": [],
                "pages": {"total": 0, "free": 0, "cached": 0, "active": 0, "host": 0},
                "running": 0,
                "waiting": 0,
            },
        ],
        "requests": [
            {"id": "cmpl-1", "replica": "replica-0", "tenant": "search", "prompt_tokens": 12, "output_tokens": 34, "state": "running"},
            {"id": "cmpl-2", "replica": None, "tenant": "batch", "prompt_tokens": 56, "output_tokens": 0, "state": "queued"},
        ],
    }


def test_top_adds_page_maps_and_counters(admin: Admin) -> None:
    top = httpx.get(admin[1].url + "/admin/top").json()
    assert top.keys() - STATUS.as_json().keys() == {"page_maps", "tokens", "queue"}
    assert top["page_maps"] == {"replica-0": "a" * 12 + "s" * 4 + "c" * 16 + "f" * 32}
    assert top["tokens"]["replica-0"] == {"epoch": 7, "prompt": 500, "output": 1000}
    assert top["queue"] == {"requests": 3, "tokens": 170}


def test_restart_and_log_level(admin: Admin) -> None:
    port, running = admin
    before = logging.getLogger().level
    try:
        assert httpx.post(running.url + "/admin/replicas/replica-1/restart", json={}).json() == {
            "replica": "replica-1",
            "state": "restarting",
        }
        assert httpx.post(running.url + "/admin/log-level", json={"level": "debug"}).json() == {"level": "debug"}
        assert logging.getLogger().level == logging.DEBUG  # this process too
    finally:
        logging.getLogger().setLevel(before)
    assert port.calls == [("restart", "replica-1"), ("log-level", "debug")]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/admin/replicas/replica-9/restart", {}, 404, "replica_id"),
        ("/admin/replicas/replica-0/restart", {"now": True}, 400, "now"),
        ("/admin/requests/cmpl-9/migrate", {"to": "replica-0"}, 404, "request_id"),
        ("/admin/requests/cmpl-1/migrate", {"to": "replica-9"}, 404, "to"),
        ("/admin/requests/cmpl-1/migrate", {}, 400, "to"),
        ("/admin/requests/cmpl-2/migrate", {"to": "replica-0"}, 409, None),
        ("/admin/replicas/replica-9/drain", {}, 404, "replica_id"),
        ("/admin/replicas/replica-1/drain", {}, 409, None),
        ("/admin/replicas/replica-0/drain", {"wait": 3}, 400, "wait"),
        ("/admin/rebalance", {"now": True}, 400, "now"),
        ("/admin/scale", {"replicas": 9}, 409, "replicas"),
        ("/admin/scale", {"replicas": "many"}, 400, "replicas"),
        ("/admin/scale", {}, 400, "replicas"),
        ("/admin/scale", {"replicas": 2, "auto": True}, 400, "replicas"),
        ("/admin/log-level", {"level": "loud"}, 400, "level"),
        ("/admin/log-level", {}, 400, "level"),
        ("/admin/log-level", {"level": 5}, 400, "level"),
        ("/admin/nothing", {}, 404, None),
        ("/admin/status", {}, 405, None),
    ],
)
def test_what_is_wrong_is_said_in_json(admin: Admin, path: str, body: dict[str, object], status: int, param: str | None) -> None:
    answer = httpx.post(admin[1].url + path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert admin[0].calls == []


def test_a_controller_that_does_not_answer_is_a_503(admin: Admin) -> None:
    admin[0].lost = True
    answer = httpx.get(admin[1].url + "/admin/status")
    assert answer.status_code == 503
    assert "controller does not answer" in answer.json()["error"]["message"]


def test_the_number_of_replicas_is_told_and_changed(admin: Admin) -> None:
    told = httpx.get(admin[1].url + "/admin/autoscaling").json()
    assert (told["target"], told["decisions"]) == (3, [{"target": 3, "why": "policy"}])
    assert httpx.post(admin[1].url + "/admin/scale", json={"replicas": 5}).json()["target"] == 5
    assert httpx.post(admin[1].url + "/admin/scale", json={"auto": True}).json()["by_hand"] is False
    assert admin[0].calls == [("scale", "5"), ("scale", "None")]


def test_decisions_are_told_by_replica(admin: Admin) -> None:
    (told,) = httpx.get(admin[1].url + "/admin/decisions").json()["replica-0"]
    assert (told["action"], told["reason"]) == ("swap", "cheapest")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/admin/status",
        "/admin/top",
        "/admin/decisions",
        "/admin/autoscaling",
        "/metrics",
        "/nothing",
        "/live",
        "/docs",
        "/openapi.json",
    ],
)
@pytest.mark.parametrize("token", [None, "sesam", "sesamee"])
def test_with_a_token_nothing_answers_without_it(closed: Admin, path: str, token: str | None) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    answer = httpx.get(closed[1].url + path, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_admin_token")


def test_with_the_token_any_host_may_be_named(closed: Admin) -> None:
    headers = {"Authorization": "Bearer sesame", "Host": "quire.example"}
    assert httpx.get(closed[1].url + "/admin/status", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8001", "127.0.0.1.evil.example", "10.0.0.1", "localhost.evil.example", ""])
def test_without_a_token_a_rebound_name_is_refused(admin: Admin, host: str) -> None:
    assert httpx.get(admin[1].url + "/admin/status", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:8001", "127.0.0.1", "[::1]:8001", "LOCALHOST"])
def test_without_a_token_this_machine_may_be_named(admin: Admin, host: str) -> None:
    assert httpx.get(admin[1].url + "/admin/status", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_web_page_cannot_change_anything(admin: Admin, kind: str) -> None:
    for path in ("/admin/replicas/replica-0/restart", "/admin/log-level"):
        answer = httpx.post(admin[1].url + path, content=b'{"level": "debug"}', headers={"Content-Type": kind})
        assert answer.status_code == 415
    preflight = httpx.options(admin[1].url + "/admin/log-level", headers={"Origin": "http://evil.example"})
    assert preflight.status_code >= 400
    assert not any(name.startswith("access-control") for name in preflight.headers)
    assert admin[0].calls == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "quire.example"])
def test_an_address_that_others_reach_needs_a_token(host: str) -> None:
    with pytest.raises(ValueError, match="--admin-token"):
        check_admin(AdminOptions(admin_host=host))
    with pytest.raises(ValueError, match="--admin-token"):
        start_admin(FakePort(), AdminOptions(admin_host=host))
    check_admin(AdminOptions(admin_host=host, admin_token="t"))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_a_loopback_address_needs_none(host: str) -> None:
    check_admin(AdminOptions(admin_host=host))


def test_a_taken_port_is_said_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port} for the admin API: .*in use.*--admin-port"):
            start_admin(FakePort(), AdminOptions(admin_port=port))


def test_it_stops_and_says_where_it_was(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, "quire"), running_admin() as (_, running):
        pass
    assert f"admin API on {running.url}" in caplog.text
    assert capfd.readouterr().out == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.url)


def test_its_metrics_are_those_of_the_status(admin: Admin) -> None:
    text = httpx.get(admin[1].url + "/metrics").text
    assert text == exposition(STATUS).decode()
    samples = {(s.name, *sorted(s.labels.values())): s.value for family in text_string_to_metric_families(text) for s in family.samples}
    expected = {
        ("quire_replicas", "ready"): 1,
        ("quire_replicas", "starting"): 1,
        ("quire_replicas", "suspect"): 0,
        ("quire_replicas", "dead"): 0,
        ("quire_replicas", "draining"): 0,
        ("quire_replicas", "drained"): 0,
        ("quire_startup_seconds", "import torch", "replica-0"): 1.5,
        ("quire_startup_seconds", "load model", "replica-0"): 8.0,
        ("quire_ingresses",): 1,
        ("quire_queue_requests",): 3,
        ("quire_queue_tokens",): 170,
        **{("quire_refused_total", *sorted((tenant, why))): 0 for tenant in ("search", "batch") for why in REFUSALS},
        ("quire_refused_total", "overloaded", "search"): 4,
        ("quire_refused_total", "batch", "rate"): 5,
        ("quire_expired_total",): 6,
        ("quire_replica_deaths_total",): 2,
        ("quire_replica_restarts_total",): 1,
        ("quire_autoscaler_target_replicas",): 3,
        ("quire_autoscaler_ready_replicas",): 1,
        ("quire_autoscaler_leaving_replicas",): 1,
        ("quire_autoscaler_wanted_replicas",): 3.5,
        ("quire_autoscaler_gpus",): 6,
        **{("quire_autoscaler_decisions_total", why.value): {"policy": 4, "down_cooldown": 7}.get(why, 0) for why in Why},
        **{("quire_migrations_total", *sorted((why.value, outcome))): 0 for why in Reason for outcome in OUTCOMES},
        ("quire_migrations_total", "drain", "moved"): 5,
        ("quire_migrations_total", "rebalance", "refused"): 2,
        ("quire_migrations_under_way",): 1,
        ("quire_migrated_pages_total",): 40,
        ("quire_migrated_bytes_total",): 4096,
        ("quire_migration_downtime_seconds_total",): 0.25,
        ("quire_tenant_output_tokens_total", "search"): 900,
        ("quire_tenant_output_tokens_total", "batch"): 100,
        ("quire_tenant_requests_waiting", "search"): 0,
        ("quire_tenant_requests_waiting", "batch"): 1,
        ("quire_tenant_requests_running", "search"): 1,
        ("quire_tenant_requests_running", "batch"): 0,
        ("quire_tenant_pages", "search"): 4,
        ("quire_tenant_pages", "batch"): 0,
        ("quire_tenant_weight", "search"): 2,
        ("quire_tenant_weight", "batch"): 1,
        ("quire_tenant_limit", "requests_per_s", "search"): 10,
        ("quire_tenant_limit", "search", "tokens_per_min"): 6000,
        ("quire_tenant_limit", "max_concurrent", "search"): 8,
        ("quire_tenant_limit", "max_pages", "search"): 512,
    }
    assert samples == expected
