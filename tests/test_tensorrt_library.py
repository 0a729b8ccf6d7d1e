"""The libraries: found or not, where they differ, and that the real one has every name that is used of it."""

import ast
import gc
import inspect
import logging
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import stand_in_tensorrt as stand_in
from wicore_backend.errors import ExecutorError
from wicore_backend.executor.tensorrt import library as library_module
from wicore_backend.executor.tensorrt.library import (
    Installed,
    LibraryName,
    installed_libraries,
    load_library,
    messages_of,
)

PACKAGE = Path(library_module.__file__).parent

OBJECTS = {
    "api": "",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "opened.engine": "ICudaEngine",
    "context": "IExecutionContext",
    "bound.context": "IExecutionContext",
    "config": ("IRuntimeConfig", "IBuilderConfig"),
    "self._cache": "IRuntimeCache",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "made": "IOptimizationProfile",
    "layer": "ILayer",
    "self._library.api": "",
    "library.api": "",
}
"""What variables stand for in the modules that talk to the library: its module, or an object of a class of its."""
OURS = {"layer.get", "error.strerror"}
"""Of variables that stand for something else in another function."""
MODULES = ("building", "contexts", "inspection", "kernel_cache", "loading")


@pytest.fixture(scope="module")
def real():
    return load_library("tensorrt_rtx")


def uses():
    """Every variable and attribute that is read, called or set of the library's objects, and in which module."""
    for name in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.Attribute):
                variable = ast.unparse(node.value)
                if variable in OBJECTS and f"{variable}.{node.attr}" not in OURS:
                    yield variable, node.attr, name


