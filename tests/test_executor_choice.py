"""Which executor a setting stands for on a machine, why, and what is said where it cannot be had."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import stand_in_tensorrt as stand_in
from tests.accuracy import relative_error
from tests.gemma3_driver import Driver, Sequence
from tests.gemma3_random import write_random_checkpoint
from tests.stand_in_engines import StandInCard, write_engines
from wicore_backend.config import EngineConfig
from wicore_backend.engine import executor_loading, executors
from wicore_backend.engine.executor_loading import load_executor
from wicore_backend.engine.executors import (
    Choice,
    ExecutorName,
    FoundEngines,
    choose,
    computing_type,
    engines_directory,
    exported_precision,
    find_engines,
)
from wicore_backend.engine.loading import _computed_in
from wicore_backend.errors import ExecutorError, InvalidArgumentError
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.segments.export import export_segments
from wicore_backend.executor.tensorrt import card, library
from wicore_backend.executor.tensorrt.executor import TensorRTExecutor
from wicore_backend.executor.tensorrt.library import Installed, LibraryName
from wicore_backend.executor.tensorrt.profiles import profiles_for
from wicore_backend.executor.tensorrt.records import EngineKey
from wicore_backend.executor.tensorrt.store import EngineSet
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.quantization.fp8 import quantized_fp8
from wicore_backend.triton.settings import engine_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ENGINES = EngineSet(
    Path("/engines/int4/tensorrt_rtx-1.7-sm89"),
    EngineKey(
        model="0123456789abcdef",
        precision=Precision.INT4,
        library=LibraryName.TENSORRT_RTX,
        version="1.7",
        compute_capability="sm89",
        profiles=profiles_for(max_running=8, max_batch_tokens=512),
    ),
    {},
)


def engines():
    return FoundEngines(ENGINES)


def engines_of_one_of_two_libraries():
    return FoundEngines(ENGINES, ("tensorrt does not load: libnvinfer.so.10: no such file",))


def no_engines():
    raise ExecutorError("there are no TensorRT engines in /engines; build them with scripts/build_engines.py")


def nobody_asks():
    raise AssertionError("looking for engines takes time, and nobody wants them")


@pytest.mark.parametrize(
    ("wanted", "device", "find", "name", "reason"),
    [
        ("torch", CPU, nobody_asks, ExecutorName.TORCH, "executor = 'torch'"),
        ("torch", CUDA, nobody_asks, ExecutorName.TORCH, "executor = 'torch'"),
        ("auto", CPU, nobody_asks, ExecutorName.TORCH, "on a CPU"),
        ("auto", CUDA, no_engines, ExecutorName.TORCH, "no TensorRT engines in /engines"),
        ("auto", CUDA, engines, ExecutorName.TENSORRT, "engines in int4 for sm89 by tensorrt_rtx 1.7: /engines/int4"),
        ("tensorrt", CUDA, engines, ExecutorName.TENSORRT, "executor = 'tensorrt', engines in int4 for sm89"),
        ("auto", CUDA, engines_of_one_of_two_libraries, ExecutorName.TENSORRT, "; tensorrt does not load: libnvinfer."),
        ("onnx", CPU, nobody_asks, ExecutorName.ONNX, "executor = 'onnx'"),
        ("onnx", CUDA, nobody_asks, ExecutorName.ONNX, "executor = 'onnx'"),
    ],
)
def test_the_choice_and_its_reason(wanted, device, find, name, reason):
    choice = choose(wanted, device, find=find, installed=lambda _: True)
    assert choice.name is name
    assert reason in choice.reason
    assert (choice.engines is ENGINES) == (name is ExecutorName.TENSORRT)


@pytest.mark.parametrize(
    ("wanted", "device", "find", "said"),
    [
        ("tensorrt", CPU, nobody_asks, r"needs a CUDA device, and device is cpu; set executor to"),
        ("tensorrt", CUDA, no_engines, r"executor = 'tensorrt': there are no .* in /engines; build them with scripts"),
        ("onnx", CPU, nobody_asks, r"ONNX Runtime is not installed; pip install 'wicore\[onnx\]'"),
    ],
)
def test_what_is_asked_for_and_is_not_there_is_an_error_with_a_remedy(wanted, device, find, said):
    with pytest.raises(ExecutorError, match=said):
        choose(wanted, device, find=find, installed=lambda _: False)


@pytest.mark.parametrize("value", ["tensorflow", "ONNX", 1])
def test_other_names_are_refused_with_those_that_there_are(value):
    with pytest.raises(InvalidArgumentError, match=r"executor.*'auto', 'torch', 'tensorrt' or 'onnx'"):
        EngineConfig(model="/m", executor=value)


@pytest.mark.parametrize(
    ("settings", "device", "precision"),
    [
        ({}, CPU, Precision.FP32),
        ({}, CUDA, Precision.BF16),
        ({"dtype": "float32"}, CUDA, Precision.FP32),
        ({"dtype": "float16"}, CPU, Precision.FP16),
        ({"engine_precision": "fp16"}, CPU, Precision.FP16),
        ({"engine_precision": "int4"}, CUDA, Precision.INT4),
        ({"dtype": "bfloat16", "engine_precision": "fp8"}, CUDA, Precision.FP8),
    ],
)
def test_onnx_computes_in_the_type_of_the_settings(settings, device, precision):
    assert exported_precision(EngineConfig(model="/m", **settings), device) is precision


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype = 'bfloat16': ONNX Runtime multiplies no bfloat16 on a CPU"),
        ({"engine_precision": "int4"}, "engine_precision = 'int4': ONNX Runtime multiplies no bfloat16 on a CPU"),
        ({"dtype": "float32", "engine_precision": "fp16"}, "computes in float16, and dtype = 'float32'"),
    ],
)
def test_onnx_in_a_type_that_it_has_not_is_an_error(settings, said):
    with pytest.raises(ExecutorError, match=said):
        exported_precision(EngineConfig(model="/m", **settings), CPU)


@pytest.fixture
def turing(monkeypatch):
    """A Tesla T10 in this machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T10")


