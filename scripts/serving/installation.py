"""Everything a server needs on disk: a virtual environment with the pinned packages, and the server itself.

Both are made once and are safe to ask for again, from several processes at once, and after an interruption: a stamp is
written when a set-up is complete and taken away before the next one begins.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from scripts.serving.console import Step, say

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".wicore"
PYTHONS = ((3, 11), (3, 12))
"""Python versions with both a stub in the server's wheel and a wheel of numpy 1.26.4."""
SERVER_WHEEL = "nvidia-pytriton==0.7.0"
SERVER_VERSION = "2.51.0"
NUMPY = "1.26.4"
"""Triton's Python stub of this server corrupts tensors under numpy 2, without an error."""

_SERVE_EXTRAS = ("serve", "client", "gateway")
_NEEDED_BYTES = {"packages": 3 * 2**30, "server": 512 * 2**20}
"""The packages with PyTorch's CPU build (with CUDA's libraries they take 8 GiB); the server with its wheel."""
_CHECK = (
    "import google.protobuf, grpc, jinja2, numpy, PIL.Image, pydantic, safetensors, sentencepiece, tokenizers, torch, "
    "tritonclient.grpc, tritonclient.http, wicore_backend, wicore_client; print(numpy.__version__)"
)


class SetUpError(Exception):
    """The machine or the network does not allow the set-up; the message says what to do."""


class _DamagedError(SetUpError):
    """The packages are there and do not work."""


