"""What each tenant may use, and what it uses: rates, requests at once, pages. Pure; times are arguments.

Rates (requests a second, tokens a minute) are token buckets: beyond them a request is refused, with the time after which it
would pass. Requests at once and pages bound what runs: beyond them a request waits in the queue, and only its own tenant with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..worker.protocol import BadRequest, Overloaded
from .messages import AdmitRequest

KEPT_TENANTS = 1024  # states of tenants without an entry of their own, before the idle ones among them are forgotten
BOUNDS = ("requests_per_s", "tokens_per_min", "max_concurrent", "max_pages")


class CountedTenants:
    """The names under which tenants are counted: the first `most` their own, all others together."""

    def __init__(self, most: int = KEPT_TENANTS) -> None:
        self._most = most
        self._names: set[str] = set()

    def name(self, tenant: str) -> str:
        """Its own, or `others`."""
        if len(self._names) < self._most:
            self._names.add(tenant)
        return tenant if tenant in self._names else "others"


class RateLimited(Overloaded):
    """The tenant sends faster than it may, whatever the cluster has room for."""


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """One tenant's share and bounds. None is no bound.

    Attributes:
        name: as the API key says; "" stands for every tenant without an entry of its own.
        weight: its share of the cluster while others want it too; twice the weight gets twice the service.
        requests_per_s: how fast it may send; a second's worth, at least one, may come at once.
        tokens_per_min: prompt tokens when they are sent, and output tokens as they come; a minute's worth may come at once.
        max_concurrent: requests that run at once.
        max_pages: pages that its running requests may hold when another one starts. They grow as they run.

    Raises:
        ValueError: a weight or a bound that is not positive.
    """

    name: str
    weight: float = 1.0
    requests_per_s: float | None = None
    tokens_per_min: float | None = None
    max_concurrent: int | None = None
    max_pages: int | None = None

    def __post_init__(self) -> None:
        for field in ("weight", *BOUNDS):
            value = getattr(self, field)
            # Infinities and NaN fail the comparison.
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"tenant {self.name!r}: {field} must be a positive number, not {value!r}")

    def bounds(self) -> tuple[tuple[str, float], ...]:
        """(field, value) of every bound that there is."""
        values = [(field, getattr(self, field)) for field in BOUNDS]
        return tuple((field, value) for field, value in values if value is not None)


class TokenBucket:
    """So much a second, saved up to `burst`. Starts full.

    Args:
        rate_per_s: what flows in.
        burst: what it holds at most.
    """

    def __init__(self, rate_per_s: float, burst: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._level = burst
        self._at_s: float | None = None

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` may be taken; 0.0 when it may now. More than the bucket holds passes when the bucket is full."""
        self._flow(now_s)
        lacking = min(amount, self._burst) - self._level
        return lacking / self._rate_per_s if lacking > 1e-9 * self._burst else 0.0  # whoever waits as long as told passes, rounding or not

    def take(self, amount: float, now_s: float) -> None:
        """Takes it, also what is not there: the bucket then owes it."""
        self._flow(now_s)
        self._level -= amount

    def full(self, now_s: float) -> bool:
        """Whether it forgets nothing when it is made anew."""
        return self.wait_s(self._burst, now_s) == 0.0

    def _flow(self, now_s: float) -> None:
        if self._at_s is not None and now_s > self._at_s:
            self._level = min(self._burst, self._level + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s if self._at_s is None else max(now_s, self._at_s)


class Tenant:
    """One tenant's limits, and what it uses of them now.

    Attributes:
        running: requests that have been sent to replicas and have not ended.
        prompt_pages: pages that their prompts fill.
        output_tokens: tokens that they have generated so far.
    """

    def __init__(self, limits: TenantLimits, page_size: int) -> None:
        self.limits = limits
        self.running = 0
        self.prompt_pages = 0
        self.output_tokens = 0
        self._page_size = page_size
        rate, tokens = limits.requests_per_s, limits.tokens_per_min
        self._requests = None if rate is None else TokenBucket(rate, max(rate, 1.0))
        self._tokens = None if tokens is None else TokenBucket(tokens / 60, tokens)

    @property
    def pages(self) -> int:
        """Pages that its requests hold, as counted from their tokens: shared ones once for each, whatever replicas cache not at all."""
        return self.prompt_pages + -(-self.output_tokens // self._page_size)

    def pages_for(self, tokens: int, sequences: int) -> int:
        """Pages for `tokens` in so many sequences: every sequence ends in a page of its own, the rest is shared at best."""
        return -(-tokens // self._page_size) + sequences - 1

    def check_size(self, request: AdmitRequest) -> None:
        """Raises:
        BadRequest: the request alone may need more pages than the tenant may hold.
        """
        most, needed = self.limits.max_pages, self.pages_for(request.prompt_tokens + request.max_tokens, request.sequences)
        if most is not None and needed > most:
            what = f"{request.prompt_tokens} prompt tokens and up to {request.max_tokens} output tokens need {needed} pages"
            raise BadRequest("max_tokens", f"{what} of {self._page_size} tokens; {self._who()} may hold {most}")

    def check_rates(self, request: AdmitRequest, now_s: float) -> None:
        """Raises:
        Overloaded: it comes too fast; with the seconds after which it would pass.
        """
        limits = self.limits
        if self._requests is not None and (wait_s := self._requests.wait_s(1, now_s)):
            raise RateLimited(f"{self._who()} may send {limits.requests_per_s:g} requests a second", wait_s)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(request.prompt_tokens, now_s)):
            raise RateLimited(f"{self._who()} may use {limits.tokens_per_min:g} tokens a minute", wait_s)

    def take_rates(self, request: AdmitRequest, now_s: float) -> None:
        """The request has been let in."""
        if self._requests is not None:
            self._requests.take(1, now_s)
        self.use_tokens(request.prompt_tokens, now_s)

    def use_tokens(self, tokens: int, now_s: float) -> None:
        """It was served so many tokens."""
        if self._tokens is not None:
            self._tokens.take(tokens, now_s)

    def may_run(self, request: AdmitRequest) -> bool:
        """Whether one more request would stay within its bounds on what runs. One that a replica has lost ran within them already."""
        limits = self.limits
        if request.resumed:
            return True
        if limits.max_concurrent is not None and self.running >= limits.max_concurrent:
            return False
        return limits.max_pages is None or self.pages + self.pages_for(request.prompt_tokens, request.sequences) <= limits.max_pages

    def idle(self, now_s: float) -> bool:
        """Whether nothing is lost when its state is forgotten."""
        return not self.running and all(bucket is None or bucket.full(now_s) for bucket in (self._requests, self._tokens))

    def _who(self) -> str:
        return f"tenant {self.limits.name}" if self.limits.name else "a caller without a tenant of its own"


class TenantTable:
    """Every tenant's limits and use.

    Args:
        limits: of the tenants that have an entry. The one named "" holds for each of the others; without it they have no bounds.
        page_size: tokens in a page.

    Raises:
        ValueError: two entries of one name.
    """

    def __init__(self, limits: Iterable[TenantLimits] = (), page_size: int = 32) -> None:
        self._limits: dict[str, TenantLimits] = {}
        for entry in limits:
            if entry.name in self._limits:
                raise ValueError(f"tenant {entry.name!r} has two entries")
            self._limits[entry.name] = entry
        self._default = self._limits.get("", TenantLimits(""))
        self._page_size = page_size
        self._tenants: dict[str, Tenant] = {}
        self._sweep_at = KEPT_TENANTS + len(self._limits)

    def limits(self, name: str) -> TenantLimits:
        """The limits that hold for `name`."""
        return self._limits.get(name, self._default)

    def weight(self, name: str) -> float:
        """The weight of `name`."""
        return self.limits(name).weight

    def names(self) -> list[str]:
        """The tenants that have an entry of their own, and those that use anything or did lately."""
        return sorted({name for name in self._limits if name} | self._tenants.keys())

    def tenant(self, name: str, now_s: float) -> Tenant:
        """The state of `name`."""
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= self._sweep_at:
                self._tenants = {n: t for n, t in self._tenants.items() if not t.idle(now_s)}
                self._sweep_at = KEPT_TENANTS + 2 * len(self._tenants)
            tenant = self._tenants[name] = Tenant(self.limits(name), self._page_size)
        return tenant
