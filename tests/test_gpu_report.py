"""The report of a card: parts are measured each by itself, and the table says which goals are met, and why not."""

import time
from pathlib import Path
from typing import Any

import pytest

from scripts import gpu_report
from scripts.gpu_figures import tests as card_tests
from scripts.gpu_figures.goals import GOALS, Goal
from scripts.gpu_figures.parts import PARTS
from scripts.gpu_figures.running import Report, Run, measure, saved


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> str:
    """The name of a module with this code, for a process to run."""
    (tmp_path / "some_part.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "some_part"


def run(name: str, *, limit_s: float = 20.0, **more: Any) -> Run:
    return Run("part", [name, "{scratch}"], [name], limit_s=limit_s, expected_s=1.0, **more)


def measured(tmp_path: Path, one: Run, limit_s: float = 20.0) -> Report:
    report = measure(one, tmp_path, scratch=tmp_path, rehearse=False, limit_s=limit_s)
    assert saved(tmp_path) == {"part": report}
    return report


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_part_prints_last_is_saved(tmp_path, monkeypatch):
    code = "import sys; print('words'); print('{\"a\": 1}'); open(sys.argv[1] + '/large', 'w'); print('{\"a\": 2}')"
    report = measured(tmp_path, run(module(tmp_path, monkeypatch, code)))
    assert (report.ending, report.result, report.why) == ("done", {"a": 2}, "")
    assert report.command == "python -m some_part DIRECTORY"
    assert not list(tmp_path.glob("gpu-report-*"))


def test_rows_are_kept_all(tmp_path, monkeypatch):
    code = "print('{\"a\": 1}'); print('{\"a\": 2}')"
    assert measured(tmp_path, run(module(tmp_path, monkeypatch, code), rows=True)).result == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "code", ["raise SystemExit('no such card')", "import sys; print('no such card', file=sys.stderr)"]
)
def test_a_part_that_fails_or_says_nothing_says_why(tmp_path, monkeypatch, code):
    report = measured(tmp_path, run(module(tmp_path, monkeypatch, code)))
    assert report.ending == "failed"
    assert "no such card" in report.why
    assert report.result is None


def test_a_part_that_takes_too_long_ends_with_all_it_started_and_keeps_what_it_told(tmp_path, monkeypatch):
    code = (
        "import json, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(json.dumps({'child': child.pid}), file=sys.stderr, flush=True)\n"
        "time.sleep(60)\n"
    )
    one = run(module(tmp_path, monkeypatch, code), lines=lambda objects: {"told": objects})
    began = time.monotonic()
    report = measured(tmp_path, one, limit_s=2.0)
    assert time.monotonic() - began < 15
    assert report.ending == "cut off"
    assert "limit of 2 s" in report.why
    assert not runs(report.result["told"][0]["child"])


def test_parts_for_which_no_time_is_left_are_left_out(tmp_path, monkeypatch):
    quick = run(module(tmp_path, monkeypatch, "print('{}')"))
    [report] = gpu_report.take([quick], tmp_path, scratch=tmp_path, rehearse=False, seconds=0.0)
    assert (report.ending, report.why) == ("left out", "0 s were left")


def test_the_table_judges_figures_and_says_why_others_are_not_there():
    def read(result: Any) -> float:
        return float(result["x"])

    goals = [
        Goal("low enough", "a", read, "ms", 2.0),
        Goal("too high", "a", read, "ms", 0.5),
        Goal("enough", "a", read, "", 1.0, more=True),
        Goal("told", "a", read, "GB"),
        Goal("not in it", "b", read, "ms", 1.0),
        Goal("nothing", "c", read, "ms", 1.0),
        Goal("only rehearsed", "d", read, "ms", 1.0),
    ]
    reports = {
        "a": Report("a", "python -m a", "done", 1.0, result={"x": 1}),
        "b": Report("b", "python -m b", "cut off", 1.0, "its limit had passed", {}),
        "d": Report("d", "python -m d", "done", 1.0, result={"x": 1}, rehearsed=True),
    }
    rows = [line.split(" | ")[1:] for line in gpu_report.table(reports, goals).splitlines()[2:9]]
    assert rows == [
        ["at most 2", "1 ms", "met |"],
        ["at most 0.5", "1 ms", "**not met** |"],
        ["at least 1", "1", "met |"],
        ["", "1 GB", "|"],
        ["at most 1", "cut off: its limit had passed", "|"],
        ["at most 1", "not measured", "|"],
        ["at most 1", "rehearsed, done", "|"],
    ]


