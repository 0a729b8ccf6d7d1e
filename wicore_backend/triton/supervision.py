"""What an engine and the supervisor of its server tell each other: by files in the directory of the server's run.

Triton tells no model that the server is about to stop: by the time of `finalize`, requests in flight have ended or been
given up. So the supervisor (`scripts/serving/guard.py`) asks the engines to drain before it stops the server.

    engines/PID.json   this engine is there: {"healthy": true, "reason": ""}; gone once it has drained
    workers/PID.json   this process of a model without an engine is there
    drain.json         the supervisor asks for the end: {"grace_s": 20.0}
    markers/           the repository of markers (`triton/readiness.py`)
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from wicore_backend.engine.health import Health

VARIABLE = "WICORE_RUN_DIRECTORY"
"""Environment variable that names the directory; a server without a supervisor has none."""


def attend(directory: Path) -> Path:
    """Say that this process is there, so that it is missed if it dies; returns the file to remove at its end."""
    presence = directory / "workers" / f"{os.getpid()}.json"
    presence.parent.mkdir(exist_ok=True)
    presence.write_text("{}")
    return presence


class Supervision:
    """An engine's side of the files."""

    def __init__(self, directory: Path) -> None:
        self.markers = directory / "markers"
        self._drain = directory / "drain.json"
        self._presence = directory / "engines" / f"{os.getpid()}.json"
        self._presence.parent.mkdir(exist_ok=True)
        self._told: Health | None = None

    def tell(self, health: Health) -> None:
        """Say how the engine is."""
        if health != self._told:
            written = self._presence.with_suffix(".new")
            written.write_text(json.dumps({"healthy": health.ok, "reason": health.reason}))
            written.rename(self._presence)
            self._told = health

    def drain_grace_s(self) -> float | None:
        """How long running requests may take to end by themselves; None as long as nobody asks for the end."""
        try:
            return float(json.loads(self._drain.read_text())["grace_s"])
        except FileNotFoundError:
            return None

    def leave(self) -> None:
        """Say that everything has ended here; the server may be stopped."""
        self._presence.unlink(missing_ok=True)
