"""The gateway beside a server: started, kept running, and ended with whoever started it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scripts.serving.console import say
from scripts.serving.installation import ROOT, Installation
from scripts.serving.server import ServerStartError, Urls

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05
_READY_SECONDS = 60.0
_LAST_SECONDS = 8.0
"""Beyond the time that answers may take to end: for connections to close."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
_WELL_SECONDS = 60.0
"""A gateway that ran so long and then died is started again without the growing wait."""


@dataclass(frozen=True)
class GatewayOptions:
    """How to start a gateway."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes a free one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the gateway (`GatewaySettings`); names may be SECTION.NAME. The environment's WICORE_GATEWAY has more."""
    drain_seconds: float = 20.0
    """How long running answers may take to end by themselves when it is stopped."""


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Gateway:
    """One gateway, in a process of its own. Use it as a context manager.

    The listening socket belongs to this object and is handed to each process that it starts, so that the port stays
    the same and clients wait a moment, instead of being refused, while a gateway that died is started again.
    """

    def __init__(self, options: GatewayOptions, installation: Installation, triton: Urls, *, log: Path) -> None:
        self.log = log
        self._options = options
        self._installation = installation
        self._triton = triton
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._began = 0.0
        self._pause = _FIRST_PAUSE_SECONDS
        self._again_at: float | None = None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> Self:
        try:
            self._socket = self._listen()
            self._start()
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """Where it listens."""
        if self._socket is None:
            raise RuntimeError("the gateway has not been started")
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """The chat page's address; the API's base is below it, `/v1`."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._options.host, self._options.host)
        return f"http://{host}:{self.port}"

    @property
    def process_id(self) -> int:
        """Of the process that runs now."""
        if self._process is None:
            raise RuntimeError("the gateway has not been started")
        return self._process.pid

    def keep_running(self) -> None:
        """Start it again if it has died; to be called now and then. The pauses grow while it keeps dying."""
        if self._process is None or self._process.poll() is None:
            return
        now = time.monotonic()
        if self._again_at is None:
            if now - self._began > _WELL_SECONDS:
                self._pause = _FIRST_PAUSE_SECONDS
            self._again_at = now + self._pause
            say(f"the gateway died ({_ending(self._process.returncode)}); starting it again in {self._pause:.0f} s")
            say(f"log: {self.log}")
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        elif now >= self._again_at:
            self._start()

    def begin_to_stop(self) -> None:
        """Tell it to refuse new requests and to end when the running ones have. Does not wait."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End it, and return when it has ended; once more does nothing."""
        if self._process is not None:
            self.begin_to_stop()
            try:
                self._process.wait(self._options.drain_seconds + _LAST_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _listen(self) -> socket.socket:
        host, port = self._options.host, self._options.port
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(2048)
        except OSError as error:
            listener.close()
            raise ServerStartError(
                f"cannot listen on {host}:{port}: {error.strerror}; --gateway-port 0 takes a free port, "
                "--no-gateway does without"
            ) from None
        return listener

    def _start(self) -> None:
        assert self._socket is not None
        settings = {
            "host": self._options.host,
            "port": self.port,
            "triton_url": self._triton.grpc,
            "triton_metrics_url": self._triton.metrics,
            "drain_s": self._options.drain_seconds,
            **self._options.settings,
        }
        assignments = [
            f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(
                        str(self._installation.python),
                        "-P",
                        "-m",
                        "wicore_backend.gateway",
                        "--fd",
                        str(self._socket.fileno()),
                    ),
                    *(part for assignment in assignments for part in ("--set", assignment)),
                ],
                env={**self._installation.variables(os.environ), "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._socket.fileno()],
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._began = time.monotonic()
        self._again_at = None

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not self._answers():
            assert self._process is not None
            if self._process.poll() is not None:
                last = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
                ending = _ending(self._process.returncode)
                raise ServerStartError(f"the gateway ended while it started ({ending}):\n{last}\nlog: {self.log}")
            if time.monotonic() > deadline:
                raise ServerStartError(f"the gateway does not answer after {_READY_SECONDS:.0f} s\nlog: {self.log}")
            time.sleep(_POLL_SECONDS)

    def _answers(self) -> bool:
        try:
            with self._opener.open(f"{self.url}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
