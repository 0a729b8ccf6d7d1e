"""The server's readiness follows the engine's health, by a model that cannot be loaded.

Triton 2.51 asks no model whether it is well: `/v2/health/ready` says that all models are loaded, even one whose process
has died. But a server that polls its model repositories and meets a model that does not load is not ready, while the
others work on, so that clients still hear from the engine itself when to come back. So an engine in trouble puts such
a model, a *marker*, into a repository that is there for this.

Files are the way since the calls that a Python model has to load models, or to ask for them, end its process now and
then when they fail, as they do in a server that stops.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from wicore_backend.engine.health import Health

_FORGET_S = 30.0
"""How long a mended marker stays: many times what the server takes to look and to load it."""

_BROKEN = """\
# The engine is in trouble. There is no such backend, and that makes the server "not ready".
backend: "{reason}"
max_batch_size: 0
input [ {{ name: "input" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "output" data_type: TYPE_STRING dims: [ 1 ] }} ]
"""

_MENDED = """\
# The engine is well again, and this a model that nobody calls.
platform: "ensemble"
max_batch_size: 0
input [ {{ name: "tick_in" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "tick" data_type: TYPE_STRING dims: [ 1 ] }} ]
ensemble_scheduling {{
  step [
    {{
      model_name: "{model}" model_version: -1
      input_map {{ key: "tick_in" value: "tick_in" }}
      output_map {{ key: "tick" value: "tick" }}
    }}
  ]
}}
"""


class Readiness:
    """One engine's markers.

    Each time that the engine gets into trouble it has a new marker. When the trouble is over the marker is *mended*
    rather than removed, for a model that failed to load and then disappears keeps the server "not ready" for ever;
    some time later, when it has long been loaded, it goes. A mended one is never broken again: a server of which a
    loaded model breaks in place does not stop in time.

    Parameters
    ----------
    repository
        A model repository that the server polls, for markers alone.
    name
        Beginning of the markers' names, no other engine's.
    model
        This engine's model.
    """

    def __init__(self, repository: Path, *, name: str, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._repository = repository
        self._name = name
        self._model = model
        self._clock = clock
        self._count = 0
        self._broken: Path | None = None
        self._mended: deque[tuple[float, Path]] = deque()

    def follow(self, health: Health) -> None:
        """Have the server's readiness be what `health` says; to be called now and then."""
        if not health.ok and self._broken is None:
            self._count += 1
            self._broken = self._repository / f"{self._name}_{self._count}"
            # It becomes part of an error message, and of a path that Triton looks for.
            reason = re.sub(r"[^\w ,:()=-]", " ", health.reason)[:100].strip()
            self._put(self._broken, _BROKEN.format(reason=reason))
        elif health.ok and self._broken is not None:
            self._put(self._broken, _MENDED.format(model=self._model))
            self._mended.append((self._clock(), self._broken))
            self._broken = None
        while self._mended and self._clock() - self._mended[0][0] > _FORGET_S:
            self._remove(self._mended.popleft()[1])

    def _put(self, marker: Path, config: str) -> None:
        """Write a marker, or its new config; at no moment must Triton see half of it."""
        with tempfile.TemporaryDirectory(dir=self._repository.parent) as scratch:
            made = Path(scratch, marker.name)
            (made / "1").mkdir(parents=True)
            (made / "config.pbtxt").write_text(config)
            if marker.exists():
                (made / "config.pbtxt").rename(marker / "config.pbtxt")
            else:
                made.rename(marker)

    def _remove(self, marker: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self._repository.parent) as scratch:
            marker.rename(Path(scratch, marker.name))
