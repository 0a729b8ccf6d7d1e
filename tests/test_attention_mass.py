"""Attention mass: what a step says of it against the definition in float64, when it is asked for, and its average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gemma3_driver import Driver
from tests.paged_steps import DECODES, GLOBAL_LAYERS, LAYERS, PREFILLS, Checked, Part, Shape, check, parts_with_holes
from wicore_backend.attention import torch_pieces
from wicore_backend.attention.mass_sampling import MassSampling
from wicore_backend.engine.pictures import PictureEncoder
from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.request import Request, Sequence
from wicore_backend.engine.runner import ModelRunner
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.step_time import StepShape
from wicore_backend.hmt.attention_mass import AttentionMass
from wicore_backend.hmt.blocks import BlockManager, PrefixMatch
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.processor.images import PixelNormalization
from wicore_backend.processor.prompt import Prompt

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"

# What a step says.


def check_mass(shape: Shape, parts: list[Part], measured: dict[int, list[int]], *, seed: int = 0) -> Checked:
    """The masses are right, and attention is bit by bit what it is when nobody asks."""
    checked = check(shape, parts, seed=seed, measured=measured)
    assert checked.mass.keys() == checked.expected_mass.keys() == {s for asked in measured.values() for s in asked}
    tolerance = 1e-5 if shape.dtype is torch.float32 else 2e-2
    for sequence, mass in checked.mass.items():
        assert mass.dtype == np.float32
        assert mass.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(mass, checked.expected_mass[sequence], atol=tolerance)
    for asked, not_asked in zip(checked.attended, check(shape, parts, seed=seed).attended, strict=True):
        assert torch.equal(asked, not_asked)
    return checked


def everything(parts: list[Part]) -> dict[int, list[int]]:
    return {layer: list(range(len(parts))) for layer in GLOBAL_LAYERS}


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("heads", [(1, 1), (1, 8), (2, 2), (4, 1)], ids=lambda heads: f"{heads[0]}x{heads[1]}")
@pytest.mark.parametrize("parts", [DECODES, PREFILLS, DECODES + PREFILLS], ids=["decodes", "prefills", "both"])
def test_mass_is_the_share_of_attention_that_falls_on_each_block(
    parts: list[Part], heads: tuple[int, int], softcap: float | None
) -> None:
    check_mass(Shape(kv_heads=heads[0], group_size=heads[1], softcap=softcap), parts, everything(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mass_in_half_precision(dtype: torch.dtype) -> None:
    check_mass(Shape(dtype=dtype), DECODES + PREFILLS, everything(DECODES + PREFILLS))


@pytest.mark.parametrize("part", [Part(0, 1), Part(63, 1), Part(64, 1), Part(0, 600), Part(100, 520, image=(505, 12))])
def test_mass_of_a_sequence_alone_comes_from_its_last_tile(part: Part) -> None:
    check_mass(Shape(kv_heads=1, group_size=1, block_size=16), [part], everything([part]))


def test_a_decode_after_a_strong_key_looks_at_that_key() -> None:
    mass = check_mass(Shape(block_size=1), [Part(2, 1)], {1: [0]}).mass[0]
    assert mass.shape == (3,)
    assert mass.max() > 1.2 * mass.min()  # Random keys are not alike, so equal shares would be a wrong answer.


def test_only_what_is_asked_for_is_measured() -> None:
    assert check(Shape(), DECODES).mass == {}
    checked = check_mass(Shape(), DECODES + PREFILLS, {1: [2], 3: [0, 2, 6]})
    assert sorted(checked.mass) == [0, 2, 6]


def test_decodes_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pieces, "_DECODE_SCRATCH_BYTES", 4096)
    parts = [Part(length, 1) for length in (5, 200, 9, 1, 40, 190, 70)]
    check_mass(Shape(), parts, {1: [0, 1, 4, 5], 3: [5, 6]})


def test_local_layers_have_no_mass_to_give() -> None:
    with pytest.raises(ValueError, match=r"layers \[2\], which are local"):
        check(Shape(), DECODES, measured={2: [0]})


def test_blocks_that_have_left_get_no_mass() -> None:
    parts = [Part(30, 1, gone=frozenset({0, 4})), Part(9, 1), Part(45, 600, gone=frozenset({1, 2, 3}))]
    checked = check_mass(Shape(), parts, everything(parts))
    assert [(mass == 0).nonzero()[0].tolist() for mass in checked.mass.values()] == [[0, 4], [], [1, 2, 3]]


@settings(max_examples=40, deadline=None)
@given(parts=parts_with_holes, block_size=st.sampled_from([1, 3, 16]), seed=st.integers(0, 1000), data=st.data())
def test_mass_in_random_steps(parts: list[Part], block_size: int, seed: int, data: st.DataObject) -> None:
    sequences = st.lists(st.sampled_from(range(len(parts))), min_size=1, unique=True)
    measured = data.draw(st.dictionaries(st.sampled_from(GLOBAL_LAYERS), sequences))
    check_mass(Shape(block_size=block_size), parts, measured, seed=seed)


# When it is asked for.


def sampling(interval: int) -> MassSampling:
    layout = KVLayout.of(LAYERS, block_size=4, kv_heads=1, head_dim=8, window=10, bytes_per_value=4)
    return MassSampling.of(layout, interval=interval)


def test_a_decode_is_measured_every_interval_in_one_global_layer_after_the_other() -> None:
    chosen = [sampling(3).choose([position], []) for position in range(10)]
    assert chosen == [{1: [0]}, {}, {}, {3: [0]}, {}, {}, {1: [0]}, {}, {}, {3: [0]}]


def test_sequences_are_measured_by_their_own_positions() -> None:
    assert sampling(4).choose([7, 8, 12, 13, 16], []) == {1: [1, 4], 3: [2]}


def test_the_end_of_a_prompt_is_measured_in_all_global_layers() -> None:
    assert sampling(4).choose([5, 12], [2, 4]) == {1: [2, 4], 3: [2, 4, 1]}


def test_a_model_without_global_layers_measures_nothing() -> None:
    assert MassSampling((), 1).choose([0, 1], [2]) == {}


def test_an_interval_is_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="interval = 0"):
        MassSampling((1,), 0)


@pytest.fixture(scope="module")
def driver() -> Driver:
    return Driver(DEMO_MODEL, block_size=16, blocks=20)


@torch.inference_mode()
def test_a_runner_gives_the_mass_of_prompts_that_end_and_of_decodes_in_their_turn(driver: Driver) -> None:
    runner = ModelRunner(
        executor=driver.executor,
        attention=driver.attention,
        rotary=driver.rotary,
        pictures=PictureEncoder(
            driver.executor.vision,
            PixelNormalization(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            cache_bytes=0,
        ),
        layout=driver.layout,
    )
    blocks = BlockManager(driver.layout, dict.fromkeys(LayerGroup, 20), max_chunk=64)

    def sequence_of(tokens: int) -> Sequence:
        prompt = Prompt(np.arange(300, 300 + tokens, dtype=np.int32))
        sequence = Sequence(Request("a", prompt, SamplingParams(), lambda _: None, 0.0), max_tokens=50)
        sequence.blocks = blocks.open(None, PrefixMatch(), max_tokens=50, expected_tokens=50)
        return sequence

    def blocks_measured(decodes: list[Sequence], chunks: list[Chunk]) -> dict[int, int]:
        """By row of a step that changes no logits by being measured."""
        for chunk in [*(Chunk(s, s.computed, s.computed + 1) for s in decodes), *chunks]:
            assert blocks.extend(chunk.sequence.running_blocks, chunk.start, chunk.end)
        plan = StepPlan(decodes, chunks, StepShape(0, 0, 0, 0))
        runner.sampling = None
        plain = runner.run(plan)
        assert plain.mass() == {}
        logits = plain.logits([0])
        runner.sampling = MassSampling.of(driver.layout, interval=2)
        output = runner.run(plan)
        assert torch.equal(output.logits([0]), logits)
        for sequence in decodes:
            sequence.computed += 1
            sequence.tokens.append(300)
        masses = output.mass()
        assert all(mass.sum() == pytest.approx(1) for mass in masses.values())
        return {row: len(mass) for row, mass in masses.items()}

    first, second = sequence_of(30), sequence_of(41)
    assert blocks_measured([], [Chunk(first, 0, 30)]) == {0: 2}
    first.computed = 30
    first.tokens.append(300)
    assert blocks_measured([first], [Chunk(second, 0, 20)]) == {0: 2}
    assert blocks_measured([first], [Chunk(second, 20, 41)]) == {1: 3}
    assert blocks_measured([first], []) == {0: 3}
    assert blocks_measured([first], []) == {}


# Its average.


def folded(weight: float, *masses: Any) -> AttentionMass:
    average = AttentionMass(weight=weight)
    for mass in masses:
        average.fold(np.array(mass, np.float32))
    return average


def test_the_average_forgets_at_the_rate_asked_for() -> None:
    average = folded(0.25, [1, 0], [0, 1], [0, 1]).average()
    np.testing.assert_allclose(average, np.array([0.75**2, 1 + 0.75]) / (0.75**2 + 0.75 + 1), rtol=1e-6)
    assert average.dtype == np.float32


def test_a_block_is_judged_from_its_first_measurement_on() -> None:
    grown = folded(0.1, [1.0], [0.5, 0.5], [0.5, 0.3, 0.2])
    assert len(grown) == 3
    assert grown.average()[2] == pytest.approx(0.2)
    assert grown.average()[1] == pytest.approx((0.9 * 0.5 + 0.3) / 1.9)


def test_blocks_that_were_not_visible_keep_their_average() -> None:
    average = folded(0.5, [0.6, 0.4])
    average.fold(np.array([1.0, 0.0, 0.0], np.float32), np.array([True, False, False]))
    np.testing.assert_allclose(average.average(), [(0.5 * 0.6 + 1.0) / 1.5, 0.4, 0], rtol=1e-6)


def test_relative_mass_is_one_for_the_mean_block() -> None:
    relative = folded(0.1, [0.5, 0.25, 0.25, 0]).relative()
    np.testing.assert_allclose(relative, [2, 1, 1, 0], rtol=1e-6)
    assert AttentionMass().relative().shape == (0,)
    assert folded(0.1, [0, 0]).relative().tolist() == [0, 0]


def test_scores_keep_what_a_block_that_matters_may_run_into() -> None:
    average = folded(0.1, [0.05, 0.5, 0.05, 0.2, 0.1, 0.1])
    np.testing.assert_allclose(average.scores(), [0.25, 0.5, 0.25, 0.2, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(average.scores(spread=0.1), [0.05, 0.5, 0.05, 0.2, 0.1, 0.1], rtol=1e-6)
    assert AttentionMass().scores().shape == (0,)


@pytest.mark.parametrize("weight", [0, -0.1, 1.5])
def test_weights_outside_their_range_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight = "):
        AttentionMass(weight=weight)
