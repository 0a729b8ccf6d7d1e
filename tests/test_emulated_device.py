"""An engine over an emulated device takes that device's time for a step, and works on the host meanwhile."""

import statistics
import time

import pytest

from scripts.benchmark import DEMO_MODEL
from scripts.emulated_device import EmulatedDevice, emulated
from wicore_backend import Engine, EngineConfig, SamplingParams

STEP_S = 0.02


def test_a_device_computes_one_step_after_the_other():
    device = EmulatedDevice(100.0)  # Longer than a busy machine takes from one to the other.
    now = time.monotonic()
    first, second = device.begin(), device.begin()
    assert first >= now + 100
    assert second == pytest.approx(first + 100)


@pytest.mark.timing
def test_streams_get_a_token_a_step():
    settings = EngineConfig(model=DEMO_MODEL, device="cpu", dtype="float32", max_running=4, max_guessed_tokens=0)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    paces = []
    with emulated(STEP_S), Engine(settings) as engine:
        for _ in range(5):
            results = engine.generate([f"Say {n}." for n in range(4)], params)
            assert all(len(result.token_ids) == 12 for result in results)
            assert len({tuple(result.token_ids) for result in results}) > 1  # The device makes tokens up.
            per_token = [result.usage.tpot_s or 0.0 for result in results]
            assert min(per_token) > 0.95 * STEP_S
            paces.append(max(per_token))
    # A busy machine stops for longer than a step now and then.
    assert statistics.median(paces) < 2 * STEP_S


def test_nothing_is_emulated_afterwards():
    with emulated(STEP_S):
        pass
    settings = EngineConfig(model=DEMO_MODEL, device="cpu", dtype="float32")
    with Engine(settings) as engine:
        (result,) = engine.generate(["What is 2 + 3?"], SamplingParams(max_tokens=4, temperature=0.0))
    assert result.text.startswith("5")
