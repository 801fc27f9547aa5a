"""Alerts fire when they should, and not when all is well: promtool plays series to the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from eyes import RULES, alerts
from test_dashboards import OF_INGRESSES, needs_promtool, promtool

MODEL = 'namespace="llm",model="m"'
# Series of a cluster in which all is well, a value every two minutes (promtool's a+bxN: from a, b more each time, N times).
HEALTHY = {
    'up{job="quire",instance="a"}': "1x70",
    f'quire_replicas{{state="ready",{MODEL}}}': "2x70",
    f'quire_replicas{{state="draining",{MODEL}}}': "0x70",
    f"quire_autoscaler_target_replicas{{{MODEL}}}": "2x70",
    f"quire_autoscaler_ready_replicas{{{MODEL}}}": "2x70",
    f"quire_replica_restarts_total{{{MODEL}}}": "1x70",
    f'quire_pause_seconds_total{{ingress="i",{MODEL}}}': "0+2x70",
    f'quire_streams_resumed_total{{ingress="i",{MODEL}}}': "0+1x70",
    f'quire_http_requests_total{{ingress="i",route="r",status="200",{MODEL}}}': "0+100x70",
    f'quire_http_requests_total{{ingress="i",route="r",status="500",{MODEL}}}': "0+1x70",
    f'quire_http_requests_total{{ingress="i",route="r",status="504",{MODEL}}}': "0+30x70",
    f'quire_ttft_seconds_bucket{{ingress="i",le="2.5",{MODEL}}}': "0+100x70",
    f'quire_ttft_seconds_count{{ingress="i",{MODEL}}}': "0+100x70",
    f'quire_tpot_seconds_bucket{{ingress="i",le="0.1",{MODEL}}}': "0+100x70",
    f'quire_tpot_seconds_count{{ingress="i",{MODEL}}}': "0+100x70",
    f'quire_refused_total{{tenant="t",reason="overloaded",{MODEL}}}': "7x70",
    f'quire_refused_total{{tenant="t",reason="rate",{MODEL}}}': "0+3x70",
    f"quire_expired_total{{{MODEL}}}": "3x70",
    f'quire_pages{{replica="r",tier="device",state="active",{MODEL}}}': "90x70",
    f'quire_pages{{replica="r",tier="device",state="reserved",{MODEL}}}': "2x70",
    f'quire_pages{{replica="r",tier="device",state="free",{MODEL}}}': "3x70",
    f'quire_pages{{replica="r",tier="device",state="cached",{MODEL}}}': "5x70",
    f'quire_recomputed_tokens_total{{replica="r",{MODEL}}}': "0+5x70",
    f'quire_prompt_tokens_total{{replica="r",{MODEL}}}': "0+50x70",
    f'quire_output_tokens_total{{replica="r",{MODEL}}}': "0+50x70",
    f'quire_migrations_total{{reason="drain",outcome="moved",{MODEL}}}': "0+9x70",
    f'quire_migrations_total{{reason="drain",outcome="aborted",{MODEL}}}': "0+1x70",
    f'quire_autoscaler_decisions_total{{why="max",{MODEL}}}': "0+10x70",
    f'quire_autoscaler_decisions_total{{why="stalled",{MODEL}}}': "0+10x70",
    f'quire_autoscaler_decisions_total{{why="policy",{MODEL}}}': "0+40x70",
    f'quire_tenant_requests_waiting{{tenant="t",{MODEL}}}': "3x70",
    f'quire_tenant_requests_running{{tenant="t",{MODEL}}}': "1x70",
}
ASLEEP = {'quire_replicas{state="ready"': "0x70", "quire_autoscaler_target": "0x70", "quire_autoscaler_ready": "0x70"}
# Alert -> what is different: how a series begins -> its values; "" is no such series.
TROUBLE: dict[str, dict[str, str]] = {
    "QuireTargetDown": {"up{": "0x70"},
    "QuireControllerDown": {"quire_replicas": ""},
    "QuireNoReplicaReady": {'quire_replicas{state="ready"': "0x70"},
    "QuireReplicasMissing": {"quire_autoscaler_ready": "1x70"},
    "QuireReplicaRestarts": {"quire_replica_restarts": "0+1x70"},
    "QuireResumesSlow": {"quire_pause_seconds": "0+20x70"},
    "QuireDrainStuck": {'quire_replicas{state="draining"': "1x70"},
    "QuireServerErrors": {'quire_http_requests_total{ingress="i",route="r",status="500"': "0+10x70"},
    "QuireFirstTokenSlow": {"quire_ttft_seconds_bucket": "0+80x70"},
    "QuireFirstTokenSlowish": {"quire_ttft_seconds_bucket": "0+90x70"},
    "QuireOutputTokensSlow": {"quire_tpot_seconds_bucket": "0+80x70"},
    "QuireOutputTokensSlowish": {"quire_tpot_seconds_bucket": "0+90x70"},
    "QuireQueueSaturated": {'quire_refused_total{tenant="t",reason="overloaded"': "0+1x70"},
    "QuireDeadlinesMissed": {"quire_expired": "0+1x70"},
    "QuirePagesNearlyExhausted": {'quire_pages{replica="r",tier="device",state="cached"': "0x70"},
    "QuireRecomputeTax": {"quire_recomputed": "0+20x70"},
    "QuireMigrationsFail": {'quire_migrations_total{reason="drain",outcome="aborted"': "0+9x70"},
    "QuireAutoscalerAtBound": {'quire_autoscaler_decisions_total{why="max"': "0+900x70"},
    "QuireAutoscalerStuck": {'quire_autoscaler_decisions_total{why="stalled"': "0+90x70"},
    "QuireTenantThrottled": {'quire_refused_total{tenant="t",reason="rate"': "0+60x70"},
    "QuireTenantStarves": {"quire_tenant_requests_running": "0x70"},
}
# What follows from the same trouble.
BESIDES = {
    "QuireFirstTokenSlow": {"QuireFirstTokenSlowish"},
    "QuireOutputTokensSlow": {"QuireOutputTokensSlowish"},
}


def played(name: str, different: dict[str, str], firing: set[str]) -> dict[str, Any]:
    """A test of promtool's: after two hours exactly these alerts fire, each once. What HTTP servers export comes in by two pods."""
    series = []
    for metric, values in HEALTHY.items():
        now = next((changed for begin, changed in different.items() if metric.startswith(begin)), values)
        pods = (',pod="a"', ',pod="b"') if metric.partition("{")[0] in OF_INGRESSES else ("",)
        series += [{"series": metric[:-1] + pod + "}", "values": now} for pod in pods if now]
    samples = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(firing)]
    asked = {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": "2h", "exp_samples": samples}
    return {"name": name, "interval": "2m", "input_series": series, "promql_expr_test": [asked]}


def test_every_alert_is_played() -> None:
    assert {alert["alert"] for alert in alerts()} == TROUBLE.keys()


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    tests = [played("all is well", {}, set()), played("asleep, with no replica", ASLEEP, set())]
    tests += [played(alert, different, {alert} | BESIDES.get(alert, set())) for alert, different in TROUBLE.items()]
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "10m", "tests": tests}))
    promtool("test", "rules", str(file))