def test_a_report_that_cannot_be_read_leaves_the_others(tmp_path):
    Report("whole", "python -m a", "done", result={"x": 1}).save(tmp_path)
    (tmp_path / "cut.json").write_text('{"name": "cut", ')
    (tmp_path / "other.json").write_text('{"something": 1}')
    found = saved(tmp_path)
    assert found["whole"].result == {"x": 1}
    assert all(
        (found[name].ending, "cannot be read" in found[name].why) == ("failed", True) for name in ("cut", "other")
    )


def test_every_goal_has_a_run_and_every_run_a_goal():
    runs = [one.name for part in PARTS.values() for one in part]
    assert len(set(runs)) == len(runs)
    assert {goal.run for goal in GOALS} == set(runs)


def test_a_part_that_was_cut_off_gives_the_figures_that_it_had_told():
    [bf16] = PARTS["bf16"]
    told = [{"batch": 1, "prompt": 512, "step_ms": 13.1, "ttft_s": 0.0384}, {"other": 1}]
    report = Report("bf16", "", "cut off", result=bf16.lines(told))
    figures = {goal.what: goal.figure({"bf16": report}) for goal in GOALS if goal.run == "bf16"}
    assert figures["bf16 batch 1, ms a step"] == 13.1
    assert figures["TTFT of 512 tokens, bf16"] == pytest.approx(38.4)
    assert figures["bf16 batch 16, ms a step"] is None


def test_of_streams_through_a_server_the_rounds_before_the_cut_count():
    [grpc] = PARTS["grpc"]
    told = [{"served_over_in_process": 0.9, "served_tokens_per_s": 4000.0}, {"served_over_in_process": 0.95}]
    report = Report("grpc", "", "cut off", result=grpc.lines(told))
    figures = {goal.what: goal.figure({"grpc": report}) for goal in GOALS if goal.run == "grpc"}
    assert figures == {"gRPC at 64 streams over in process": 0.95, "gRPC at 64 streams": None}
    assert grpc.lines([{"other": 1}]) is None


_READ = {
    "memory": lambda result: result["result"]["runs"][0]["step_ms"],
    "loading": lambda result: result["result"]["share"],
    "vision": lambda result: result["rows"][0]["launched_device_ms"],
    "speculation": lambda result: result[0]["speed_up"],
    "cold-tier": lambda result: result["shares"]["tier_up"],
    "restore": lambda result: result["rows"][-1]["host_ttft_s"],
}


@pytest.mark.parametrize("name", _READ)
def test_parts_are_rehearsed_without_a_card(tmp_path, name):
    one = next(one for part in PARTS.values() for one in part if one.name == name)
    report = measure(one, tmp_path, scratch=tmp_path, rehearse=True, limit_s=120)
    assert report.ending == "done", report.why
    assert _READ[name](report.result) > 0


def test_what_pytest_says_of_a_card_is_read(tmp_path):
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"><system-out>\n'
        "bfloat16: 199 of 200 answers are the same, 3,300 tokens</system-out></testcase>"
        '<testcase classname="a" name="two"><failure message="1 != 2">x</failure></testcase>'
        '<testcase classname="a" name="three"><skipped message="no card"/></testcase></testsuite></testsuites>'
    )
    found = card_tests.outcome(tmp_path / "junit.xml")
    assert found == {"passed": 1, "skipped": 1, "failed": {"a::two": "1 != 2"}, "same_answers": {"bfloat16": 0.995}}


def test_the_plan_is_told_without_running_anything(capsys):
    assert gpu_report.main(["--plan", "--parts", "bf16", "vision"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[:2]] == ["bf16", "vision"]
    assert told[2].split() == ["52", "s"]
