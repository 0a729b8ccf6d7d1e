"""What tests of OpenAI's endpoints share: a backend with laid-down answers, and how it is asked and read."""

import json
from typing import Any

from tests.gateway_kit import CHAT, ScriptedBackend, gateway
from wicore_backend.gateway.backend import Delta, Usage

PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Said(ScriptedBackend):
    """Says laid-down deltas, or raises what stands among them."""

    def __init__(self, *items: Delta | Exception) -> None:
        super().__init__()
        self.items = items

    async def generate(self, request):
        self.requests.append(request)
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item


def said(*texts: str, reason: str = "stop", index: int = 0, usage: Usage | None = Usage(5, 2, 3)) -> list[Delta]:  # noqa: B008
    """An answer whose tokens are these texts, and its end."""
    return [*(Delta(index, text, (7,)) for text in texts), Delta(index, "", (), None, reason, usage)]


def post(backend, path="/v1/chat/completions", body=None, **fields):
    """The answer to a body, by default a chat's, with further fields."""
    with gateway(backend) as client:
        return client.post(path, json={**(CHAT if body is None else body), **fields})


def events(response) -> list[Any]:
    """What a stream said, event by event."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line.split("data: ")[-1]) for line in lines]


def options_of(**fields) -> dict[str, Any]:
    """What the server of models is asked for when a chat has these fields."""
    backend = ScriptedBackend()
    response = post(backend, **fields)
    assert response.status_code == 200, response.text
    return dict(backend.requests[0].options)


def error_of(response, status=400):
    """The error that a request was refused with, in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error
