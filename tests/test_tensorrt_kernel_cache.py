"""Kernels that the TensorRT executor has compiled, on its stand-in: kept, and kept whole."""

import errno
import logging
from pathlib import Path

import pytest

from tests import stand_in_tensorrt as stand_in
from tests.stand_in_engines import write_engines

pytest_plugins = ["tests.tensorrt_fixtures"]
pytestmark = pytest.mark.usefixtures("told_anew")


def test_compiled_kernels_are_kept(model, tmp_path, caplog):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    cache = engines.directory / "kernels.cache"
    model.load(engines)
    first = int(cache.read_bytes().split()[1])
    assert first == stand_in.TOLD.contexts
    model.load(engines)
    assert int(cache.read_bytes().split()[1]) == 2 * first, "it went on with what there was"
    cache.write_bytes(b"of another driver")
    with caplog.at_level(logging.INFO):
        model.load(engines)
    assert "is of another card, driver or library" in caplog.text
    assert int(cache.read_bytes().split()[1]) == first
    executor = model.load(engines, cache=tmp_path / "nowhere" / "kernels.cache")
    assert "cannot be written" in caplog.text
    executor.save_kernels()


def test_a_full_disk_has_no_half_of_the_kernels(model, tmp_path, monkeypatch, caplog):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    before = set(engines.directory.iterdir())

    def half(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    model.load(engines)
    assert "kernels.cache cannot be written: [Errno 28] No space left on device" in caplog.text
    assert set(engines.directory.iterdir()) == before
