"""Tenants' limits: token buckets to the exact second, pages, what is refused and what waits."""

from __future__ import annotations

import pytest

from quire.cluster.messages import AdmitRequest
from quire.cluster.tenants import KEPT_TENANTS, Tenant, TenantLimits, TenantTable, TokenBucket
from quire.worker.protocol import BadRequest, Overloaded


def request(prompt: int = 10, output: int = 10, *, sequences: int = 1, resumed: bool = False) -> AdmitRequest:
    return AdmitRequest("r", 0, "t", 0, 0.0, None, sequences, prompt, output, prompt + output, resumed=resumed)


def test_a_bucket_holds_a_burst_then_flows_and_tells_exactly_when() -> None:
    bucket = TokenBucket(2.0, 4.0)
    for _ in range(4):
        assert bucket.wait_s(1, 10.0) == 0.0
        bucket.take(1, 10.0)
    assert bucket.wait_s(1, 10.0) == 0.5
    assert bucket.wait_s(1, 10.25) == 0.25
    assert bucket.wait_s(1, 10.5) == 0.0
    assert bucket.wait_s(4, 10.5) == 1.5
    assert bucket.wait_s(4, 1000.0) == 0.0
    assert bucket.wait_s(5, 1000.0) == 0.0, "more than the burst passes when the bucket is full"
    bucket.take(5, 1000.0)
    assert bucket.wait_s(1, 1000.0) == 1.0, "and is owed"


def test_waiting_as_long_as_told_is_enough_whatever_the_rounding() -> None:
    for rate in (0.1, 0.3, 7.0, 1 / 3):
        bucket, now_s = TokenBucket(rate, max(rate, 1.0)), 0.1
        for _ in range(50):
            now_s += bucket.wait_s(1, now_s)
            assert bucket.wait_s(1, now_s) == 0.0
            bucket.take(1, now_s)


def test_a_clock_that_steps_back_gives_nothing_away() -> None:
    bucket = TokenBucket(1.0, 1.0)
    bucket.take(1, 10.0)
    assert bucket.wait_s(1, 5.0) == 1.0
    assert bucket.wait_s(1, 10.0) == 1.0
    assert bucket.wait_s(1, 10.5) == 0.5


def test_requests_a_second_are_refused_with_the_time_until_they_pass() -> None:
    tenant = Tenant(TenantLimits("t", requests_per_s=0.5), 16)
    tenant.check_rates(request(), 0.0)
    tenant.take_rates(request(), 0.0)
    with pytest.raises(Overloaded, match=r"tenant t may send 0\.5 requests a second") as refused:
        tenant.check_rates(request(), 0.5)
    assert refused.value.retry_after_s == 1.5
    tenant.check_rates(request(), 2.0)


def test_tokens_a_minute_count_prompts_at_once_and_outputs_as_they_come() -> None:
    tenant = Tenant(TenantLimits("t", tokens_per_min=600), 16)
    tenant.take_rates(request(prompt=400), 0.0)
    tenant.check_rates(request(prompt=200), 0.0)
    tenant.use_tokens(100, 0.0)
    with pytest.raises(Overloaded, match="600 tokens a minute") as refused:
        tenant.check_rates(request(prompt=200), 0.0)
    assert refused.value.retry_after_s == 10.0
    tenant.check_rates(request(prompt=200), 10.0)
    tenant.check_rates(request(prompt=5000), 60.0)  # larger than a minute's worth: passes when nothing is owed


def test_a_refused_request_takes_nothing_from_any_bucket() -> None:
    tenant = Tenant(TenantLimits("t", requests_per_s=2.0, tokens_per_min=60), 16)
    tenant.take_rates(request(prompt=60), 0.0)
    for _ in range(5):
        with pytest.raises(Overloaded, match="tokens a minute"):
            tenant.check_rates(request(prompt=60), 0.0)
    tenant.check_rates(request(prompt=0), 0.0)
    tenant.take_rates(request(prompt=0), 0.0)
    with pytest.raises(Overloaded, match="requests a second"):
        tenant.check_rates(request(prompt=0), 0.0)


def test_pages_are_counted_from_tokens() -> None:
    tenant = Tenant(TenantLimits("t"), 16)
    assert [tenant.pages_for(tokens, sequences) for tokens, sequences in ((1, 1), (16, 1), (17, 1), (17, 4))] == [1, 1, 2, 5]
    tenant.prompt_pages, tenant.output_tokens = 3, 17
    assert tenant.pages == 5


def test_more_pages_than_the_tenant_may_hold_are_refused_by_name() -> None:
    tenant = Tenant(TenantLimits("t", max_pages=4), 16)
    tenant.check_size(request(prompt=32, output=32))
    with pytest.raises(BadRequest, match=r"max_tokens: 33 prompt .* 32 output tokens need 5 pages of 16 tokens; tenant t may hold 4"):
        tenant.check_size(request(prompt=33, output=32))


def test_running_requests_and_pages_bound_what_may_run_next() -> None:
    tenant = Tenant(TenantLimits("t", max_concurrent=2, max_pages=4), 16)
    tenant.running, tenant.prompt_pages = 1, 3
    assert tenant.may_run(request(prompt=16))
    assert not tenant.may_run(request(prompt=17))
    tenant.output_tokens = 1
    assert not tenant.may_run(request(prompt=16))
    tenant.output_tokens, tenant.running = 0, 2
    assert not tenant.may_run(request(prompt=1))
    assert tenant.may_run(request(prompt=1, resumed=True)), "it ran before, within the bounds"


def test_who_has_no_entry_gets_the_default_each_for_itself() -> None:
    table = TenantTable((TenantLimits("big", weight=3.0), TenantLimits("", requests_per_s=1.0)), 16)
    assert table.weight("big") == 3.0
    assert table.weight("stranger") == 1.0
    table.tenant("a", 0.0).take_rates(request(), 0.0)
    with pytest.raises(Overloaded, match="a caller without a tenant of its own may send"):
        table.tenant("a", 0.0).check_rates(request(), 0.0)
    table.tenant("b", 0.0).check_rates(request(), 0.0)
    table.tenant("big", 0.0).check_rates(request(), 0.0)
    assert TenantTable().limits("x") == TenantLimits("")


@pytest.mark.parametrize(
    "wrong", [{"weight": 0}, {"weight": float("nan")}, {"requests_per_s": -1.0}, {"max_pages": 0}, {"tokens_per_min": float("inf")}]
)
def test_limits_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"tenant 't': {next(iter(wrong))} must be a positive number"):
        TenantLimits("t", **wrong)
    with pytest.raises(ValueError, match="has two entries"):
        TenantTable((TenantLimits("t"), TenantLimits("t")))


def test_strangers_are_forgotten_once_idle_and_never_while_they_owe_or_run() -> None:
    table = TenantTable((TenantLimits("", requests_per_s=1.0),), 16)
    table.tenant("runs", 0.0).running = 1
    for i in range(10 * KEPT_TENANTS):
        table.tenant(f"stranger-{i}", float(i))
    owing = table.tenant("owes", 10.0 * KEPT_TENANTS)
    owing.take_rates(request(), 10.0 * KEPT_TENANTS)
    assert len(table.names()) <= 2 * KEPT_TENANTS + 2
    assert table.tenant("runs", 0.0).running == 1