@pytest.mark.usefixtures("turing")
def test_on_a_card_without_bfloat16_nothing_is_computed_in_it_unasked():
    settings = EngineConfig(model="/m")
    assert exported_precision(settings, CUDA) is Precision.FP16
    assert computing_type(Choice(ExecutorName.ONNX, ""), settings, CUDA) is torch.float16
    torch_executor = Choice(ExecutorName.TORCH, "")
    for dtype in ("auto", "bfloat16"):
        with pytest.raises(ExecutorError, match=f"dtype = '{dtype}': Tesla T10 multiplies no bfloat16, and .* set"):
            computing_type(torch_executor, EngineConfig(model="/m", dtype=dtype), CUDA)
    for dtype in ("float16", "float32"):
        assert computing_type(torch_executor, EngineConfig(model="/m", dtype=dtype), CUDA) is getattr(torch, dtype)
    assert computing_type(torch_executor, settings, CPU) is torch.float32


def test_it_is_set_in_a_models_config_or_in_the_environment():
    parameters = {"model": "/m", "executor": "onnx", "engines": "/engines", "engine_precision": "fp32"}
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    settings = engine_config(config, {})
    assert (settings.executor, settings.engines, settings.engine_precision) == ("onnx", Path("/engines"), "fp32")
    assert engine_config(config, {"WICORE_SETTINGS": '{"executor": "torch"}'}).executor == "torch"


def test_each_checkpoint_has_its_own_directory_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directories = set()
    for seed in (1, 2):
        write_random_checkpoint(tmp_path / str(seed) / "tiny", seed=seed)
        directories.add(engines_directory(EngineConfig(model=tmp_path / str(seed) / "tiny")))
    assert len(directories) == 2
    assert {directory.parent for directory in directories} == {tmp_path / "cache" / "wicore"}
    assert all(directory.name.startswith("tiny-") for directory in directories)
    given = EngineConfig(model=tmp_path / "1" / "tiny", engines=tmp_path / "mine")
    assert engines_directory(given) == tmp_path / "mine"


def test_a_user_without_a_home_is_told_to_name_a_directory(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ExecutorError, match=r"has no home directory, .*; set engines to a directory"):
        engines_directory(EngineConfig(model="/m"))


def test_where_no_engine_is_it_is_said_where_was_looked_and_what_builds_them(tmp_path, monkeypatch):
    write_random_checkpoint(tmp_path / "tiny")
    config = Gemma3Config.from_checkpoint(tmp_path / "tiny")
    command = f"build them with python -m scripts.build_engines {tmp_path / 'tiny'}"
    with pytest.raises(ExecutorError, match=f"in {tmp_path / 'mine'}/.*{command}"):
        find_engines(EngineConfig(model=tmp_path / "tiny", engines=tmp_path / "mine"), config, CUDA)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(executors, "checkpoint_fingerprint", nobody_asks)
    with pytest.raises(ExecutorError, match=f"in {tmp_path / 'cache' / 'wicore'}/tiny-.*{command}"):
        find_engines(EngineConfig(model=tmp_path / "tiny"), config, CUDA)


