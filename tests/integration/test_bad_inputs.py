"""A hundred bad requests: each gets one clear error, and the server is as healthy after as before."""

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.integration.wire import BareStream, client, generate, post, wait_idle

TEXT = {"text_input": "hello"}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png() -> bytes:
    data = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(data, "PNG")
    return data.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header promises 100,000 by 100,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def messages(*values: object) -> dict:
    return {"messages": json.dumps(list(values))}


USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}

# (what the error must say, the fields of a generate request on the ensemble)
ENSEMBLE = [
    # Parameters
    ("temprature", {**TEXT, "temprature": 1.0}),
    ("max_token'", {**TEXT, "max_token": 5}),
    ("unknown model", {**TEXT, "model": "gpt"}),
    ("best_of is 2, less than n = 3", {**TEXT, "best_of": 2, "n": 3}),
    ("n = 65", {**TEXT, "n": 65}),
    ("timeout", {**TEXT, "timeout": 5}),
    ("max_tokens = 0", {**TEXT, "max_tokens": 0}),
    ("max_tokens = -5", {**TEXT, "max_tokens": -5}),
    ("max_tokens = '5'", {**TEXT, "max_tokens": "5"}),
    ("max_tokens = 1.5", {**TEXT, "max_tokens": 1.5}),
    ("max_tokens = True", {**TEXT, "max_tokens": True}),
    ("max_tokens = 1e+30", {**TEXT, "max_tokens": 1e30}),
    ("temperature = -1.0", {**TEXT, "temperature": -1.0}),
    ("temperature = 1000.0", {**TEXT, "temperature": 1000.0}),
    ("temperature = 'hot'", {**TEXT, "temperature": "hot"}),
    ("temperature = False", {**TEXT, "temperature": False}),
    ("top_k = -1", {**TEXT, "top_k": -1}),
    ("top_k = 1.5", {**TEXT, "top_k": 1.5}),
    ("top_p = 0", {**TEXT, "top_p": 0}),
    ("top_p = 1.1", {**TEXT, "top_p": 1.1}),
    ("min_p = -0.1", {**TEXT, "min_p": -0.1}),
    ("min_p = 2", {**TEXT, "min_p": 2}),
    ("repetition_penalty = 0", {**TEXT, "repetition_penalty": 0}),
    ("presence_penalty = 3", {**TEXT, "presence_penalty": 3}),
    ("frequency_penalty = -3", {**TEXT, "frequency_penalty": -3}),
    ("seed = -1", {**TEXT, "seed": -1}),
    ("seed = 'x'", {**TEXT, "seed": "x"}),
    ("ignore_eos = 1", {**TEXT, "ignore_eos": 1}),
    ("logprobs = 21", {**TEXT, "logprobs": 21}),
    ("logprobs = -1", {**TEXT, "logprobs": -1}),
    ("prompt_logprobs = 99", {**TEXT, "prompt_logprobs": 99}),
    ("priority = 'high'", {**TEXT, "priority": "high"}),
    ("priority = 101", {**TEXT, "priority": 101}),
    ("realtime, interactive, batch", {**TEXT, "priority": "urgent"}),
    ("tenant = 'a b'", {**TEXT, "tenant": "a b"}),
    ("tenant = 'aaa", {**TEXT, "tenant": "a" * 65}),
    ("tenant = 1", {**TEXT, "tenant": 1}),
    ("queue_deadline_ms = 0", {**TEXT, "queue_deadline_ms": 0}),
    ("first_token_deadline_ms = '5'", {**TEXT, "first_token_deadline_ms": "5"}),
    ("deadline_ms = 0", {**TEXT, "deadline_ms": 0}),
    ("deadline_ms = -1", {**TEXT, "deadline_ms": -1}),
    ("deadline_ms = 'soon'", {**TEXT, "deadline_ms": "soon"}),
    ("raw = 'yes'", {**TEXT, "raw": "yes"}),
    ("stop.0 = ''", {**TEXT, "stop": ""}),
    ("stop = (", {**TEXT, "stop": ["x"] * 17}),
    ("stop_token_ids", {**TEXT, "sampling_parameters": '{"stop_token_ids": [-1]}'}),
    ("token id 99999999", {**TEXT, "sampling_parameters": '{"stop_token_ids": [99999999]}'}),
    ("sampling_parameters is not JSON", {**TEXT, "sampling_parameters": "{"}),
    ("sampling_parameters must be a JSON object", {**TEXT, "sampling_parameters": "[1]"}),
    ("sampling_parameters must be a JSON object", {**TEXT, "sampling_parameters": "null"}),
    ("nonsense", {**TEXT, "sampling_parameters": '{"nonsense": 1}'}),
    ("max_tokens = [1]", {**TEXT, "sampling_parameters": '{"max_tokens": [1]}'}),
    ("invalid type", {**TEXT, "seed": [1]}),
    ("invalid type", {**TEXT, "seed": {"a": 1}}),
    ("invalid type", {**TEXT, "seed": None}),
    # Prompts
    ("text_input or messages", {}),
    ("text_input or messages", {**TEXT, **messages(USER)}),
    ("empty", {"text_input": ""}),
    ("empty", {"text_input": "   \n"}),
    ("limit of", {"text_input": "word " * 40_000}),
    ("shape", {"text_input": ["a", "b"]}),
    ("messages is not JSON", {"messages": "{"}),
    ("messages must be a JSON list", {"messages": "{}"}),
    ("messages must be a JSON list", {"messages": '["hello"]'}),
    ("conversation is empty", {"messages": "[]"}),
    ("role", messages({"role": "wizard", "content": "hi"})),
    ("role", messages({"content": "hi"})),
    ("content", messages({"role": "user"})),
    ("content", messages({"role": "user", "content": 5})),
    ("alternate", messages(USER, USER)),
    ("alternate", messages(USER, ASSISTANT, ASSISTANT)),
    ("", messages(ASSISTANT)),
    ("system", messages(USER, {"role": "system", "content": "x"})),
    ("type", messages({"role": "user", "content": [{"type": "video"}]})),
    ("text", messages({"role": "user", "content": [{"type": "text"}]})),
    ("image", messages({"role": "user", "content": [{"type": "image"}]})),
    ("image_soft_token", {"text_input": "<image_soft_token>", "raw": True}),
    ("place", {"text_input": "<start_of_image>", "raw": True}),
    # Pictures
    ("not an image", {**TEXT, "images": [b64(b"this is a text file called picture.png")]}),
    ("images[0]", {**TEXT, "images": ["%%% not base64 %%%"]}),
    ("images[0]", {**TEXT, "images": [""]}),
    ("images[0]", {**TEXT, "images": [b64(png()[: len(png()) // 2])]}),
    ("images[0]", {**TEXT, "images": [b64(png()[:-200])]}),
    ("max_image_pixels", {**TEXT, "images": [b64(bomb())]}),
    ("max_images", {**TEXT, "images": [b64(png())] * 17}),
    ("images[1]", {**TEXT, "images": [b64(png()), b64(b"GIF89a")]}),
    ("images[0]", {**TEXT, "images": [b64(b"%PDF-1.7 ...")]}),
    ("images[0]", {**TEXT, "images": [b64(b"<svg xmlns='http://www.w3.org/2000/svg'/>")]}),
    ("images[0]", {**TEXT, "images": ["https://example.com/a.png"]}),
    ("images[0]", {**TEXT, "images": ["file:///etc/passwd"]}),
    ("images[0]", {**TEXT, "images": ["/etc/passwd"]}),
    ("image", {**messages(USER), "images": [b64(png())]}),
    ("messages is JSON that is nested too deeply", {"messages": "[" * 100_000}),
    ("deadline_ms = 1000", {**TEXT, "sampling_parameters": '{"deadline_ms": 1' + "0" * 400 + "}"}),
]

# (what the error must say, the fields of a generate request) on the model itself
BARE_FIELDS = [
    ("the request has no input_ids", {"max_tokens": 3}),
    ("request is not JSON", {"input_ids": [2, 300], "request": "{"}),
    ("request must be a JSON object", {"input_ids": [2, 300], "request": "[1]"}),
    ("request is JSON that is nested too deeply", {"input_ids": [2, 300], "request": "[" * 100_000}),
]

# (what the error must say, token ids, parameters) on the model itself
BARE = [
    ("token id 99999999", [2, 99999999], {}),
    ("token id -1", [2, -1], {}),
    ("1 to", [], {}),
    ("1 to", [300] * 40_000, {}),
    ("temprature", [2, 300], {"temprature": 1.0}),
    ("max_tokens = 0", [2, 300], {"max_tokens": 0}),
    ("top_p = 3", [2, 300], {"top_p": 3}),
    ("stream = 'yes'", [2, 300], {"stream": "yes"}),
    ("deadline_ms = 0", [2, 300], {"deadline_ms": 0}),
]

# What Triton's own HTTP server answers before any model is asked.
MALFORMED = [
    ("/v2/models/wicore/generate", b""),
    ("/v2/models/wicore/generate", b"{"),
    ("/v2/models/wicore/generate", b"\xff\xfe\x00"),
    ("/v2/models/wicore/generate", b"[]"),
    ("/v2/models/wicore/generate_stream", b"null"),
    ("/v2/models/nothing/generate", b"{}"),
    ("/v2/models/wicore/infer", b"{}"),
]


def test_there_are_a_hundred_of_them():
    assert len(ENSEMBLE) + len(BARE) + len(MALFORMED) >= 100


@pytest.mark.parametrize(("said", "fields"), ENSEMBLE)
def test_the_ensemble_names_what_is_wrong(server, said, fields):
    status, text = generate(server, **fields)
    assert status in (400, 404, 500), text
    error = json.loads(text)["error"]
    assert said in error, error
    assert len(error) < 1000
    assert "Traceback" not in error
    assert "[internal]" not in error


@pytest.mark.parametrize(("said", "ids", "parameters"), BARE)
def test_the_model_itself_names_what_is_wrong(server, said, ids, parameters):
    stream = BareStream(server, ids, **parameters)
    stream.wait()
    stream.close()
    assert not stream.results
    assert said in str(stream.errors[0])


@pytest.mark.parametrize(("said", "fields"), BARE_FIELDS)
def test_the_model_itself_names_what_is_wrong_with_its_tensors(server, said, fields):
    status, text = generate(server, "wicore_gemma3", **fields)
    assert status == 400
    assert f"[invalid_argument] {said}" in json.loads(text)["error"]


@pytest.mark.parametrize(("path", "body"), MALFORMED)
def test_malformed_http_is_refused(server, path, body):
    status, text = post(server, path, body)
    assert 400 <= status < 600
    assert "error" in json.loads(text)


def test_pixels_that_do_not_fit_the_ids_are_refused(server):
    import tritonclient.grpc as grpcclient

    def tensor(name: str, value: np.ndarray, datatype: str):
        t = grpcclient.InferInput(name, list(value.shape), datatype)
        t.set_data_from_numpy(value)
        return t

    pixels = np.zeros((1, 3, 896, 896), np.uint8)
    digest = np.zeros((1, 16), np.uint8)
    cases = [
        ("pixels is", pixels[:, :, :8, :8], [[0, 64]], digest),
        ("image_spans", pixels, [[0, 64], [64, 64]], digest),
        ("image_digests", pixels, [[0, 64]], digest[:, :8].repeat(2, 0)),
        ("must be ordered", pixels, [[90, 64]], digest),
        ("must be ordered", pixels, [[-1, 64]], digest),
        ("each takes", pixels, [[0, 3]], digest),
    ]
    for said, image, spans, name in cases:
        ids = tensor("input_ids", np.full(100, 300, np.int32), "INT32")
        errors: list = []
        with grpcclient.InferenceServerClient(server.urls.grpc) as c:
            c.start_stream(lambda result, error, errors=errors: errors.append(error or result))
            inputs = [
                ids,
                tensor("pixels", image, "UINT8"),
                tensor("image_spans", np.array(spans, np.int32), "INT32"),
                tensor("image_digests", name, "UINT8"),
            ]
            c.async_stream_infer("wicore_gemma3", inputs)
            c.stop_stream()
        assert said in str(errors[0]), (said, errors)


def test_a_server_that_refused_all_that_is_healthy(server):
    wait_idle(server, 5)
    with client(server) as c:
        assert c.health().ready
        assert c.generate("hello", max_tokens=3, temperature=0.0).token_ids
