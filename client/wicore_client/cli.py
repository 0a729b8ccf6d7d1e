"""The command line: `wicore chat`, `wicore describe PICTURE`, `wicore health`, `wicore cache`."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, cast

from wicore_client import cache_table
from wicore_client.cache import TIERS, reports, since
from wicore_client.chat import Chat, summary
from wicore_client.client import CONNECT_TIMEOUT, DEFAULT_MODEL, DEFAULT_URL, METRICS_PORT, Client
from wicore_client.errors import InvalidArgument, Unavailable, WicoreClientError
from wicore_client.requests import SamplingOptions
from wicore_client.terminal import Terminal, one_line

DESCRIBE = {"en": "Describe this picture.", "zh": "描述这张图片。"}

_OPTIONS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "longest answer, in tokens"),
    "min_tokens": (int, "the model does not end its answer before so many"),
    "temperature": (float, "0 takes the most likely token"),
    "top_k": (int, "choose among the K most likely tokens"),
    "top_p": (float, "choose among the fewest tokens that reach this probability together"),
    "min_p": (float, "choose among tokens at least this probable, relative to the most likely one"),
    "repetition_penalty": (float, "above 1: fewer repetitions of prompt and answer"),
    "presence_penalty": (float, "above 0: fewer tokens a second time"),
    "frequency_penalty": (float, "above 0: fewer tokens many times"),
    "seed": (int, "the same seed gives the same answer"),
    "priority": (int, "smaller goes first"),
    "deadline_ms": (int, "the server ends the answer after this time"),
}
"""Sampling options with one value; --stop is the one with many."""


_LONGEST_ERROR = 300
"""Of what was wrong with an argument, which it repeats."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        said = one_line(message)
        said = said if len(said) <= _LONGEST_ERROR else f"{said[:_LONGEST_ERROR]}..."
        self.exit(2, f"wicore: {said} ({self.prog} --help tells more)\n")


def build_parser() -> argparse.ArgumentParser:
    place = _Parser(add_help=False)
    group = place.add_argument_group("server")
    group.add_argument(
        "--url",
        default=os.environ.get("WICORE_URL") or DEFAULT_URL,
        help="host:port, grpc://host:port or http://host:port (default: $WICORE_URL, or localhost)",
    )
    group.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="give up after this time")
    group.add_argument("--json", action="store_true", help="one JSON object instead of text")

    server = _Parser(add_help=False, parents=[place])
    group = server.add_argument_group("model")
    group.add_argument("--protocol", choices=("grpc", "http"), help="default: grpc, if the url does not say")
    group.add_argument("--model", default=DEFAULT_MODEL, help="model of the server's repository (default: %(default)s)")

    sampling = _Parser(add_help=False)
    group = sampling.add_argument_group("sampling (the server's defaults otherwise)")
    for name, (kind, text) in _OPTIONS.items():
        metavar = "N" if kind is int else "X"
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind, metavar=metavar, help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="text that ends the answer; may be repeated")
    group.add_argument("--json-schema", metavar="FILE", help="a JSON Schema; the answer is JSON that is valid by it")

    parser = _Parser(prog="wicore", description="Talk to a Wicore server: Gemma-3 on Triton, with text and pictures.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    chat = commands.add_parser(
        "chat", parents=[server, sampling], help="ask one question, or talk", description="Ask one question, or talk."
    )
    chat.add_argument("question", nargs="?", help="without it: a conversation, or the question from a pipe")
    chat.add_argument("--image", action="append", default=[], metavar="PATH", help="a picture; may be repeated")
    chat.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    chat.set_defaults(run=_chat)

    describe = commands.add_parser(
        "describe", parents=[server, sampling], help="describe a picture", description="Describe a picture."
    )
    describe.add_argument("picture", metavar="PICTURE", help="a PNG, JPEG, WebP or GIF file")
    describe.add_argument("--language", choices=tuple(DESCRIBE), default="en", help="default: %(default)s")
    describe.add_argument("--prompt", help="ask this instead")
    describe.set_defaults(run=_describe)

    health = commands.add_parser(
        "health",
        parents=[server],
        help="tell whether the server is ready",
        description="Tell whether the server is ready; the exit code is 0 if it is and 1 if it is not.",
    )
    health.set_defaults(run=_health)

    cache = commands.add_parser(
        "cache",
        parents=[place],
        help="tell what the KV cache holds and does",
        description="Tell what each tier of the KV cache holds and does, and why prompts missed it, from the server's "
        "metrics. Counts are since the server's start.",
    )
    cache.add_argument("--metrics-port", type=_port, default=METRICS_PORT, metavar="PORT", help="default: %(default)s")
    cache.add_argument("--tier", choices=tuple(TIERS), help="this tier only")
    cache.add_argument(
        "--over", type=_seconds, metavar="SECONDS", help="look twice, and count what happened in this time"
    )
    cache.set_defaults(run=_cache, protocol=None, model=DEFAULT_MODEL)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its log lines would stand between ours
    given = build_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    terminal = Terminal()
    try:
        port = getattr(given, "metrics_port", METRICS_PORT)
        with Client(given.url, given.protocol, model=given.model, metrics_port=port) as client:
            code: int = given.run(client, terminal, given)
            return code
    except WicoreClientError as error:
        terminal.error(str(error))
        return 1
    except KeyboardInterrupt:
        terminal.note("cancelled")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has left, as `| head` does
        _write_no_more()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _write_no_more()
        terminal.error(f"the answer cannot be written: {error.strerror or error}")
        return 1


