"""The supervisor, with a stand-in for the server: whatever is killed, nothing of a start stays behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from scripts.serving import Installation, ServerOptions, ServerStartError, TritonServer, cli, server
from scripts.serving.installation import ROOT
from scripts.serving.runs import Run, open_run, sweep
from tests import waiting

FREE = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
wait_until = partial(waiting.wait_until, within_s=10, every_s=0.02)


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "repository" / "one").mkdir(parents=True)
    (tmp_path / "repository" / "one" / "config.pbtxt").write_text('name: "one"')
    return tmp_path / "repository"


@pytest.fixture
def installation(tmp_path):
    program = tmp_path / "server" / "bin" / "tritonserver"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\n{Path(ROOT, 'tests', 'fake_tritonserver.py').read_text()}")
    program.chmod(0o755)
    return Installation(Path(sys.prefix), tmp_path / "server")


@pytest.fixture
def make(repository, installation, tmp_path):
    def make(*, mode="", **options):
        return TritonServer(
            ServerOptions(**({"model_repository": repository} | FREE | options)),
            installation,
            state=tmp_path / "state",
            environ={**os.environ, "FAKE_SERVER": mode},
        )

    return make


def is_clean(run: Run) -> bool:
    return not run.processes() and not run.regions() and not run.directory.exists()


def test_a_server_starts_answers_and_stops_without_a_trace(make):
    with make() as triton:
        assert len(triton.run.processes()) == 2
        assert len(triton.run.regions()) == 1
        assert triton.exit_code is None
    assert triton.exit_code == 0
    assert is_clean(triton.run)
    triton.stop()  # once more does nothing


def test_ports_are_free_ones_and_differ(make):
    with make() as first, make() as second:
        ports = {url.split(":")[-1].split("/")[0] for urls in (first.urls, second.urls) for url in vars(urls).values()}
        assert len(ports) == 6


def test_a_taken_port_is_named_before_anything_is_started(make):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        triton = make(grpc_port=port)
        with pytest.raises(ServerStartError, match=rf"cannot listen on 127\.0\.0\.1:{port}.*--grpc-port 0"):
            triton.start()


def test_an_address_that_is_not_this_machine_s_is_no_matter_of_ports(make):
    for host in ("300.1.1.1", "192.0.2.1"):
        with pytest.raises(ServerStartError, match=rf"cannot listen on {host}:.*--host") as caught:
            make(host=host).start()
        assert "-port" not in str(caught.value)


@pytest.mark.parametrize(("made", "said"), [(True, "no config.json"), (False, "no such directory")])
def test_what_a_model_s_directory_lacks_is_said(tmp_path, made, said):
    model = tmp_path / "model"
    if made:
        model.mkdir()
    with pytest.raises(ServerStartError, match=rf"{model} is not a checkpoint: .*{said}"):
        cli._options(cli.build_parser().parse_args(["serve", "--model", str(model)]))


def test_a_repository_without_models_is_refused(make, tmp_path):
    with pytest.raises(ServerStartError, match="there is no model in"):
        make(model_repository=tmp_path).start()


def test_settings_reach_the_models_and_the_users_python_path_does_not(make):
    triton = make(settings={"model": "/models/x", "max_batch_tokens": 512})
    triton._environ["PYTHONPATH"] = "/somewhere"
    with triton:
        environment = Path(f"/proc/{triton.process_id}/environ").read_bytes().decode().split("\0")
    assert 'WICORE_SETTINGS={"model": "/models/x", "max_batch_tokens": 512}' in environment
    assert not [entry for entry in environment if entry.startswith("PYTHONPATH=")]
    assert next(entry for entry in environment if entry.startswith("PATH=")).startswith(f"PATH={sys.prefix}/bin:")


def test_a_model_that_fails_to_load_is_reported_in_its_own_words(make):
    triton = make(mode="broken")
    with pytest.raises(ServerStartError, match=r"exit code 1\):\none: Internal: no such luck\nlog: "):
        triton.__enter__()
    assert is_clean(triton.run)


def test_an_error_whose_words_say_it_all_is_told_without_its_place_in_the_code(tmp_path):
    log = tmp_path / "a.log"
    place = r"\n\nAt:\n  /a.py(2): f\n"
    head = 'E1121 09:37:15.932656 5460 model_lifecycle.cc:642] "failed to load'
    log.write_text(
        rf"""{head} 'one' version 1: Internal: InvalidArgumentError: x = \"5\": give it less{place}"
{head} 'two' version 1: Internal: KeyError: 'x'{place}"
"""
    )
    own, foreign = server._errors(log).split("\ntwo: ")
    assert own == 'one: x = "5": give it less'
    assert foreign.startswith("Internal: KeyError: 'x'\n\nAt:")


def test_a_killed_server_is_noticed_and_cleared_up_after(make):
    with make() as triton:
        os.kill(triton.process_id, signal.SIGKILL)
        assert triton.wait(10) == -signal.SIGKILL
        assert is_clean(triton.run)


def test_a_server_that_does_not_stop_is_killed(make, monkeypatch):
    monkeypatch.setattr(server, "_STOP_SECONDS", 0.2)
    with make(mode="stubborn") as triton:
        pass
    assert triton.exit_code == -signal.SIGKILL
    assert is_clean(triton.run)


def test_a_killed_guard_takes_its_server_along(make):
    with make(mode="stubborn") as triton:
        triton._guard.kill()
        assert triton.wait(10) == -signal.SIGKILL
        assert is_clean(triton.run)


def start_elsewhere(repository, installation, state, mode=""):
    """A supervisor in a process of its own; returns it, its run, and its guard's id."""
    code = f"""
        import time
        from pathlib import Path
        from scripts.serving import Installation, ServerOptions, TritonServer
        installation = Installation(Path({str(installation.environment)!r}), Path({str(installation.server)!r}))
        options = ServerOptions(model_repository=Path({str(repository)!r}), http_port=0, grpc_port=0, metrics_port=0)
        with TritonServer(options, installation, state=Path({str(state)!r})) as server:
            print(server.run.name, server._guard.pid, flush=True)
            time.sleep(600)
        """
    supervisor = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "FAKE_SERVER": mode},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert supervisor.stdout is not None
    name, guard = supervisor.stdout.readline().split()
    return supervisor, Run(state / "runs" / name), int(guard)


