"""Ctrl-C and code that must not be cut short."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def interrupts_held(cancel: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt only at the block's end, and call `cancel` meanwhile, to hasten that end.

    For gRPC's code: an exception out of nowhere can leave one of its locks taken, for which the channel's own thread,
    and so every later request, would wait for ever. A signal handler of the program's own stays as it is.
    """
    main = threading.current_thread() is threading.main_thread()  # the one that signals interrupt
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = False

    def hold(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        _thread.start_new_thread(cancel, ())  # not here, in the midst of what gRPC does; and `threading` has locks too

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupted:
            raise KeyboardInterrupt
