"""Tensors read from files in pieces are those that were written, whatever their sizes; broken files say so."""

import mmap
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wicore_backend.errors import CheckpointError
from wicore_backend.models.gemma3 import upload, weight_file
from wicore_backend.models.gemma3.upload import StoredTensor, Uploader, stored_tensors
from wicore_backend.models.gemma3.weight_file import PAGE, WeightFile

CPU = torch.device("cpu")


def stored(path: Path, tensors: list[torch.Tensor]) -> list[StoredTensor]:
    """`tensors` one after the other in a file, with some bytes between them."""
    places = []
    with path.open("wb") as file:
        for number, tensor in enumerate(tensors):
            file.write(bytes(number % 7))
            places.append(StoredTensor(path, file.tell(), tuple(tensor.shape), tensor.dtype))
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return places


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(upload, "_PIECE_BYTES", 4096)


@pytest.mark.usefixtures("small_pieces")
def test_every_byte_arrives_in_its_type(tmp_path):
    rng = random.Random(0)
    shapes = [(rng.randrange(1, 300), rng.randrange(1, 200)) for _ in range(20)] + [(1,), (2048,), (2049,)]
    tensors = [torch.randn(shape).to(rng.choice([torch.float32, torch.bfloat16, torch.float16])) for shape in shapes]
    read = []
    with Uploader(CPU, progress=read.append) as uploader:
        for place, tensor in zip(stored(tmp_path / "weights", tensors), tensors, strict=True):
            same, wider = torch.empty_like(tensor), torch.empty(tensor.shape, dtype=torch.float32)
            uploader.copy(place, same)
            uploader.copy(place, wider)
            assert torch.equal(same, tensor)
            assert torch.equal(wider, tensor.float())
    assert sum(read) == 2 * sum(tensor.nbytes for tensor in tensors)


def test_the_places_of_a_safetensors_file_are_those_of_the_library(tmp_path):
    tensors = {f"{n}": torch.randint(-100, 100, (n + 1, 3)).to(dtype) for n, dtype in enumerate(upload._TYPES.values())}
    save_file(tensors, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    places = stored_tensors(tmp_path / "weights.safetensors")
    assert places.keys() == tensors.keys()
    with Uploader(CPU) as uploader:
        for name, tensor in tensors.items():
            into = torch.empty_like(tensor)
            uploader.copy(places[name], into)
            assert torch.equal(into.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_ends_early_is_named_and_nothing_writes_into_the_pieces_afterwards(tmp_path):
    path = tmp_path / "weights"
    whole = torch.randn(100_000)
    [place] = stored(path, [whole])
    os.truncate(path, 200_000)
    with Uploader(CPU) as uploader:
        with pytest.raises(CheckpointError, match=r"weights cannot be read at byte .* ends .* bytes before"):
            uploader.copy(place, torch.empty(100_000))
        assert uploader._free.qsize() == len(uploader._pieces)
        [again] = stored(tmp_path / "other", [whole])
        into = torch.empty(100_000)
        uploader.copy(again, into)
        assert torch.equal(into, whole)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with Uploader(CPU) as uploader, pytest.raises(CheckpointError, match="gone cannot be opened"):
        uploader.copy(StoredTensor(tmp_path / "gone", 0, (1,), torch.float32), torch.empty(1))


@pytest.fixture(params=["cached", "on the disk", "of a disk without direct I/O", "not to be written to"])
def bytes_of_a_file(request, tmp_path, monkeypatch):
    """A file's content and its path, with its pages in the page cache or, as far as the kernel lets go of them, not."""
    path, content = tmp_path / "weights", random.Random(0).randbytes(37 * PAGE + 123)
    path.write_bytes(content)
    if request.param != "cached":
        file = os.open(path, os.O_RDWR)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    if request.param == "of a disk without direct I/O":

        def refused(file: int, buffers: list[memoryview], offset: int) -> int:
            if file == opened._direct:
                raise OSError("no such thing")
            return int(real(file, buffers, offset))

        real = os.preadv
        monkeypatch.setattr(weight_file.os, "preadv", refused)
    if request.param == "not to be written to":
        monkeypatch.setattr(weight_file.os, "access", lambda *_: False)
    opened = WeightFile(path)
    yield opened, content
    opened.close()


def test_any_bytes_of_a_file_are_read_wherever_they_are(bytes_of_a_file):
    file, content = bytes_of_a_file
    memory = memoryview(mmap.mmap(-1, 64 * PAGE))
    rng = random.Random(1)
    places = [(0, len(content)), (0, 1), (len(content) - 1, 1), (PAGE - 1, 2), (PAGE, PAGE)]
    places += [(first := rng.randrange(len(content)), rng.randrange(1, len(content) - first + 1)) for _ in range(40)]
    for offset, size in places:
        start = file.read(offset, size, memory)
        assert memory[start : start + size] == content[offset : offset + size]
    with pytest.raises(OSError, match="the file ends"):
        file.read(len(content) - 5, 6, memory)


def test_what_is_not_in_the_page_cache_is_read_past_it(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(64 * PAGE))
    handle = os.open(path, os.O_RDWR)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    file = WeightFile(path)
    if file._direct is None or file._pages.are_there(0, 64 * PAGE):
        pytest.skip("this file system has no direct I/O, or does not let go of its pages")
    file.read(0, 64 * PAGE, memoryview(mmap.mmap(-1, 64 * PAGE)))
    assert not file._pages.are_there(0, 64 * PAGE)
    path.read_bytes()
    assert file._pages.are_there(0, 64 * PAGE)
    file.close()


@pytest.mark.usefixtures("small_pieces")
def test_tensors_that_are_copied_at_once_share_the_pieces(tmp_path):
    tensors = [torch.randn(500 + 77 * n, 130) for n in range(12)]
    places = stored(tmp_path / "weights", tensors)
    into = [torch.empty_like(tensor) for tensor in tensors]
    with Uploader(CPU) as uploader, ThreadPoolExecutor(6) as threads:
        list(threads.map(uploader.copy, places, into))
        assert uploader._free.qsize() == len(uploader._pieces)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(into, tensors, strict=True))
