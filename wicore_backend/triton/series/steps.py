"""The engine itself: whether it is well, what computes for it, and its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

from wicore_backend.engine.statistics import EngineStatistics, StepStatistics
from wicore_backend.triton.series.family import Family, labelled, one


def _latest(name: str, description: str, read: Callable[[StepStatistics], float | None]) -> Family:
    """Of the latest step, once there has been one."""
    return one("gauge", name, description, lambda s: None if s.step is None else read(s.step))


def _coefficients(statistics: EngineStatistics) -> Mapping[str, float]:
    step = statistics.step
    return {} if step is None or step.coefficients is None else asdict(step.coefficients)


FAMILIES = (
    Family(
        "gauge",
        "wicore_engine_healthy",
        "1 if the engine is well, 0 if not",
        lambda _, health: [({}, float(health.ok))],
    ),
    Family(
        "gauge",
        "wicore_executor_info",
        "1, with the executor of the dense segments and why it was chosen",
        lambda s, _: [({"executor": s.executor.name, "reason": s.executor.reason}, 1.0)],
    ),
    one("counter", "wicore_steps_total", "Steps of the engine", lambda s: s.steps),
    one("counter", "wicore_step_seconds_total", "Time spent in steps", lambda s: s.step_seconds),
    one("counter", "wicore_steps_retried_total", "Steps that failed at first", lambda s: s.retried),
    one(
        "counter",
        "wicore_pool_restarts_total",
        "How often nothing could be computed and the KV pools were cleared",
        lambda s: s.restarts,
    ),
    _latest("wicore_step_tokens", "Tokens computed in the latest step", lambda step: step.shape.tokens),
    _latest("wicore_step_sequences", "Sequences computed in the latest step", lambda step: step.shape.sequences),
    _latest("wicore_step_seconds", "Time of the latest step", lambda step: step.seconds),
    _latest(
        "wicore_step_limit_seconds",
        "Time that the latest step was given, for the sake of its decodes",
        lambda step: step.limit_s,
    ),
    _latest(
        "wicore_step_predicted_seconds", "Time that was predicted for the latest step", lambda step: step.predicted_s
    ),
    _latest(
        "wicore_step_prediction_error",
        "Median relative error of recent predictions of a step's time",
        lambda step: step.error,
    ),
    labelled(
        "gauge",
        "wicore_step_time_coefficient",
        "Seconds that a step takes for each thing that it does, as learnt",
        "of",
        _coefficients,
    ),
)
