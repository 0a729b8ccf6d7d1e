"""An engine over an emulated device takes that device's time for a step, and works on the host meanwhile."""

import statistics
import time
from argparse import ArgumentParser

import pytest

from scripts.benchmark import DEMO_MODEL
from scripts.emulated_device import EmulatedDevice, add_emulated_device, costs_of, emulated, emulating_model
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.step_time import Coefficients, StepShape

STEP_S = 0.02
ALIKE = Coefficients(step=STEP_S, sequence=0.0, prefill_token=0.0, key=0.0, pair=0.0, mixed=0.0)


def costs(*options: str) -> Coefficients | None:
    parser = ArgumentParser()
    add_emulated_device(parser)
    return costs_of(parser.parse_args(options))


def test_a_device_computes_one_step_after_the_other_each_in_the_time_of_what_it_computes():
    options = ("--emulated-step-ms", "1e5", "--emulated-sequence-us", "2e6", "--emulated-prefill-token-us", "3e6")
    said = costs(*options, "--emulated-mixed-ms", "4e4")
    assert said is not None
    device = EmulatedDevice(said)
    decodes = StepShape(5, 5, 100, 0)
    now = time.monotonic()
    first = device.begin(decodes)
    assert first >= now + 110  # Longer than a busy machine takes from one to the other.
    second = device.begin(decodes.with_prefill(8, 0))
    assert second - first == pytest.approx(100 + 6 * 2 + 7 * 3 + 40)


def test_without_a_time_for_steps_no_device_is_emulated():
    assert costs() is None
    assert costs("--emulated-mixed-ms", "8") is None


def test_a_model_for_a_server_says_what_steps_take():
    said = costs("--emulated-step-ms", "15", "--emulated-mixed-ms", "8")
    assert said is not None
    code = emulating_model(said)
    compile(code, "model.py", "exec")
    assert f"emulate({said!r})" in code


@pytest.mark.timing
def test_streams_get_a_token_a_step():
    settings = EngineConfig(model=DEMO_MODEL, device="cpu", dtype="float32", max_running=4, max_guessed_tokens=0)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    paces = []
    with emulated(ALIKE), Engine(settings) as engine:
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
    with emulated(ALIKE):
        pass
    settings = EngineConfig(model=DEMO_MODEL, device="cpu", dtype="float32")
    with Engine(settings) as engine:
        (result,) = engine.generate(["What is 2 + 3?"], SamplingParams(max_tokens=4, temperature=0.0))
    assert result.text.startswith("5")
