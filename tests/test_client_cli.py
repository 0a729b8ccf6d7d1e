"""The command line against a scripted server: what it prints where, its exit codes, Ctrl-C, pipes and a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wicore_client
from wicore_client.cli import main
from wicore_client.results import Response

from tests.fake_triton import USAGE, Failure, FakeTriton, words

PICTURE = Path(wicore_client.__file__).parent / "assets" / "shapes.png"
COMMAND = [sys.executable, "-m", "wicore_client.cli"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTriton]:
    with FakeTriton() as fake:
        monkeypatch.setenv("WICORE_URL", f"127.0.0.1:{fake.ports['grpc']}")
        monkeypatch.setenv("PYTHONPATH", str(Path(wicore_client.__file__).parents[1]))
        yield fake


def asked(server):
    """The text of the last question."""
    return json.loads(server.requests[-1].messages)[-1]["content"][-1]["text"]


def endless(request):
    yield Response("some", (1,))
    request.wait()


def failing(code, message):
    def script(_):
        raise Failure(code, message)
        yield

    return script


def test_chat_answers_one_question(server, capsys):
    assert main(["chat", "Hi", "--system", "Be brief", "--max-tokens", "9", "--stop", "a", "--stop", "b"]) == 0
    assert capsys.readouterr() == ("Hello, world\n", "")
    (request,) = server.requests
    messages = json.loads(request.messages)
    assert messages[0] == {"role": "system", "content": "Be brief"}
    assert messages[1] == {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    assert json.loads(request.sampling_parameters) == {"max_tokens": 9, "stop": ["a", "b"]}


def test_chat_shows_pictures_before_the_question(server):
    assert main(["chat", "Which?", "--image", str(PICTURE), "--image", str(PICTURE)]) == 0
    (request,) = server.requests
    assert request.images == [PICTURE.read_bytes()] * 2
    content = json.loads(request.messages)[0]["content"]
    assert [part["type"] for part in content] == ["image", "image", "text"]


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        ([], "Describe this picture."),
        (["--language", "zh"], "描述这张图片。"),
        (["--prompt", "How many?"], "How many?"),
    ],
)
def test_describe_asks_about_a_picture(server, capsys, arguments, prompt):
    assert main(["describe", str(PICTURE), *arguments]) == 0
    assert capsys.readouterr().out == "Hello, world\n"
    assert asked(server) == prompt
    assert server.requests[0].images == [PICTURE.read_bytes()]


def test_http_is_a_url_away(server, capsys):
    assert main(["chat", "Hi", "--url", f"http://127.0.0.1:{server.ports['http']}"]) == 0
    assert main(["chat", "Hi", "--protocol", "http", "--url", f"127.0.0.1:{server.ports['http']}"]) == 0
    assert capsys.readouterr().out == "Hello, world\n" * 2


def test_json_is_one_object(server, capsys):
    server.script = words("红", "色")
    assert main(["chat", "Hi", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    completion = json.loads(out)
    assert (completion["text"], completion["finish_reason"]) == ("红色", "stop")
    assert completion["usage"]["prompt_tokens"] == 5


def test_health_tells_the_state_by_words_and_exit_code(server, capsys):
    assert main(["health"]) == 0
    assert re.fullmatch(r"triton 2\.51\.0 at \S+ \(gRPC\): ready\n  wicore  ready\n", capsys.readouterr().out)
    assert main(["health", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ready"] is True
    server.model_state = "UNAVAILABLE"
    assert main(["health"]) == 1
    assert "wicore  unavailable" in capsys.readouterr().out
    assert main(["health", "--model", "other"]) == 1
    assert "no model 'other'" in capsys.readouterr().err


def test_errors_are_one_line_on_stderr(server, capsys, tmp_path):
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    cases = [
        (["chat", "Hi"], failing("invalid_argument", "top_k is -1;\n it must be 0 or more"), "it must be 0 or more"),
        (["chat", "Hi"], failing("unavailable", "full; retry after 60 s"), "retry after 60 s"),
        (["chat", "Hi", "--timeout", "0.2"], endless, "timeout"),
        (["describe", "no-such.png"], endless, "no-such.png"),
        (["health", "--url", "127.0.0.1:1"], endless, "start it"),
        (["chat", "Hi", "--url", "ftp://x"], endless, "http://host:port"),
        (["chat", "caf\udce9"], endless, "send UTF-8"),
        (["chat", "Hi", "--temperature", "nan"], endless, "temperature cannot be written"),
        (["chat", "Hi", "--json-schema", str(deep)], endless, "nested too deeply"),
    ]
    for arguments, script, words_of_it in cases:
        server.script = script
        assert main(arguments) == 1
        err = capsys.readouterr().err
        assert err.startswith("wicore: ")
        assert words_of_it in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["chat", "--top-k", "many", "Hi"],
        ["chat", "--max-tokens", "9" * 5000, "Hi"],
        ["chat", "  "],
        ["nonsense"],
        ["health", "--protocol", "ftp"],
        *(["chat", "Hi", "--timeout", wrong] for wrong in ("nan", "inf", "0", "-1", "1e300")),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(server, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("wicore: ")
    assert err.count("\n") == 1
    assert len(err) < 500
    assert not server.requests


def test_a_pipe_gets_the_text_alone(server):
    server.script = words("a\x1b[31m", "b")
    done = subprocess.run([*COMMAND, "chat"], input="From a pipe\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\x1b[31mb\n", "")
    assert asked(server) == "From a pipe"


def test_an_answer_that_cannot_be_shown_or_written_is_no_crash(server):
    server.script = words("红")
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, "chat", "Hi"], capture_output=True, timeout=60, env=ascii_only)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"?\n", b"")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "chat", "Hi"], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"wicore: the answer cannot be written: No space left on device\n"


def test_a_reader_that_leaves_is_no_error(server):
    def more(request):
        while not request.wait(0.01):
            yield Response("more", (1,))

    server.script = more
    process = subprocess.Popen([*COMMAND, "chat", "Hi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(4) == b"more"
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""
    assert server.wait_until_gone()


def heeds_ctrl_c() -> None:
    """In a child, before its program: a shell's background jobs ignore SIGINT, and what they start does too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_cancels_a_single_question(server):
    server.script = endless
    process = subprocess.Popen(
        [*COMMAND, "chat", "Hi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c
    )
    assert process.stdout is not None
    assert process.stdout.read(4) == "some"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "\n", "")
    assert server.wait_until_gone()


