"""Runs measurements one after the other, each in a process of its own with a time limit, and keeps what each gave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
_KILL_S = 5.0
"""What a process gets to end by itself."""
_LAST_WORDS = 400

Ending = Literal["done", "failed", "cut off", "left out"]


@dataclass(frozen=True, slots=True)
class Run:
    """One command, `python -m` with the arguments; {scratch} in one is a directory of its own.

    Attributes
    ----------
    expected_s
        What it takes on an H200, its kernels compiled before; for who plans a card's time.
    rehearsal
        The arguments by which a machine without a card goes through all of it, in seconds.
    rows
        It tells a JSON object a row, all of which are its result; otherwise the last one is, and ...
    lines
        ... what is made of the objects that it had told on standard error, if it ended without a result.
    """

    name: str
    arguments: Sequence[str]
    rehearsal: Sequence[str]
    limit_s: float
    expected_s: float
    rows: bool = False
    lines: Callable[[list[Any]], Any] = lambda _: None


@dataclass(frozen=True, slots=True)
class Report:
    """What a run gave.

    Attributes
    ----------
    result
        The JSON object that it printed last; of a run that did not end well what it had told by then, or None.
    why
        It did not end well, in its own words where it had any.
    rehearsed
        At a shape that any machine computes: its figures say nothing.
    """

    name: str
    command: str
    ending: Ending
    seconds: float = 0.0
    why: str = ""
    result: Any = None
    rehearsed: bool = False

    def save(self, directory: Path) -> None:
        """As `directory`/NAME.json, whole or not at all."""
        path = directory / f"{self.name}.json"
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(asdict(self), indent=1))
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Report:
        """One that cannot be read says so."""
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            return cls(path.stem, "", "failed", why=f"{path} cannot be read: {error}")


def saved(directory: Path) -> dict[str, Report]:
    """The reports in a directory, of this and of earlier commands, by name."""
    return {path.stem: Report.load(path) for path in sorted(directory.glob("*.json"))}


def measure(run: Run, directory: Path, *, scratch: Path, rehearse: bool, limit_s: float) -> Report:
    """Run it, and save what it gives, its standard error beside it as NAME.err.

    Parameters
    ----------
    scratch
        Where it may leave large files; they are removed.
    limit_s
        After which it is ended, with all the processes that it started.
    """
    errors, printed = directory / f"{run.name}.err", directory / f"{run.name}.out"
    began = time.monotonic()
    with TemporaryDirectory(dir=scratch, prefix="gpu-report-", ignore_cleanup_errors=True) as own:
        arguments = [argument.format(scratch=own) for argument in (run.rehearsal if rehearse else run.arguments)]
        code = _ended_within(limit_s, arguments, Path(own), printed, errors)
    seconds = round(time.monotonic() - began, 1)
    command = " ".join(["python -m", *arguments]).replace(own, "DIRECTORY")
    told = _objects(printed)
    result = told if run.rows else told[-1] if told else None
    ending: Ending = "cut off" if code is None else "failed" if code or not told else "done"
    why = "" if ending == "done" else f"after {seconds} s: {_last_words(errors) or _last_words(printed)}"
    if ending == "cut off":
        why = f"its limit of {limit_s:.0f} s had passed; {why}"
    if ending != "done":
        result = result or run.lines(_objects(errors))
    report = Report(run.name, command, ending, seconds, why, result, rehearse)
    report.save(directory)
    return report


def left_out(run: Run, directory: Path, why: str) -> Report:
    """A report of a run that was not begun."""
    report = Report(run.name, " ".join(["python -m", *run.arguments]), "left out", why=why)
    report.save(directory)
    return report


def _ended_within(limit_s: float, arguments: Sequence[str], scratch: Path, printed: Path, errors: Path) -> int | None:
    """The exit code; None if it had to be ended."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch)}
    with printed.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it has not ended, and what is left of those that it started: all are in its session."""
    for ask, patience_s in ((signal.SIGTERM, _KILL_S), (signal.SIGKILL, _KILL_S)):
        end = time.monotonic() + patience_s
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, ask)
            while time.monotonic() < end:
                process.poll()  # Until it is waited for, its group is there.
                os.killpg(process.pid, 0)
                time.sleep(0.05)


def _objects(path: Path) -> list[Any]:
    """The JSON objects in a file of lines."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def _last_words(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    words = [line for line in lines if line and not line.startswith("{")]
    return " / ".join(words[-2:])[-_LAST_WORDS:]
