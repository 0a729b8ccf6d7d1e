"""What scripts/serve.sh, scripts/test.sh and scripts/setup.sh run."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from scripts.serving.console import Step, say
from scripts.serving.gateway import Gateway, GatewayOptions
from scripts.serving.installation import ROOT, Installation, SetUpError
from scripts.serving.server import LOG_LEVELS, ServerOptions, ServerStartError, TritonServer

DEMO_MODEL = ROOT / "models" / "wicore-demo"
PICTURE = ROOT / "client" / "wicore_client" / "assets" / "shapes.png"

_DEFAULT_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
_FIRST_RESTART_SECONDS, _LONGEST_RESTART_SECONDS = 1.0, 30.0
_HEALTHY_SECONDS = 60.0
"""A server that ran so long and then died is restarted without the growing wait."""
_PATIENCE_SECONDS = 30.0
"""An engine that is not healthy for so long does not get well by itself: a hung device needs a new process."""


class _Stopped(BaseException):
    """A person or the system wants this process to end; carries the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts.serving", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser(
        "serve",
        prog="scripts/serve.sh",
        description="Set up what is missing and serve Gemma-3 through Triton until Ctrl-C.",
        epilog="Exit code: 0 when it was told to stop while it served, 1 when the server could not start or died, "
        "2 for wrong usage, 128 and the signal when it was told to stop before it was ready.",
    )
    serve.add_argument("--demo", action="store_true", help="ask one question about a picture, then stop")
    serve.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a Gemma-3 checkpoint in Hugging Face layout (default: that of $WICORE_SETTINGS, $WICORE_MODEL, or the "
        "demo model)",
    )
    serve.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    serve.add_argument(
        "--set",
        action="append",
        default=[],
        type=setting,
        metavar="NAME=VALUE",
        dest="settings",
        help="a setting of the engine, its value as JSON or text: --set max_batch_tokens=512; may be repeated",
    )
    for name, port in _DEFAULT_PORTS.items():
        serve.add_argument(
            f"--{name}-port", type=_port, metavar="PORT", help=f"0 takes a free one (default: {port}; --demo: 0)"
        )
    serve.add_argument(
        "--gateway-port",
        type=_port,
        default=8080,
        metavar="PORT",
        help="of the OpenAI API and the chat page; 0 takes a free one (default: %(default)s)",
    )
    serve.add_argument(
        "--gateway-set",
        action="append",
        default=[],
        type=setting,
        metavar="NAME=VALUE",
        dest="gateway_settings",
        help="a setting of the gateway, as for --set: --gateway-set access.keys_file=keys.json; may be repeated",
    )
    serve.add_argument("--no-gateway", action="store_true", help="Triton alone")
    serve.add_argument("--host", default="127.0.0.1", help="address for Triton to listen on (default: %(default)s)")
    serve.add_argument("--model-repository", type=Path, default=ROOT / "model_repository", metavar="PATH")
    serve.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="of the log (default: %(default)s)")
    serve.add_argument("--ready-timeout", type=_seconds, default=600.0, metavar="SECONDS", help="default: %(default)s")
    serve.add_argument(
        "--drain",
        type=_seconds,
        default=20.0,
        metavar="SECONDS",
        help="when it is told to stop, how long answers may take to end by themselves (default: %(default)s)",
    )
    serve.add_argument(
        "--restart",
        action="store_true",
        help="start the server again when it or a model's process dies, or when its engine is in trouble for "
        f"{_PATIENCE_SECONDS:.0f} s",
    )
    serve.set_defaults(run=_serve, parser=serve)

    setup = commands.add_parser("setup", prog="scripts/setup.sh", description="Set up what is missing, start nothing.")
    setup.add_argument("--test", action="store_true", help="with what the tests need")
    setup.set_defaults(run=_set_up, parser=setup)
    return parser


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["test"]:  # whose arguments are pytest's
        run = partial(_test, arguments[1:])
    else:
        given, unknown = build_parser().parse_known_args(arguments)
        if unknown:
            given.parser.error(f"unrecognized arguments: {shlex.join(unknown)}")
        run = partial(given.run, given)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _raise_stopped)
    try:
        code: int = run()
        return code
    except _Stopped as stopped:  # before its work was done
        say("stopped")
        return 128 + stopped.number
    except (SetUpError, ServerStartError) as error:
        say(f"error: {error}")
        return 1


def _raise_stopped(number: int, _frame: object) -> NoReturn:
    raise _Stopped(number)


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE of a command line, the value as JSON or text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return seconds


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _options(given: argparse.Namespace) -> ServerOptions:
    settings = {**_environment_settings(), **dict(given.settings)}
    for name, value in (("model", given.model), ("device", given.device)):
        if value and name in dict(given.settings):
            given.parser.error(f"--{name} and --set {name}=... say the same; give one of them")
    named = given.model or settings.get("model") or os.environ.get("WICORE_MODEL") or DEMO_MODEL
    model = Path(str(named)).expanduser().resolve()
    if not (model / "config.json").is_file():
        lacks = "it has no config.json" if model.is_dir() else "there is no such directory"
        raise ServerStartError(f"{model} is not a checkpoint: {lacks}; name that of one in Hugging Face layout")
    settings |= {"model": str(model), **({"device": given.device} if given.device else {})}
    return ServerOptions(
        model_repository=given.model_repository.resolve(),
        host=given.host,
        log_level=given.log_level,
        settings=settings,
        drain_seconds=given.drain,
        http_port=_chosen_port(given, "http"),
        grpc_port=_chosen_port(given, "grpc"),
        metrics_port=_chosen_port(given, "metrics"),
    )


