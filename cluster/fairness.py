"""Who is served next when tenants want more than there is: the Virtual Token Counter. Pure.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, with weights:

    served[u] += INPUT_PRICE * prompt tokens that must be computed / weight[u]      when a request of u is sent to a replica
    served[u] += OUTPUT_PRICE * output tokens / weight[u]                           as they are generated
    served[u]  = max(served[u], min of served over the tenants with queued work)    when u comes to have queued work
    served[u]  = max(served[u], served[the last that had])                          the same, when nobody has

The tenant with queued work and the least `served` goes first. The lift is what keeps an idle tenant from saving up. Two tenants
that both always have queued work, and could run, are served alike within 2 * max(INPUT_PRICE * longest prompt, OUTPUT_PRICE *
tokens that the replicas hold at once), each divided by the smaller weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

INPUT_PRICE = 1.0
OUTPUT_PRICE = 2.0
KEPT_COUNTERS = 4096  # before those that say nothing are forgotten


class VirtualTokenCounters:
    """The counters, and which tenants have work that could be sent now (they are `active`).

    A tenant whose next request waits for the tenant's own limits is not active: nobody else keeps it from being served.

    Args:
        weight: of a tenant; twice the weight gets twice the service.
    """

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._served: dict[str, float] = {}
        self._active: dict[str, None] = {}  # in the order of joining
        self._last_left: str | None = None

    def active(self) -> Iterator[str]:
        """The tenants that take part, in the order in which they joined."""
        return iter(self._active)

    def is_active(self, tenant: str) -> bool:
        return tenant in self._active

    def active_weight(self) -> float:
        """The weights of the active tenants together."""
        return sum(self._weight(tenant) for tenant in self._active)

    def served(self, tenant: str) -> float:
        """The tenant's counter, in weighted token prices. Only differences between tenants mean anything."""
        return self._served.get(tenant, 0.0)

    def join(self, tenant: str) -> None:
        """`tenant` has come to have work that could be sent."""
        if tenant in self._active:
            return
        self._served[tenant] = max(self.served(tenant), self._floor())
        self._active[tenant] = None
        if len(self._served) > KEPT_COUNTERS + 2 * len(self._active):
            self._forget()

    def leave(self, tenant: str) -> None:
        """`tenant` has no such work any more."""
        if tenant in self._active:
            del self._active[tenant]
            self._last_left = tenant

    def charge_input(self, tenant: str, tokens: int) -> None:
        """So many of its prompt tokens are about to be computed."""
        self._charge(tenant, INPUT_PRICE * tokens)

    def charge_output(self, tenant: str, tokens: int) -> None:
        """So many tokens were generated for it."""
        self._charge(tenant, OUTPUT_PRICE * tokens)

    def _charge(self, tenant: str, price: float) -> None:
        self._served[tenant] = self.served(tenant) + price / self._weight(tenant)

    def _floor(self) -> float:
        if self._active:
            return min(map(self.served, self._active))
        return self.served(self._last_left) if self._last_left is not None else 0.0

    def _forget(self) -> None:
        """Drops counters that the lift would raise anyway; should that not do, the lowest others: they lose the least."""
        floor, kept = self._floor(), {*self._active, self._last_left}
        idle = sorted((served, tenant) for tenant, served in self._served.items() if tenant not in kept)
        spare = [tenant for served, tenant in idle if served <= floor]
        for tenant in spare if len(spare) * 2 >= len(idle) else [tenant for _, tenant in idle[: len(idle) // 2]]:
            del self._served[tenant]
