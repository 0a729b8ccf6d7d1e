"""Rates per minute of each key and each tenant, on every answer that is asked for."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from wicore_backend.gateway.access.keys import KeyLimits
from wicore_backend.gateway.asgi import state_of
from wicore_backend.gateway.caller import Caller
from wicore_backend.gateway.errors import ApiError
from wicore_backend.gateway.generation import Generation
from wicore_backend.gateway.limits.bucket import Charge, Decision, Rate
from wicore_backend.gateway.limits.estimates import Estimate, TokenEstimates
from wicore_backend.gateway.limits.stores import BucketStore

LimitsOf = Callable[[str], KeyLimits]

HEADERS = "ratelimit_headers"
"""Where in the connection's state the headers of its answer are."""

_LEAD = "ratelimit_lead"
"""Where in the connection's state is what became of the first prompt of an HTTP request."""

Kind = Literal["requests", "tokens"]


class RateLimitError(ApiError):
    """429: the limit comes first, then the time after which the request would be let through.

    Parameters
    ----------
    wait_s
        None if it never will be.
    """

    def __init__(self, message: str, *, kind: Kind, wait_s: float | None, headers: dict[str, str]) -> None:
        retry = {"x-should-retry": "false"} if wait_s is None else {"retry-after-ms": str(math.ceil(wait_s * 1000))}
        super().__init__(
            message,
            status=429,
            kind=kind,
            code="rate_limit_exceeded" if wait_s is not None else "request_too_large",
            retry_after_s=wait_s,
            headers={**headers, **retry},
        )


@dataclass(frozen=True, slots=True)
class Limit:
    """One bucket that a request draws on."""

    whose: str
    kind: Kind
    amount: float
    """Per minute."""
    charge: Charge


@dataclass(slots=True)
class _Reservation:
    limits: tuple[Limit, ...]
    estimate: Estimate


@dataclass(slots=True)
class _Lead:
    """The first prompt of a request, which the others wait for."""

    prompt_tokens: float
    """Of all prompts so far."""
    refusal: ApiError | None = None
    decided: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class RateLimits:
    """A hook of every generation: charges what it will probably take before Triton is asked, settles what it took.

    A key's and its tenant's buckets are charged together or not at all. What nothing was computed for costs a request
    and no tokens; what was cancelled costs its prompt, and the tokens that came.

    Several prompts in one HTTP request are one request, let through or refused with the first of them: buckets hold
    little, and what waits for room prompt by prompt would never find it for all. The others' tokens become a debt.
    """

    store: BucketStore
    limits_of_key: LimitsOf
    limits_of_tenant: LimitsOf
    _estimates: defaultdict[str, TokenEstimates] = field(default_factory=lambda: defaultdict(TokenEstimates))
    _reserved: dict[Generation, _Reservation] = field(default_factory=dict)
    _settling: set[asyncio.Task[None]] = field(default_factory=set)

    async def admit(self, generation: Generation) -> None:
        """Raise RateLimitError unless every limit has room; leave the headers that say how much."""
        caller = generation.caller
        if not self._limits(caller, 0.0):
            return
        estimate = self._estimates[caller.tenant].of(generation.request)
        state = state_of(generation.connection.scope)
        lead: _Lead | None = state.get(_LEAD)
        if lead is not None:
            await self._follow(lead, generation, estimate)
            return
        lead = _Lead(estimate.prompt)
        if generation.connection.scope["type"] == "http":  # On a WebSocket every generation is a request.
            state[_LEAD] = lead
        try:
            await self._lead(generation, estimate)
        except ApiError as error:
            lead.refusal = error
            raise
        finally:
            lead.decided.set()

    async def _lead(self, generation: Generation, estimate: Estimate) -> None:
        limits = self._limits(generation.caller, estimate.total)
        _check_prompts(limits, estimate.prompt)
        decision = await self.store.take([limit.charge for limit in limits])
        headers = rate_limit_headers(limits, decision)
        state_of(generation.connection.scope)[HEADERS] = headers
        if not decision.taken:
            raise _refusal(limits, decision, headers)
        self._reserved[generation] = _Reservation(limits, estimate)

    async def _follow(self, lead: _Lead, generation: Generation, estimate: Estimate) -> None:
        await lead.decided.wait()
        if lead.refusal is not None:
            raise lead.refusal
        limits = self._limits(generation.caller, estimate.total, requests=0.0)
        lead.prompt_tokens += estimate.prompt
        _check_prompts(limits, lead.prompt_tokens)
        if charges := _token_charges(limits, estimate.total):
            await self.store.adjust(charges)
        self._reserved[generation] = _Reservation(limits, estimate)

    def first_token(self, generation: Generation) -> None:
        """Nothing to do."""

    def finished(self, generation: Generation) -> None:
        """Settle the tokens."""
        if (reservation := self._reserved.pop(generation, None)) is None:
            return
        if generation.usage is not None and generation.outcome == "completed":
            self._estimates[generation.caller.tenant].learn(generation.request, generation.usage)
        difference = tokens_taken(generation, reservation.estimate) - reservation.estimate.total
        charges = _token_charges(reservation.limits, difference)
        if charges and difference:
            task = asyncio.get_running_loop().create_task(self.store.adjust(charges))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def close(self) -> None:
        """Finish settling, then close the store."""
        await asyncio.gather(*self._settling)
        await self.store.close()

    async def state(self, key_id: str, tenant: str) -> dict[str, dict[str, float]]:
        """What the buckets of a key and its tenant hold, by name."""
        limits = self._limits(Caller(key_id=key_id, tenant=tenant), 0.0, requests=0.0)
        if not limits:
            return {}
        decision = await self.store.take([limit.charge for limit in limits])
        return {
            f"{limit.whose} {limit.kind}": {"per_minute": limit.amount, "remaining": level}
            for limit, level in zip(limits, decision.levels, strict=True)
        }

    def _limits(self, caller: Caller, tokens: float, requests: float = 1.0) -> tuple[Limit, ...]:
        found = []
        together = f"{{{caller.tenant or 'anybody'}}}"  # What stands in braces keeps a Redis cluster in one place.
        for whose, bucket, limits in (
            (f"key {caller.key_id}", f"{together}:key:{caller.key_id}", self.limits_of_key(caller.key_id)),
            (f"tenant {caller.tenant}", f"{together}:tenant", self.limits_of_tenant(caller.tenant)),
        ):
            kinds: tuple[tuple[Kind, float | None, float, float], ...] = (
                ("requests", limits.requests_per_minute, requests, 1.0),
                ("tokens", limits.tokens_per_minute, tokens, 0.0),
            )
            for kind, amount, cost, least in kinds:
                if amount is not None:
                    rate = Rate.per_minute(amount, burst_s=limits.burst_seconds, least=least)
                    found.append(Limit(whose, kind, amount, Charge(f"{bucket}:{kind}", rate, cost)))
        return tuple(found)