def _environment_settings() -> dict[str, Any]:
    """The engine's settings in the environment, which those of the command line go before."""
    text = os.environ.get("WICORE_SETTINGS") or "{}"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServerStartError(f"WICORE_SETTINGS is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ServerStartError(f"WICORE_SETTINGS must be a JSON object, not {text[:80]!r}")
    return values


def _chosen_port(given: argparse.Namespace, name: str) -> int:
    wanted: int | None = getattr(given, f"{name}_port")
    if wanted is None:
        return 0 if given.demo else _DEFAULT_PORTS[name]
    return wanted


def _serve(given: argparse.Namespace) -> int:
    options = _options(given)
    installation = Installation.of_this_checkout()
    pause = _FIRST_RESTART_SECONDS
    # The gateway outlives servers: while one is started again its clients hear when to come back. When all of it stops
    # it ends after the server, whose last answers go through it.
    with ExitStack() as stack:
        gateway: Gateway | None = None
        while True:
            with _running(options, installation, given.ready_timeout) as server:
                if given.demo:
                    return _demo(server, installation)
                began = time.monotonic()
                try:
                    if gateway is None and not given.no_gateway:
                        gateway = stack.enter_context(_gateway(given, server, installation))
                    print(_welcome(server, gateway), flush=True)
                    trouble = _wait_for_trouble(server, gateway, patience=_PATIENCE_SECONDS if given.restart else None)
                except _Stopped:
                    return 0
                say(f"error: {trouble}\nlog: {server.log}")
            if not given.restart:
                return 1
            pause = _FIRST_RESTART_SECONDS if time.monotonic() - began > _HEALTHY_SECONDS else pause
            say(f"starting it again in {pause:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_RESTART_SECONDS)
            options = server.same_ports()


def _gateway(given: argparse.Namespace, server: TritonServer, installation: Installation) -> Gateway:
    """The gateway to this server, and to those that are started after it."""
    settings = dict(given.gateway_settings)
    options = GatewayOptions(
        host=str(settings.pop("host", "127.0.0.1")),
        port=given.gateway_port,
        settings=settings,
        drain_seconds=given.drain,
    )
    return Gateway(options, installation, server.urls, log=server.log.with_suffix(".gateway.log"))


def _wait_for_trouble(server: TritonServer, gateway: Gateway | None = None, *, patience: float | None) -> str:
    """Return when the server or a model's process has died, or an engine has been unhealthy for `patience` seconds;
    says what it is. A gateway that dies is started again meanwhile."""
    unhealthy_since: float | None = None
    while server.wait(1.0) is None:
        if gateway is not None:
            gateway.keep_running()
        if dead := server.dead():
            server.hurry()
            return (
                f"a model's process died ({', '.join(map(str, dead))}), and its requests with it: it crashed, or was "
                "killed, by the kernel perhaps for want of memory (dmesg says so)"
            )
        reasons = [engine.reason for engine in server.engines() if not engine.healthy]
        if not reasons:
            unhealthy_since = None
        elif unhealthy_since is None:
            unhealthy_since = time.monotonic()
            say(f"the engine is not healthy: {'; '.join(reasons)}")
        elif patience is not None and time.monotonic() - unhealthy_since > patience:
            server.hurry()
            return f"the engine has not been healthy for {patience:.0f} s: {'; '.join(reasons)}"
    return f"tritonserver died ({server.ending}):\n{server.why()}"


@contextmanager
def _running(options: ServerOptions, installation: Installation, ready_timeout: float) -> Iterator[TritonServer]:
    """A server that is ready. Leaving stops it; a signal meanwhile only makes that quicker."""
    server = TritonServer(options, installation)
    server.start()
    try:
        with Step("starting tritonserver") as step:
            server.wait_ready(timeout=ready_timeout, progress=lambda model: step.detail(f"{model} is ready"))
        yield server
    finally:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda _number, _frame: server.hurry()) for number in numbers}
        if server.exit_code is None:
            say("stopping tritonserver; once more cuts short what is still being answered ...")
        server.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _demo(server: TritonServer, installation: Installation) -> int:
    command = ["describe", str(PICTURE), "--max-tokens", "200", "--url", server.urls.grpc]
    say(f"\n$ wicore {shlex.join(command)}")
    return subprocess.run([installation.environment / "bin" / "wicore", *command]).returncode


def _welcome(server: TritonServer, gateway: Gateway | None) -> str:
    urls = server.urls
    url = "" if server.options.grpc_port == _DEFAULT_PORTS["grpc"] else f" --url {urls.grpc}"
    wicore = f"{_from_here(ROOT / '.venv' / 'bin' / 'wicore')}"
    question = json.dumps({"text_input": "What is 7 plus 5?", "stream": True})
    page = log = ""
    if gateway is not None:
        page = f"\n  chat     {gateway.url}/\n  figures  {gateway.url}/dashboard\n  OpenAI   {gateway.url}/v1"
        log = f"\n           {gateway.log}"
    return f"""
Wicore is ready.{page}
  HTTP     {urls.http}
  gRPC     {urls.grpc}
  metrics  {urls.metrics}
  log      {server.log}{log}

Try:
  {wicore} describe {_from_here(PICTURE)}{url}
  {wicore} chat{url}
  curl -sN {urls.http}/v2/models/wicore/generate_stream -d '{question}'

Ctrl-C stops it."""


def _from_here(path: Path) -> str:
    return shlex.quote(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else shlex.quote(str(path))


def _set_up(given: argparse.Namespace) -> int:
    Installation.of_this_checkout(extras=["test"] if given.test else [])
    say("everything is set up")
    return 0


def _test(arguments: Sequence[str]) -> NoReturn:
    installation = Installation.of_this_checkout(extras=["test"])
    os.chdir(ROOT)
    os.environ.pop("PYTHONPATH", None)
    os.execv(installation.python, [str(installation.python), "-m", "pytest", *arguments])
