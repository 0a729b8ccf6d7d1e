"""Wicore's own endpoint: a question with pictures, in JSON or by upload."""

from tests.gateway_kit import gateway
from tests.openai_kit import Said, error_of, post, said


def test_a_question_with_a_picture_through_wicores_own_endpoint():
    backend = Said(*said("Hel", "lo"))
    body = {"prompt": "What?", "images": ["iVBORw0KGgo="], "max_tokens": 5, "temperature": 0}
    answer = post(backend, "/v1/inference", body).json()
    assert answer.keys() == {"id", "content", "token_count", "finish_reason", "latency_ms", "gpu_utilization"}
    assert (answer["content"], answer["token_count"]) == ("Hello", 2)
    assert backend.requests[0].images == (b"\x89PNG\r\n\x1a\n",)
    assert error_of(post(backend, "/v1/inference", {**body, "images": ["%"]}))["param"] == "images[0]"


def test_a_question_with_pictures_by_upload():
    backend = Said(*said("Hel", "lo"))
    with gateway(backend) as client:
        files = [("images", ("a.png", b"one", "image/png")), ("images", ("b.png", b"two", "image/png"))]
        fields = {"prompt": "What?", "max_tokens": "5", "temperature": "0"}
        answer = client.post("/v1/inference/upload", data=fields, files=files)
        assert answer.status_code == 200, answer.text
        assert answer.json()["content"] == "Hello"
        asked = backend.requests[0]
        assert (asked.prompt, asked.images) == ("What?", (b"one", b"two"))
        assert (asked.options["max_tokens"], asked.options["temperature"]) == (5, 0)
        for wrong, param in (
            ({"max_tokens": "many"}, "max_tokens"),
            ({"prompt": ""}, "prompt"),
            ({"no_such": "1"}, "no_such"),
        ):
            sent = client.post("/v1/inference/upload", data={**fields, **wrong}, files=files)
            assert error_of(sent)["param"] == param
        named = client.post("/v1/inference/upload", data=fields, files=[("photo", ("a.png", b"one", "image/png"))])
        assert error_of(named)["param"] == "photo"
        assert error_of(client.post("/v1/inference/upload", json=fields))["param"] == "prompt"
        broken = client.post("/v1/inference/upload", content=b"x", headers={"content-type": "multipart/form-data"})
        assert error_of(broken)["code"] == "bad_request"
        assert len(backend.requests) == 1
