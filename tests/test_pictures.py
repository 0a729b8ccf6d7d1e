"""Pictures are encoded once while they are remembered, whoever asks and in whatever order, and alike every time."""

import random
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch

from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.pictures import MAX_BATCH, Picture, PictureEncoder
from wicore_backend.engine.request import Deadlines, FinishReason
from wicore_backend.engine.vision_graphs import BATCHES, VisionGraphs
from wicore_backend.executor.tensorrt.profiles import profiles_for
from wicore_backend.processor.images import PixelNormalization, digest
from wicore_backend.processor.prompt import PromptImage

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "models" / "wicore-demo"
PICTURE = (ROOT / "client" / "wicore_client" / "assets" / "shapes.png").read_bytes()
SIDE, TOKENS, HIDDEN = 8, 4, 6
PICTURE_BYTES = TOKENS * HIDDEN * 4
NORMALIZATION = PixelNormalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
MAP = torch.from_numpy(np.random.default_rng(0).normal(size=(3 * SIDE * SIDE, TOKENS * HIDDEN)).astype(np.float32))


class Tower:
    """Notes the sizes of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def vision(self, pixels: Any) -> Any:
        self.batches.append(len(pixels))
        return (pixels.flatten(1) @ MAP).view(-1, TOKENS, HIDDEN)


class Recorder:
    """`Record` without a device: the work is done anew into the memory that the first results are in."""

    def __init__(self, *, fails_at: int) -> None:
        self._fails_at = fails_at

    def __call__(self, work):
        results = work()
        if len(results.tokens) == self._fails_at:
            raise torch.OutOfMemoryError("no room")

        return Again(work, results)


class Again:
    """Work that has been recorded."""

    def __init__(self, work, results) -> None:
        self._work = work
        self._results = results

    def __call__(self):
        self._results.tokens.copy_(self._work().tokens)
        return self._results

    def lend(self) -> None:
        """Nobody else works in this memory."""


def picture(seed: int, tenant: str = "") -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)
    return Picture(tenant, PromptImage(0, TOKENS, pixels, digest(pixels)))


def expected(pictures: list[Picture]) -> Any:
    pixels = NORMALIZATION.apply(np.stack([p.image.pixels for p in pictures]))
    return Tower().vision(torch.from_numpy(pixels)).flatten(0, 1)


def encoder(tower: Tower, pictures: int) -> PictureEncoder:
    """One that remembers so many pictures."""
    return PictureEncoder(
        tower.vision, NORMALIZATION, device=CPU, dtype=torch.float32, cache_bytes=pictures * PICTURE_BYTES
    )


@pytest.mark.parametrize("remembered", [0, 1, 5, 100])
def test_any_sequence_of_questions_gets_the_tokens_of_its_pictures(remembered):
    rng = random.Random(remembered)
    tower = Tower()
    ours = encoder(tower, remembered)
    asked = 0
    for _ in range(40):
        pictures = [picture(rng.randrange(8), rng.choice(["", "other"])) for _ in range(rng.randrange(1, 6))]
        torch.testing.assert_close(ours.soft_tokens(pictures), expected(pictures))
        asked += len(pictures)
    assert ours.encoded == sum(tower.batches)
    assert ours.encoded <= (16 if remembered == 100 else asked)


def test_a_picture_that_comes_again_is_not_encoded_again_and_twice_in_a_step_once():
    tower = Tower()
    ours = encoder(tower, 4)
    ours.soft_tokens([picture(1), picture(1), picture(2)])
    ours.soft_tokens([picture(2), picture(1)])
    assert tower.batches == [2]
    assert ours.hits == 3


def test_another_tenants_picture_is_no_shortcut():
    tower = Tower()
    ours = encoder(tower, 4)
    ours.soft_tokens([picture(1, "one")])
    ours.soft_tokens([picture(1, "two")])
    assert tower.batches == [1, 1]


def test_the_one_unused_for_longest_is_forgotten_first():
    tower = Tower()
    ours = encoder(tower, 2)
    for seed in (1, 2, 1, 3):
        ours.soft_tokens([picture(seed)])
    tower.batches.clear()
    ours.soft_tokens([picture(1)])
    ours.soft_tokens([picture(3)])
    assert tower.batches == []
    ours.soft_tokens([picture(2)])
    assert tower.batches == [1]


def test_many_pictures_go_through_in_batches():
    tower = Tower()
    pictures = [picture(seed) for seed in range(2 * MAX_BATCH + 1)]
    torch.testing.assert_close(encoder(tower, 0).soft_tokens(pictures), expected(pictures))
    assert tower.batches == [MAX_BATCH, MAX_BATCH, 1]


def test_the_towers_engines_are_built_for_as_many_pictures_as_go_through_it_at_once():
    profiles = profiles_for(max_running=8, max_batch_tokens=512)
    assert {profile.images.max for profile in profiles} == {MAX_BATCH}


@pytest.mark.parametrize("fails_at", [0, 1, MAX_BATCH])
def test_graphs_of_the_tower_take_any_number_of_pictures(fails_at):
    tower = Tower()
    graphs = VisionGraphs(tower.vision, Recorder(fails_at=fails_at))
    graphs.prepare(torch.zeros(3, SIDE, SIDE))
    for count in range(1, MAX_BATCH + 2):
        pixels = torch.randn(count, 3, SIDE, SIDE)
        first, expected = graphs(pixels), Tower().vision(pixels)
        graphs(torch.randn(count, 3, SIDE, SIDE))
        torch.testing.assert_close(first, expected)  # It is the caller's own, whatever comes after.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
@torch.inference_mode()
def test_beside_other_work_and_as_graphs_the_tokens_are_the_same():
    from wicore_backend.engine.recording import CudaRecorder

    cuda = torch.device("cuda")
    weights = MAP.to(cuda)

    def encode(pixels):
        return (pixels.flatten(1) @ weights).view(-1, TOKENS, HIDDEN)

    graphs = VisionGraphs(encode, CudaRecorder(cuda))
    graphs.prepare(torch.zeros(3, SIDE, SIDE, device=cuda))
    assert graphs._graphs.keys() == set(BATCHES)
    ours = PictureEncoder(graphs, NORMALIZATION, device=cuda, dtype=torch.float32, cache_bytes=6 * PICTURE_BYTES)
    rng = random.Random(0)
    for _ in range(200):
        pictures = [picture(rng.randrange(9)) for _ in range(rng.randrange(1, 12))]
        ours.foresee("a request", pictures[: rng.randrange(3)])
        torch.cuda._sleep(rng.randrange(200_000))
        torch.testing.assert_close(ours.soft_tokens(pictures).cpu(), expected(pictures), rtol=1e-3, atol=1e-3)
    assert ours.hits > 100


def ahead(tower: Tower, pictures: int) -> PictureEncoder:
    """One that encodes ahead, though on a CPU that is beside nothing, and remembers so many pictures."""
    ours = encoder(tower, pictures)
    ours._ahead = True
    return ours


def test_what_is_encoded_ahead_is_not_encoded_again_when_it_is_asked_for():
    tower = Tower()
    ours = ahead(tower, 4)
    ours.foresee("a", [picture(1), picture(2), picture(3)])  # As far as half the cache has room.
    assert tower.batches == [1, 1]
    torch.testing.assert_close(ours.soft_tokens([picture(1), picture(2)]), expected([picture(1), picture(2)]))
    assert tower.batches == [1, 1]
    ours.foresee("b", [picture(4)])  # Those two are awaited no more.
    assert tower.batches == [1, 1, 1]


def test_pictures_of_a_request_that_ended_before_its_turn_make_room_for_the_next():
    tower = Tower()
    ours = ahead(tower, 4)
    ours.foresee("gone", [picture(1), picture(2)])
    ours.foresee("next", [picture(3)])
    assert tower.batches == [1, 1]  # There is no room to look ahead for the next, ...
    ours.forget("gone")
    ours.foresee("next", [picture(3), picture(4)])
    assert tower.batches == [1, 1, 1, 1]  # ... until nobody awaits the others any more.
    ours.soft_tokens([picture(5)])
    ours.soft_tokens([picture(3), picture(4)])
    assert tower.batches == [1, 1, 1, 1, 1]  # What nobody asked for has left first.


def test_what_another_request_awaits_too_stays():
    tower = Tower()
    ours = ahead(tower, 6)
    for owner, seed in (("b", 1), ("a", 2), ("b", 2)):
        ours.foresee(owner, [picture(seed)])
    ours.forget("a")
    for seed in (3, 4, 5, 6, 7):  # One more than there is room for: the oldest leaves.
        ours.soft_tokens([picture(seed)])
    tower.batches.clear()
    ours.soft_tokens([picture(2)])
    assert tower.batches == []


def test_a_new_requests_unseen_pictures_are_encoded_ahead_and_a_fault_in_that_costs_nothing(monkeypatch):
    asked = [
        {"type": "text", "text": "a long story " * 40},
        {"type": "image"},
        {"type": "text", "text": "Describe it."},
    ]
    question = [{"role": "user", "content": asked}]
    params = SamplingParams(max_tokens=8, temperature=0.0)
    with Engine(EngineConfig(model=DEMO_MODEL, device="cpu", dtype="float32")) as engine:
        engine._model = replace(engine._model, overlaps=True)
        foreseen = []

        def foresee(_request, computed):
            foreseen.append(computed)
            raise RuntimeError("no memory for that")

        monkeypatch.setattr(engine._model.runner, "foresee", foresee)
        answers = [engine.generate(question, params, images=[PICTURE]).token_ids for _ in range(2)]
        engine.generate("no picture", params)
    assert answers[0] == answers[1]
    first, second = foreseen
    assert first == 0
    assert second > 100  # What was cached meanwhile, the picture among it.


def test_a_request_that_ends_in_whatever_way_lets_go_of_its_pictures(monkeypatch):
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]}]
    with Engine(EngineConfig(model=DEMO_MODEL, device="cpu", dtype="float32")) as engine:
        engine._model = replace(engine._model, overlaps=True)
        pictures = engine._model.runner._pictures
        monkeypatch.setattr(pictures, "_ahead", True)
        prompt, events = engine.processor.process(question, images=[PICTURE]), Queue()
        request_id = engine.submit(prompt, SamplingParams(max_tokens=1000, ignore_eos=True), sink=events.put)
        engine.cancel(request_id)
        while not hasattr(events.get(timeout=20), "usage"):
            pass
        engine.generate(question, SamplingParams(max_tokens=2), images=[PICTURE])
    assert pictures.encoded == 1
    assert not pictures._awaited


def test_pictures_of_a_request_that_is_turned_away_are_not_encoded(monkeypatch):
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]}]
    with Engine(EngineConfig(model=DEMO_MODEL, device="cpu", dtype="float32")) as engine:
        engine._model = replace(engine._model, overlaps=True)
        foreseen = []
        monkeypatch.setattr(engine._model.runner, "foresee", lambda *of_request: foreseen.append(of_request))
        prompt, events = engine.processor.process(question, images=[PICTURE]), Queue()
        too_soon = Deadlines(first_token_s=1e-9)
        engine.submit(prompt, SamplingParams(max_tokens=2), sink=events.put, deadlines=too_soon)
        assert events.get(timeout=20).reason is FinishReason.REJECTED
        engine.generate("no picture", SamplingParams(max_tokens=2))
    assert not foreseen
