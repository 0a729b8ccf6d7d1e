"""NVIDIA's aiperf, unmodified, against the gateway with the demo model.

    python3 -m venv /tmp/aiperf && /tmp/aiperf/bin/pip install aiperf
    .venv/bin/python -m scripts.benchmark_aiperf --aiperf /tmp/aiperf/bin/aiperf

It starts a server and a gateway, lets aiperf ask them at several numbers of requests at a time, and prints what it
measured as a table. A request that fails, or a count of tokens that differs from the server's own, ends it with an
error. aiperf has an environment of its own because what it needs does not fit beside the server's packages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.serving import Installation, ServerOptions, TritonServer
from scripts.serving.gateway import Gateway, GatewayOptions
from scripts.serving.installation import ROOT

MODEL = ROOT / "models" / "wicore-demo"


class AiperfError(RuntimeError):
    """aiperf failed, or what it measured does not hold together."""


@dataclass(frozen=True)
class Load:
    """What aiperf is to ask: texts of random words, `concurrency` of them at a time."""

    concurrency: int
    requests: int
    prompt_tokens: int = 64
    answer_tokens: int = 32


@dataclass(frozen=True)
class Measured:
    """What aiperf found; times are medians and 99th percentiles in ms."""

    load: Load
    requests_per_second: float
    tokens_per_second: float
    ttft: tuple[float, float]
    inter_token: tuple[float, float]
    request: tuple[float, float]


def run(aiperf: Path, url: str, load: Load, *, folder: Path) -> Measured:
    """Let aiperf ask, and read its report.

    Raises
    ------
    AiperfError
        It ended with an error, or a request did.
    """
    command = [
        *(str(aiperf), "profile", "--model", "wicore", "--url", url, "--endpoint-type", "chat", "--streaming"),
        *("--tokenizer", str(MODEL), "--use-server-token-count", "--random-seed", "1", "--ui", "none"),
        *("--concurrency", str(load.concurrency), "--request-count", str(load.requests)),
        *("--warmup-request-count", str(load.concurrency)),
        *("--synthetic-input-tokens-mean", str(load.prompt_tokens)),
        *("--output-tokens-mean", str(load.answer_tokens), "--extra-inputs", "ignore_eos:true"),
        *("--artifact-dir", str(folder)),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    ended = subprocess.run(command, env=environment | {"HOME": str(folder)}, capture_output=True, text=True)
    report = folder / "profile_export_aiperf.json"
    if ended.returncode != 0 or not report.is_file():
        raise AiperfError(f"aiperf ended with {ended.returncode}:\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")
    return read(json.loads(report.read_text()), load)


def read(report: Mapping[str, Any], load: Load) -> Measured:
    """aiperf's report, once it is sure that all requests were answered in full.

    Raises
    ------
    AiperfError
        They were not.
    """
    answered = report["request_count"]["avg"]
    if report["error_summary"] or answered != load.requests:
        raise AiperfError(f"{answered:.0f} of {load.requests} requests were answered: {report['error_summary']}")
    tokens = report["total_usage_completion_tokens"]["avg"]
    if tokens != load.requests * load.answer_tokens:
        raise AiperfError(f"{tokens:.0f} tokens came, not {load.requests} times {load.answer_tokens}")

    def times(name: str) -> tuple[float, float]:
        return report[name]["p50"], report[name]["p99"]

    return Measured(
        load,
        report["request_throughput"]["avg"],
        report["output_token_throughput"]["avg"],
        times("time_to_first_token"),
        times("inter_token_latency"),
        times("request_latency"),
    )


def table(rows: list[Measured]) -> str:
    """What was measured, as Markdown."""
    lines = [
        "| at a time | requests | requests/s | tokens/s | TTFT p50, p99 | per token p50, p99 | request p50, p99 (ms) |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        pairs = (f"{median:.1f}, {late:.1f}" for median, late in (row.ttft, row.inter_token, row.request))
        figures = (f"{row.requests_per_second:.1f}", f"{row.tokens_per_second:.0f}", *pairs)
        lines.append(f"| {row.load.concurrency} | {row.load.requests} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Start everything, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", type=Path, required=True, help="the program")
    parser.add_argument("--at-a-time", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of requests")
    given = parser.parse_args()
    installation = Installation.of_this_environment()
    ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    options = ServerOptions(settings={"model": str(MODEL), "device": "cpu"}, **ports)
    with tempfile.TemporaryDirectory() as scratch, TritonServer(options, installation) as server:
        log = Path(scratch) / "gateway.log"
        with Gateway(GatewayOptions(port=0), installation, server.urls, log=log) as gateway:
            rows = []
            for concurrency in given.at_a_time:
                folder = Path(scratch) / str(concurrency)
                folder.mkdir()
                load = Load(concurrency, requests=max(20, 4 * concurrency))
                rows.append(run(given.aiperf, gateway.url, load, folder=folder))
    print(table(rows))


if __name__ == "__main__":
    main()
