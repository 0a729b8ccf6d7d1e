"""API keys: who is let in, to what, and what a change of the keys' file does."""

import json
import logging
import stat

import pytest
from starlette.testclient import WebSocketDenialResponse

from tests.gateway_kit import CHAT, Keys, ScriptedBackend, bearer, gateway, metric
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.gateway.access.key_command import keys_command
from wicore_backend.gateway.access.key_file import read_keys
from wicore_backend.gateway.access.key_ring import KeyRing
from wicore_backend.gateway.access.keys import PresentedKey, new_key
from wicore_backend.gateway.settings import GatewaySettings

CHAT_PATH = "/v1/chat/completions"


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path / "keys.json")


def ring_of(keys, clock=lambda: 0.0, **options):
    return KeyRing(keys.path, clock=clock, **options)


def test_a_key_opens_the_api_and_anything_else_does_not(keys):
    good = keys.add()
    wrong_secret = good[:-1] + ("0" if good[-1] != "0" else "1")
    with gateway(access={"keys_file": str(keys.path)}) as client:
        assert client.post(CHAT_PATH, json=CHAT, headers=bearer(good)).status_code == 200
        refused = [{}, bearer("nonsense"), bearer(wrong_secret), bearer(str(new_key({"tenant": "x"})[0]))]
        refused += [{"Authorization": "Basic abc"}, {"Authorization": "Bearer"}, {"Authorization": "Bearer a b"}]
        for headers in refused:
            answer = client.post(CHAT_PATH, json=CHAT, headers=headers)
            assert answer.status_code == 401, headers
            assert answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == "invalid_api_key"
            assert wrong_secret not in error["message"]
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers=bearer(good)).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_stranger_is_refused_before_his_body_is_read(keys):
    keys.add()

    def endless():
        for _ in range(1000):
            sent.append(1)
            yield b"x" * 1000

    sent = []
    with gateway(access={"keys_file": str(keys.path)}, connections={"body_bytes": 2000}) as client:
        # A body over the limit would be 413 to somebody who is known.
        assert client.post(CHAT_PATH, content=endless()).status_code == 401


def test_two_different_keys_in_one_request_are_refused(keys):
    one, other = keys.add(), keys.add()
    with gateway(access={"keys_file": str(keys.path)}) as client:
        headers = [("Authorization", f"Bearer {one}"), ("Authorization", f"Bearer {other}")]
        assert client.post(CHAT_PATH, json=CHAT, headers=headers).status_code == 401


def test_tenant_and_class_come_from_the_key_whatever_the_request_says(keys):
    backend = ScriptedBackend()
    batch, realtime = keys.add("acme", service_class="batch"), keys.add("globex", service_class="realtime")
    with gateway(backend, access={"keys_file": str(keys.path)}) as client:
        for key in (batch, realtime):
            body = {**CHAT, "priority": "realtime"}
            assert client.post(CHAT_PATH, json=body, headers=bearer(key)).status_code == 200
    assert [r.options["tenant"] for r in backend.requests] == ["acme", "globex"]
    assert [r.options["priority"] for r in backend.requests] == [10, -10]


def test_a_model_that_a_key_may_not_use_does_not_exist_for_it(keys):
    some, none = keys.add(models=["wicore"]), keys.add(models=["another"])
    with gateway(access={"keys_file": str(keys.path)}) as client:
        assert client.post(CHAT_PATH, json=CHAT, headers=bearer(some)).status_code == 200
        answer = client.post(CHAT_PATH, json=CHAT, headers=bearer(none))
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_a_browser_sends_its_key_as_a_subprotocol_and_gets_another_one_back(keys):
    key = keys.add()
    with gateway(access={"keys_file": str(keys.path)}) as client:
        offered = ["wicore.chat.v1", f"wicore.key.{key}"]
        with client.websocket_connect("/ws/chat", subprotocols=offered) as socket:
            assert socket.accepted_subprotocol == "wicore.chat.v1"
            socket.send_json({"type": "ping"})
            assert socket.receive_json() == {"type": "pong"}
        for refused in ([], ["wicore.key.wrong"], [f"wicore.key.{key[:-1]}"]):
            connecting = client.websocket_connect("/ws/chat", subprotocols=refused)
            with pytest.raises(WebSocketDenialResponse) as caught, connecting:
                pass
            assert caught.value.status_code == 401


