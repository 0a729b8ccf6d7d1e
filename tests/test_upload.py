"""Tensors read from files in pieces are those that were written, whatever their sizes; broken files say so."""

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wicore_backend.errors import CheckpointError
from wicore_backend.models.gemma3 import upload
from wicore_backend.models.gemma3.upload import StoredTensor, Uploader, stored_tensors

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
        [again] = stored(tmp_path / "other", [whole])
        into = torch.empty(100_000)
        uploader.copy(again, into)
        assert torch.equal(into, whole)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with Uploader(CPU) as uploader, pytest.raises(CheckpointError, match="gone cannot be opened"):
        uploader.copy(StoredTensor(tmp_path / "gone", 0, (1,), torch.float32), torch.empty(1))
