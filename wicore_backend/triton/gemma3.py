"""The Triton model `wicore_gemma3`: decoupled, a Prompt's tensors in, streamed text out."""

from __future__ import annotations

import gc
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from wicore_backend.engine.engine import Engine
from wicore_backend.errors import WicoreError
from wicore_backend.processor.prompt import Prompt
from wicore_backend.triton.grammar_queue import GrammarQueue, WaitingRequest
from wicore_backend.triton.lifecycle import Lifecycle
from wicore_backend.triton.logs import log_to_triton
from wicore_backend.triton.metrics import Metrics, MetricsThread
from wicore_backend.triton.outbox import Channel, Outbox
from wicore_backend.triton.readiness import Readiness
from wicore_backend.triton.settings import check_numpy, engine_config
from wicore_backend.triton.supervision import VARIABLE, Supervision
from wicore_backend.triton.tensors import tensors_of
from wicore_backend.triton.wire import RequestOptions, arrival_of, prompt_from_tensors
from wicore_backend.triton.wires import FINAL, DirectWire, EnsembleWire, ReplySender

_log = logging.getLogger(__name__)

_LAST_WORDS_S = 5.0
"""How long after the last request's end its client may take to be told, before the server is stopped."""

_HARDLY_EVER = 10**9
"""Collections of Python's second generation before a full one."""

_COLLECT_EVERY_S = 600.0

_SETTLING_S = 0.5
"""What Triton is given to close the requests that have been answered: an ensemble's that meets the server's end there
stays for ever, and keeps the server from stopping."""


class TritonPythonModel:
    """Hands requests to the engine and never waits for them; the outbox answers.

    A request is *direct*, from a client of this model, or one of an ensemble's two steps, *submit* and *attach*
    (`triton/wires.py`): attach has the input `tick_in`, submit asks for the output `tick` alone.
    """

    def initialize(self, args: dict[str, str]) -> None:
        check_numpy()
        log_to_triton()
        self._engine = Engine(engine_config(json.loads(args["model_config"])), when_idle=_full_collections())
        self._metrics = Metrics(args["model_name"])
        self._metrics_thread = MetricsThread(
            lambda: self._metrics.update(self._engine.statistics(), self._engine.health())
        )
        self._replies = ReplySender(self._engine.processor.tokenizer.token_text)
        self._outbox = Outbox(on_end=lambda end: self._metrics.observe(end.usage))
        self._grammars = GrammarQueue()
        self._attachable: WeakValueDictionary[bytes, Channel] = WeakValueDictionary()  # The outbox holds what is open.
        self._lifecycle = self._look_after(args["model_name"])
        # A full collection looks through all that has been loaded, and all that the cache's policies remember: 100 ms
        # and more in which no step runs. What is loaded stays; for the rest there is time when the engine is idle.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*gc.get_threshold()[:2], _HARDLY_EVER)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                tensors = tensors_of(request)
                if "tick_in" in tensors:
                    key = bytes(tensors["tick_in"][0])
                    self._outbox.post(partial(self._attach, key, sender, cancelled=request.is_cancelled()))
                else:
                    self._take(request, tensors, sender)
            except Exception as error:
                self._refuse(request, sender, error)

    def finalize(self) -> None:
        if self._lifecycle is not None:
            self._lifecycle.close()
        self._engine.close()
        self._grammars.close()
        self._outbox.close()
        self._metrics_thread.close()

    def _look_after(self, model: str) -> Lifecycle | None:
        """What a supervisor needs, if there is one."""
        directory = os.environ.get(VARIABLE)
        if not directory:
            return None
        supervision = Supervision(Path(directory))
        readiness = Readiness(supervision.markers, name=f"wicore_health_{os.getpid()}", model=model)
        return Lifecycle(supervision, readiness, health=self._engine.health, drain=self._drain)

    def _drain(self, grace_s: float) -> None:
        self._engine.drain(grace_s)
        if not self._outbox.wait_until_answered(_LAST_WORDS_S):
            _log.warning("some clients have not been told of their requests' ends in %g s", _LAST_WORDS_S)
        time.sleep(_SETTLING_S)

    def _take(self, request: Any, tensors: dict[str, Any], sender: Any) -> None:
        """Submit a request; one whose grammar is to be compiled first, which may take seconds, waits elsewhere."""
        arrival = arrival_of(tensors, time.monotonic())
        options = RequestOptions.parse(request.parameters(), tensors, json_tensor="request")
        prompt = prompt_from_tensors(tensors, self._engine.processor.image_size)
        # Clients choose their request ids, also twice the same; inside, each request has its own.
        request_id = f"{request.request_id()}#{secrets.token_hex(8)}"
        grammar = options.sampling.grammar
        waits = not self._engine.has_compiled(grammar)
        if waits:
            self._grammars.check_room()
        key = request_id.encode()
        in_ensemble = list(request.requested_output_names()) == ["tick"]
        wire = EnsembleWire(key, sender, self._replies) if in_ensemble else DirectWire(sender, self._replies)
        channel = self._outbox.channel(
            wire,
            stream=options.serving.stream,
            answers=options.sampling.n,
            cancel=lambda: self._cancel(waiting, request_id),
        )
        waiting = WaitingRequest(
            channel.put, prompt_tokens=len(prompt), arrival=arrival, deadlines=options.serving.deadlines
        )
        submit = partial(self._submit, prompt, options, channel, request_id, arrival)
        if not waits:
            waiting.submit(submit)
        if isinstance(wire, EnsembleWire):
            self._attachable[key] = channel
        self._outbox.begin(channel)
        if waits:
            self._grammars.add(waiting, compile_it=partial(self._engine.compile, grammar), submit=submit)

    def _refuse(self, request: Any, sender: Any, error: Exception) -> None:
        if not isinstance(error, WicoreError):
            _log.error("request %r could not be submitted", request.request_id(), exc_info=error)
        self._replies.fail(sender, error)

    def _cancel(self, waiting: WaitingRequest, request_id: str) -> None:
        if not waiting.cancel():
            self._engine.cancel(request_id)

    def _submit(
        self, prompt: Prompt, options: RequestOptions, channel: Channel, request_id: str, arrival: float
    ) -> None:
        self._engine.submit(
            prompt,
            options.sampling,
            sink=channel.put,
            request_id=request_id,
            priority=options.serving.priority,
            tenant=options.serving.tenant,
            deadlines=options.serving.deadlines,
            retention=options.serving.retention,
            arrival=arrival,
        )

    def _attach(self, key: bytes, sender: Any, *, cancelled: bool) -> None:
        """On the sending thread: a tick has come back."""
        channel = self._attachable.get(key)
        if channel is None or not channel.open or not isinstance(channel.wire, EnsembleWire):
            sender.send(flags=FINAL)
            return
        try:
            channel.wire.attach(sender, cancelled=cancelled)
        finally:
            if cancelled:
                channel.lose()
            channel.flush()


def _full_collections() -> Callable[[], None]:
    """A call that collects all of Python's garbage, unless it has done so a short while ago."""
    last = time.monotonic()

    def collect() -> None:
        nonlocal last
        if time.monotonic() - last >= _COLLECT_EVERY_S:
            gc.collect()
            last = time.monotonic()

    return collect
