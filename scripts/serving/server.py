"""A tritonserver that is started, watched and stopped from Python."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from scripts.serving.installation import ROOT, STATE, Installation
from scripts.serving.runs import DIRECTORY, MARKER, Engine, Run, open_run, sweep

LogLevel = Literal["error", "warning", "info", "verbose"]
LOG_LEVELS: tuple[LogLevel, ...] = ("error", "warning", "info", "verbose")

_PORT_ATTEMPTS = 5
_POLL_SECONDS = 0.05
_EXIT_SECONDS = 8
"""What the server itself gives requests in flight, and models to unload, when it is told to stop."""
_STOP_SECONDS = 30.0
"""After which it is killed. It hears of its end once the model that it loads is there: one that failed it tries again
every second, which takes a busy machine ten; and it looks only once a second how far it is."""


class ServerStartError(Exception):
    """The server did not come up; the message says why, in the server's own words where it has any."""


class _PortTakenError(ServerStartError):
    pass


@dataclass(frozen=True)
class ServerOptions:
    """How to start a server."""

    model_repository: Path = ROOT / "model_repository"
    http_port: int = 8000
    """0 takes a free one, here and below."""
    grpc_port: int = 8001
    metrics_port: int = 8002
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of the machine."""
    log_level: LogLevel = "info"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the models (`EngineConfig`), which go before those in their config.pbtxt."""
    drain_seconds: float = 20.0
    """How long running requests may take to end by themselves when the server is stopped; new ones are refused then."""
    extra_arguments: tuple[str, ...] = ()
    """For tritonserver, as they are."""


@dataclass(frozen=True)
class Urls:
    """Where a server answers."""

    http: str
    grpc: str
    metrics: str


