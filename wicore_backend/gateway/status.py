"""/health, /ready, /status and /v1/stats."""

from __future__ import annotations

import time
from dataclasses import asdict

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from wicore_client import cache

from wicore_backend.gateway.backend import BackendStatus, Model
from wicore_backend.gateway.caller import CallerDep
from wicore_backend.gateway.errors import ApiError
from wicore_backend.gateway.openai.documentation import ERRORS
from wicore_backend.gateway.server_metrics import ServerMetrics
from wicore_backend.gateway.status_schema import (
    Cache,
    Device,
    ExecutorState,
    GatewayState,
    HealthAnswer,
    KvBlocks,
    Load,
    ModelState,
    ReadyAnswer,
    RequestCounts,
    StatsAnswer,
    StatusAnswer,
)

router = APIRouter(tags=["status"])

_STARTED = time.monotonic()


@router.get("/health")
async def health() -> HealthAnswer:
    """Whether this process lives: it says so."""
    return HealthAnswer()


@router.get(
    "/ready",
    response_model=ReadyAnswer,
    responses={503: {"model": ReadyAnswer, "description": "No requests are taken."}},
)
async def ready(request: Request) -> JSONResponse:
    """Whether requests are taken: 200, or 503 and why not."""
    is_ready, reason = await _readiness(request)
    answer = ReadyAnswer(ready=is_ready, reason=reason)
    return JSONResponse(
        answer.model_dump(),
        status_code=200 if is_ready else 503,
        headers={} if is_ready else {"Retry-After": "1"},
    )


@router.get("/status", responses=ERRORS)
async def status(request: Request, _caller: CallerDep) -> StatusAnswer:
    """The gateway and the server behind it: models, devices, load, memories."""
    state = request.app.state
    is_ready, reason = await _readiness(request)
    try:
        found: BackendStatus | None = await state.backend.status()
    except ApiError:
        found = None
    metrics = ServerMetrics.parse(found.metrics) if found else ServerMetrics(())
    return StatusAnswer(
        time=time.time(),
        gateway=GatewayState(
            version=request.app.version,
            uptime_s=round(time.monotonic() - _STARTED, 3),
            running=state.generations.running,
            draining=state.generations.draining,
        ),
        ready=is_ready,
        reason=reason,
        server=found.server if found else None,
        system_fingerprint=await state.backend.fingerprint() if found else None,
        models=[_model(model, found) for model in found.models] if found else [],
        executors=_executors(metrics),
        devices=_devices(metrics),
        load=_load(metrics) if metrics.samples else None,
        cache=_cache(metrics),
    )


@router.get("/v1/stats", responses=ERRORS)
async def stats(request: Request, _caller: CallerDep) -> StatsAnswer:
    """What has been done since the engine was started."""
    found: BackendStatus = await request.app.state.backend.status()
    metrics = ServerMetrics.parse(found.metrics)
    return StatsAnswer(
        time=time.time(),
        requests=_counts(metrics.by("outcome", "wicore_requests_total")),
        rejected=_counts(metrics.by("reason", "wicore_requests_rejected_total")),
        prompt_tokens=int(metrics.total("wicore_prompt_tokens_total")),
        generated_tokens=int(metrics.total("wicore_generated_tokens_total")),
        cached_tokens=int(metrics.total("wicore_prefix_hit_tokens_total")),
        queue_seconds=metrics.by("class", "wicore_queue_seconds_sum_total"),
        started=_counts(metrics.by("class", "wicore_queue_seconds_count_total")),
        gpu_utilization=metrics.largest("nv_gpu_utilization"),
    )


async def _readiness(request: Request) -> tuple[bool, str | None]:
    state = request.app.state
    if state.generations.draining:
        return False, "the gateway is shutting down"
    readiness = await state.backend.readiness()
    return readiness.ready, readiness.reason or None


def _model(model: Model, found: BackendStatus) -> ModelState:
    counts = found.statistics.get(model.name)
    return ModelState(
        name=model.name,
        version=model.version,
        ready=model.ready,
        reason=model.reason or None,
        requests=None
        if counts is None
        else RequestCounts(
            succeeded=int(counts["succeeded"]),
            failed=int(counts["failed"]),
            queue_ms=counts["queue_ms"],
            compute_ms=counts["compute_ms"],
        ),
    )


def _executors(metrics: ServerMetrics) -> list[ExecutorState]:
    found = (sample.labels for sample in metrics.samples if sample.name == "wicore_executor_info")
    return [
        ExecutorState(model=labels.get("model", ""), name=labels.get("executor", ""), reason=labels.get("reason", ""))
        for labels in found
    ]


def _devices(metrics: ServerMetrics) -> list[Device]:
    used = metrics.by("gpu_uuid", "nv_gpu_memory_used_bytes")
    total = metrics.by("gpu_uuid", "nv_gpu_memory_total_bytes")
    utilization = metrics.by("gpu_uuid", "nv_gpu_utilization")
    power = metrics.by("gpu_uuid", "nv_gpu_power_usage")
    return [
        Device(
            name=name,
            utilization=utilization.get(name),
            memory_used_bytes=_whole(used.get(name)),
            memory_total_bytes=_whole(total.get(name)),
            power_watts=power.get(name),
        )
        for name in sorted({*used, *total, *utilization, *power})
    ]


def _load(metrics: ServerMetrics) -> Load:
    used = metrics.by("group", "wicore_kv_blocks_used")
    cached = metrics.by("group", "wicore_kv_blocks_cached")
    return Load(
        running=int(metrics.total("wicore_running_requests")),
        waiting=int(metrics.total("wicore_waiting_requests")),
        queue_oldest_s=metrics.largest("wicore_queue_oldest_seconds"),
        prompt_tokens_total=int(metrics.total("wicore_prompt_tokens_total")),
        generated_tokens_total=int(metrics.total("wicore_generated_tokens_total")),
        requests_total=_counts(metrics.by("outcome", "wicore_requests_total")),
        rejected_total=_counts(metrics.by("reason", "wicore_requests_rejected_total")),
        preemptions_total=int(metrics.total("wicore_preemptions_total")),
        steps_total=int(metrics.total("wicore_steps_total")),
        step_seconds_total=metrics.total("wicore_step_seconds_total"),
        kv_blocks={
            group: KvBlocks(used=int(used.get(group, 0)), cached=int(cached.get(group, 0)), total=int(total))
            for group, total in metrics.by("group", "wicore_kv_blocks").items()
        },
    )


def _cache(metrics: ServerMetrics) -> Cache | None:
    reports = cache.reports([m for m in metrics.samples if m.name.startswith("wicore_")])
    return Cache.model_validate(asdict(reports[0])) if reports else None


def _counts(values: dict[str, float]) -> dict[str, int]:
    return {name: int(value) for name, value in values.items()}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
