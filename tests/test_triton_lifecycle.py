"""How an engine's health and end travel between it, the supervisor and the server: by files."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from scripts.serving.runs import DIRECTORY, MARKER, Run
from tests.waiting import wait_until
from wicore_backend.engine.health import Health
from wicore_backend.triton.lifecycle import Lifecycle
from wicore_backend.triton.readiness import Readiness
from wicore_backend.triton.supervision import VARIABLE, Supervision

WELL, ILL = Health(True), Health(False, 'a step failed ("CUDA error" in ../../x)')


@pytest.fixture
def run(tmp_path):
    """A run's directory, as the supervisor makes it."""
    run = Run(tmp_path / "run")
    run.markers.mkdir(parents=True)
    return run


class Markers:
    """A Readiness over a clock that is turned by hand."""

    def __init__(self, run: Run) -> None:
        self.now = 0.0
        self.repository = run.markers
        self.readiness = Readiness(run.markers, name="m", model="gemma", clock=lambda: self.now)

    def follow(self, *healths: Health) -> dict[str, str]:
        """The configs of the markers after the engine was so."""
        for health in healths:
            self.readiness.follow(health)
        assert all((path / "1").is_dir() for path in self.repository.iterdir())
        return {path.name: (path / "config.pbtxt").read_text() for path in self.repository.iterdir()}


def test_trouble_puts_a_model_that_cannot_load_and_its_end_one_that_can(run):
    markers = Markers(run)
    assert markers.follow(WELL) == {}
    broken = markers.follow(ILL, ILL)
    assert list(broken) == ["m_1"]
    assert 'backend: "a step failed ( CUDA error  in       x)"' in broken["m_1"]
    mended = markers.follow(WELL)
    assert 'platform: "ensemble"' in mended["m_1"]
    assert 'model_name: "gemma"' in mended["m_1"]


def test_a_marker_goes_when_it_has_long_been_loaded_and_is_never_broken_again(run):
    markers = Markers(run)
    markers.follow(ILL, WELL)
    markers.now = 10.0
    again = markers.follow(ILL)
    assert "ensemble" in again["m_1"]
    assert "backend:" in again["m_2"]
    markers.now = 31.0
    assert list(markers.follow(ILL)) == ["m_2"]
    markers.follow(WELL)
    markers.now = 70.0
    assert markers.follow(WELL) == {}


def test_both_sides_know_the_directory_by_the_same_name():
    assert DIRECTORY == VARIABLE


def test_the_supervisor_sees_the_engines_that_live_and_hears_how_they_are(run):
    program = """
import sys
from pathlib import Path
from wicore_backend.engine.health import Health
from wicore_backend.triton.supervision import Supervision
supervision = Supervision(Path(sys.argv[1]))
supervision.tell(Health(True))
print("told", flush=True)
sys.stdin.readline()
supervision.tell(Health(False, "no luck"))
print("told", flush=True)
sys.stdin.readline()
"""
    assert run.engines() == []
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run.directory)],
        env={**os.environ, MARKER: run.name, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        assert [(e.process_id, e.healthy, e.reason) for e in run.engines()] == [(process.pid, True, "")]
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        assert [(e.healthy, e.reason) for e in run.engines()] == [(False, "no luck")]
    assert run.engines() == [], "its file is still there, its process is not"


class Served:
    """An engine as the lifecycle knows one."""

    def __init__(self, run: Run) -> None:
        self.health = WELL
        self.graces: list[float] = []
        self.may_end = threading.Event()
        self.presence = run.directory / "engines" / f"{os.getpid()}.json"
        self.lifecycle = Lifecycle(
            Supervision(run.directory),
            Readiness(run.markers, name="m", model="gemma"),
            health=lambda: self.health,
            drain=self._drain,
            interval_s=0.005,
        )

    def _drain(self, grace_s: float) -> None:
        self.graces.append(grace_s)
        self.health = ILL
        self.may_end.wait(5)
        if grace_s == 0:
            raise RuntimeError("no luck")


@pytest.fixture
def served(run):
    served = Served(run)
    wait_until(served.presence.exists)
    yield served
    served.may_end.set()
    served.lifecycle.close()


def test_the_engine_drains_when_it_is_asked_to_and_leaves_when_that_is_done(run, served):
    run.ask_to_drain(2.5)
    wait_until(lambda: served.graces)
    wait_until(lambda: list(run.markers.iterdir()))
    time.sleep(0.05)
    assert served.presence.exists()
    served.may_end.set()
    wait_until(lambda: not served.presence.exists())
    time.sleep(0.05)
    assert served.graces == [2.5]
    assert not served.presence.exists()


def test_an_engine_that_cannot_be_drained_does_not_hold_up_the_end(run, served):
    served.may_end.set()
    run.ask_to_drain(0)
    wait_until(lambda: not served.presence.exists())


def test_health_is_told_and_goes_on_being_told_after_a_fault(served, caplog):
    assert json.loads(served.presence.read_text()) == {"healthy": True, "reason": ""}
    served.health = ILL
    wait_until(lambda: json.loads(served.presence.read_text())["reason"] == ILL.reason)
    served.health = None
    wait_until(lambda: "could not be told" in caplog.text)
    time.sleep(0.05)
    assert caplog.text.count("could not be told") == 1
    served.health = WELL
    wait_until(lambda: json.loads(served.presence.read_text())["healthy"])


def test_an_engine_that_goes_takes_its_trouble_along(run, served):
    served.health = ILL
    wait_until(lambda: list(run.markers.iterdir()))
    served.lifecycle.close()
    assert not served.presence.exists()
    assert all("ensemble" in (path / "config.pbtxt").read_text() for path in run.markers.iterdir())
