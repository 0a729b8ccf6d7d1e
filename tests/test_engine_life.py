"""An engine from its settings to its end: what it refuses to start with, what it does without work, how it closes."""

import threading
import time
from queue import Queue

import pytest

from tests.engine_kit import config, greedy
from wicore_backend import Engine, SamplingParams
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.errors import CancelledError, CheckpointError, InvalidArgumentError, OverloadedError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "/nowhere"}, "not a directory"),
        ({"max_batch_tokens": 70}, "max_batch_tokens = 70"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"kv_cache_bytes": 1000}, "kv_cache_bytes is 1,000"),
        ({"block_size": 0}, "block_size = 0"),
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"speed": 11}, "'speed' is not a setting"),
    ],
)
def test_settings_that_cannot_be_are_errors_that_say_so(settings, said):
    with pytest.raises(InvalidArgumentError) as caught:
        Engine(config(**settings))
    assert said in str(caught.value)


def test_a_directory_without_a_model_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Engine(config(model=tmp_path))


def test_an_engine_that_cannot_start_its_watchdog_says_so(monkeypatch):
    def no_thread(**_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("wicore_backend.engine.engine.HealthMonitor", no_thread)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Engine(config())


def test_an_engine_with_nothing_to_do_says_so_once():
    idle = Queue()
    with Engine(config(), when_idle=lambda: idle.put(threading.current_thread().name)) as engine:
        for _ in range(2):
            engine.generate("hello", greedy(2))
            assert idle.get(timeout=20) == "wicore-engine"
            time.sleep(1.5)
            assert idle.empty()


def test_draining_lets_the_running_end_and_refuses_new_ones():
    with Engine(config()) as engine:
        stream = engine.stream("hello", greedy(40))
        next(stream)
        draining = threading.Thread(target=engine.drain, args=(30.0,))
        draining.start()
        while engine.health().ok:
            time.sleep(0.001)
        with pytest.raises(OverloadedError, match="retry after"):
            engine.generate("hello", greedy(1))
        grammar = Grammar(regex="[a-z]{4}")
        with pytest.raises(OverloadedError, match="retry after"):
            engine.generate("hello", SamplingParams(max_tokens=1, grammar=grammar))
        assert not engine.has_compiled(grammar)  # The stop would wait for it.
        assert len(stream.collect().token_ids) == 39
        draining.join(5)
        assert not draining.is_alive()


def test_after_the_grace_time_the_rest_is_ended():
    with Engine(config(max_running=1)) as engine:
        running, waiting = engine.stream([2, 300], greedy(20_000)), engine.stream([2, 301], greedy(20_000))
        next(running)
        began = time.monotonic()
        engine.drain(0.2)
        assert time.monotonic() - began < 5
        with pytest.raises(CancelledError, match="shutting down"):
            running.collect()
        with pytest.raises(OverloadedError, match="retry after"):
            waiting.collect()


def test_closing_ends_every_request_and_refuses_new_ones():
    engine = Engine(config(max_running=2))
    streams = [engine.stream("hello", greedy(5000)) for _ in range(5)]
    engine.close()
    for stream in streams:
        with pytest.raises((CancelledError, OverloadedError), match="closing"):
            stream.collect()
    with pytest.raises(OverloadedError, match="shutting down"):
        engine.generate("hello")
    engine.close()