class Card(StandInCard):
    def leave_default_stream(self):
        """A CPU has no other."""


@pytest.fixture
def on_stand_in(monkeypatch):
    """A machine whose card and TensorRT library are the stand-in's."""
    monkeypatch.setattr(card.CudaCard, "of", lambda _: Card())
    monkeypatch.setattr(executors, "installed_libraries", lambda: Installed((stand_in.library(),), ()))
    monkeypatch.setattr(library, "load_library", lambda _: stand_in.library())


@pytest.fixture
def both_libraries(on_stand_in, monkeypatch):  # noqa: ARG001
    both = Installed((stand_in.library(rtx=False), stand_in.library(rtx=True)), ())
    monkeypatch.setattr(executors, "installed_libraries", lambda: both)


@pytest.mark.usefixtures("on_stand_in")
@pytest.mark.parametrize("weights", ["embedded", "inputs"])
@pytest.mark.parametrize("wanted", ["auto", "tensorrt"])
def test_engines_that_fit_are_found_loaded_and_run(tmp_path, monkeypatch, wanted, weights):
    """From the settings to logits, all but the card; weights that engines have within are not read again."""
    write_random_checkpoint(tmp_path / "model", vision={})
    exported = export_segments(tmp_path / "model", tmp_path / "engines" / "fp32", Precision.FP32, weights=weights)
    write_engines(exported, tmp_path / "engines", library=stand_in.library())
    settings = EngineConfig(
        model=tmp_path / "model", engines=tmp_path / "engines", executor=wanted, max_running=8, max_batch_tokens=64
    )
    driver, plain = Driver(settings.model), Driver(settings.model)
    config = driver.config
    read = []
    load_weights = executor_loading.load_weights
    monkeypatch.setattr(executor_loading, "load_weights", lambda *a, **k: read.append(a) or load_weights(*a, **k))

    choice = choose(wanted, CUDA, find=partial(find_engines, settings, config, CUDA))
    dtype = computing_type(choice, settings, CUDA)
    loaded = load_executor(choice, settings, config, device=CPU, dtype=dtype, reserved_bytes=lambda: 0)

    assert choice.name is ExecutorName.TENSORRT
    assert "engines in fp32 for sm89 by tensorrt_rtx" in choice.reason
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = EngineConfig(model=tmp_path / "model", max_running=8, max_batch_tokens=64)
    shutil.copytree(tmp_path / "engines", engines_directory(kept))
    assert find_engines(kept, config, CUDA).engines.directory.is_relative_to(tmp_path / "cache")
    assert (dtype, loaded.multiplies) == (torch.float32, "")
    assert len(read) == (weights == "inputs")
    driver.executor = loaded.executor
    for ours, theirs in zip(*([d.step([(Sequence(list(range(8, 40))), 32)]) for d in (driver, plain)]), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("built_by_rtx", [True, False])
@pytest.mark.usefixtures("both_libraries")
def test_engines_of_either_library_are_found_where_both_are(tmp_path, built_by_rtx):
    write_random_checkpoint(tmp_path / "model")
    exported = export_segments(tmp_path / "model", tmp_path / "engines" / "fp32", Precision.FP32)
    write_engines(exported, tmp_path / "engines", library=stand_in.library(rtx=built_by_rtx))
    settings = EngineConfig(model=tmp_path / "model", engines=tmp_path / "engines", max_batch_tokens=64, max_running=8)
    found = find_engines(settings, Gemma3Config.from_checkpoint(settings.model), CUDA)
    assert found.engines.key.library == ("tensorrt_rtx" if built_by_rtx else "tensorrt")


@pytest.mark.usefixtures("both_libraries")
def test_where_both_libraries_are_the_reason_of_each_is_said(tmp_path):
    write_random_checkpoint(tmp_path / "model")
    exported = export_segments(tmp_path / "model", tmp_path / "engines" / "fp32", Precision.FP32)
    write_engines(exported, tmp_path / "engines", library=stand_in.library(rtx=False))
    settings = EngineConfig(model=tmp_path / "model", engines=tmp_path / "engines", max_batch_tokens=999, max_running=8)
    with pytest.raises(
        ExecutorError,
        match=r"^with tensorrt \d.* are for steps of 64 tokens, and max_batch_tokens = 999; build them: .*--library "
        r"tensorrt .*; with tensorrt_rtx \d.* are for tensorrt instead of tensorrt_rtx, .*--library rtx ",
    ):
        find_engines(settings, Gemma3Config.from_checkpoint(settings.model), CUDA)


_DOES_NOT_LOAD = "tensorrt does not load: libnvinfer.so.10: cannot open shared object file"


@pytest.mark.usefixtures("on_stand_in")
@pytest.mark.parametrize("built_by_rtx", [True, False])
def test_a_library_that_does_not_load_is_said_whatever_is_chosen(tmp_path, monkeypatch, caplog, built_by_rtx):
    """Its engines may be the ones that are there; or those of another serve, and nobody wonders why."""
    one_of_two = Installed((stand_in.library(),), (_DOES_NOT_LOAD,))
    monkeypatch.setattr(executors, "installed_libraries", lambda: one_of_two)
    write_random_checkpoint(tmp_path / "model")
    exported = export_segments(tmp_path / "model", tmp_path / "engines" / "fp32", Precision.FP32)
    write_engines(exported, tmp_path / "engines", library=stand_in.library(rtx=built_by_rtx))
    settings = EngineConfig(model=tmp_path / "model", engines=tmp_path / "engines", max_batch_tokens=64, max_running=8)
    find = partial(find_engines, settings, Gemma3Config.from_checkpoint(settings.model), CUDA)
    chosen = choose("auto", CUDA, find=find)
    assert chosen.name is (ExecutorName.TENSORRT if built_by_rtx else ExecutorName.TORCH)
    assert _DOES_NOT_LOAD in chosen.reason
    assert _DOES_NOT_LOAD in caplog.text
    if built_by_rtx:
        assert _DOES_NOT_LOAD in choose("tensorrt", CUDA, find=find).reason
    else:
        with pytest.raises(ExecutorError, match=rf"for tensorrt instead of tensorrt_rtx; .*; {_DOES_NOT_LOAD}$"):
            choose("tensorrt", CUDA, find=find)


@pytest.mark.usefixtures("on_stand_in")
def test_where_no_library_loads_it_is_said_why_of_each(tmp_path, monkeypatch):
    def import_module(name):
        raise OSError(f"{name}.so: undefined symbol")

    monkeypatch.setattr(library, "import_module", import_module)
    monkeypatch.setattr(executors, "installed_libraries", library.installed_libraries)
    write_random_checkpoint(tmp_path / "model")
    exported = export_segments(tmp_path / "model", tmp_path / "engines" / "fp32", Precision.FP32)
    write_engines(exported, tmp_path / "engines", library=stand_in.library())
    settings = EngineConfig(model=tmp_path / "model", engines=tmp_path / "engines", max_batch_tokens=64, max_running=8)
    find = partial(find_engines, settings, Gemma3Config.from_checkpoint(settings.model), CUDA)
    each = "; ".join(
        f"{name} does not load: {name}.so: undefined symbol"
        for name in ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings")
    )
    assert each in choose("auto", CUDA, find=find).reason
    with pytest.raises(ExecutorError, match=each):
        choose("tensorrt", CUDA, find=find)


@pytest.mark.usefixtures("on_stand_in")
def test_engines_that_do_not_fit_are_passed_over_with_the_reason(tmp_path):
    write_random_checkpoint(tmp_path / "model")
    exported = export_segments(tmp_path / "model", tmp_path / "engines" / "fp32", Precision.FP32)
    write_engines(exported, tmp_path / "engines", library=stand_in.library(), compute_capability="sm120")
    config = Gemma3Config.from_checkpoint(tmp_path / "model")

    def find(**settings):
        given = {"model": tmp_path / "model", "engines": tmp_path / "engines", "max_batch_tokens": 64, "max_running": 8}
        return partial(find_engines, EngineConfig(**given, **settings), config, CUDA)

    choice = choose("auto", CUDA, find=find())
    assert choice.name is ExecutorName.TORCH
    assert "for sm120, and this card, Stand-in RTX, is sm89" in choice.reason
    with pytest.raises(ExecutorError, match=r"executor = 'tensorrt': .* for sm120, and this card.*build_engines"):
        choose("tensorrt", CUDA, find=find())
    write_engines(exported, tmp_path / "engines", library=stand_in.library())
    assert choose("auto", CUDA, find=find()).name is ExecutorName.TENSORRT
    with pytest.raises(
        ExecutorError, match=r"computing in float32, and dtype = 'bfloat16' \('auto' takes any\);.*--precision bf16"
    ):
        choose("tensorrt", CUDA, find=find(dtype="bfloat16"))
    halves = export_segments(tmp_path / "model", tmp_path / "engines" / "fp16", Precision.FP16)
    write_engines(halves, tmp_path / "engines", library=stand_in.library())
    assert find(dtype="float16")().engines.key.precision is Precision.FP16
    assert find()().engines.key.precision is Precision.FP32
    with pytest.raises(ExecutorError, match="in fp32 instead of int4"):
        choose("tensorrt", CUDA, find=find(engine_precision="int4"))


@pytest.mark.usefixtures("on_stand_in")
@pytest.mark.parametrize(
    ("precision", "searched", "name"),
    [
        (Precision.FP32, False, "torch.float32"),
        (Precision.FP16, False, "torch.float16"),
        (Precision.BF16, False, "torch.bfloat16"),
        (Precision.INT4, False, "torch.bfloat16 int4, scales not searched"),
        (Precision.INT4, True, "torch.bfloat16 int4, scales searched"),
        (Precision.FP8, False, "torch.bfloat16 fp8"),
    ],
)
def test_keys_and_values_of_weights_that_were_rounded_have_a_name_of_their_own(precision, searched, name, monkeypatch):
    """On the disk, where an engine of another kind must not take them for its own."""
    key = ENGINES.key.model_copy(update={"precision": precision, "searched": searched})
    found = SimpleNamespace(dtype=precision.activations, recording=None, save_kernels=None)
    monkeypatch.setattr(TensorRTExecutor, "load", lambda *_, **__: found)
    monkeypatch.setattr(executor_loading, "_given", lambda *_, **__: (None, {}))
    choice = Choice(ExecutorName.TENSORRT, "tried", replace(ENGINES, key=key))
    settings = EngineConfig(model=Path("model"))
    given = {"device": CUDA, "dtype": precision.activations, "reserved_bytes": lambda: 0}
    assert _computed_in(load_executor(choice, settings, None, **given)) == name


@pytest.mark.parametrize(("of_fp8", "name"), [(False, "torch.bfloat16"), (True, "torch.bfloat16 fp8 beyond one row")])
def test_keys_and_values_of_rows_that_kernels_round_have_a_name_of_their_own(of_fp8, name, monkeypatch):
    """Neither engines in bfloat16 nor those in FP8 compute the same of an FP8 checkpoint."""
    from wicore_backend.executor import cuda_executor

    plain = torch.ones(16, 16, dtype=torch.bfloat16)
    layer = SimpleNamespace(qkv=plain, out=plain, gate_up=plain, down=quantized_fp8(plain) if of_fp8 else plain)
    weights = SimpleNamespace(text=SimpleNamespace(layers=[layer], head=plain))
    monkeypatch.setattr(executor_loading, "_weights", lambda *_: weights)
    monkeypatch.setattr(cuda_executor, "CudaExecutor", lambda *_, **__: SimpleNamespace(dtype=torch.bfloat16))
    given = {"device": CUDA, "dtype": torch.bfloat16, "reserved_bytes": lambda: 0}
    loaded = load_executor(Choice(ExecutorName.TORCH, "tried"), EngineConfig(model=Path("model")), None, **given)
    assert _computed_in(loaded) == name


# Settings that the chosen executor has no use for, or cannot have.


def test_torch_says_which_settings_are_for_others(tmp_path, caplog):
    write_random_checkpoint(tmp_path, text={"num_hidden_layers": 2})
    settings = EngineConfig(model=tmp_path, device="cpu", engine_precision="int4", host_embeddings=True)
    choice = Choice(ExecutorName.TORCH, "executor = 'torch'")
    config = Gemma3Config.from_checkpoint(tmp_path)
    load_executor(choice, settings, config, device=CPU, dtype=torch.float32, reserved_bytes=lambda: 0)
    assert "host_embeddings is for the executors tensorrt and onnx" in caplog.text
    assert "engine_precision = 'int4' is for the executors tensorrt and onnx: this one computes in torch.float32" in (
        caplog.text
    )


def test_embeddings_stay_in_host_memory_only_where_a_kernel_reads_them_from_there(monkeypatch):
    monkeypatch.setattr(executor_loading, "find_spec", lambda _: None)
    settings = EngineConfig(model=Path("model"), host_embeddings=True)
    with pytest.raises(ExecutorError, match=r"host_embeddings = true: .*; pip install 'wicore\[gpu\]', or set"):
        executor_loading._given(settings, None, CUDA, Precision.BF16, whole=False)
