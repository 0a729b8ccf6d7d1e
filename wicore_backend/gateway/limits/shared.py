"""Buckets that all copies of the gateway share, in Redis."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from wicore_backend.gateway.errors import UnavailableError
from wicore_backend.gateway.limits.bucket import Charge, Decision
from wicore_backend.gateway.limits.stores import MemoryStore
from wicore_backend.observability.logfmt import logfmt

_log = logging.getLogger(__name__)

_SCRIPT = """
-- KEYS: buckets. ARGV: "take" or "adjust", then for each bucket: per_second, capacity, cost.
-- Redis's own clock: the copies' clocks need not agree. The arithmetic is that of bucket.py.
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local levels, waits, taken = {}, {}, true
for i, key in ipairs(KEYS) do
  local per_second, capacity, cost = tonumber(ARGV[3*i-1]), tonumber(ARGV[3*i]), tonumber(ARGV[3*i+1])
  local kept = redis.call('HMGET', key, 'level', 'at')
  local level = capacity
  if kept[1] then
    level = math.min(capacity, tonumber(kept[1]) + math.max(0, now - tonumber(kept[2])) * per_second)
  end
  levels[i], waits[i] = level, 0
  if ARGV[1] == 'take' then
    local missing = math.min(cost, capacity) - level
    if missing > 1e-6 * math.max(1, cost) then
      waits[i] = missing / per_second
      taken = false
    end
  end
end
for i, key in ipairs(KEYS) do
  local per_second, capacity, cost = tonumber(ARGV[3*i-1]), tonumber(ARGV[3*i]), tonumber(ARGV[3*i+1])
  if taken then
    levels[i] = math.min(capacity, levels[i] - cost)
  end
  redis.call('HSET', key, 'level', string.format('%.17g', levels[i]), 'at', string.format('%.6f', now))
  -- A full bucket is as good as none. Ten more seconds for clocks that jump.
  redis.call('EXPIRE', key, math.ceil((capacity - levels[i]) / per_second) + 10)
end
local answer = {}
for i = 1, #KEYS do
  answer[2*i-1], answer[2*i] = string.format('%.17g', waits[i]), string.format('%.17g', levels[i])
end
return answer
"""

_RETRY_AFTER_S = 1.0
"""After a failure Redis is left alone for so long: otherwise every request would wait for it in turn."""


class FailureListener(Protocol):
    """Is told of each failure of the shared store, and when it is back."""

    def limits_shared(self, shared: bool) -> None:
        """Whether limits are shared now."""


@dataclass(slots=True)
class RedisStore:
    """Buckets in one Redis. Each operation is one script, hence atomic among all copies.

    It is *up*, or *down* since an operation failed or took longer than `timeout_s`; once a second an operation
    tries it again. While it is down, with `on_failure="open"` each copy of the gateway holds the limits by itself (so
    that N copies admit up to N times the rate); with "closed" requests get 503.
    """

    redis: Redis
    on_failure: Literal["open", "closed"] = "open"
    timeout_s: float = 0.25
    prefix: str = "wicore:limits"
    listener: FailureListener | None = None
    clock: Callable[[], float] = time.monotonic
    up: bool = field(init=False, default=True)
    _local: MemoryStore = field(init=False)
    _next_try: float = field(init=False, default=0.0)
    _script: Any = field(init=False)

    def __post_init__(self) -> None:
        self._local = MemoryStore(self.clock)
        self._script = self.redis.register_script(_SCRIPT)

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """As BucketStore has it. Raises UnavailableError while Redis is down and failures close."""
        answer = await self._run("take", charges)
        if answer is not None:
            return Decision(tuple(map(float, answer[::2])), tuple(map(float, answer[1::2])))
        if self.on_failure == "closed":
            raise UnavailableError(
                "limits cannot be checked at the moment; try again", code="limits_unavailable", retry_after_s=1
            )
        return await self._local.take(charges)

    async def adjust(self, charges: Sequence[Charge]) -> None:
        """As BucketStore has it. While Redis is down nobody else learns of it."""
        if await self._run("adjust", charges) is None:
            await self._local.adjust(charges)

    async def close(self) -> None:
        """Close the connections."""
        await self.redis.aclose()

    async def _run(self, operation: str, charges: Sequence[Charge]) -> list[bytes] | None:
        """The script's answer; None if there is none to be had."""
        if not self.up and self.clock() < self._next_try:
            return None
        # The braces keep one tenant's buckets on one node of a cluster, as a script needs them.
        keys = [f"{self.prefix}:{charge.bucket}" for charge in charges]
        numbers = [repr(n) for c in charges for n in (c.rate.per_second, c.rate.capacity, c.cost)]
        try:
            async with asyncio.timeout(self.timeout_s):
                answer: list[bytes] = await self._script(keys=keys, args=[operation, *numbers])
        except (RedisError, OSError, TimeoutError) as error:
            self._next_try = self.clock() + _RETRY_AFTER_S
            self._tell(up=False, problem=f"{type(error).__name__}: {error}")
            return None
        self._tell(up=True)
        return answer

    def _tell(self, *, up: bool, problem: str = "") -> None:
        if up == self.up:
            return
        self.up = up
        if up:
            _log.warning(logfmt("limits_shared_again"))
        else:
            _log.error(logfmt("limits_not_shared", problem=problem, failures=self.on_failure))
        if self.listener:
            self.listener.limits_shared(up)