def test_concurrent_requests_of_a_key_and_of_a_tenant_are_bounded(keys):
    keys.tenant("acme", concurrent_requests=3)
    one, two = keys.add(limits={"concurrent_requests": 2}), keys.add()
    with gateway(access={"keys_file": str(keys.path)}) as client:

        def connect(key):
            return client.websocket_connect("/ws/chat", headers=bearer(key))

        with connect(one), connect(one):
            answer = client.post(CHAT_PATH, json=CHAT, headers=bearer(one))
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "concurrency_limit_exceeded"
            with connect(two):
                assert client.post(CHAT_PATH, json=CHAT, headers=bearer(two)).status_code == 429
            assert client.post(CHAT_PATH, json=CHAT, headers=bearer(two)).status_code == 200
        assert client.post(CHAT_PATH, json=CHAT, headers=bearer(one)).status_code == 200


def test_admin_endpoints_have_keys_of_their_own(keys):
    key, admin = keys.add(), keys.add("ops", admin=True)
    with gateway(access={"keys_file": str(keys.path)}) as client:
        assert client.get("/admin/keys").status_code == 401
        assert client.get("/admin/keys", headers=bearer(key)).status_code == 403
        assert client.post("/admin/drain", headers=bearer(key)).status_code == 403
        assert client.post(CHAT_PATH, json=CHAT, headers=bearer(admin)).status_code == 403
        assert client.get("/metrics", headers=bearer(admin)).status_code == 200
        listing = client.get("/admin/keys", headers=bearer(admin))
        assert listing.status_code == 200
        assert "sha256" not in listing.text
        assert "salt" not in listing.text
        assert client.post("/admin/drain", headers=bearer(admin)).json() == {"draining": True, "running": 0}
        assert client.post(CHAT_PATH, json=CHAT, headers=bearer(key)).status_code == 503
        assert client.get("/ready").status_code == 503
        client.post("/admin/resume", headers=bearer(admin))
        assert client.post(CHAT_PATH, json=CHAT, headers=bearer(key)).status_code == 200


def test_admin_sees_what_is_left_of_a_keys_limits(keys):
    admin = keys.add("ops", admin=True)
    key = keys.add(limits={"requests_per_minute": 60, "burst_seconds": 10})
    key_id = PresentedKey.parse(key).id
    with gateway(access={"keys_file": str(keys.path)}) as client:
        client.post(CHAT_PATH, json=CHAT, headers=bearer(key))
        answer = client.get("/admin/limits", params={"key_id": key_id}, headers=bearer(admin)).json()
        (state,) = answer["limits"].values()
        assert state["per_minute"] == 60
        assert 9 <= state["remaining"] < 10
        assert client.get("/admin/limits", params={"key_id": "f" * 12}, headers=bearer(admin)).status_code == 404


def test_nobody_administers_a_gateway_without_keys():
    with gateway() as client:
        assert client.post(CHAT_PATH, json=CHAT).status_code == 200
        for path in ("/admin/keys", "/admin/limits?key_id=a"):
            assert client.get(path).status_code == 403
        assert client.post("/admin/drain").status_code == 403


