"""The two roads from `wicore_gemma3` back to a client: straight, and through the ensemble.

Triton never tells a running step of an ensemble that its client has gone, but every step that it starts anew learns of
it at once. So in the ensemble the model is two steps, both requests of the same instance:

    wicore_preprocess -> submit (gives ticks) -> attach (takes a tick, gives the answer) -> client

A *submit* starts the request and sends nothing but ticks, now and then. For each tick Triton starts an *attach*, whose
response sender leads to the client; the newest serves, and says whether the client is still there. The client sees
the answer only, straight from the newest attach.

The order of the end matters to Triton, which otherwise keeps the request for ever: no tick outstanding, then submit's
end, then the answer's last response.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from wicore_backend.errors import WicoreError
from wicore_backend.triton.errors import triton_error
from wicore_backend.triton.outbox import Reply
from wicore_backend.triton.tensors import strings
from wicore_backend.triton.wire import logprobs_content, usage_json

FINAL = 1
"""TRITONSERVER_RESPONSE_COMPLETE_FINAL; pb_utils has the name only once a model is being initialised."""

_TICK_PATIENCE_S = 5.0
"""After which another tick follows one that has not come back. A server was seen to start no step for one until
something else came, 90 s later; meanwhile a client that had gone was computed for."""

_MOST_TICKS = 4
"""Outstanding at a time: a server that is too busy for one is not helped by more."""


class ReplySender:
    """Sends replies as Triton responses; outputs that say nothing are left out, since each costs time.

    Parameters
    ----------
    token_text
        A token's piece, for log-probabilities.
    """

    def __init__(self, token_text: Callable[[int], str]) -> None:
        self._token_text = token_text

    def response(self, reply: Reply) -> Any:
        """The response that says `reply`."""
        texts = {"text_output": reply.text}
        if reply.logprobs or reply.prompt_logprobs is not None:
            content = logprobs_content(reply.logprobs, reply.prompt_logprobs, self._token_text)
            texts["logprobs"] = json.dumps(content, ensure_ascii=False)
        if reply.reason is not None and reply.usage is not None:
            texts |= {"finish_reason": str(reply.reason), "usage": usage_json(reply.usage)}
        if reply.error is not None:
            texts |= {"error_code": str(reply.error.code), "error_message": str(reply.error)}
        if reply.answers:
            texts["answers"] = json.dumps([self._answer(answer) for answer in reply.answers], ensure_ascii=False)
        tensors = [pb_utils.Tensor(name, strings(text)) for name, text in texts.items()]
        if reply.index is not None:
            tensors.append(pb_utils.Tensor("index", np.array([reply.index], np.int32)))
        tensors.append(pb_utils.Tensor("token_ids", np.array(reply.token_ids, np.int32)))
        return pb_utils.InferenceResponse(tensors)

    def _answer(self, reply: Reply) -> dict[str, Any]:
        """An entry of the `answers` output."""
        content: dict[str, Any] = {
            "index": reply.index,
            "text": reply.text,
            "token_ids": reply.token_ids,
            "finish_reason": str(reply.reason),
        }
        if reply.logprobs or reply.prompt_logprobs is not None:
            content["logprobs"] = logprobs_content(reply.logprobs, reply.prompt_logprobs, self._token_text)
        return content

    def send(self, sender: Any, reply: Reply) -> None:
        """Send a reply; one with a reason is the sender's last."""
        sender.send(self.response(reply), flags=0 if reply.reason is None else FINAL)

    def fail(self, sender: Any, error: Exception) -> None:
        """Send an error as the sender's last response."""
        sender.send(pb_utils.InferenceResponse(error=triton_error(error)), flags=FINAL)


class DirectWire:
    """To a client of the model itself."""

    def __init__(self, sender: Any, replies: ReplySender) -> None:
        self._sender = sender
        self._replies = replies

    def accepts(self, *, last: bool) -> bool:  # noqa: ARG002
        return True

    def send(self, reply: Reply) -> None:
        self._replies.send(self._sender, reply)

    def fail(self, error: WicoreError) -> None:
        self._replies.fail(self._sender, error)

    def probe(self) -> None:
        """Nothing to do: Triton tells this sender by itself."""

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class EnsembleWire:
    """To a client of the ensemble.

    Parameters
    ----------
    key
        What a tick carries, so that its attach finds this wire again.
    submit
        The response sender of the submit step.
    """

    def __init__(
        self, key: bytes, submit: Any, replies: ReplySender, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._last_tick = -inf
        self._key = key
        self._submit = submit
        self._replies = replies
        self._client: Any | None = None
        self._ticks_outstanding = 0
        self._submit_ended = False
        self._cancelled = False

    def attach(self, sender: Any, *, cancelled: bool) -> None:
        """A tick has come back: `sender` leads to the client from now on."""
        before, self._client = self._client, sender
        self._ticks_outstanding -= 1
        self._cancelled = self._cancelled or cancelled
        if before is not None:
            before.send(flags=FINAL)

    def accepts(self, *, last: bool) -> bool:
        return self._client is not None and not (last and self._ticks_outstanding)

    def send(self, reply: Reply) -> None:
        response = self._replies.response(reply)  # Before anything is ended: this may be what fails.
        if reply.reason is None:
            self._road.send(response)
        else:
            self._end_submit()
            self._road.send(response, flags=FINAL)

    def fail(self, error: WicoreError) -> None:
        self._end_submit()
        self._replies.fail(self._road, error)

    @property
    def _road(self) -> Any:
        """The newest attach's sender; submit's own where the ensemble's second step never came."""
        return self._client or self._submit

    def _end_submit(self) -> None:
        if self._client is not None and not self._submit_ended:
            self._submit_ended = True
            self._submit.send(flags=FINAL)

    def probe(self) -> None:
        late = self._clock() - self._last_tick >= _TICK_PATIENCE_S
        if not self._ticks_outstanding or (late and self._ticks_outstanding < _MOST_TICKS):
            self._ticks_outstanding += 1
            self._last_tick = self._clock()
            tick = pb_utils.Tensor("tick", np.array([self._key], np.object_))
            self._submit.send(pb_utils.InferenceResponse([tick]))

    def is_cancelled(self) -> bool:
        return self._cancelled
