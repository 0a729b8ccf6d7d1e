"""The Triton model `wicore_preprocess`: a client's text and pictures to the engine's Prompt."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from wicore_backend.errors import WicoreError
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.processor.processor import Processor
from wicore_backend.triton.errors import triton_error
from wicore_backend.triton.settings import check_numpy, engine_config
from wicore_backend.triton.supervision import VARIABLE, attend
from wicore_backend.triton.tensors import strings, tensors_of
from wicore_backend.triton.wire import RequestOptions, prompt_source, prompt_to_tensors


class TritonPythonModel:
    """Stateless: each request gives one response, whatever becomes of it later."""

    def initialize(self, args: dict[str, str]) -> None:
        check_numpy()
        settings = engine_config(json.loads(args["model_config"]))
        config = Gemma3Config.from_checkpoint(settings.model)
        self._processor = Processor.from_checkpoint(
            settings.model,
            limits=settings.prompt_limits(config.text.max_position_embeddings),
            do_pan_and_scan=settings.pan_and_scan,
        )
        directory = os.environ.get(VARIABLE)
        self._presence = attend(Path(directory)) if directory else None

    def finalize(self) -> None:
        if self._presence is not None:
            self._presence.unlink(missing_ok=True)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            return pb_utils.InferenceResponse([pb_utils.Tensor(*item) for item in self._process(request).items()])
        except WicoreError as error:
            return pb_utils.InferenceResponse(error=triton_error(error))
        except Exception as error:
            pb_utils.Logger.log_error(f"request {request.request_id()!r} broke the preprocessor: {error!r}")
            return pb_utils.InferenceResponse(error=triton_error(error))

    def _process(self, request: Any) -> dict[str, NDArray[Any]]:
        arrival = time.monotonic()
        tensors = tensors_of(request)
        options = RequestOptions.parse(request.parameters(), tensors, json_tensor="sampling_parameters")
        prompt = self._processor.process(
            prompt_source(tensors), images=list(tensors.get("images", ())), raw=options.serving.raw
        )
        outputs = prompt_to_tensors(prompt, self._processor.image_size or 1)
        return outputs | {
            "request": strings(json.dumps(options.values)),
            "arrival": np.array([arrival]),  # Deadlines count from here.
        }
