"""Before engines are built: what the command refuses, what it estimates, and how builds share memory."""

import dataclasses
import shlex
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from scripts import build_engines
from scripts.engine_build import estimates
from scripts.engine_build.builder import Limits, build_all
from scripts.engine_build.estimates import Part, check_memory, disk_needed, parts
from scripts.random_gemma3 import published_config
from scripts.serving.cli import build_parser
from tests.build_engines_kit import NAMES, arguments, call
from wicore_backend.config import EngineConfig
from wicore_backend.devices.memory import segment_bytes
from wicore_backend.engine import executors
from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind
from wicore_backend.models.gemma3.fingerprint import checkpoint_fingerprint

pytest_plugins = ["tests.build_engines_fixtures"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--target", "sm89", "--library", "rtx"], "--precision is missing; or name a plan: --plan t10x2-4b"),
        (["--plan", "rtx4090-27b", "--target", "sm90"], "--target sm90: --plan rtx4090-27b has sm89"),
        (["--plan", "rtx5090-27b"], "invalid choice: 'rtx5090-27b'"),
        (["--plan", "rtx4090-27b", "--jobs", "0"], "'0' is no whole number above 0"),
        *(
            (["--plan", "rtx4090-27b", "--memory", n], f"'{n}' is no number of GiB above 0")
            for n in ("0", "nan", "inf")
        ),
        (["--plan", "rtx4090-27b", "--max-images", "1"], "'1' is less than 2"),
    ],
)
def test_what_is_typed_wrongly_is_named(model, monkeypatch, capsys, args, said):
    with pytest.raises(SystemExit) as ended:
        call(model, monkeypatch, *args)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--target", "sm90", "--precision", "bf16", "--library", "rtx"], "cannot build for sm90, only for .*sm89"),
        (
            ["--target", "sm90", "--precision", "bf16", "--library", "tensorrt"],
            "no tensorrt library here; for tensorrt: ",
        ),
        (["--inspect"], "has no engines; build them: python -m scripts.build_engines"),
        (
            ["--target", "sm75", "--precision", "bf16", "--library", "rtx"],
            r"--precision bf16: T10 16 GB \(sm75\) multiplies fp16 only; take that",
        ),
        (
            ["--engines", "/dev/null", "--target", "sm89", "--precision", "bf16", "--library", "rtx"],
            "/dev/null/bf16/.* cannot be written to: Not a directory; name another with --engines",
        ),
    ],
)
def test_what_cannot_be_is_said_with_what_can(model, tmp_path, monkeypatch, args, said):
    with pytest.raises(SystemExit, match=said):
        call(model, monkeypatch, "--engines", str(tmp_path), *args)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"build_engines: .*config\.json"):
        call(tmp_path / "none", monkeypatch, *arguments(tmp_path))


def test_a_model_that_a_plan_does_not_fit_is_refused(tmp_path, monkeypatch):
    config = published_config("gemma-3-27b")
    monkeypatch.setattr(build_engines.Gemma3Config, "from_checkpoint", lambda _: config)
    with pytest.raises(SystemExit, match=r"--plan t10x2-4b is for gemma-3-4b, and .* not enough for 65,536 tokens"):
        call(tmp_path, monkeypatch, "--plan", "t10x2-4b")
    short = dataclasses.replace(config, text=dataclasses.replace(config.text, max_position_embeddings=32_768))
    monkeypatch.setattr(build_engines.Gemma3Config, "from_checkpoint", lambda _: short)
    with pytest.raises(SystemExit, match=r"sequences of 98,304 tokens, and .* has 32,768 positions; take another plan"):
        call(tmp_path, monkeypatch, "--plan", "rtx4090-27b")


