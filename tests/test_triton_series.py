"""What the metrics page says is what the engine's statistics say."""

from collections import Counter
from dataclasses import replace

from tests.cold_tier_bench import SHAPES, Bench
from wicore_backend.engine.health import Health
from wicore_backend.engine.plan import RejectReason, SchedulerCounts, SchedulerLimits
from wicore_backend.engine.request import FinishReason, PriorityClass
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.statistics import (
    QUEUE_BUCKETS_S,
    BlockUsage,
    BoundUsage,
    EngineStatistics,
    ExecutorInUse,
    QueueStatistics,
    StatisticsRecorder,
    StepStatistics,
    TierUsage,
)
from wicore_backend.engine.step_time import Coefficients, StepShape, StepTimeModel
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.bounded_kv import BoundCounts, KVBudget
from wicore_backend.hmt.cold_tier import ColdCounts, ColdStatistics
from wicore_backend.hmt.host_tier import HostTier, TierCounts
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.nvme import NvmeStatistics, Outcome, Trouble
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.triton.series import FAMILIES

EMPTY = QueueStatistics(0, 0, 0.0, 0, 0.0, (0,) * (len(QUEUE_BUCKETS_S) + 1))
COLD = ColdStatistics(
    groups={
        LayerGroup.GLOBAL: ColdCounts(
            spills=Counter({Outcome.DONE: 21, Outcome.HELD: 1, Outcome.FAILED: 2}),
            restores=Counter({Outcome.DONE: 22, Outcome.LATE: 3, Outcome.CLOSED: 1}),
            evicted=23,
            lost=24,
            unasked=5,
        ),
    },
    held={LayerGroup.GLOBAL: 25},
    capacity=26,
    spilling_bytes=27,
    restoring_bytes=28,
    spilled_bytes=29,
    restored_bytes=30,
    spill_seconds=3.1,
    restore_seconds=3.2,
    spill_bytes_per_second=33.0,
    restore_bytes_per_second=34.0,
    restore_latency_s=0.35,
    store=NvmeStatistics(
        capacity_bytes=36,
        used_bytes=37,
        records=38,
        stores={},
        fetches={},
        troubles={Trouble.DISK_FULL: 39},
        bytes_written=40,
        bytes_read=41,
        write_seconds=4.2,
        read_seconds=4.3,
    ),
)
STATISTICS = EngineStatistics(
    executor=ExecutorInUse("onnx", "executor = 'onnx'"),
    running=3,
    waiting=4,
    blocks={
        LayerGroup.GLOBAL: BlockUsage(active=5, cached=6, capacity=70, recycled=8, block_bytes=1000),
        LayerGroup.LOCAL: BlockUsage(active=1, cached=1, capacity=9, recycled=2, block_bytes=100),
    },
    host={LayerGroup.LOCAL: TierUsage(used=1, capacity=2, counts=TierCounts(3, 4, 5, 6, 7))},
    nvme=COLD,
    bounded=BoundUsage(tokens=256, counts=BoundCounts(left=51, returned=52, lost=53)),
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
    scheduler=SchedulerCounts(1, 20, 30, 40, 50, 60, 7, 8, 90, 10, 4, 12, 13, 14, 15),
    step=StepStatistics(
        StepShape(90, 10, 1000, 2000, 1), 0.02, 0.021, 0.05, Coefficients(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 0.03
    ),
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
        ("wicore_executor_info", "onnx", "executor = 'onnx'"): 1,
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
        ("wicore_guessed_tokens_total",): 14,
        ("wicore_guessed_tokens_right_total",): 15,
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
        ("wicore_step_time_coefficient", "mixed"): 6.0,
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
        ("wicore_tier_written_behind_blocks_total", "host", "local"): 7,
        ("wicore_tier_hit_tokens_total", "host"): 12,
        ("wicore_tier_hit_tokens_total", "nvme"): 13,
        ("wicore_restores_total",): 8,
        ("wicore_restored_tokens_total",): 90,
        ("wicore_restores_declined_total",): 10,
        ("wicore_restores_without_room_total",): 4,
        ("wicore_kv_block_bytes", "local"): 100,
        ("wicore_tier_blocks_used", "device", "global"): 11,
        ("wicore_tier_blocks", "device", "global"): 70,
        ("wicore_tier_evicted_blocks_total", "device", "global"): 8,
        ("wicore_tier_spilled_bytes_total", "host", "local"): 300,
        ("wicore_tier_loaded_bytes_total", "host", "local"): 400,
        ("wicore_tier_blocks_used", "nvme", "global"): 25,
        ("wicore_tier_blocks", "nvme", "all"): 26,
        ("wicore_tier_spilled_blocks_total", "nvme", "global"): 21,
        ("wicore_tier_spilled_bytes_total", "nvme", "global"): 21_000,
        ("wicore_tier_loaded_blocks_total", "nvme", "global"): 22,
        ("wicore_tier_loaded_bytes_total", "nvme", "global"): 22_000,
        ("wicore_tier_evicted_blocks_total", "nvme", "global"): 23,
        ("wicore_tier_refused_blocks_total", "nvme", "global"): 7,
        ("wicore_tier_lost_blocks_total", "nvme", "global"): 24,
        ("wicore_tier_unmoved_blocks_total", "nvme", "global", "spill", "failed"): 2,
        ("wicore_tier_unmoved_blocks_total", "nvme", "global", "restore", "late"): 3,
        ("wicore_tier_unmoved_blocks_total", "nvme", "global", "restore", "closed"): 1,
        ("wicore_tier_unmoved_blocks_total", "nvme", "global", "restore", "corrupt"): 0,
        ("wicore_bounded_kv_tokens",): 256,
        ("wicore_bounded_kv_blocks_total", "left"): 51,
        ("wicore_bounded_kv_blocks_total", "returned"): 52,
        ("wicore_bounded_kv_blocks_total", "lost"): 53,
        ("wicore_tier_moving_bytes", "nvme", "spill"): 27,
        ("wicore_tier_moving_bytes", "nvme", "restore"): 28,
        ("wicore_tier_busy_seconds_total", "nvme", "spill"): 3.1,
        ("wicore_tier_busy_seconds_total", "nvme", "restore"): 3.2,
        ("wicore_tier_bytes_per_second", "nvme", "spill"): 33.0,
        ("wicore_tier_bytes_per_second", "nvme", "restore"): 34.0,
        ("wicore_tier_latency_seconds", "nvme", "restore"): 0.35,
        ("wicore_tier_troubles_total", "nvme", "disk_full"): 39,
        ("wicore_tier_troubles_total", "nvme", "corrupt"): 0,
        ("wicore_tier_disk_bytes_used", "nvme"): 37,
        ("wicore_tier_disk_bytes", "nvme"): 36,
    }
    assert {series: said.get(series) for series in expected} == expected
    assert {name for name, *_ in said} == {family.name for family in FAMILIES}


def test_success_is_not_among_the_reasons_for_blocks_that_did_not_move():
    reasons = {labels[-1] for name, *labels in page() if name == "wicore_tier_unmoved_blocks_total"}
    assert reasons == {str(outcome) for outcome in Outcome} - {"done", "held"}


def test_hits_of_the_lower_tiers_and_what_is_left_for_the_device_are_those_of_the_statistics():
    said = page()
    lower = {labels[0]: value for (name, *labels), value in said.items() if name == "wicore_tier_hit_tokens_total"}
    device = said["wicore_prefix_hit_tokens_total",] - sum(lower.values())
    assert {"device": device, **lower} == STATISTICS.hit_tokens == {"device": 5, "host": 12, "nvme": 13}


def test_no_counter_falls_while_a_request_is_being_counted():
    """Its hits by tier are counted first, then all of them."""
    half = replace(STATISTICS.scheduler, host_hit_tokens=20, nvme_hit_tokens=25)
    before, then = page(), page(replace(STATISTICS, scheduler=half))
    assert all(then[series] >= value for series, value in before.items())


def test_a_tier_that_is_not_there_has_no_series():
    said = page(replace(STATISTICS, host={}, nvme=None))
    assert {labels[0] for name, *labels in said if name.startswith("wicore_tier_")} == {"device"}


def test_a_speed_that_was_never_measured_has_no_series():
    cold = replace(COLD, spill_bytes_per_second=None, restore_bytes_per_second=None, restore_latency_s=None)
    said = {name for name, *_ in page(replace(STATISTICS, nvme=cold))}
    assert not said & {"wicore_tier_bytes_per_second", "wicore_tier_latency_seconds"}
    assert "wicore_tier_moving_bytes" in said


def snapshot(lower: LowerTiers | None, budget: KVBudget | None = None) -> EngineStatistics:
    """Of an engine with blocks like those of the cold tier's tests, and that has done nothing."""
    layers, _, tokens, heads, dim = SHAPES[LayerGroup.LOCAL]
    groups = [LayerGroup.LOCAL] * layers + [LayerGroup.GLOBAL] * SHAPES[LayerGroup.GLOBAL][0]
    layout = KVLayout.of(groups, block_size=tokens, kv_heads=heads, head_dim=dim, window=16, bytes_per_value=2)
    blocks = BlockManager(layout, dict.fromkeys(LayerGroup, 9), max_chunk=8, lower=lower, budget=budget)
    scheduler = Scheduler(blocks, SchedulerLimits(max_batch_tokens=8, max_running=1), StepTimeModel())
    executor = ExecutorInUse("torch", "a test")
    return StatisticsRecorder().snapshot(executor, scheduler, blocks, now=0.0, unfinished=0)


def test_a_block_on_the_disk_is_in_the_statistics_and_on_the_page(tmp_path):
    with Bench(tmp_path) as bench:
        assert bench.spill_numbers(LayerGroup.LOCAL, range(3)) == [Outcome.DONE] * 3
        assert bench.restore([bench.put(LayerGroup.LOCAL, 1, 0)]) == [Outcome.DONE]
        host = HostTier({group: len(slots) for group, slots in bench.slots.items()}, LRU)
        said = page(snapshot(LowerTiers(host, bench.tier)))
        assert bench.tier.statistics().spilled_bytes == said["wicore_tier_spilled_bytes_total", "nvme", "local"]
    size = bench.slots[LayerGroup.LOCAL][0].nbytes
    assert said["wicore_kv_block_bytes", "local"] == size
    assert said["wicore_tier_blocks_used", "nvme", "local"] == 3
    assert said["wicore_tier_spilled_bytes_total", "nvme", "local"] == 3 * size
    assert said["wicore_tier_loaded_blocks_total", "nvme", "local"] == 1
    assert said["wicore_tier_blocks", "host", "local"] == len(bench.slots[LayerGroup.LOCAL])


def test_without_lower_tiers_the_statistics_have_none():
    statistics = snapshot(None)
    assert (statistics.host, statistics.nvme) == ({}, None)


def test_lossy_answers_are_named_as_such_and_exact_ones_have_no_series():
    assert not [name for name, *_ in page(snapshot(None)) if name.startswith("wicore_bounded")]
    budget = KVBudget.of(110, block_size=SHAPES[LayerGroup.GLOBAL][2])
    assert page(snapshot(None, budget))["wicore_bounded_kv_tokens",] == 104


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
