"""The simulation: traces as they are published, a clock that only steps move, and every request accounted for."""

import json
from argparse import Namespace
from random import Random

import pytest

from scripts.scheduling_cost import benchmark_scheduler
from scripts.simulate import Simulation, main, meets_targets, parser, setting_of
from scripts.simulation.machine import H200_BF16, Machine
from scripts.simulation.replay import Arrival, End, Replay, RequestClass, TraceNames
from scripts.simulation.traces import Trace, TraceRequest, read_trace
from wicore_backend.engine.plan import SchedulerLimits
from wicore_backend.engine.step_time import StepShape

QUIET = Machine(noise=0.0)
PLAIN = RequestClass("plain", 0, 1.0)


def conversations(count: int, *, seed: int = 1, rate: float = 5.0) -> Trace:
    random, at = Random(seed), 0.0
    requests = []
    for _ in range(count):
        requests.append(TraceRequest(at, 1 + int(random.expovariate(1 / 800)), 1 + int(random.expovariate(1 / 60))))
        at += random.expovariate(rate)
    return Trace("small", tuple(requests))


def replay(arrivals, *, block_size=None, **limits) -> Replay:
    chosen = SchedulerLimits(max_batch_tokens=2048, max_running=64, **limits)
    return Replay(QUIET, chosen, block_size=block_size, arrivals=arrivals)


def test_an_azure_trace_is_read(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_bytes(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109"
    )
    first, second = read_trace(file).requests
    assert (first.arrival_s, first.prompt_tokens, first.answer_tokens) == (0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579)


def test_a_mooncake_trace_is_read(tmp_path):
    file = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 1000 * n, "input_length": 600, "output_length": 5, "hash_ids": [7, n]} for n in range(2)]
    file.write_text("\n".join(map(json.dumps, lines)))
    trace = read_trace(file)
    assert trace.block_size == 512
    assert trace.requests[1] == TraceRequest(1.0, 600, 5, (7, 1))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "trace.txt").write_text("")
    with pytest.raises(ValueError, match="neither"):
        read_trace(tmp_path / "trace.txt")


@pytest.mark.parametrize(("batch", "measured_ms"), [(1, 15.1), (16, 16.6), (64, 20.9), (128, 27.5)])
def test_decode_steps_last_as_long_as_they_were_measured(batch, measured_ms):
    shape = StepShape(tokens=batch, sequences=batch, keys_read=576 * batch, pairs=0)
    assert 1000 * H200_BF16.seconds(shape) == pytest.approx(measured_ms, rel=0.03)


@pytest.mark.parametrize(("keys", "measured_ms"), [(32_768, 16.0), (130_000, 17.9)])
def test_decodes_of_long_contexts_last_as_long_as_they_were_measured(keys, measured_ms):
    assert 1000 * H200_BF16.seconds(StepShape(1, 1, keys, 0)) == pytest.approx(measured_ms, rel=0.03)


def test_a_request_alone_takes_the_time_of_its_steps():
    run = replay([Arrival(3.0, TraceRequest(0.0, 1000, 11), PLAIN)])
    (record,) = run.run().records
    prefill = H200_BF16.seconds(StepShape(0, 0, 0, 0).with_prefill(1000, 0))
    decodes = [H200_BF16.seconds(StepShape(1, 1, 1000 + n, 0)) for n in range(10)]
    assert record.end is End.FINISHED
    assert (record.queue_s, record.queue_steps, record.tokens) == (0.0, 1, 11)
    assert record.ttft_s == pytest.approx(prefill)
    assert record.tpot_s == pytest.approx(sum(decodes) / 10)


def test_every_request_ends_whatever_the_load():
    trace = conversations(150)
    summary = Simulation(trace, setting_of(parser().parse_args([]))).at_load(4.0, 5.0)
    assert summary.unended == 0
    ends = [sum((c.finished, c.rejected, c.expired)) for c in summary.classes.values()]
    assert sum(ends) == len(trace.requests)
    assert 0 < summary.good_share < 1


def test_a_late_first_token_or_a_slow_answer_is_not_good():
    hasty = RequestClass("hasty", 0, 1.0, first_token_s=1e-3)
    (record,) = replay([Arrival(0.0, TraceRequest(0.0, 10, 5), hasty)]).run().records
    assert not record.is_good(1.0)
    (record,) = replay([Arrival(0.0, TraceRequest(0.0, 10, 5), PLAIN)]).run().records
    assert record.is_good(0.016)
    assert not record.is_good(0.014)


def test_the_same_blocks_are_computed_once():
    again = [Arrival(at, TraceRequest(0.0, 4096 + 100, 3, (*range(8), 100 + n)), PLAIN) for n, at in enumerate((0, 9))]
    run = replay(again, block_size=512)
    first, second = run.run().records
    assert run.scheduler.counts.prefix_hit_tokens == 4096
    assert second.ttft_s < first.ttft_s / 5


def test_only_full_blocks_of_a_prompt_have_the_names_of_the_trace():
    one, other = (TraceNames((1, 2, 3), 1100, 512, number) for number in (1, 2))
    assert one.first(2)[:2] == other.first(2)[:2]
    assert one.first(3)[2] != other.first(3)[2]


def test_the_same_seed_gives_the_same_figures():
    trace, setting = conversations(60), setting_of(parser().parse_args(["--seed", "3"]))
    runs = [Simulation(trace, setting).at_load(1.0, 5.0) for _ in range(2)]
    assert runs[0].classes == runs[1].classes


def test_capacity_is_what_is_finished_when_the_queue_is_never_empty():
    trace, setting = conversations(400), setting_of(parser().parse_args([]))
    simulation = Simulation(trace, setting)
    capacity = simulation.capacity()
    assert simulation.at_load(0.3, capacity).good_share > 0.99
    slow = simulation.at_load(3.0, capacity)
    assert slow.requests_per_s > 1.5 * slow.goodput_per_s


def test_targets_are_judged():
    trace, setting = conversations(200), setting_of(parser().parse_args([]))
    simulation = Simulation(trace, setting)
    one, two = (simulation.at_load(load, 5.0) for load in (1.0, 2.0))
    met = meets_targets([one, two], simulation.batch_saturated(5.0), "realtime")
    assert len(met) == 3
    assert met["every request ends"]


def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    trace, figures = tmp_path / "trace.jsonl", tmp_path / "figures.json"
    lines = [
        {"timestamp": 300 * n, "input_length": 900, "output_length": 20, "hash_ids": [n % 3, n]} for n in range(60)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr("sys.argv", ["simulate", "--trace", str(trace), "--loads", "1", "2", "--json", str(figures)])
    code = main()
    printed = capsys.readouterr().out
    (result,) = json.loads(figures.read_text())["results"]
    assert code == (not all(result["targets"].values()))
    assert f"capacity {result['capacity_per_s']:.3f}" in printed
    assert [load["load"] for load in result["loads"]] == [1, 2]


def test_the_cost_of_scheduling_is_measured():
    result = benchmark_scheduler(Namespace(running=8, waiting=20, steps=10, rounds=1))
    assert 0 < result["best_median_us"] <= result["p99_us"]
