"""Abuses a gateway that listens on this machine, and says how others fared meanwhile.

    .venv/bin/python -m tests.gateway_kit &                      # prints its port; or any gateway without keys
    .venv/bin/python scripts/abuse_gateway.py --port PORT --pid PID

Each row is one abuse, kept up for `--seconds`. Meanwhile one well-behaved client asks for answers one after another;
`served`, `p50`, `p99` are his. `growth` is the resident memory of the gateway at the end against what it was after
warming up, `left` the connections that the abuse still has then of those it opened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

CHAT = json.dumps(
    {"model": "wicore", "messages": [{"role": "user", "content": "What is 12 + 7?"}], "max_tokens": 8}
).encode()


def request(body: bytes, *, length: int | None = None, path: str = "/v1/chat/completions") -> bytes:
    """A POST as bytes; with `length` it announces a body of another size."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    ).encode() + body


@dataclass
class Attack:
    """Connections of one kind, and what has become of them."""

    port: int
    opened: int = 0
    open: int = 0
    answers: dict[str, int] = field(default_factory=dict)

    async def connection(self, behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        """One connection, until it ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.opened += 1
        self.open += 1
        try:
            await behave(reader, writer)
            await self.until_closed(reader)
        except OSError:
            self.count("reset")
        finally:
            self.open -= 1
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def until_closed(self, reader: asyncio.StreamReader) -> None:
        """Notes the status of the answer, if one comes."""
        first = await reader.read(4096)
        self.count(first.split(b" ")[1].decode() if first.startswith(b"HTTP/") else "closed")
        while await reader.read(65536):
            pass

    def count(self, what: str) -> None:
        self.answers[what] = self.answers.get(what, 0) + 1


async def silent(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Connects and says nothing."""


async def slow_header(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A byte of a header each second."""
    for byte in request(CHAT) * 10:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(1)


async def slow_body(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A byte of a body each second."""
    writer.write(request(b"{", length=100_000))
    for _ in range(100_000):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(1)


async def oversized_upload(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A gigabyte, announced."""
    writer.write(request(b"", length=2**30))
    for _ in range(2**14):
        writer.write(bytes(2**16))
        await writer.drain()


async def chunked_upload(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A gigabyte, in chunks that do not say how many there will be."""
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(2**14):
        writer.write(b"10000\r\n" + bytes(2**16) + b"\r\n")
        await writer.drain()


async def endless_header(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A header of a gigabyte."""
    writer.write(b"GET / HTTP/1.1\r\nX: ")
    for _ in range(2**14):
        writer.write(b"y" * 2**16)
        await writer.drain()


async def nonsense(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """TLS to a port that speaks HTTP."""
    writer.write(bytes.fromhex("16030100c8010000c40303") + bytes(200))


async def deep_json(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A megabyte of brackets."""
    writer.write(request(b"[" * 2**20))
    await writer.drain()


ATTACKS = [
    (silent, 1000),
    (slow_header, 500),
    (slow_body, 500),
    (oversized_upload, 20),
    (chunked_upload, 20),
    (endless_header, 50),
    (nonsense, 200),
    (deep_json, 20),
]


async def ask(port: int) -> float | None:
    """Seconds that one answer takes on a new connection; None if it is not a good one."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request(CHAT).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        answer = await asyncio.wait_for(reader.read(), 30)
    finally:
        writer.close()
    return time.perf_counter() - began if b" 200 " in answer.split(b"\r\n")[0] + b" " else None


async def keep_up(attack: Attack, behave: Callable[..., Awaitable[None]], connections: int) -> None:
    """Keeps `connections` open: each that ends is followed by another, a little later."""

    async def one() -> None:
        while True:
            with suppress(OSError):
                await attack.connection(behave)
            await asyncio.sleep(0.2)

    await asyncio.gather(*(one() for _ in range(connections)))


async def measure(port: int, seconds: float) -> list[float | None]:
    """Answers to a well-behaved client, one after another; None for one that failed."""
    answers: list[float | None] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        answers.append(await ask(port))
        await asyncio.sleep(0.02)
    return answers


async def measure_apart(port: int, seconds: float) -> list[float | None]:
    """The same in a process of its own, which the abuse does not slow down."""
    arguments = [sys.executable, __file__, "--port", str(port), "--seconds", str(seconds), "--measure"]
    process = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    found: list[float | None] = json.loads(output)
    return found


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def main(port: int, pid: int, seconds: float) -> int:
    await measure_apart(port, 3)  # Warming up.
    print("| abuse | at a time | opened | served | p50 ms | p99 ms | memory MiB | growth MiB | what they got |")
    print("|---|---|---|---|---|---|---|---|---|")
    failed = 0
    warm = resident_mib(pid)
    for behave, connections in [(None, 0), *ATTACKS]:
        attack = Attack(port)
        task = asyncio.create_task(keep_up(attack, behave, connections)) if behave else None
        await asyncio.sleep(1)
        answers = await measure_apart(port, seconds)
        memory = resident_mib(pid)
        if task:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        good = sorted(a for a in answers if a is not None)
        failed += len(answers) - len(good)
        got = ", ".join(f"{what} {n}" for what, n in sorted(attack.answers.items())) or "-"
        print(
            f"| {behave.__name__ if behave else 'none'} | {connections} | {attack.opened} | {len(good)}/{len(answers)}"
            f" | {statistics.median(good) * 1e3:.1f} | {good[int(len(good) * 0.99)] * 1e3:.1f}"
            f" | {memory:.0f} | {memory - warm:+.0f} | {got} |",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, help="the gateway's process, whose memory is watched")
    parser.add_argument("--measure", action="store_true", help="only ask, and print what it took, in JSON")
    parser.add_argument("--seconds", type=float, default=15.0)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(asyncio.run(measure(given.port, given.seconds))))
        raise SystemExit(0)
    raise SystemExit(asyncio.run(main(given.port, given.pid, given.seconds)))
