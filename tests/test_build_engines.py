"""The command that builds engines: what it leaves on disk, what a kill leaves, what it says of what is there."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import build_engines
from scripts.engine_build import tables
from scripts.engine_build.builder import Build
from scripts.engine_build.estimates import parts
from tests.build_engines_kit import CONFIG, NAMES, arguments, call
from tests.gemma3_random import write_random_checkpoint
from wicore_backend.executor.segments.contract import Precision, segments
from wicore_backend.executor.segments.exclusive import alone_in
from wicore_backend.executor.segments.export import export_segments
from wicore_backend.executor.segments.manifest import SegmentSet
from wicore_backend.executor.tensorrt.building import BuildOptions
from wicore_backend.executor.tensorrt.library import load_library
from wicore_backend.executor.tensorrt.store import EngineStore, Wanted
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.fingerprint import checkpoint_fingerprint

pytest_plugins = ["tests.build_engines_fixtures"]

ROOT = Path(__file__).resolve().parents[1]


def command(model: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "scripts.build_engines", str(model), *args]


def run(model: Path, engines: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(model, *arguments(engines, *more)), cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def built(model, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    engines = tmp_path_factory.mktemp("engines")
    return engines, run(model, engines, "--jobs", "2", "--max-running", "4", "--max-batch-tokens", "96")


def folder(engines: Path) -> Path:
    (found,) = engines.glob("*/*/engines.json")
    return found.parent


def complete(model: Path, engines: Path, *, precision: Precision = Precision.BF16) -> bool:
    library = load_library("tensorrt_rtx")
    wanted = Wanted(
        model=checkpoint_fingerprint(model).hex(),
        precision=precision,
        library=library.name,
        version=library.version,
        compute_capability="sm89",
        card="NVIDIA GeForce RTX 4090",
        max_running=4,
        max_batch_tokens=96,
        segments=tuple(segments(Gemma3Config.from_checkpoint(model))),
    )
    found = EngineStore(engines).find(wanted)
    return all(found.read(record) for record in found.records)


def test_a_build_leaves_a_whole_set_and_nothing_else(model, built):
    engines, done = built
    assert done.returncode == 0, done.stderr
    assert complete(model, engines)
    names = {path.name for path in folder(engines).iterdir()}
    assert names == {"engines.json", *(f"{name}.engine" for name in NAMES)}
    assert not list(engines.rglob("*.onnx"))
    for name in NAMES:
        assert re.search(
            rf"^{name}: [\d.]+ MiB in [\d.]+ \+ [\d.]+ s, [\d.]+ GiB of memory; \d left", done.stderr, re.M
        )
    assert "5 engines built" in done.stdout
    assert f"serve them: scripts/serve.sh --model {model} --set executor=tensorrt" in done.stdout
    assert "--set max_running=4" in done.stdout


def test_engines_are_within_what_was_estimated(model, built):
    config = Gemma3Config.from_checkpoint(model)
    estimated = {part.name: part for part in parts(config, Precision.BF16, "embedded")}
    assert tuple(estimated) == NAMES
    for name, part in estimated.items():
        engine = folder(built[0]) / f"{name}.engine"
        assert part.engine_bytes / 8 < engine.stat().st_size < part.engine_bytes + 2**21


def test_what_is_there_is_not_built_again_and_what_is_damaged_is(model, built, monkeypatch, capsys):
    engines, _ = built
    limits = ["--max-running", "4", "--max-batch-tokens", "96"]
    victim = folder(engines) / "mid_001.engine"
    whole, others = victim.read_bytes(), {p: p.stat().st_mtime_ns for p in folder(engines).glob("*.engine")}
    victim.write_bytes(whole[:-1])
    call(model, monkeypatch, *arguments(engines, *limits, "--dry-run"))
    said = capsys.readouterr().out
    assert re.search(r"1 of 5 engines to build", said)
    assert said.count("there already") == 4
    call(model, monkeypatch, *arguments(engines, *limits))
    assert "1 engines built" in capsys.readouterr().out
    assert complete(model, engines)
    assert {p for p in others if p.stat().st_mtime_ns != others[p]} == {victim}


def test_inspect_tells_what_engines_are_and_which_are_damaged(model, built, monkeypatch, capsys):
    engines, _ = built
    call(model, monkeypatch, "--engines", str(engines), "--inspect")
    said = capsys.readouterr().out
    assert "bf16, weights embedded, tensorrt_rtx" in said
    assert "decode: 1 to 4 tokens (best 4), prompts: 5 to 96 tokens" in said
    for name in NAMES:
        assert re.search(rf"^{name} +[\d.]+ +[\d.]+ +[\d.]+ .*(bfloat16|float32):\d+", said, re.M), name
    assert "hidden[*,128] attention[*," in said
    assert "5 engines" in said
    victim = folder(engines) / "last.engine"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    lost = folder(engines) / "mid_000.engine"
    lost.rename(lost.with_suffix(".away"))
    unreadable = folder(engines).with_name("tensorrt_rtx-1-sm89") / "engines.json"
    unreadable.parent.mkdir()
    unreadable.write_text("[")
    with pytest.raises(SystemExit) as ended:
        call(model, monkeypatch, "--engines", str(engines), "--inspect")
    assert ended.value.code == 1
    said = capsys.readouterr().out
    table, *problems = said.strip().split("\n\n")
    assert re.findall(r"^(\w+) .* DAMAGED$", table, re.M) == ["mid_000", "last"]
    assert "DAMAGED" not in problems[0]
    for problem in (
        "last.engine is damaged: its checksum",
        "mid_000.engine cannot be read",
        f"{unreadable} is no list",
    ):
        assert sum(problem in told for told in problems) == 1, problems
    victim.write_bytes(whole)
    lost.with_suffix(".away").rename(lost)
    unreadable.unlink()
    unreadable.parent.rmdir()


def test_numbers_in_a_table_end_below_each_other():
    table = tables._aligned([("engine", "MiB", "built in"), ("first", "9.5", "1.0 s"), ("last", "1,024.0", "DAMAGED")])
    assert table == [
        "engine      MiB  built in",
        "first       9.5     1.0 s",
        "last    1,024.0   DAMAGED",
    ]


def children(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    own = {int(child) for task in tasks for child in task.read_text().split()}
    return own | {grandchild for child in own for grandchild in children(child)}


def gone(pids: set[int]) -> bool:
    def is_gone(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    return all(map(is_gone, pids))


def waited_for(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def begun(model: Path, engines: Path) -> subprocess.Popen[str]:
    args = arguments(engines, "--max-running", "4", "--max-batch-tokens", "96")
    return subprocess.Popen(command(model, *args), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_kill_at_any_moment_leaves_what_a_next_run_goes_on_with(model, tmp_path):
    """Of the command while a graph is written, then of its worker while an engine is built."""
    process = begun(model, tmp_path)
    graphs = next(iter(tmp_path.glob("*/*")), tmp_path) / "graphs"
    assert waited_for(lambda: any(tmp_path.glob("*/*/graphs/mid_000.*")))
    everybody = children(process.pid)
    process.kill()
    process.communicate()
    assert everybody
    assert waited_for(lambda: gone(everybody)), "a worker outlived the command"
    names = [e["file"] for e in json.loads((folder(tmp_path) / "engines.json").read_bytes())["engines"]]
    assert names == ["first.engine"]
    kept = (folder(tmp_path) / "first.engine").stat()

    process = begun(model, tmp_path)
    assert waited_for(lambda: any(tmp_path.glob("*/*/graphs/last.onnx")))
    for child in children(process.pid):
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(child, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "the process that built last was killed" in said
    assert "run the command again" in said
    assert not graphs.exists()

    done = run(model, tmp_path, "--max-running", "4", "--max-batch-tokens", "96")
    assert done.returncode == 0, done.stderr
    assert "first" not in done.stderr
    assert complete(model, tmp_path)
    assert (folder(tmp_path) / "first.engine").stat().st_ino == kept.st_ino


def test_graphs_that_are_kept_serve_other_engines(model, tmp_path, monkeypatch, capsys):
    limits = ["--max-running", "4", "--max-batch-tokens", "96"]
    call(model, monkeypatch, *arguments(tmp_path, *limits, "--weights", "inputs", "--keep-onnx"))
    there = SegmentSet.read(tmp_path / "bf16")
    assert there.weights == "inputs"
    assert complete(model, tmp_path)
    # All `mid` are one engine, which is given each layer's weights.
    assert {path.name for path in folder(tmp_path).glob("*.engine")} == {
        f"{name}.engine" for name in ("first", "mid_000", "last", "vision")
    }
    assert "4 engines built" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "bf16").glob("*.onnx")}
    call(
        model,
        monkeypatch,
        *("--engines", str(tmp_path), "--target", "sm120", "--precision", "bf16", "--library", "rtx", *limits),
        *("--weights", "inputs"),
    )
    assert len(list(tmp_path.glob("bf16/*-sm120/*.engine"))) == 4
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "bf16").glob("*.onnx")} == before


@pytest.mark.parametrize("given", [[], ["--no-search"]])
def test_engines_and_graphs_whose_scales_were_searched_do_not_mix_with_others(tmp_path, given):
    checkpoint = tmp_path / "model"
    write_random_checkpoint(checkpoint, text={**CONFIG, "num_hidden_layers": 2})
    args = ["--target", "sm89", "--library", "rtx", *given]
    library = load_library("tensorrt_rtx")
    parsed = build_engines._parser().parse_args([str(checkpoint), *args, "--precision", "int4"])
    fingerprint = checkpoint_fingerprint(checkpoint).hex()
    key = build_engines._key(parsed, None, library, fingerprint=fingerprint)
    assert key.searched == (not given)
    plain = build_engines._parser().parse_args([str(checkpoint), *args, "--precision", "bf16"])
    of_plain = build_engines._key(plain, None, library, fingerprint=fingerprint)
    assert not of_plain.searched, "nothing is rounded there"
    build = Build(checkpoint, tmp_path, key, [], options=BuildOptions(), keep_onnx=False, replace=False)
    for search in (True, False):
        export_segments(checkpoint, tmp_path / "int4", Precision.INT4, search=search)
        assert bool(build._graphs()) == (search == key.searched)


def test_two_builds_of_the_same_engines_do_not_mix(model, built):
    engines, _ = built
    (folder(engines) / "vision.engine").rename(folder(engines) / "aside")
    try:
        with alone_in(folder(engines), ".building", wait=False):
            done = run(model, engines, "--max-running", "4", "--max-batch-tokens", "96")
    finally:
        (folder(engines) / "aside").rename(folder(engines) / "vision.engine")
    assert done.returncode == 1
    assert "another process builds in" in done.stderr


def test_graphs_that_are_kept_leave_no_lock_beside_them(model, tmp_path, monkeypatch):
    monkeypatch.setattr(build_engines.Build, "check", lambda *_: None)
    monkeypatch.setattr("scripts.engine_build.builder.build_all", lambda *_: [])
    engines = tmp_path / "engines"
    call(model, monkeypatch, *arguments(engines, "--keep-onnx"))
    assert {path.name for path in engines.rglob("*.onnx")} == {f"{name}.onnx" for name in NAMES}
    assert not list(engines.rglob("*.lock"))
    assert not list(engines.rglob(".building"))
    refused = ["--target", "sm89", "--precision", "int4", "--library", "rtx", "--weights", "inputs", "--keep-onnx"]
    with pytest.raises(SystemExit, match="weights in int4 cannot be inputs"):
        call(model, monkeypatch, "--engines", str(tmp_path / "refused"), *refused)
    assert not (tmp_path / "refused").exists()
