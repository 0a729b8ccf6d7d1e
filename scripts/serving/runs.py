"""What one start of the server owns, on disk and in the kernel, and how to take it back.

A run is one start. It has a directory with its lock, its log and the command to run; every process of it carries the
run's name in its environment, and every shared-memory region carries it in its name. So whatever is left of a run can
be found and removed by anyone, and nothing else ever is.

The models' engines find the directory too, and there is what they and the supervisor tell each other
(`wicore_backend/triton/supervision.py`).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MARKER = "WICORE_RUN"
DIRECTORY = "WICORE_RUN_DIRECTORY"
SHARED_MEMORY = Path("/dev/shm")
_KEPT_LOGS = 10
_PROCESS_END_SECONDS = 5.0


@dataclass(frozen=True)
class Engine:
    """An engine in the server, as it says of itself; `reason` says why it is not healthy."""

    process_id: int
    healthy: bool
    reason: str


@dataclass(frozen=True)
class Run:
    """One start of the server. It is alive as long as somebody holds the lock in its directory."""

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def shared_memory_prefix(self) -> str:
        """Start of the names of the run's regions in /dev/shm."""
        return f"{self.name}-"

    @property
    def log(self) -> Path:
        """The server's log; it outlives the run, until `_KEPT_LOGS` later ones have come."""
        return self.directory.parent.parent / "logs" / f"{self.name}.log"

    @property
    def order(self) -> Path:
        """What the guard reads: the command, its environment, how long a stop may take."""
        return self.directory / "order.json"

    @property
    def models(self) -> Path:
        """The repository that the server runs on: a copy, since it follows changes and nobody should make any."""
        return self.directory / "models"

    @property
    def markers(self) -> Path:
        """The repository in which an engine in trouble puts a model that cannot be loaded, so that no one is ready."""
        return self.directory / "markers"

    def engines(self) -> list[Engine]:
        """The engines that have not ended."""
        told_of = sorted((self.directory / "engines").glob("*.json"))
        alive = self.processes() if told_of else []
        found = []
        for path in told_of:
            with suppress(FileNotFoundError):  # it has ended just now
                told = json.loads(path.read_text())
                if int(path.stem) in alive:
                    found.append(Engine(int(path.stem), bool(told["healthy"]), str(told["reason"])))
        return found

    def dead(self) -> list[int]:
        """Ids of the processes of models, engines or others, that have ended without a word: killed, or crashed."""
        told_of = [*(self.directory / "engines").glob("*.json"), *(self.directory / "workers").glob("*.json")]
        alive = self.processes() if told_of else []
        # Who ends in an orderly way takes his file away first, and so before he is missing among the living.
        return sorted(int(path.stem) for path in told_of if int(path.stem) not in alive and path.exists())

    def ask_to_drain(self, grace_seconds: float) -> None:
        """Tell the engines to refuse new requests, and to end those that are left after `grace_seconds`."""
        written = self.directory / "drain.new"
        written.write_text(json.dumps({"grace_s": grace_seconds}))
        written.rename(self.directory / "drain.json")

    def copy_models(self, repository: Path) -> None:
        """Make `models`.

        Python would keep compiled code beside a model's, and Triton would take that for a change and load the model
        once more; a file where Python wants its folder prevents it.
        """
        shutil.copytree(repository, self.models, ignore=shutil.ignore_patterns("__pycache__"))
        for code in self.models.rglob("*.py"):
            (code.parent / "__pycache__").touch()

    def write_order(self, order: dict[str, object]) -> None:
        self.order.write_text(json.dumps(order))

    def processes(self) -> list[int]:
        """Ids of the run's processes that are still alive, by the mark in their environment."""
        mark = f"{MARKER}={self.name}".encode()
        found = []
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with suppress(OSError):  # gone meanwhile, or another user's
                if mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def regions(self) -> list[Path]:
        """The run's regions in /dev/shm."""
        return sorted(SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"))

    def clear(self) -> list[int]:
        """End what is left of the run, remove its shared memory and its directory; returns the processes ended."""
        ended: set[int] = set()
        deadline = time.monotonic() + _PROCESS_END_SECONDS
        while (alive := self.processes()) and time.monotonic() < deadline:
            for process in alive:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            ended.update(alive)
            time.sleep(0.02)
        for region in self.regions():
            region.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        return sorted(ended)


@contextmanager
def _books(state: Path) -> Iterator[Path]:
    """The directory of all runs, with nobody else adding or sweeping meanwhile."""
    runs = state / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    (state / "logs").mkdir(exist_ok=True)
    with (state / "runs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield runs


def open_run(state: Path) -> tuple[Run, int]:
    """A new run below `state` and the descriptor that holds its lock: keep it open, or hand it on, while it lives."""
    with _books(state) as runs:
        run = Run(runs / f"wicore-{secrets.token_hex(4)}")
        run.markers.mkdir(parents=True)
        lock = os.open(run.directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        for log in sorted((state / "logs").glob("wicore-*.log"), key=lambda path: path.stat().st_mtime)[:-_KEPT_LOGS]:
            log.unlink(missing_ok=True)
    return run, lock


def sweep(state: Path) -> list[Run]:
    """Clear the runs below `state` whose holders died without a chance to; returns them."""
    swept = []
    with _books(state) as runs:
        for directory in sorted(runs.iterdir()):
            run = Run(directory)
            try:
                lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:  # its holder died between making the directory and the lock
                run.clear()
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                run.clear()
                swept.append(run)
            finally:
                os.close(lock)
    return swept