def test_disk_and_memory_are_looked_at_before_anything_is_built(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimates, "free_bytes", lambda _: 10**6)
    with pytest.raises(SystemExit, match=r"will take up to \d MB, and its disk has 1 MB free; make room"):
        call(model, monkeypatch, *arguments(tmp_path))
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"needs about \d.\d GiB of memory to be built, and there are 0.1"):
        call(model, monkeypatch, *arguments(tmp_path, "--memory", "0.1"))
    call(model, monkeypatch, *arguments(tmp_path, "--dry-run"))
    assert "5 of 5 engines to build" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_build_that_is_refused_leaves_no_folders(model, tmp_path, monkeypatch):
    refused = ["--target", "sm89", "--precision", "int4", "--library", "rtx", "--weights", "inputs"]
    with pytest.raises(SystemExit, match="weights in int4 cannot be inputs"):
        call(model, monkeypatch, "--engines", str(tmp_path / "new" / "engines"), *refused)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoints_fingerprint_is_read_once(model, tmp_path, monkeypatch, named):
    """It takes a second for a large one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read = []

    def fingerprint(directory: Path) -> bytes:
        read.append(directory)
        return checkpoint_fingerprint(directory)

    for module in (build_engines, executors):
        monkeypatch.setattr(module, "checkpoint_fingerprint", fingerprint)
    where = ["--engines", str(tmp_path / "mine")] if named else []
    call(model, monkeypatch, *where, "--target", "sm89", "--precision", "bf16", "--library", "rtx", "--dry-run")
    assert read == [model]


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_that_cannot_be_read_is_said_to_be_one(model, tmp_path, monkeypatch, named):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "more.safetensors").mkdir()
    where = ["--engines", str(tmp_path / "mine")] if named else []
    asked = [*where, "--target", "sm89", "--precision", "bf16", "--library", "rtx", "--dry-run"]
    for more in (asked, ["--inspect"]) if not named else (asked,):
        with pytest.raises(SystemExit, match=r"^build_engines: .*model cannot be read: .*Is a directory: .*; name the"):
            call(tmp_path / "model", monkeypatch, *more)


def test_the_27b_in_int4_is_planned_as_its_sizes_are():
    config = published_config("gemma-3-27b")
    planned = parts(config, Precision.INT4, "embedded")
    assert len(planned) == 64
    stored = segment_bytes(config, Precision.INT4)
    assert 16.5e9 < sum(part.engine_bytes for part in planned) < 17.5e9
    largest = max(planned, key=lambda part: part.engine_bytes)
    assert largest.segments == (Segment(SegmentKind.LAST),)
    one = disk_needed(planned, jobs=1, keep_onnx=False)
    assert one == sum(part.engine_bytes for part in planned) + largest.engine_bytes
    assert disk_needed(planned, jobs=1, keep_onnx=True) == 2 * sum(part.engine_bytes for part in planned)
    assert all(part.engine_bytes >= stored[part.segments[0]] for part in planned)
    with pytest.raises(ExecutorError, match="last needs about"):
        check_memory(planned, largest.memory_bytes - 1)
    check_memory(planned, largest.memory_bytes)


def test_builds_run_together_as_far_as_jobs_and_memory_allow(monkeypatch):
    under_way, together = dict[Future[str], Part](), list[list[Part]]()

    def submit(part: Part) -> Future[str]:
        future = Future[str]()
        under_way[future] = part
        return future

    def first_ends(running, **options):
        together.append(list(under_way.values()))
        first = next(iter(under_way))
        first.set_result(under_way.pop(first).name)
        return wait(running, **options)

    monkeypatch.setattr("scripts.engine_build.builder.wait", first_ends)
    some = [Part((Segment(SegmentKind.MID, i),), 1, size, 1.0) for i, size in enumerate((5, 6, 3, 3, 3, 9, 2, 1))]
    done = list(build_all([(part, part) for part in some], Limits(jobs=3, memory=10), submit, lambda _: None))
    assert sorted(name for _, name in done) == sorted(part.name for part in some)
    assert all(part.name == name for part, name in done)
    assert max(sum(part.memory_bytes for part in parts) for parts in together) <= 10
    assert max(map(len, together)) == 3


def test_memory_that_is_gone_when_building_begins_ends_it():
    some = Part((Segment(SegmentKind.FIRST),), 1, 11, 1.0)
    with pytest.raises(ExecutorError, match="first needs about"):
        list(build_all([(some, some)], Limits(memory=10), lambda _: pytest.fail("begun"), lambda _: None))


def test_a_failure_of_one_build_is_that_of_the_command():
    part = Part((Segment(SegmentKind.FIRST),), 1, 1, 1.0)

    def fail(_: object) -> str:
        raise ExecutorError("the library said no")

    with ThreadPoolExecutor(1) as pool, pytest.raises(ExecutorError, match="said no"):
        list(
            build_all(
                [(part, part)],
                Limits(memory=10),
                lambda order: pool.submit(fail, order),
                lambda _: None,
            )
        )


def test_a_plan_stands_for_the_settings_of_building_and_serving(model, tmp_path, monkeypatch, capsys):
    orders = []
    monkeypatch.setattr(build_engines.Build, "run", lambda build, todo, *_: orders.append((build.key, todo)))
    call(model, monkeypatch, "--engines", str(tmp_path), "--plan", "rtx4090-27b", "--max-running", "4")
    ((key, todo),) = orders
    assert (key.precision, key.library, key.compute_capability) == ("int4", "tensorrt_rtx", "sm89")
    assert [profile.tokens.max for profile in key.profiles] == [4, 512]
    assert [part.name for part in todo] == list(NAMES)
    said = capsys.readouterr().out
    for setting in ("executor=tensorrt", "engine_precision=int4", "kv_cache_dtype=fp8", "host_embeddings=true"):
        assert f"--set {setting}" in said
    assert "--set max_running=4" in said
    assert f"--set engines={tmp_path}" in said
    _, *typed = shlex.split(said.split("serve them: ")[1])
    given = build_parser().parse_args(["serve", *typed])
    assert given.model == model
    assert EngineConfig(model=model, **dict(given.settings)).max_model_len == 98_304