def test_nothing_stays_when_the_supervisor_is_killed(repository, installation, tmp_path):
    supervisor, run, _ = start_elsewhere(repository, installation, tmp_path / "state")
    assert len(run.processes()) == 2
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: is_clean(run))


def has_ended(process: int) -> bool:
    """Whether a process is gone, or a zombie, which holds nothing any more."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_the_next_start_clears_what_a_wholesale_kill_left(repository, installation, tmp_path, make):
    supervisor, run, guard = start_elsewhere(repository, installation, tmp_path / "state", mode="stubborn")
    for process in (guard, supervisor.pid):
        os.kill(process, signal.SIGKILL)
    supervisor.wait()
    wait_until(lambda: has_ended(guard))  # A kill is not waited for, and until its end the guard holds the run's lock.
    assert len(run.processes()) == 2  # it ignores the SIGTERM that the guard's death sends it
    with make():
        assert is_clean(run)


def test_sweeping_leaves_running_servers_alone(make, tmp_path):
    with make() as triton:
        assert sweep(tmp_path / "state") == []
        assert len(triton.run.processes()) == 2


def test_a_run_is_swept_once_nobody_holds_its_lock(tmp_path):
    run, lock = open_run(tmp_path)
    region = Path("/dev/shm", f"{run.shared_memory_prefix}left-over")
    region.write_bytes(b"0")
    assert sweep(tmp_path) == []
    os.close(lock)
    assert sweep(tmp_path) == [run]
    assert not region.exists()


def said_by(triton: TritonServer) -> list[str]:
    return triton.log.read_text().splitlines()


def test_engines_drain_before_the_server_is_told_to_stop(make):
    with make(mode="busy", drain_seconds=30.0) as triton:
        wait_until(lambda: [(engine.healthy, engine.reason) for engine in triton.engines()] == [(True, "")])
    assert said_by(triton) == ['asked to drain: {"grace_s": 30.0}', "drained", "told to stop"]
    assert is_clean(triton.run)


def test_whoever_is_in_a_hurry_cuts_the_drain_short(make):
    with make(mode="endless", drain_seconds=600.0) as triton:
        wait_until(triton.engines)
        stopping = threading.Thread(target=triton.stop)
        stopping.start()
        wait_until(lambda: said_by(triton) == ['asked to drain: {"grace_s": 600.0}'])
        time.sleep(0.2)
        assert stopping.is_alive()
        triton.hurry()
        stopping.join(10)
        assert said_by(triton)[1:] == ["told to stop"]
    assert is_clean(triton.run)


def test_a_server_that_dies_amid_its_drain_is_not_waited_for(make):
    with make(mode="endless", drain_seconds=600.0) as triton:
        wait_until(triton.engines)
        stopping = threading.Thread(target=triton.stop)
        stopping.start()
        wait_until(lambda: said_by(triton))
        os.kill(triton.process_id, signal.SIGKILL)
        stopping.join(10)
        assert not stopping.is_alive()
    assert is_clean(triton.run)


def test_an_engine_that_stays_ill_ends_the_server_for_a_new_one(make):
    with make(mode="ill", drain_seconds=600.0) as triton:
        wait_until(triton.engines)
        trouble = cli._wait_for_trouble(triton, patience=0.5)
        assert "has not been healthy for" in trouble
        assert "no luck" in trouble
        assert triton.wait(10) is not None
    assert is_clean(triton.run)


@pytest.mark.parametrize("mode", ["busy", "worker", "stubborn worker"])
def test_a_models_process_that_is_killed_ends_the_server(make, mode):
    with make(mode=mode, drain_seconds=600.0) as triton:
        files = [triton.run.directory / "engines", triton.run.directory / "workers"]
        wait_until(lambda: any(path for folder in files for path in folder.glob("*.json")))
        assert triton.dead() == []
        (stub,) = (int(path.stem) for folder in files for path in folder.glob("*.json"))
        os.kill(stub, signal.SIGKILL)
        trouble = cli._wait_for_trouble(triton, patience=None)
        assert f"a model's process died ({stub})" in trouble
        began = time.monotonic()
        assert triton.wait(10) is not None
        assert time.monotonic() - began < 8, "it waited for requests that do not end any more"
    assert is_clean(triton.run)


def test_the_server_runs_on_a_copy_that_nobody_changes(make, repository):
    (repository / "one" / "1" / "__pycache__").mkdir(parents=True)
    (repository / "one" / "1" / "model.py").write_text("")
    with make() as triton:
        copied = triton.run.models / "one"
        (repository / "one" / "config.pbtxt").write_text("changed")
        assert (copied / "config.pbtxt").read_text() == 'name: "one"'
        assert (copied / "1" / "__pycache__").is_file(), "Python must not be able to write beside the model's code"


def settings_of(*arguments: str) -> dict[str, object]:
    return dict(cli._options(cli.build_parser().parse_args(["serve", *arguments])).settings)


def test_settings_of_the_environment_count_and_those_of_the_command_line_go_before(monkeypatch, tmp_path):
    (tmp_path / "config.json").touch()
    monkeypatch.delenv("WICORE_MODEL", raising=False)
    monkeypatch.setenv("WICORE_SETTINGS", json.dumps({"model": str(tmp_path), "max_running": 16, "threads": 2}))
    expected = {"model": str(tmp_path), "max_running": 8, "threads": 2}
    assert settings_of("--set", "max_running=8") == expected
    demo = str(cli.DEMO_MODEL)
    assert settings_of("--model", demo)["model"] == demo
    assert settings_of("--set", f"model={demo}", "--device", "cpu") == expected | {
        "model": demo,
        "max_running": 16,
        "device": "cpu",
    }
    monkeypatch.setenv("WICORE_SETTINGS", "")
    assert settings_of() == {"model": demo}


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_an_environment_that_is_no_object_is_refused_before_anything_is_started(text, monkeypatch):
    monkeypatch.setenv("WICORE_SETTINGS", text)
    with pytest.raises(ServerStartError, match="WICORE_SETTINGS"):
        settings_of()


def test_one_thing_that_is_said_twice_is_refused(capsys):
    with pytest.raises(SystemExit):
        settings_of("--device", "cpu", "--set", "device=cuda")
    assert "--device and --set device=... say the same" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon", "100000"])
def test_a_drain_that_is_no_time_is_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["serve", f"--drain={seconds}"])
    assert "is not a number of seconds" in capsys.readouterr().err
