"""Settings of the Triton models: config.pbtxt's parameters, and over them the environment's WICORE_SETTINGS."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from wicore_backend.config import EngineConfig
from wicore_backend.errors import EngineError, InvalidArgumentError
from wicore_backend.settings import parse_json


def engine_config(model_config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> EngineConfig:
    """The engine's settings for a model of the repository.

    Parameters
    ----------
    model_config
        The model's config.pbtxt as Triton hands it to `initialize`. A parameter's string value is JSON, or, where it
        is not, a text: "512", "true", "/models/gemma-3-4b-it". An empty value is no value.
    environ
        WICORE_SETTINGS, a JSON object of the same names, goes before the parameters.

    Raises
    ------
    InvalidArgumentError
        Naming an unknown setting, or one with a bad value.
    """
    values = {}
    for name, parameter in model_config.get("parameters", {}).items():
        text = parameter["string_value"]
        if text:
            try:
                values[name] = json.loads(text)
            except ValueError:
                values[name] = text
    text = environ.get("WICORE_SETTINGS", "") or "{}"
    overriding = parse_json(text, "WICORE_SETTINGS")
    if not isinstance(overriding, dict):
        raise InvalidArgumentError(f"WICORE_SETTINGS must be a JSON object, not {text[:80]!r}")
    values |= overriding
    # The server and its clients need a CPU too: where they take one away from a team of threads that is as large as the
    # machine, the others wait for it at the end of every operator (0.67 against 0.88 of the tokens on 2 CPUs).
    values.setdefault("threads", max(1, len(os.sched_getaffinity(0)) - 1))
    if "model" not in values:
        raise InvalidArgumentError('no model: set WICORE_SETTINGS=\'{"model": "/path/to/checkpoint"}\'')
    return EngineConfig(**values)


def check_numpy() -> None:
    """Refuse to serve wrong bytes: this server's Python stub reads numpy 2 arrays wrongly, without an error."""
    if not np.__version__.startswith("1.26."):
        raise EngineError(
            f"numpy {np.__version__} is first on this process's path; Triton's Python stub needs numpy 1.26 "
            "(put the serving environment's bin first on PATH: scripts/serve.sh does)"
        )
