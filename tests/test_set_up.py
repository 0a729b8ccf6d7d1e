"""Setting up is done once, done again when its inputs change, and mends what an interruption left."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from scripts.serving import installation
from scripts.serving.cli import build_parser
from scripts.serving.installation import SetUpError, check_python, ensure_environment


@pytest.fixture
def installs(monkeypatch, tmp_path):
    """Replaces the installing of packages; the list of what was installed, and how to make it fail."""

    class Installs(list):
        failure = None

    done = Installs()

    def install(directory, stamp_file, wanted):
        (directory / "bin").mkdir(parents=True, exist_ok=True)
        (directory / "bin" / "python").touch()
        stamp_file.write_text(json.dumps({"complete": False, "fingerprint": "", "extras": []}))
        failure, done.failure = done.failure, None
        if failure:
            raise failure
        done.append(wanted.extras)

    monkeypatch.setattr(installation, "_install", install)
    monkeypatch.setattr(installation, "STATE", tmp_path / "state")
    return done


@pytest.fixture
def environment(tmp_path):
    return tmp_path / "venv"


def test_it_is_done_once(installs, environment):
    ensure_environment(environment, extras={"serve"})
    ensure_environment(environment, extras={"serve"})
    assert installs == [("serve",)]


def test_more_packages_are_added_to_those_that_are_there(installs, environment):
    for extras in ({"serve"}, {"serve", "test"}, {"serve"}):
        ensure_environment(environment, extras=extras)
    assert installs == [("serve",), ("serve", "test")]


def test_a_change_of_its_inputs_does_it_again(installs, environment, monkeypatch):
    ensure_environment(environment, extras={"serve", "test"})
    monkeypatch.setattr(installation, "_fingerprint", lambda: "another")
    ensure_environment(environment, extras={"serve"})
    assert installs == [("serve", "test"), ("serve", "test")]


def test_a_python_that_is_gone_does_it_again(installs, environment):
    ensure_environment(environment, extras={"serve"})
    (environment / "bin" / "python").unlink()
    ensure_environment(environment, extras={"serve"})
    assert len(installs) == 2


def test_an_interrupted_one_starts_over(installs, environment):
    installs.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ensure_environment(environment, extras={"serve"})
    (environment / "half").touch()
    ensure_environment(environment, extras={"serve"})
    assert installs == [("serve",)]
    assert not (environment / "half").exists()


def test_packages_that_do_not_load_are_installed_anew(installs, environment):
    environment.mkdir()
    (environment / "damaged").touch()
    installs.failure = installation._DamagedError("no torch")
    ensure_environment(environment, extras={"serve"})
    assert installs == [("serve",)]
    assert not (environment / "damaged").exists()


def test_a_network_that_is_gone_is_not_taken_for_damage(installs, environment):
    installs.failure = SetUpError("pip failed")
    with pytest.raises(SetUpError, match="pip failed"):
        ensure_environment(environment, extras={"serve"})
    assert installs == []


def test_a_full_disk_is_named_with_what_is_needed(installs, environment, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 2**30))
    with pytest.raises(SetUpError, match=r"packages need 3\.0 GiB or more; .* has 1\.0 GiB left"):
        ensure_environment(environment, extras={"serve"})
    assert installs == []


def test_a_python_without_a_stub_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    with pytest.raises(SetUpError, match=r"Python 3\.11 and 3\.12.*WICORE_PYTHON="):
        check_python()


def test_settings_of_the_command_line_are_json_or_text():
    given = build_parser().parse_args(["serve", "--set", "max_batch_tokens=512", "--set", "dtype=float32"])
    assert given.settings == [("max_batch_tokens", 512), ("dtype", "float32")]


@pytest.mark.parametrize("argument", ["--set=max_batch_tokens", "--http-port=70000", "--grpc-port=-1", "--host"])
def test_wrong_usage_ends_with_code_2(argument, capsys):
    with pytest.raises(SystemExit) as ending:
        build_parser().parse_args(["serve", argument])
    assert ending.value.code == 2
    assert argument.split("=")[0] in capsys.readouterr().err


def test_the_scripts_can_be_run():
    for name in ("serve.sh", "test.sh", "setup.sh"):
        assert Path(installation.ROOT, "scripts", name).stat().st_mode & 0o111
