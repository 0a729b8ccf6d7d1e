"""The clock of a card beside a benchmark: samples, those of some moments, and a machine without NVML."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from scripts import card_clock
from scripts.card_clock import CardClock, Sample, summary


def test_a_line_is_a_sample_and_a_summary_says_what_held_the_clock_down():
    samples = [
        Sample.of(line) for line in ("1.0 1980 400.5 0", "1.1 1410 690.0 4", "1.2 1400 701.2 4", "1.3 1395 698.0 36")
    ]
    assert samples[0] == Sample(1.0, 1980, 400.5, 0)
    assert summary(samples) == {"sm_mhz": 1405, "watts": 701, "held_down_by": {"power": 0.75, "heat": 0.25}}
    assert summary([]) is None


def test_samples_are_those_of_the_moments_asked_for(tmp_path):
    teller = tmp_path / "teller.py"
    teller.write_text("print('1.0 1980 100.0 0\\n2.0 1500 700.0 4\\n3.0 1600 650.0 4\\n4.0 17', end='', flush=True)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_clock, "__file__", str(teller))
        with CardClock("GPU-any") as clock:
            clock._process.wait(20)
            assert clock.between((0.5, 1.5)) == {"sm_mhz": 1980, "watts": 100, "held_down_by": {}}
            assert clock.between((1.5, 2.5), (2.9, 3.1))["sm_mhz"] == 1550
            assert clock.between((4.0, 5.0)) is None, "a line that is not whole yet is none"


def test_without_a_card_nothing_is_started_and_nothing_told():
    with CardClock(None) as clock:
        assert clock._process is None
        assert clock.between((0.0, time.perf_counter())) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here, and NVML with it")
def test_a_machine_without_nvml_says_so_and_goes_on():
    told = subprocess.run([sys.executable, card_clock.__file__, "GPU-none"], capture_output=True, text=True, timeout=60)
    assert told.returncode == 1
    assert "the card's clock is not told" in told.stderr
    with CardClock("GPU-none") as clock:
        assert clock.between((0.0, time.perf_counter())) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_card_at_work_has_a_clock():
    with CardClock(f"GPU-{torch.cuda.get_device_properties(0).uuid}") as clock:
        began = time.perf_counter()
        while time.perf_counter() < began + 0.3:
            torch.ones(2**24, device="cuda").sin_()
        torch.cuda.synchronize()
        found = clock.between((began, time.perf_counter()))
    assert found is not None
    assert 100 < found["sm_mhz"] < 5000
    assert found["watts"] > 10