class Typist:
    """A person at a terminal in which a command runs."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            heeds_ctrl_c()
            os.execv(COMMAND[0], [*COMMAND, *arguments])
        self.screen = ""

    def sees(self, text: str, seconds: float = 30) -> str:
        """Wait for `text` to appear; returns what came with it, and looks no further back from now on."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            ready, _, _ = select.select([self._terminal], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not appear, but {self.screen!r}"
            self.screen += os.read(self._terminal, 4096).decode()
        before, _, self.screen = self.screen.partition(text)
        return before

    def types(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def leaves(self) -> int:
        """The exit code."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(status)


def test_a_conversation_at_the_terminal(server):
    def script(request):
        question = asked(server)
        if question == "wait":
            yield Response("so far", (1,))
            request.wait()
        elif question == "fail":
            raise Failure("invalid_argument", "that was wrong")
        else:
            yield Response(f"\x1b[31manswer to {question}", (1,), "stop", usage=USAGE)

    server.script = script
    person = Typist("chat")
    person.sees("> ")
    person.types("one\n")
    assert "\x1b[31m" not in person.sees("answer to one"), "the model gave the terminal orders"
    person.sees("3 tokens")

    person.types(f"/image {PICTURE}\n")
    person.types("two\n")
    person.sees("answer to two")
    assert server.requests[-1].images == [PICTURE.read_bytes()]
    said = json.loads(server.requests[-1].messages)
    assert [message["role"] for message in said] == ["user", "assistant", "user"]

    person.types("wait\n")
    person.sees("so far")
    person.types("\x03")
    person.sees("cancelled")
    assert server.wait_until_gone()

    person.types("fail\n")
    person.sees("wicore: that was wrong")
    person.types("three\n")
    person.sees("answer to three")
    said = json.loads(server.requests[-1].messages)
    assert [message["role"] for message in said] == ["user", "assistant"] * 3 + ["user"]
    assert said[5]["content"] == "so far"

    person.types("/reset\n")
    person.sees("forgotten")
    person.types("four\n")
    person.sees("answer to four")
    assert len(json.loads(server.requests[-1].messages)) == 1
    assert server.requests[-1].images == []

    person.types(f"/image {PICTURE}\n")
    person.types("fail\n")
    person.sees("taken back")
    person.types("five\n")
    person.sees("answer to five")
    assert server.requests[-1].images == [], "a picture that is refused would be refused with every question"

    person.types("/quit\n")
    assert person.leaves() == 0
