"""What /status, /ready and /v1/stats say."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class HealthAnswer(BaseModel):
    """The process lives."""

    status: Literal["ok"] = "ok"


class ReadyAnswer(BaseModel):
    """Whether requests are taken."""

    ready: bool
    reason: str | None = None
    """Why not."""


class GatewayState(BaseModel):
    """This process."""

    version: str
    uptime_s: float
    running: int
    """Answers under way."""
    draining: bool


class RequestCounts(BaseModel):
    """What Triton counted for a model since it was loaded; times are means for one request."""

    succeeded: int
    failed: int
    queue_ms: float
    compute_ms: float


class ModelState(BaseModel):
    """A model of the server's repository."""

    name: str
    version: str
    ready: bool
    reason: str | None
    requests: RequestCounts | None


class ExecutorState(BaseModel):
    """What computes a model's dense segments."""

    model: str
    name: str
    """torch, tensorrt or onnx."""
    reason: str
    """Why this one."""


class Device(BaseModel):
    """A GPU. What the server does not say is null."""

    name: str
    utilization: float | None
    """0 to 1."""
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    power_watts: float | None


class KvBlocks(BaseModel):
    """Blocks of the KV cache on the device, of one layer group."""

    used: int
    """Held by requests."""
    cached: int
    """Held by nobody, kept for prompts that begin alike."""
    total: int


class Load(BaseModel):
    """What the engine has to do. Totals count since it was started."""

    running: int
    waiting: int
    queue_oldest_s: float | None
    prompt_tokens_total: int
    generated_tokens_total: int
    requests_total: dict[str, int]
    """By outcome."""
    rejected_total: dict[str, int]
    """By reason."""
    preemptions_total: int
    steps_total: int
    step_seconds_total: float
    kv_blocks: dict[str, KvBlocks]
    """By layer group."""


class MissReason(BaseModel):
    """Why tokens of prompts had to be computed."""

    reason: str
    count: int
    unit: str


class TierGroup(BaseModel):
    """One layer group's blocks in a tier; null is what the tier does not count."""

    group: str
    used: int | None
    capacity: int | None
    stored: int | None
    loaded: int | None
    evicted: int | None
    refused: int | None
    written_behind: int | None


class Tier(BaseModel):
    """One memory of the KV cache, `device`, `host` or `nvme`."""

    tier: str
    groups: list[TierGroup]
    found_tokens: int
    """Of prompts, those that it had and no faster tier."""
    used_bytes: int | None
    stored_bytes: int | None
    loaded_bytes: int | None
    store_bytes_per_second: float | None
    load_bytes_per_second: float | None
    load_latency_s: float | None
    used_disk_bytes: int | None
    disk_bytes: int | None
    errors: dict[str, int]


class Cache(BaseModel):
    """The KV cache of one model, tier by tier."""

    model: str
    found_tokens: int
    missed_tokens: int
    restores: int
    restored_tokens: int
    reasons: list[MissReason]
    tiers: list[Tier]
    bounded_tokens: int | None
    """If there is one, answers are lossy: what they keep of the layers with unlimited attention."""
    bounded_blocks: dict[str, int]


class StatusAnswer(BaseModel):
    """The gateway and the server behind it. While that is gone, `ready` is false and what it would say is missing."""

    time: float
    """Seconds since 1970."""
    gateway: GatewayState
    ready: bool
    reason: str | None
    server: str | None
    """Name and version."""
    system_fingerprint: str | None
    models: list[ModelState]
    executors: list[ExecutorState]
    devices: list[Device]
    load: Load | None
    cache: Cache | None


class StatsAnswer(BaseModel):
    """Counters for those who collect them without Prometheus; rates are differences between two looks."""

    time: float
    requests: dict[str, int]
    """By outcome."""
    rejected: dict[str, int]
    """By reason."""
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    """Of prompts, those that were found in the KV cache."""
    queue_seconds: dict[str, float]
    """By class: from arrival to the first step, sums of all requests."""
    started: dict[str, int]
    """By class: the requests behind these sums."""
    gpu_utilization: float | None
    """0 to 1, of the busiest GPU; null on a machine without."""
