"""The Triton model `wicore_gemma3`: decoupled, a Prompt's tensors in, streamed text out."""

from __future__ import annotations

import json
import logging
import secrets
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from wicore_backend.engine.engine import Engine
from wicore_backend.errors import WicoreError
from wicore_backend.triton.errors import triton_error
from wicore_backend.triton.logs import log_to_triton
from wicore_backend.triton.metrics import Metrics, MetricsThread
from wicore_backend.triton.outbox import Outbox, Reply
from wicore_backend.triton.settings import check_numpy, engine_config
from wicore_backend.triton.tensors import strings, tensors_of
from wicore_backend.triton.wire import RequestOptions, logprobs_json, prompt_from_tensors, usage_json

_log = logging.getLogger(__name__)
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """Hands requests to the engine and never waits for them; the outbox answers."""

    def initialize(self, args: dict[str, str]) -> None:
        check_numpy()
        log_to_triton()
        self._engine = Engine(engine_config(json.loads(args["model_config"])))
        self._metrics = Metrics(args["model_name"], list(self._engine.statistics().blocks))
        self._metrics_thread = MetricsThread(self._metrics, self._engine.statistics)
        self._outbox = Outbox()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except Exception as error:
                if not isinstance(error, WicoreError):
                    _log.exception("request %r could not be submitted", request.request_id())
                sender.send(pb_utils.InferenceResponse(error=triton_error(error)), flags=_FINAL)

    def finalize(self) -> None:
        self._engine.close()
        self._outbox.close()
        self._metrics_thread.close()

    def _submit(self, request: Any, sender: Any) -> None:
        tensors = tensors_of(request)
        options = RequestOptions.parse(request.parameters(), tensors["request"][0] if "request" in tensors else None)
        prompt = prompt_from_tensors(tensors, self._engine.processor.image_size)
        # Clients choose their request ids, also twice the same; inside, each request has its own.
        request_id = f"{request.request_id()}#{secrets.token_hex(4)}"
        wire = _PythonWire(sender, self._engine.processor.tokenizer.token_text, self._metrics)
        sink = self._outbox.open(wire, stream=options.serving.stream, cancel=partial(self._engine.cancel, request_id))
        deadline_ms = options.serving.deadline_ms
        self._engine.submit(
            prompt,
            options.sampling,
            sink=sink,
            request_id=request_id,
            priority=options.serving.priority,
            deadline_s=None if deadline_ms is None else deadline_ms / 1000,
        )