@dataclass(frozen=True)
class Installation:
    """An environment and a server that fit together."""

    environment: Path
    """A virtual environment, as `sys.prefix` names it: its Python runs the models."""

    server: Path
    """What the server's wheel calls pytriton/tritonserver."""

    @classmethod
    def of_this_checkout(cls, *, extras: Collection[str] = ()) -> Installation:
        """The environment in .venv and the server in .wicore, set up if they are not.

        Parameters
        ----------
        extras
            Of pyproject.toml, beyond what serving needs: "test".

        Raises
        ------
        SetUpError
            If this machine cannot have them.
        """
        check_python()
        environment = ensure_environment(ROOT / ".venv", extras={*_SERVE_EXTRAS, *extras})
        return cls(environment, ensure_server(environment))

    @classmethod
    def of_this_environment(cls) -> Installation:
        """The environment that is running, as tests have it, and the server in .wicore, fetched if it is not there."""
        return cls(Path(sys.prefix), ensure_server(Path(sys.prefix)))

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"

    def command(self) -> list[str]:
        """The server and the options that tell it where its own parts are."""
        return [
            str(self.server / "bin" / "tritonserver"),
            f"--backend-directory={self.server / 'backends'}",
            f"--cache-directory={self.server / 'caches'}",
        ]

    def variables(self, base: Mapping[str, str]) -> dict[str, str]:
        """Environment variables for the server, whose Python stub finds its packages by the first python on PATH."""
        kept = {name: value for name, value in base.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        libraries = [_python_library_directory(self.python), base.get("LD_LIBRARY_PATH", "")]
        return kept | {
            "PATH": f"{self.environment / 'bin'}{os.pathsep}{base.get('PATH', os.defpath)}",
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1",
        }


def check_python() -> None:
    """Refuse a Python or a machine that the packages are not made for."""
    if sys.version_info[:2] not in PYTHONS:
        raise SetUpError(
            f"Python {platform.python_version()} at {sys.executable} will not do: the server's Python stub and "
            "numpy 1.26.4 go together on Python 3.11 and 3.12. Install one and name it: WICORE_PYTHON=/path/python3.11"
        )
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SetUpError(
            f"tritonserver runs on Linux on x86_64 and aarch64, not on {sys.platform} {platform.machine()}"
        )


@dataclass(frozen=True)
class _Stamp:
    """What the last set-up of an environment left behind."""

    complete: bool
    fingerprint: str
    extras: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> _Stamp | None:
        try:
            values = json.loads(path.read_text())
            return cls(bool(values["complete"]), str(values["fingerprint"]), tuple(map(str, values["extras"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def ensure_environment(directory: Path, *, extras: Collection[str]) -> Path:
    """A virtual environment with the pinned packages, made or mended if need be; returns `directory`."""
    stamp_file = directory / ".wicore-setup.json"
    with _locked("setup"):
        stamp = _Stamp.read(stamp_file) if (directory / "bin" / "python").exists() else None
        there = set(stamp.extras) if stamp and stamp.complete else set()
        if stamp and stamp.complete and stamp.fingerprint == _fingerprint() and there >= set(extras):
            return directory
        wanted = _Stamp(complete=True, fingerprint=_fingerprint(), extras=tuple(sorted(there | set(extras))))
        say("setting up (once; minutes, depending on the network):")
        if stamp and not stamp.complete:
            say("  an earlier set-up was interrupted: starting over")
            shutil.rmtree(directory)
        if not directory.exists():
            _check_space(directory.parent, "packages")
        try:
            _install(directory, stamp_file, wanted)
        except _DamagedError as error:
            say(f"  {error}\n  the environment is damaged: making it anew")
            shutil.rmtree(directory)
            _install(directory, stamp_file, wanted)
        wanted.write(stamp_file)
    return directory


def _install(directory: Path, stamp_file: Path, wanted: _Stamp) -> None:
    python = directory / "bin" / "python"
    if not python.exists():
        with Step(f"virtual environment in {directory}"):
            venv.create(directory, with_pip=True, clear=True)
    replace(wanted, complete=False).write(stamp_file)
    package = f"{ROOT}[{','.join(wanted.extras)}]"
    with Step("packages") as step:
        _pip(python, step, "install", "--constraint", str(ROOT / "constraints.txt"), "--editable", package)
    with Step("looking whether everything loads"):
        outcome = subprocess.run([python, "-P", "-c", _CHECK], capture_output=True, text=True, env=_plain_environment())
    if outcome.returncode != 0:
        raise _DamagedError(f"the packages do not load: {outcome.stderr.strip().splitlines()[-1]}")
    if outcome.stdout.strip() != NUMPY:
        raise _DamagedError(f"numpy is {outcome.stdout.strip()}, the server's Python stub needs {NUMPY}")


def ensure_server(environment: Path) -> Path:
    """The server, unpacked into .wicore with the stub of the environment's Python; returns its directory.

    The wheel is unpacked by hand, for installing it would bring pins of its own into the environment.
    """
    python = environment / "bin" / "python"
    version = _ask(python, "import sys; print('%d.%d' % sys.version_info[:2])")
    target = STATE / f"tritonserver-{SERVER_VERSION}-py{version}"
    server = target / "pytriton" / "tritonserver"
    with _locked("server"):
        if target.exists():
            return server
        _check_space(STATE, "server")
        _check_python_library(python, version)
        with (
            Step(f"tritonserver {SERVER_VERSION}") as step,
            tempfile.TemporaryDirectory(dir=STATE, prefix="unpacking-") as scratch,
        ):
            work = Path(scratch)
            _pip(python, step, "download", "--no-deps", "--dest", str(work), SERVER_WHEEL)
            wheel = next(work.glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                wanted = ("pytriton/tritonserver/", "nvidia_pytriton.libs/", "nvidia_pytriton-")
                archive.extractall(work / "server", [name for name in archive.namelist() if name.startswith(wanted)])
            unpacked = work / "server" / "pytriton" / "tritonserver"
            stub = unpacked / "backends" / "python" / "triton_python_backend_stub"
            shutil.copy(unpacked / "python_backend_stubs" / version / stub.name, stub)
            shutil.rmtree(unpacked / "python_backend_stubs")
            for program in (stub, unpacked / "bin" / "tritonserver"):
                program.chmod(0o755)
            (work / "server").rename(target)
    return server


def _fingerprint() -> str:
    """Of everything that says what the environment must hold."""
    digest = hashlib.sha256(platform.python_version().encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    digest.update(str(ROOT).encode())
    return digest.hexdigest()


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Keep other set-ups of this checkout out; says so if that means waiting."""
    STATE.mkdir(exist_ok=True)
    with (STATE / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this checkout is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_space(directory: Path, what: str) -> None:
    free, needed = shutil.disk_usage(directory).free, _NEEDED_BYTES[what]
    if free < needed:
        raise SetUpError(f"{what} need {needed / 2**30:.1f} GiB or more; {directory} has {free / 2**30:.1f} GiB left")


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _pip(python: Path, step: Step, *arguments: str) -> None:
    """Run pip, showing what takes long; its whole output goes into .wicore/logs/setup.log."""
    command = [str(python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments, "--progress-bar=off"]
    log = STATE / "logs" / "setup.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: list[str] = []
    with (
        log.open("a") as book,
        subprocess.Popen(
            command, env=_plain_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as pip,
    ):
        assert pip.stdout is not None
        try:
            for line in map(str.strip, pip.stdout):
                book.write(f"{line}\n")
                tail = [*tail[-7:], line]
                if line.startswith("Downloading ") and " MB)" in line:
                    step.detail(line)
                elif line.startswith("Installing collected packages"):
                    step.detail(f"installing {line.count(',') + 1} packages")
        except BaseException:
            pip.terminate()
            raise
    if pip.returncode != 0:
        raise SetUpError("\n".join([f"pip failed (all of it is in {log}):", *tail]))


def _ask(python: Path, code: str) -> str:
    asked = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    return asked.stdout.strip()


def _python_library_directory(python: Path) -> str:
    return _ask(python, "import sysconfig; print(sysconfig.get_config_var('LIBDIR') or '')")


def _check_python_library(python: Path, version: str) -> None:
    """The stub is linked to libpython; a Python that was built without it needs the system's."""
    name = f"libpython{version}.so.1.0"
    for candidate in (f"{_python_library_directory(python)}/{name}", name):
        with suppress(OSError):
            ctypes.CDLL(candidate)
            return
    raise SetUpError(
        f"{name} is missing, which the server's Python stub needs: install it (Debian, Ubuntu: apt install "
        f"libpython{version}), or set WICORE_PYTHON to a Python built with --enable-shared and delete .venv"
    )
