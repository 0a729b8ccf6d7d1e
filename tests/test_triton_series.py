"""What the metrics page says is what the engine's statistics say."""

from dataclasses import replace

from wicore_backend.engine.health import Health
from wicore_backend.engine.plan import RejectReason, SchedulerCounts
from wicore_backend.engine.request import FinishReason, PriorityClass
from wicore_backend.engine.statistics import (
    QUEUE_BUCKETS_S,
    BlockUsage,
    EngineStatistics,
    QueueStatistics,
    StepStatistics,
    TierUsage,
)
from wicore_backend.engine.step_time import Coefficients, StepShape
from wicore_backend.hmt.host_tier import TierCounts
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.triton.series import FAMILIES

EMPTY = QueueStatistics(0, 0, 0.0, 0, 0.0, (0,) * (len(QUEUE_BUCKETS_S) + 1))
STATISTICS = EngineStatistics(
    running=3,
    waiting=4,
    blocks={LayerGroup.GLOBAL: BlockUsage(active=5, cached=6, capacity=70, recycled=8)},
    host={LayerGroup.LOCAL: TierUsage(used=1, capacity=2, counts=TierCounts(3, 4, 5, 6))},
    queues=dict.fromkeys(PriorityClass, EMPTY)
    | {PriorityClass.BATCH: QueueStatistics(4, 400, 1.5, 3, 0.75, (1, 0, 2, *[0] * (len(QUEUE_BUCKETS_S) - 2)))},
    requests=dict.fromkeys(FinishReason, 0) | {FinishReason.STOP: 9},
    rejected=dict.fromkeys(RejectReason, 0) | {RejectReason.TOO_LATE: 2},
    prompt_tokens=11,
    completion_tokens=12,
    steps=13,
    step_seconds=1.25,
    retried=1,
    restarts=2,
    scheduler=SchedulerCounts(1, 20, 30, 40, 50, 60, 7),
    step=StepStatistics(StepShape(90, 10, 1000, 2000), 0.02, 0.021, 0.05, Coefficients(1.0, 2.0, 3.0, 4.0, 5.0), 0.03),
)


def page(statistics: EngineStatistics = STATISTICS, health: Health = Health(True)) -> dict[tuple, float]:  # noqa: B008
    return {
        (family.name, *labels.values()): value
        for family in FAMILIES
        for labels, value in family.read(statistics, health)
    }


def test_every_number_of_the_statistics_is_on_the_page():
    said = page()
    expected = {
        ("wicore_engine_healthy",): 1,
        ("wicore_requests_total", "stop"): 9,
        ("wicore_requests_rejected_total", "too_late"): 2,
        ("wicore_running_requests",): 3,
        ("wicore_waiting_requests",): 4,
        ("wicore_queue_requests", "batch"): 4,
        ("wicore_queue_tokens", "batch"): 400,
        ("wicore_queue_oldest_seconds", "batch"): 1.5,
        ("wicore_queue_seconds_sum", "batch"): 0.75,
        ("wicore_queue_seconds_count", "batch"): 3,
        ("wicore_queue_seconds_count", "realtime"): 0,
        ("wicore_prompt_tokens_total",): 11,
        ("wicore_generated_tokens_total",): 12,
        ("wicore_preemptions_total",): 1,
        ("wicore_preemption_lost_tokens_total",): 20,
        ("wicore_prefix_hit_tokens_total",): 30,
        ("wicore_prefix_missed_tokens_total",): 40,
        ("wicore_prefix_window_missing_tokens_total",): 50,
        ("wicore_shared_prefill_tokens_total",): 60,
        ("wicore_promotions_total",): 7,
        ("wicore_steps_total",): 13,
        ("wicore_step_seconds_total",): 1.25,
        ("wicore_steps_retried_total",): 1,
        ("wicore_pool_restarts_total",): 2,
        ("wicore_step_tokens",): 90,
        ("wicore_step_sequences",): 10,
        ("wicore_step_seconds",): 0.02,
        ("wicore_step_predicted_seconds",): 0.021,
        ("wicore_step_prediction_error",): 0.05,
        ("wicore_step_time_coefficient", "prefill_token"): 3.0,
        ("wicore_kv_blocks_used", "global"): 5,
        ("wicore_kv_blocks_cached", "global"): 6,
        ("wicore_step_limit_seconds",): 0.03,
        ("wicore_kv_blocks", "global"): 70,
        ("wicore_kv_blocks_recycled_total", "global"): 8,
        ("wicore_tier_blocks_used", "host", "local"): 1,
        ("wicore_tier_blocks", "host", "local"): 2,
        ("wicore_tier_spilled_blocks_total", "host", "local"): 3,
        ("wicore_tier_loaded_blocks_total", "host", "local"): 4,
        ("wicore_tier_evicted_blocks_total", "host", "local"): 5,
        ("wicore_tier_refused_blocks_total", "host", "local"): 6,
    }
    assert {series: said.get(series) for series in expected} == expected
    assert {name for name, *_ in said} == {family.name for family in FAMILIES}


def test_queue_times_are_a_histogram_as_prometheus_has_them():
    said = page()
    assert [said["wicore_queue_seconds_bucket", "batch", le] for le in ("0.005", "0.01", "0.025", "+Inf")] == [
        1,
        1,
        3,
        3,
    ]


def test_an_engine_in_trouble_before_its_first_step_has_a_page_too():
    said = page(replace(STATISTICS, step=None), Health(False, "no luck"))
    assert said["wicore_engine_healthy",] == 0
    assert not [name for name, *_ in said if name in ("wicore_step_tokens", "wicore_step_time_coefficient")]


def test_names_are_as_prometheus_wants_them():
    for family in FAMILIES:
        counted = family.name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert counted == (family.kind == "counter"), family.name
