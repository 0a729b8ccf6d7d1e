"""The process between supervisor and server: it ends the server and clears up, whoever else has been killed.

Run as `python -m scripts.serving.guard RUN_DIRECTORY`, with the run's lock held in an inherited descriptor. It

1. starts the server as the run's order says and writes `started PID` to standard output,
2. waits until the server ends, or standard input ends (the supervisor stopped it, or died), or it gets SIGTERM,
3. lets the engines drain, unless SIGTERM says that it should be quick,
4. stops the server, first gently; then ends what is left of the run and removes its shared memory,
5. writes `ended CODE` and exits.

Draining comes before the server hears of its end, since from then on it starts no step of an ensemble any more, so that
answers on their way through `wicore` would stop in their midst.

If the guard itself is killed, the kernel sends the server SIGTERM, and the supervisor or the next start clears up.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from scripts.serving.runs import Run

_PR_SET_PDEATHSIG = 1
_STACK_BYTES = 256 * 2**20
"""Stack of the server's threads. Its HTTP threads put 1.7 times a request's body there (measured): with the usual
8 MiB a picture of 5 MB in a JSON body ends the server with a segmentation fault. It is address space, not memory."""


_DRAIN_POLL_SECONDS = 0.05
_DRAIN_MARGIN_SECONDS = 10.0
"""For an engine to notice the wish, to end what is left after the grace time, and to send the last responses."""

_HURRIED_SECONDS = 12.0
"""For the server to end in a hurry: its exit timeout of 8 s, for which it waits for answers in vain, and a moment. Past
that timeout Triton 2.51 does not always come to its end: it corrupts its heap, and hangs."""

_HOPELESS_SECONDS = 1.0


def _prepare_server() -> None:
    """In the child, before the server: die with the guard, and have a stack for large bodies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    soft = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def _tell(line: str) -> None:
    with suppress(BrokenPipeError):  # the supervisor is gone; there is still work to do
        print(line, flush=True)


class _Reasons:
    """What ends the server's run: its own end, the end of standard input, SIGTERM."""

    def __init__(self, server: subprocess.Popen[bytes], wake: int) -> None:
        self._server = server
        self._wake = wake

    def wait(self) -> None:
        """Return when there is one."""
        ended = os.pidfd_open(self._server.pid)
        try:
            poll = select.poll()
            for descriptor in (ended, self._wake, sys.stdin.fileno()):
                poll.register(descriptor, select.POLLIN | select.POLLHUP)
            poll.poll()
        finally:
            os.close(ended)

    @property
    def urgent(self) -> bool:
        """Whether nothing is left to wait for, or nobody wants to."""
        return self._server.poll() is not None or bool(select.select([self._wake], [], [], 0)[0])


def _drain(run: Run, reasons: _Reasons, grace_seconds: float) -> None:
    run.ask_to_drain(grace_seconds)
    deadline = time.monotonic() + grace_seconds + _DRAIN_MARGIN_SECONDS
    while run.engines() and not reasons.urgent and time.monotonic() < deadline:
        time.sleep(_DRAIN_POLL_SECONDS)


def _stop(server: subprocess.Popen[bytes], seconds: float) -> None:
    server.terminate()
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def main(directory: str) -> int:
    run = Run(Path(directory))
    order = json.loads(run.order.read_text())
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with run.log.open("wb") as log:
            server = subprocess.Popen(
                order["command"],
                env=order["environment"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_prepare_server,
            )
        _tell(f"started {server.pid}")
        reasons = _Reasons(server, wake)
        reasons.wait()
        _drain(run, reasons, order["drain_seconds"])
        seconds = min(_HURRIED_SECONDS, order["stop_seconds"]) if reasons.urgent else order["stop_seconds"]
        # Requests that a dead process had will not end, and the server would wait for them.
        _stop(server, _HOPELESS_SECONDS if run.dead() else seconds)
    finally:
        run.clear()
    _tell(f"ended {server.returncode}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