def _token_charges(limits: Sequence[Limit], tokens: float) -> list[Charge]:
    return [Charge(limit.charge.bucket, limit.charge.rate, tokens) for limit in limits if limit.kind == "tokens"]


def _check_prompts(limits: Sequence[Limit], tokens: float) -> None:
    """Raise RateLimitError for what no waiting makes room for."""
    for limit in limits:
        if limit.kind == "tokens" and tokens > limit.amount:
            raise RateLimitError(
                f"the prompt has about {tokens:.0f} tokens; {limit.whose} may use {limit.amount:g} tokens"
                " per minute: send a shorter one",
                kind="tokens",
                wait_s=None,
                headers={},
            )


def tokens_taken(generation: Generation, estimate: Estimate) -> float:
    """What a generation that is over took: by the engine's count, or by the estimate of its prompt and what came."""
    if generation.usage is not None:
        return generation.usage.prompt_tokens + generation.usage.completion_tokens
    error = generation.error
    if generation.outcome == "refused" and error is not None and error.status != 504:
        return 0.0  # Turned away before anything was computed.
    return estimate.prompt + generation.tokens


def rate_limit_headers(limits: Sequence[Limit], decision: Decision) -> dict[str, str]:
    """`x-ratelimit-*` as OpenAI names them; of a key's and a tenant's limits those that will be reached first.

    `remaining` is what may be had at this moment: a bucket holds what `burst_seconds` gives, not a whole minute's.
    """
    headers = {}
    for kind in ("requests", "tokens"):
        held = [(limit, level) for limit, level in zip(limits, decision.levels, strict=True) if limit.kind == kind]
        if not held:
            continue
        limit, level = min(held, key=lambda pair: pair[1])
        rate = limit.charge.rate
        headers[f"x-ratelimit-limit-{kind}"] = f"{limit.amount:.0f}" if limit.amount >= 1 else f"{limit.amount:g}"
        headers[f"x-ratelimit-remaining-{kind}"] = f"{max(0, math.floor(level))}"
        headers[f"x-ratelimit-reset-{kind}"] = duration((rate.capacity - level) / rate.per_second)
    return headers


def duration(seconds: float) -> str:
    """A time as OpenAI's headers have it: `120ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


def _refusal(limits: Sequence[Limit], decision: Decision, headers: dict[str, str]) -> RateLimitError:
    limit, wait = max(zip(limits, decision.waits, strict=True), key=lambda pair: pair[1])
    return RateLimitError(
        f"{limit.whose} has reached its limit of {limit.amount:g} {limit.kind} per minute;"
        f" try again in {duration(wait)}",
        kind=limit.kind,
        wait_s=wait,
        headers=headers,
    )
