"""Reading the small files of a checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wicore_backend.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if it cannot be read or is not an object."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch the model's own file again") from None
    except RecursionError:
        raise CheckpointError(
            f"{path} cannot be read: its objects or lists are nested too deep; fetch the model's own file again"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__} where an object is needed")
    return values


def read_json_if_present(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty if there is no such file."""
    return read_json(path) if path.exists() else {}