def test_without_keys_only_this_machine_is_listened_to():
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.com", ""):
        with pytest.raises(InvalidArgumentError, match="open_to_network"):
            GatewaySettings(host=host)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        GatewaySettings(host=host)
    GatewaySettings(host="0.0.0.0", access={"open_to_network": True})
    GatewaySettings(host="0.0.0.0", access={"keys_file": "keys.json"})


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "169.254.1.1", "[::2]", "a:b:c", ""])
def test_without_keys_other_host_names_are_refused(host):
    with gateway() as client:
        assert client.get("/health", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080"])
def test_without_keys_loopback_names_are_answered(host):
    with gateway() as client:
        assert client.get("/health", headers={"Host": host}).status_code == 200


def test_without_keys_other_pages_cannot_use_the_server():
    headers = {"Host": "localhost:8080"}
    with gateway(cors={"origins": ["https://friend.example"]}) as client:

        def ask(origin):
            return client.post(CHAT_PATH, json=CHAT, headers={**headers, "Origin": origin}).status_code

        assert ask("http://localhost:8080") == 200
        assert ask("https://friend.example") == 200
        for origin in ("http://localhost:9999", "https://evil.example", "null"):
            assert ask(origin) == 403
        connecting = client.websocket_connect("/ws/chat", headers={**headers, "Origin": "https://evil.example"})
        with pytest.raises(WebSocketDenialResponse) as caught, connecting:
            pass
        assert caught.value.status_code == 403


def test_browsers_learn_which_origins_may_ask_without_a_key(keys):
    keys.add()
    origin = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
    settings = {"access": {"keys_file": str(keys.path)}}
    with gateway(**settings, cors={"origins": ["https://friend.example"]}) as client:
        answer = client.options(CHAT_PATH, headers=origin)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    with gateway(**settings) as client:
        assert "access-control-allow-origin" not in client.options(CHAT_PATH, headers=origin).headers


def test_a_changed_file_is_in_force_a_second_later(keys):
    first = PresentedKey.parse(keys.add())
    now = [0.0]
    ring = ring_of(keys, lambda: now[0])
    second = PresentedKey.parse(keys.add())
    assert ring.find(first)
    assert ring.find(second) is None, "the file is looked at once a second at most"
    now[0] = 1.1
    assert ring.find(second)


def test_a_file_that_becomes_wrong_keeps_the_keys_before_it_and_says_so(keys, caplog):
    key = PresentedKey.parse(keys.add())
    told = []

    class Listener:
        def keys_reloaded(self, *, keys, ok):
            told.append((keys, ok))

    now = [0.0]
    ring = ring_of(keys, lambda: now[0], listener=Listener())
    good = keys.path.read_text()
    for number, broken in enumerate(("{", "[]", '{"keys": {"x": {}}}', good.replace('"tenant"', '"tenent"'), None), 1):
        if broken is None:
            keys.path.unlink()
        else:
            keys.path.write_text(broken)
        now[0] = number * 2.0
        with caplog.at_level(logging.ERROR):
            caplog.clear()
            assert ring.find(key), broken
        assert "keys_not_reloaded" in caplog.text
        assert ring.problem
        assert told[-1] == (1, False)
    keys.path.write_text(good)
    now[0] = 100.0
    assert ring.find(key)
    assert not ring.problem
    assert told[-1] == (1, True)


def test_an_error_in_the_file_names_the_key_and_the_field(keys):
    key_id = PresentedKey.parse(keys.add()).id
    values = json.loads(keys.path.read_text())
    values["keys"][key_id]["limits"] = {"requests_per_minute": -1}
    keys.path.write_text(json.dumps(values))
    with pytest.raises(InvalidArgumentError) as caught:
        read_keys(keys.path)
    assert key_id in str(caught.value)
    assert "requests_per_minute = -1" in str(caught.value)


def test_a_broken_file_shows_in_the_metrics(keys):
    admin = keys.add(admin=True)
    with gateway(access={"keys_file": str(keys.path)}) as client:
        assert metric(client.get("/metrics", headers=bearer(admin)).text, "wicore_gateway_keys_file_ok") == 1
        keys.path.write_text("broken")
        reloaded = client.post("/admin/keys/reload", headers=bearer(admin))
        assert reloaded.status_code == 400
        assert "not JSON" in reloaded.json()["error"]["message"]
        page = client.get("/metrics", headers=bearer(admin)).text
        assert metric(page, "wicore_gateway_keys_file_ok") == 0
        assert metric(page, "wicore_gateway_keys") == 1


def test_a_wrong_file_at_the_start_is_an_error(tmp_path):
    missing = str(tmp_path / "no")
    with (
        pytest.raises(InvalidArgumentError, match="cannot be read"),
        gateway(access={"keys_file": missing}),
    ):
        pass


def test_the_command_makes_lists_and_revokes_keys(tmp_path, capsys):
    path = tmp_path / "new" / "keys.json"
    file = ["--keys-file", str(path)]
    add = ["add", *file, "--tenant", "acme", "--class", "batch", "--requests-per-minute", "30", "--model", "wicore"]
    assert keys_command([*add, "--note", "for the nightly job"]) == 0
    text = capsys.readouterr().out.strip()
    key = PresentedKey.parse(text)
    assert key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.secret not in path.read_text(), "only a hash is kept"
    record = KeyRing(path).find(key)
    assert record
    assert (record.tenant, record.service_class, record.models) == ("acme", "batch", ("wicore",))
    assert record.limits.requests_per_minute == 30
    assert keys_command(["list", *file]) == 0
    listed = capsys.readouterr().out
    assert key.id in listed
    assert "nightly" in listed
    assert key.secret not in listed
    assert keys_command(["revoke", *file, key.id]) == 0
    assert KeyRing(path).find(key) is None
    assert keys_command(["revoke", *file, key.id]) == 2
    assert "there is no key" in capsys.readouterr().err
    assert keys_command(["add", *file, "--tenant", "bad tenant"]) == 2
    assert "tenant" in capsys.readouterr().err


def test_equal_secrets_have_different_hashes_and_a_key_does_not_show_in_a_repr():
    key, record = new_key({"tenant": "a"})
    _, other = new_key({"tenant": "a"})
    assert record.salt != other.salt
    assert key.secret not in repr(key)
    assert record.matches(key.secret)
    assert not other.matches(key.secret)
