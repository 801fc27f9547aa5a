"""The policies against each other: sessions of a recorded trace on four virtual replicas that are busy nine tenths of the time."""

from __future__ import annotations

from functools import cache

import pytest
from virtual_replica import Figures, Job, Shape, Speed, VirtualCluster

from quire.cluster.policies import POLICIES
from quire.cluster.routing import Router
from quire.deploy.load.report import percentile
from quire.deploy.load.traces import TraceOptions
from quire.deploy.load.workload import trace_file

REPLICAS, BUSY = 4, 0.9
SPEED, SHAPE = Speed(), Shape(pages=512)  # a seventh of what the prompts fill


@pytest.fixture(scope="module")
def race(data_file):
    trace = trace_file(
        data_file("traces/mooncake_conversation_trace.jsonl.gz"), 10_000, TraceOptions(scale=16, max_tokens=2048, one_session_in=30)
    )
    # A decode step is shared by several sequences, so each of its tokens costs less than a step.
    work_s = sum(len(r.prompt) * SPEED.prefill_token_s + r.output_tokens * 1.5 * SPEED.decode_token_s for r in trace)
    stretch = work_s / REPLICAS / BUSY / trace[-1].arrival_s
    jobs = [Job(r.arrival_s * stretch, r.prompt, r.output_tokens) for r in trace]

    @cache
    def run(policy: str) -> Figures:
        return VirtualCluster(Router(policy), [SPEED] * REPLICAS, SHAPE).run(jobs)

    return run


def test_the_same_traffic_gives_the_same_figures(race):
    again = race.__wrapped__("cost")
    assert again == race("cost")
    assert min(again.ttft_s) > 0
    assert len(again.ttft_s) > 300


@pytest.mark.parametrize("other", sorted(POLICIES.keys() - {"cost"}))
def test_cost_finds_more_prefixes_and_is_sooner(race, other: str):
    cost, beaten = race("cost"), race(other)
    assert cost.hit_rate > 1.5 * beaten.hit_rate
    assert percentile(cost.ttft_s, 50) < 0.7 * percentile(beaten.ttft_s, 50)
    assert percentile(cost.ttft_s, 99) < 0.85 * percentile(beaten.ttft_s, 99)
