"""The process between supervisor and server: it ends the server and clears up, whoever else has been killed.

Run as `python -m scripts.serving.guard RUN_DIRECTORY`, with the run's lock held in an inherited descriptor. It

1. starts the server as the run's order says and writes `started PID` to standard output,
2. waits until the server ends, or standard input ends (the supervisor stopped it, or died), or it gets SIGTERM,
3. stops the server, first gently; then ends what is left of the run and removes its shared memory,
4. writes `ended CODE` and exits.

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
from contextlib import suppress
from pathlib import Path

from scripts.serving.runs import Run

_PR_SET_PDEATHSIG = 1
_STACK_BYTES = 256 * 2**20
"""Stack of the server's threads. Its HTTP threads put 1.7 times a request's body there (measured): with the usual
8 MiB a picture of 5 MB in a JSON body ends the server with a segmentation fault. It is address space, not memory."""


def _prepare_server() -> None:
    """In the child, before the server: die with the guard, and have a stack for large bodies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    soft = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def _tell(line: str) -> None:
    with suppress(BrokenPipeError):  # the supervisor is gone; there is still work to do
        print(line, flush=True)


def _wait_for_a_reason(server: subprocess.Popen[bytes], wake: int) -> None:
    """Return when the server has ended, standard input has ended, or a signal has come."""
    ended = os.pidfd_open(server.pid)
    try:
        poll = select.poll()
        for descriptor in (ended, wake, sys.stdin.fileno()):
            poll.register(descriptor, select.POLLIN | select.POLLHUP)
        poll.poll()
    finally:
        os.close(ended)


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
        _wait_for_a_reason(server, wake)
        _stop(server, order["stop_seconds"])
    finally:
        run.clear()
    _tell(f"ended {server.returncode}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
