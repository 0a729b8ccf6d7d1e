"""A real tritonserver starts, answers and ends, whoever is killed, and leaves nothing behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import pytest

from scripts.serving import ServerOptions, ServerStartError, TritonServer
from scripts.serving.installation import ROOT
from scripts.serving.runs import Run
from tests import waiting
from tests.integration.conftest import FREE_PORTS
from tests.integration.wire import assert_stopped_by_itself

wait_until = partial(waiting.wait_until, within_s=15, every_s=0.05)


@pytest.fixture
def make(echo_repository, installation, tmp_path):
    def make(**options):
        options = {"model_repository": echo_repository, **FREE_PORTS, **options}
        return TritonServer(ServerOptions(**options), installation, state=tmp_path / "state")

    return make


def ask(url, text, timeout=10):
    body = json.dumps({"text": text}).encode()
    with urllib.request.urlopen(f"{url}/v2/models/echo/generate", body, timeout) as answer:
        return json.load(answer)["echo"]


def is_clean(run: Run) -> bool:
    return not run.processes() and not run.regions() and not run.directory.exists()


def test_five_starts_and_stops_leave_nothing_behind(make):
    for _ in range(5):
        with make() as server:
            assert ask(server.urls.http, "hello") == "hello from numpy 1.26.4"
            assert server.run.regions()
        assert_stopped_by_itself(server)
        assert is_clean(server.run)


def test_two_servers_run_side_by_side(make):
    with make() as first, make() as second:
        assert ask(first.urls.http, "one").startswith("one")
        assert ask(second.urls.http, "two").startswith("two")


def test_nothing_stays_when_the_server_is_killed(make):
    with make() as server:
        os.kill(server.process_id, signal.SIGKILL)
        assert server.wait(10) == -signal.SIGKILL
        assert is_clean(server.run)


def test_nothing_stays_when_the_stub_is_killed(make):
    with make() as server:
        for process in server.run.processes():
            if process != server.process_id:
                os.kill(process, signal.SIGKILL)
    assert is_clean(server.run)


def test_a_model_that_hangs_does_not_hold_up_the_stop_for_ever(make):
    with make() as server:
        with pytest.raises(TimeoutError):
            ask(server.urls.http, "hold", timeout=0.5)
        began = time.monotonic()
    assert time.monotonic() - began < 20
    assert is_clean(server.run)


def test_a_model_that_cannot_load_is_reported_in_its_own_words(make):
    server = make(settings={"wrong": 1})
    with pytest.raises(ServerStartError, match=r'echo: Internal: ValueError: settings: \{"wrong": 1\}'):
        server.__enter__()
    assert is_clean(server.run)


def test_a_large_body_does_not_end_the_server(make):
    """With the usual stack of 8 MiB, tritonserver 2.51 dies of 6 MB of JSON."""
    with make() as server:
        assert ask(server.urls.http, "x" * 20_000_000).startswith("xxx")
        assert ask(server.urls.http, "hello").startswith("hello")


@pytest.fixture
def serve(echo_repository, tmp_path):
    """scripts/serve.sh on the throw-away model, in the environment that runs the tests; returns process and URL."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    model = echo_repository / "echo" / "1" / "model.py"
    model.write_text(model.read_text().replace('!= "{}"', '== "{}"'))  # this one is given settings
    program = (
        "import sys; from scripts.serving import cli, installation\n"
        "cli.Installation.of_this_checkout = installation.Installation.of_this_environment\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    started = []

    def serve(*arguments):
        ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics", "gateway")]
        command = [sys.executable, "-c", program, "serve", *ports, f"--model-repository={echo_repository}"]
        process = subprocess.Popen(
            [*command, f"--model={checkpoint}", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        started.append(process)
        assert process.stdout is not None
        process.told = told = {}
        for line in process.stdout:
            name, _, value = line.strip().partition(" ")
            told[name] = value.strip()
            if line.startswith("Ctrl-C"):
                break
        assert "HTTP" in told, process.stderr.read() if process.stderr else ""
        url, log = told["HTTP"], told["log"]
        return process, url, Run(Path(log).parent.parent / "runs" / Path(log).stem)

    yield serve
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_says_where_it_answers_and_ends_cleanly_when_told_to(serve, number):
    process, url, run = serve()
    assert ask(url, "hello").startswith("hello")
    process.send_signal(number)
    assert process.wait(20) == 0
    assert is_clean(run)


def test_serve_keeps_a_gateway_beside_the_server_and_ends_it_with_itself(serve):
    process, _, _ = serve()
    port = urlparse(process.told["OpenAI"]).port
    first = gateway_of(port)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: gateway_of(port) not in (None, first), within_s=20)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=20) as answer:
        assert answer.status == 200
    process.kill()
    wait_until(lambda: gateway_of(port) is None, within_s=20)


def test_serve_starts_triton_alone_when_asked_to(serve):
    process, url, run = serve("--no-gateway")
    assert ask(url, "hello").startswith("hello")
    assert "OpenAI" not in process.told
    assert not run.log.with_suffix(".gateway.log").exists()
    process.terminate()
    assert process.wait(20) == 0


def test_serve_reports_a_server_that_died_and_fails(serve):
    process, _, run = serve()
    os.kill(server_of(run), signal.SIGKILL)
    assert process.wait(10) == 1
    assert "tritonserver died (killed by signal 9)" in process.stderr.read()
    assert is_clean(run)


def test_serve_restarts_a_server_that_died_when_asked_to(serve):
    process, _, run = serve("--restart")
    os.kill(server_of(run), signal.SIGKILL)
    lines = []
    for line in process.stdout:
        lines.append(line.split())
        if line.startswith("Ctrl-C"):
            break
    url = next(words[1] for words in lines if words[:1] == ["HTTP"])
    assert ask(url, "again").startswith("again")
    process.terminate()
    assert process.wait(20) == 0


def test_nothing_stays_when_serve_is_killed(serve):
    process, _, run = serve()
    process.kill()
    wait_until(lambda: is_clean(run))


def server_of(run: Run) -> int:
    """The tritonserver among the run's processes."""
    return next(p for p in run.processes() if b"tritonserver\0" in Path(f"/proc/{p}/cmdline").read_bytes())


def gateway_of(port: int) -> int | None:
    """The gateway's process that listens on a port, or does not yet."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (directory / "cmdline").read_bytes()
            if b"wicore_backend.gateway\0" in command and f"port={port}\0".encode() in command:
                return int(directory.name)
    return None