def test_every_name_that_is_used_is_the_real_librarys(real):
    found = set()
    for variable, attribute, module in uses():
        kinds = OBJECTS[variable]
        owners = [getattr(real.api, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind]
        assert any(hasattr(owner, attribute) for owner in owners or [real.api]), f"{module}: {variable}.{attribute}"
        found.add(f"{variable}.{attribute}")
    expected = {
        "runtime.deserialize_cuda_engine",
        "bound.context.execute_async_v3",
        "bound.context.set_tensor_address",
        "bound.context.set_input_shape",
        "context.set_device_memory",
        "config.set_execution_context_allocation_strategy",
        "engine.get_tensor_profile_shape",
        "builder.build_serialized_network",
    }
    assert expected <= found
    assert len(found) > 50


def test_enums_have_the_members_that_are_used(real):
    for text in (path.read_text() for path in PACKAGE.glob("*.py")):
        for owner, member in re.findall(r"\bapi\.(\w+)\.([A-Z][A-Z0-9_]+)\b", text):
            assert hasattr(getattr(real.api, owner), member), f"{owner}.{member}"


def test_the_stand_in_has_no_name_that_the_real_one_lacks(real):
    """What the executor's tests prove on it must be there, with as many arguments."""
    compared = 0
    for name, ours in vars(stand_in).items():
        if not isinstance(ours, type) or not hasattr(real.api, name):
            continue
        theirs = getattr(real.api, name)
        for member, value in vars(ours).items():
            if member.startswith("_") or member in ("logger", "compiled"):
                continue
            assert hasattr(theirs, member), f"{name}.{member}"
            if inspect.isfunction(value):
                signatures = _signatures(getattr(theirs, member), member)
                wanted = [p for p in inspect.signature(value).parameters if p != "self"]
                if name == "ICudaEngine" and member == "create_execution_context":
                    assert {tuple(s) for s in signatures} == {("strategy",), ("runtime_config",)}
                elif name != "ILogger":
                    assert wanted in signatures, f"{name}.{member}: {wanted} is not one of {signatures}"
                compared += 1
    assert compared > 25


def _signatures(function, name):
    """Names of the arguments in each overload, as pybind11 wrote them into the docstring."""
    found = re.findall(rf"{name}\(self: [\w.]+(?:, )?(.*?)\) ->", function.__doc__)
    return [re.findall(r"(?:^|, )(\w+): ", re.sub(r"\[[^\]]*\]|<.*?>", "", arguments)) for arguments in found]


def test_the_real_values_are_the_stand_ins(real):
    for name in ("EngineInvalidityDiagnostics", "EngineValidity", "TensorIOMode", "LayerInformationFormat"):
        theirs = getattr(real.api, name).__members__
        for member, value in getattr(stand_in, name).__members__.items():
            assert int(theirs[member]) == int(value), f"{name}.{member}"
    assert [s.name for s in stand_in.ILogger.Severity] == list(real.api.ILogger.Severity.__members__)


def test_types_are_pytorchs(real):
    data = real.api.DataType
    assert real.dtype(data.BF16) is torch.bfloat16
    assert real.dtype(data.HALF) is torch.float16
    assert real.dtype(data.FLOAT) is torch.float32
    assert real.dtype(data.INT64) is torch.int64
    assert real.dtype(data.INT4) == "INT4", "PyTorch has no such type"


def test_the_real_library_builds_for_cards_that_are_not_there(real):
    assert real.builds_for_other_cards
    assert real.configures_contexts
    assert not real.times_kernels
    assert real.target("sm89") == real.api.ComputeCapability.SM89
    able = "sm75, sm80, .*sm89, sm120, sm121"
    for wrong in ("sm90", "current", "none", "SM89"):
        with pytest.raises(ExecutorError, match=rf"cannot build for {wrong}, only for {able}; for others"):
            real.target(wrong)


def test_tensorrt_itself_is_what_it_lacks():
    plain = stand_in.library(rtx=False)
    assert not plain.builds_for_other_cards
    assert not plain.configures_contexts
    assert plain.times_kernels


@pytest.fixture
def installed(monkeypatch):
    """What `import` finds, by name: a version, or an error."""
    there = {}

    def import_module(name):
        if name not in there:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if isinstance(there[name], Exception):
            raise there[name]
        return SimpleNamespace(__version__=there[name])

    monkeypatch.setattr(library_module, "import_module", import_module)
    return there


def test_a_library_that_is_missing_says_how_to_get_it(installed):
    with pytest.raises(ExecutorError, match=r"no tensorrt_rtx library here; for tensorrt_rtx: pip install 'wicore\["):
        load_library("tensorrt_rtx")
    with pytest.raises(ExecutorError, match=r"no tensorrt library here; for tensorrt: use an image of NVIDIA's"):
        load_library("tensorrt")
    with pytest.raises(ExecutorError, match=r"no tensorrt or tensorrt_rtx library here; for tensorrt: .*, or for"):
        load_library()
    installed["tensorrt_rtx_bindings"] = "1.7"
    assert load_library().name is LibraryName.TENSORRT_RTX
    installed["tensorrt_bindings"] = "10.13"  # As Dockerfile.triton has them, beside the image's library.
    assert str(load_library()) == "tensorrt 10.13"
    installed["tensorrt"] = "10.16"
    assert str(load_library()) == "tensorrt 10.16"
    installed["tensorrt_rtx"] = "1.8"
    assert str(load_library("tensorrt_rtx")) == "tensorrt_rtx 1.8"


@pytest.mark.parametrize(
    "error",
    [
        OSError("libnvinfer.so.10: cannot open shared object file"),
        ImportError("libcuda.so.1 is too old"),
        ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"),
    ],
)
def test_a_library_that_does_not_load_says_why(installed, error):
    installed["tensorrt"] = error
    with pytest.raises(ExecutorError, match=f"tensorrt does not load: {re.escape(str(error))}"):
        load_library("tensorrt")


def test_what_the_library_says_is_logged_and_its_errors_kept(real, caplog):
    messages = messages_of(real.api)
    severity = real.api.ILogger.Severity
    with caplog.at_level(logging.DEBUG):
        messages.logger.log(severity.ERROR, "  a bad thing \n")
        messages.logger.log(severity.WARNING, "a doubtful thing")
        messages.logger.log(severity.INFO, "Total Activation Memory: 4096 bytes")
        messages.logger.log(severity.INFO, "Total Weights Memory: 77 bytes")
        messages.logger.log(severity.VERBOSE, "chatter")
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING", "DEBUG", "DEBUG"]
    assert (messages.activations, messages.weights) == ([4096], [77])
    assert messages.errors() == "a bad thing"
    assert messages.errors() == "the library logged no error", "told once"


def test_all_users_of_a_library_share_its_one_logger_and_each_hears_it_while_it_listens(real):
    """The library knows the first logger that it is given, and no other."""
    severity = real.api.ILogger.Severity
    first = messages_of(real.api)
    first.logger.log(severity.ERROR, "a bad thing")
    second = messages_of(real.api)
    assert second.logger is first.logger
    second.logger.log(severity.INFO, "Total Weights Memory: 5 bytes")
    assert (first.weights, second.weights) == ([5], [5])
    assert second.errors() == "the library logged no error", "it was said before"
    assert first.errors() == "a bad thing"
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None, "a model that is gone is not told any more"


def test_a_users_errors_are_those_of_its_own_thread_and_others_only_where_it_has_none(real):
    messages, severity = messages_of(real.api), real.api.ILogger.Severity

    def log(text):
        messages.logger.log(severity.ERROR, text)

    for texts in (["mine", "theirs"], ["theirs"]):
        for text in texts:
            if text == "mine":
                log(text)
            else:
                thread = threading.Thread(target=log, args=(text,))
                thread.start()
                thread.join()
        assert messages.errors() == ("mine" if "mine" in texts else "on another thread: theirs; theirs")


def test_a_broken_library_is_told_beside_those_that_load(installed, caplog):
    assert installed_libraries() == Installed((), ())
    installed["tensorrt_rtx"] = "1.8"
    installed["tensorrt"] = OSError("libnvinfer.so.10: cannot open shared object file")
    found = installed_libraries()
    assert [str(library) for library in found.libraries] == ["tensorrt_rtx 1.8"]
    assert found.broken == ("tensorrt does not load: libnvinfer.so.10: cannot open shared object file",)
    assert load_library().name is LibraryName.TENSORRT_RTX
    assert "tensorrt does not load: libnvinfer.so.10" in caplog.text
    assert "tensorrt_rtx 1.8 serves in its place" in caplog.text
    installed["tensorrt"] = AttributeError("partially initialized module")
    assert installed_libraries().broken == ("tensorrt does not load: partially initialized module",)


def test_nothing_of_the_library_is_loaded_before_it_is_asked_for():
    code = "import wicore_backend.executor.tensorrt.executor, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if name.startswith(("tensorrt", "onnx"))]
