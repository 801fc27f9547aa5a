"""What has been sent and has not ended: an attempt is counted once, wherever replicas still name an earlier one."""

from __future__ import annotations

from quire.cluster.messages import AdmitRequest, Route
from quire.cluster.running_requests import RunningRequests
from quire.cluster.tenants import TenantTable
from quire.worker.protocol import EventFrame, LiveRequest, ReplicaLoad

LOAD = ReplicaLoad(1, 0, 10, 9, 0, 1, 0, 0, 0, 0, 0.0, 0.0, 1)


def test_a_later_attempt_replaces_one_that_a_replica_has_named_since() -> None:
    tenants = TenantTable(())
    running = RunningRequests(lambda name: tenants.tenant(name, 0.0))
    live = LiveRequest("r", "", 0, "running", 1, 5, 2, 1)
    running.take(EventFrame("a", 1, 0, 1, True, (), (), (live,), (), {"": 2}, LOAD))  # it still runs the first attempt
    later = AdmitRequest("r", 1, "", 0, 0.0, None, 1, 7, 9, 14, resumed=True)
    running.send(later, Route("b", 1), 0.0)
    tenant = tenants.tenant("", 0.0)
    assert tenant.running == 1
    running.take(EventFrame("a", 1, 1, 2, False, (), (), (), (("r", 2),), {"": 2}, LOAD._replace(steps=2)))
    assert tenant.running == 1  # it is b's now
    assert running.known("r") == (1, Route("b", 1))
    running.release("r", 9)
    assert (tenant.running, tenant.pages) == (0, 0)
