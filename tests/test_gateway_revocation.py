"""A WebSocket outlives the key that it was opened with; what is asked for on it does not."""

import pytest

from tests.gateway_kit import CHAT, Keys, gateway
from wicore_backend.gateway.access.key_file import read_keys, write_keys

GENERATE = {"type": "generate", "id": "a", "request": CHAT}


def last_frame(socket):
    """The last frame of a request."""
    socket.send_json(GENERATE)
    while (frame := socket.receive_json())["type"] not in ("done", "error", "cancelled"):
        pass
    return frame


def revoked(found, key_id):
    return found.without_key(key_id)


def moved_to_another_tenant(found, key_id):
    return found.with_key(key_id, found.keys[key_id].model_copy(update={"tenant": "other"}))


def made_an_admin_key(found, key_id):
    return found.with_key(key_id, found.keys[key_id].model_copy(update={"admin": True}))


def given_a_limit(found, key_id):
    limits = found.keys[key_id].limits.model_copy(update={"requests_per_minute": 600.0})
    return found.with_key(key_id, found.keys[key_id].model_copy(update={"limits": limits}))


@pytest.mark.parametrize(
    ("change", "status"),
    [(revoked, 401), (moved_to_another_tenant, 401), (made_an_admin_key, 401), (given_a_limit, None)],
)
def test_an_open_socket_may_do_what_its_key_may_now(tmp_path, change, status):
    keys = Keys(tmp_path / "keys.json")
    key = keys.add()
    with (
        gateway(access={"keys_file": str(keys.path)}) as client,
        client.websocket_connect("/ws/chat", subprotocols=["wicore.chat.v1", f"wicore.key.{key}"]) as socket,
    ):
        assert last_frame(socket)["type"] == "done"
        write_keys(keys.path, change(read_keys(keys.path), key.split("_")[1]))
        client.app.state.key_ring.reload()
        last = last_frame(socket)
    assert last["type"] == ("done" if status is None else "error")
    assert last.get("error", {}).get("status") == status