class TritonServer:
    """One tritonserver. Use it as a context manager, or call `start`, `wait_ready` and `stop`.

    It is new, then running, then stopped; it cannot be started again. Whatever ends first - the server, this process,
    an orderly `stop` - nothing of the server stays behind: see `scripts.serving.guard`.
    """

    def __init__(
        self,
        options: ServerOptions,
        installation: Installation,
        *,
        state: Path = STATE,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.options = options
        self._installation = installation
        self._state = state
        self._environ = environ
        self._run: Run | None = None
        self._guard: subprocess.Popen[str] | None = None
        self._process_id: int | None = None
        self._exit_code: int | None = None
        self._ports = (options.http_port, options.grpc_port, options.metrics_port)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def urls(self) -> Urls:
        http, grpc, metrics = self._ports
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.options.host, self.options.host)
        return Urls(f"http://{host}:{http}", f"{host}:{grpc}", f"http://{host}:{metrics}/metrics")

    def same_ports(self) -> ServerOptions:
        """Options for a server that takes this one's place: on the ports that this one had."""
        http, grpc, metrics = self._ports
        return replace(self.options, http_port=http, grpc_port=grpc, metrics_port=metrics)

    @property
    def log(self) -> Path:
        """Everything the server and its models said."""
        return self._started().log

    @property
    def run(self) -> Run:
        return self._started()

    @property
    def process_id(self) -> int:
        """Id of the tritonserver process."""
        if self._process_id is None:
            raise RuntimeError("the server has not been started")
        return self._process_id

    @property
    def exit_code(self) -> int | None:
        """How the server ended: None while it runs, negative for a signal."""
        self._look()
        return self._exit_code

    @property
    def ending(self) -> str:
        """`exit_code` in words."""
        code = self.exit_code
        if code is None:
            return "running"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def start(self) -> None:
        """Start the server; it answers once `wait_ready` has returned.

        Raises
        ------
        ServerStartError
            If the repository has no models, or a port is taken.
        """
        if self._guard is not None:
            raise RuntimeError("the server has been started already")
        sweep(self._state)
        self.models()
        self._ports = self._choose_ports()
        run, lock = open_run(self._state)
        self._run = run
        try:
            environment = self._installation.variables(self._environ)
            environment |= {
                "WICORE_SETTINGS": json.dumps(dict(self.options.settings)),
                MARKER: run.name,
                DIRECTORY: str(run.directory),
            }
            run.copy_models(self.options.model_repository)
            order = {
                "command": self._command(run),
                "environment": environment,
                "drain_seconds": self.options.drain_seconds,
                "stop_seconds": _STOP_SECONDS,
            }
            run.write_order(order)
            self._guard = subprocess.Popen(
                [sys.executable, "-P", "-m", "scripts.serving.guard", str(run.directory)],
                env={**self._environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[lock],
                start_new_session=True,
            )
        finally:
            os.close(lock)
        assert self._guard.stdout is not None
        told = self._guard.stdout.readline().split()
        if told[:1] != ["started"]:
            self._guard.wait()
            run.clear()
            raise ServerStartError(f"{self._command(run)[0]} cannot be run")
        self._process_id = int(told[1])

    def models(self) -> list[str]:
        """Names of the repository's models."""
        repository = self.options.model_repository
        names = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
        if not names:
            raise ServerStartError(f"there is no model in {repository} (looked for */config.pbtxt)")
        return names

    def wait_ready(self, *, timeout: float = 600.0, progress: Callable[[str], None] = lambda _line: None) -> None:
        """Return when the server and every model of the repository answer that they are ready.

        Parameters
        ----------
        timeout
            Seconds from now.
        progress
            Gets the name of each model once it is ready.

        Raises
        ------
        ServerStartError
            If the server ends, or is not ready in time.
        """
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            try:
                self._wait_ready(timeout, progress)
                return
            except _PortTakenError:
                # Somebody took a free port between our choice and the server's bind.
                if attempt == _PORT_ATTEMPTS or 0 not in self._wanted_ports:
                    raise
                self.stop()
                self._guard = self._exit_code = None
                self.start()

    def stop(self) -> None:
        """Let the engines drain, stop the server, and return when nothing of it is left; once more does nothing."""
        guard = self._guard
        if guard is None or self._exit_code is not None:
            return
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()
        self._look()

    def hurry(self) -> None:
        """Stop the server without draining, or cut short the drain of a `stop` that is under way. Does not wait."""
        if self._guard is not None and self._guard.poll() is None:
            self._guard.send_signal(signal.SIGTERM)

    def engines(self) -> list[Engine]:
        """The engines in the server, and how they are."""
        return self._started().engines()

    def dead(self) -> list[int]:
        """Ids of its models' processes that have been killed or have crashed. Triton does not start them again: what
        they were asked for never ends, and what comes is refused."""
        return self._started().dead()

    def wait(self, timeout: float) -> int | None:
        """Wait up to `timeout` seconds for the server to end by itself; its exit code, or None."""
        if self._guard is not None and self._exit_code is None:
            try:
                self._guard.wait(timeout)
            except subprocess.TimeoutExpired:
                return None
        return self.exit_code

    def why(self, *, lines: int = 12) -> str:
        """What the log says about the end of the server: the errors, or else its last lines."""
        return _errors(self.log) or "\n".join(_log_lines(self.log)[-lines:])

    @property
    def _wanted_ports(self) -> tuple[int, int, int]:
        return self.options.http_port, self.options.grpc_port, self.options.metrics_port

    def _started(self) -> Run:
        if self._run is None:
            raise RuntimeError("the server has not been started")
        return self._run

    def _look(self) -> None:
        """Note the end of the guard, and with it the server's; clear up in its stead if it was killed."""
        guard = self._guard
        if guard is None or self._exit_code is not None or guard.poll() is None:
            return
        assert guard.stdout is not None
        told = guard.stdout.read().split()
        if told[:1] == ["ended"]:
            self._exit_code = int(told[1])
        else:
            self._started().clear()
            self._exit_code = guard.returncode
        guard.stdout.close()

    def _command(self, run: Run) -> list[str]:
        options, (http, grpc, metrics) = self.options, self._ports
        level = LOG_LEVELS.index(options.log_level)
        return [
            *self._installation.command(),
            f"--id={run.name}",
            f"--model-repository={run.models}",
            f"--model-repository={run.markers}",
            "--model-control-mode=poll",
            "--repository-poll-secs=1",
            f"--http-address={options.host}",
            f"--http-port={http}",
            f"--grpc-address={options.host}",
            f"--grpc-port={grpc}",
            f"--metrics-address={options.host}",
            f"--metrics-port={metrics}",
            f"--backend-config=python,shm-region-prefix-name={run.shared_memory_prefix}",
            f"--exit-timeout-secs={_EXIT_SECONDS}",
            f"--log-warning={str(level >= LOG_LEVELS.index('warning')).lower()}",
            f"--log-info={str(level >= LOG_LEVELS.index('info')).lower()}",
            f"--log-verbose={int(options.log_level == 'verbose')}",
            *options.extra_arguments,
        ]

    def _choose_ports(self) -> tuple[int, int, int]:
        """The wanted ports, free ones for zeros. All are held until all are known, so that they differ."""
        chosen = []
        with ExitStack() as held:
            family = socket.AF_INET6 if ":" in self.options.host else socket.AF_INET
            # Wanted ones first: a free one must not be one of them.
            for place, port in sorted(enumerate(self._wanted_ports), key=lambda item: item[1] == 0):
                listener = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((self.options.host, port))
                    listener.listen()
                except OSError as error:
                    name = ("http", "grpc", "metrics")[place]
                    remedy = f"--{name}-port 0 takes a free port"
                    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                        remedy = "--host takes a name or an address of this machine"
                    raise ServerStartError(
                        f"cannot listen on {self.options.host}:{port}: {error.strerror}; {remedy}"
                    ) from None
                chosen.append((place, int(listener.getsockname()[1])))
        http, grpc, metrics = (port for _, port in sorted(chosen))
        return http, grpc, metrics

    def _wait_ready(self, timeout: float, progress: Callable[[str], None]) -> None:
        deadline = time.monotonic() + timeout
        missing = self.models()
        while True:
            if self.exit_code is not None:
                why = self.why()
                kind = _PortTakenError if re.search(r"Socket '\S+' already in use", why) else ServerStartError
                raise kind(f"tritonserver ended while it started ({self.ending}):\n{why}\nlog: {self.log}")
            if self._get("/v2").get("name") == self.run.name:  # and not somebody else's server on this port
                for name in [name for name in missing if self._ready(f"/v2/models/{name}/ready")]:
                    missing.remove(name)
                    progress(name)
                if not missing and self._ready("/v2/health/ready"):
                    return
            if time.monotonic() > deadline:
                raise ServerStartError(
                    f"not ready after {timeout:.0f} s; still waiting for {', '.join(missing) or 'the server'}\n"
                    f"{self.why()}\nlog: {self.log}"
                )
            time.sleep(_POLL_SECONDS)

    def _get(self, path: str) -> dict[str, Any]:
        try:
            with self._opener.open(self.urls.http + path, timeout=5) as answer:
                content = json.load(answer)
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _ready(self, path: str) -> bool:
        try:
            with self._opener.open(self.urls.http + path, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def _log_lines(log: Path) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []


_LOG_LINE = re.compile(r'^[EF]\d{4} \S+ +\d+ \S+\] *"?(?P<text>.*?)"? *$')
_LOAD_FAILURE = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<why>.*)")
_NOISE = ("CudaDriverHelper has not been initialized", "unable to create stream for", "No address added out of total")
"""What every machine without a GPU logs as errors, and gRPC's own telling of a port that is taken."""
_TOLD = re.compile(
    r"Internal: (InvalidArgument|Checkpoint|Segment|Executor|Engine)Error: (?P<why>.*?)(\n+At:\n.*)?", re.DOTALL
)
"""An error whose words say it all (`wicore_backend/errors.py`); where in the code it was raised says nothing more."""


def _errors(log: Path) -> str:
    """The log's errors; if models failed to load, only theirs, for the others follow from them."""
    texts: dict[str, None] = {}  # a set that keeps the order
    failures: dict[str, None] = {}
    for line in _log_lines(log):
        if (match := _LOG_LINE.match(line)) and not any(noise in line for noise in _NOISE):
            text = match["text"]
            kind = texts
            if failure := _LOAD_FAILURE.match(text):
                kind, text = failures, f"{failure['model']}: {failure['why']}"
            text = text.replace("\\n", "\n").replace('\\"', '"').strip()
            model, colon, why = text.partition(": ")
            told = _TOLD.fullmatch(why)
            kind[f"{model}{colon}{told['why']}" if told else text] = None
    return "\n".join(failures or texts)