def _write_no_more() -> None:
    """What is left of the output goes nowhere: Python would try once more at its end, and complain."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _chat(client: Client, terminal: Terminal, given: argparse.Namespace) -> int:
    question = given.question
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
    if question is not None and not question.strip():
        build_parser().error("the question is empty")
    if question is None and given.json:
        build_parser().error("--json needs a question")
    chat = Chat(client, terminal, _sampling(given), given.timeout, given.system)
    for path in given.image:
        chat.show(path)
    if question is None:
        chat.run()
    else:
        _ask_once(chat, terminal, question, given)
    return 0


def _describe(client: Client, terminal: Terminal, given: argparse.Namespace) -> int:
    chat = Chat(client, terminal, _sampling(given), given.timeout, system=None)
    chat.show(given.picture)
    _ask_once(chat, terminal, given.prompt or DESCRIBE[given.language], given)
    return 0


def _ask_once(chat: Chat, terminal: Terminal, question: str, given: argparse.Namespace) -> None:
    completion = chat.ask(question, live=not given.json)
    if given.json:
        _print_json(terminal, dataclasses.asdict(completion))
    else:
        terminal.note(summary(completion.usage))


def _health(client: Client, terminal: Terminal, given: argparse.Namespace) -> int:
    health = client.health(timeout=given.timeout or CONNECT_TIMEOUT)
    if given.json:
        _print_json(terminal, dataclasses.asdict(health))
        return 0 if health.ready else 1
    terminal.line(f"{health.server} at {client.endpoint}: {'ready' if health.ready else 'not ready'}")
    width = max((len(model.name) for model in health.models), default=0)
    for model in health.models:
        state = "ready" if model.ready else f"{model.state.lower() or 'not loaded'} {model.reason}".strip()
        terminal.line(f"  {one_line(model.name):{width}}  {one_line(state)}")
    if not any(model.name == given.model for model in health.models):
        terminal.error(f"the server has no model {given.model!r}; name one of its own with --model")
    return 0 if health.ready else 1


def _cache(client: Client, terminal: Terminal, given: argparse.Namespace) -> int:
    timeout = given.timeout or CONNECT_TIMEOUT
    metrics = client.metrics(timeout=timeout)
    if given.over is not None:
        time.sleep(given.over)
        metrics = since(metrics, client.metrics(timeout=timeout))
    found = reports(metrics)
    if not found:
        raise Unavailable(
            f"the metrics on port {given.metrics_port} tell nothing of a KV cache: the model is not loaded, or is none "
            "of Wicore's; `wicore health` lists the models"
        )
    if given.tier is not None:
        found = tuple(report.only(given.tier) for report in found)
        if not any(report.tiers for report in found):
            raise Unavailable(f"the server has no {given.tier} tier; its setting {TIERS[given.tier]} gives it one")
    if given.json:
        _print_json(terminal, {"seconds": given.over, "caches": [dataclasses.asdict(report) for report in found]})
        return 0
    for number, report in enumerate(found):
        if number:
            terminal.line()
        counted = "since the server's start" if given.over is None else f"in {given.over:g} s"
        terminal.line(f"{one_line(report.model)} at {one_line(client.endpoint.host)}:{given.metrics_port}, {counted}")
        for line in cache_table.lines(report, seconds=given.over, every_tier=given.tier is None):
            terminal.line(line)
    return 0


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, up to 86400")
    return seconds


def _sampling(given: argparse.Namespace) -> SamplingOptions:
    options = {name: getattr(given, name) for name in (*_OPTIONS, "stop")}
    if given.json_schema is not None:
        options["grammar"] = {"json_schema": _read_json(given.json_schema)}
    return cast(SamplingOptions, options)


def _read_json(path: str) -> Any:
    """What a file holds. Raises InvalidArgument."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InvalidArgument(f"cannot read {path!r}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgument(f"{path!r} is not JSON: {error}") from error
    except RecursionError:
        raise InvalidArgument(f"{path!r} is JSON that is nested too deeply; flatten it") from None


def _print_json(terminal: Terminal, value: Any) -> None:
    terminal.line(json.dumps(value, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
