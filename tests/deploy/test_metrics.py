"""Metrics of an ingress: values and labels from where they should come."""

import pytest
from exported_metrics import STATS
from prometheus_client.parser import text_string_to_metric_families

from quire.cluster.client import RecoveryStats
from quire.cluster.tenants import CountedTenants
from quire.deploy.metrics import WINDOW_S, Metrics

INGRESS = frozenset({("ingress", "")})


def exported(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples}


def test_replicas_are_told_apart() -> None:
    values = exported(Metrics(lambda: {"r0": STATS, "r1": STATS._replace(pages_free=50, preemptions={"recompute": 0})}))
    for state, count in {"free": 5, "cached": 6, "active": 7, "reserved": 8}.items():
        assert values["quire_pages", frozenset({("replica", "r0"), ("state", state), ("tier", "device")})] == count
    assert values["quire_pages", frozenset({("replica", "r1"), ("state", "free"), ("tier", "device")})] == 50
    for state, count in {"free": 15, "cached": 16, "active": 17}.items():
        assert values["quire_pages", frozenset({("replica", "r0"), ("state", state), ("tier", "host")})] == count
    assert values["quire_pages", frozenset({("replica", "r0"), ("state", "active"), ("tier", "disk")})] == 27
    assert values["quire_preemptions_total", frozenset({("replica", "r0"), ("action", "recompute")})] == 14
    assert values["quire_preemption_predicted_seconds_total", frozenset({("replica", "r0"), ("action", "swap")})] == 3.5
    assert values["quire_preemption_seconds_total", frozenset({("replica", "r0"), ("action", "swap")})] == 4.5
    assert values["quire_moved_bytes_total", frozenset({("replica", "r0"), ("kind", "out")})] == 19
    r0 = frozenset({("replica", "r0")})
    by_name = {
        "steps": 1,
        "prompt_tokens": 9,
        "output_tokens": 10,
        "prefix_query_tokens": 11,
        "prefix_hit_tokens": 12,
        "prefix_host_hit_tokens": 18,
        "recomputed_tokens": 13,
        "stall_seconds": 2.5,
    }
    for name, count in {**by_name, "step_seconds": 1.5}.items():
        assert values[f"quire_{name}_total", r0] == count
    assert values["quire_requests_running", r0] == 2
    assert values["quire_requests_waiting", r0] == 3


def test_latencies_of_a_request_with_two_choices() -> None:
    metrics = Metrics(dict)
    clock = metrics.generation(started_s=0.0)
    for choice in (0, 1, 0):
        clock.tokens(choice, waited_s=0.5)
    clock.ended(0, tokens=2)
    clock.ended(1, tokens=1)  # a single token has no time between tokens
    clock.all_ended()
    values = exported(metrics)
    counts = {name: values[f"quire_{name}_seconds_count", INGRESS] for name in ("admission", "ttft", "tpot", "e2e")}
    assert counts == {"admission": 1, "ttft": 1, "tpot": 1, "e2e": 1}
    assert values["quire_admission_seconds_sum", INGRESS] == 0.5
    assert values["quire_ttft_seconds_sum", INGRESS] <= values["quire_e2e_seconds_sum", INGRESS]


def test_tenants_are_told_apart() -> None:
    metrics = Metrics(dict, ingress="ingress-1")
    metrics.count_generation("search", 200)
    metrics.count_prompt("search", 30, 10, 0.5)
    metrics.count_generation("batch", 429)
    values = exported(metrics)
    search = frozenset({("ingress", "ingress-1"), ("tenant", "search")})
    assert values["quire_tenant_requests_total", search | {("status", "200")}] == 1
    assert values["quire_tenant_requests_total", frozenset({("ingress", "ingress-1"), ("tenant", "batch"), ("status", "429")})] == 1
    assert (values["quire_tenant_prompt_tokens_total", search], values["quire_tenant_cached_tokens_total", search]) == (30, 10)
    assert (values["quire_tenant_ttft_seconds_sum", search], values["quire_tenant_ttft_seconds_count", search]) == (0.5, 1)


def test_tenants_beyond_the_first_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.deploy.metrics.CountedTenants", lambda: CountedTenants(2))
    metrics = Metrics(dict)
    for tenant in ("a", "b", "c", "d", "a"):
        metrics.count_generation(tenant, 200)
    counted = {dict(labels)["tenant"]: n for (name, labels), n in exported(metrics).items() if name == "quire_tenant_requests_total"}
    assert counted == {"a": 2, "b": 1, "others": 2}


def test_what_latencies_were_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("quire.deploy.metrics.time.monotonic", lambda: now_s)
    lately = Metrics(dict).ttft
    assert lately.percentiles() is None
    for seconds in range(1, 201):
        lately.observe(float(seconds))
    assert lately.percentiles() == (100.0, 180.0, 198.0)
    now_s += WINDOW_S / 2
    lately.observe(7.0)
    now_s += WINDOW_S / 2 + 1
    assert lately.percentiles() == (7.0, 7.0, 7.0)


def test_what_deaths_have_cost() -> None:
    values = exported(Metrics(dict, lambda: RecoveryStats(lost=3, resumed=2, replayed_tokens=100, pause_s=1.5)))
    expected = {"streams_lost": 3, "streams_resumed": 2, "replayed_tokens": 100, "pause_seconds": 1.5}
    assert {name: values[f"quire_{name}_total", INGRESS] for name in expected} == expected


def test_requests_are_counted_by_route_and_status() -> None:
    metrics = Metrics(dict)
    metrics.count_request("/v1/models", 200)
    metrics.count_request("/v1/models", 200)
    metrics.count_request("other", 404)
    values = exported(metrics)
    assert values["quire_http_requests_total", frozenset({("ingress", ""), ("route", "/v1/models"), ("status", "200")})] == 2
    assert values["quire_http_requests_total", frozenset({("ingress", ""), ("route", "other"), ("status", "404")})] == 1
