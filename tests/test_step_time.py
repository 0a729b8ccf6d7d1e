"""The step-time model: learns a machine from its steps, shrugs off hiccups, follows changes, never forgets prefill."""

import math
import random
from dataclasses import replace
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.engine.step_time import Coefficients, StepShape, StepTimeModel

GPU = Coefficients(step=12e-3, sequence=110e-6, prefill_token=80e-6, key=33e-9, pair=0.27e-9, mixed=8e-3)
CPU = Coefficients(step=4e-3, sequence=500e-6, prefill_token=300e-6, key=100e-9, pair=60e-9, mixed=2e-3)
MACHINES = pytest.mark.parametrize("machine", [GPU, CPU], ids=["gpu", "cpu"])
SEEDS = pytest.mark.parametrize("seed", range(3))


def decodes(r: random.Random, least: int = 1, most: int = 128) -> StepShape:
    n = r.randint(least, most)
    return StepShape(n, n, sum(r.randint(10, 4000) for _ in range(n)), 0)


def mixed(r: random.Random) -> StepShape:
    shape = decodes(r)
    if r.random() < 0.3:
        return shape.with_prefill(r.randint(1, 2048), r.choice([0, 0, 512, 2048, 8192, 30_000]))
    return shape


def prefill(r: random.Random) -> StepShape:
    return StepShape(1, 1, 50, 0).with_prefill(r.randint(256, 4096), r.choice([0, 2048, 30_000]))


def observe(model, seconds_of, draw, steps, r, *, noise=0.03, spikes=0.02):
    for _ in range(steps):
        shape = draw(r)
        hiccup = r.uniform(5, 50) if r.random() < spikes else 1.0
        model.observe(shape, seconds_of(shape) * max(0.2, r.gauss(1, noise)) * hiccup)


def worst_error(model, seconds_of, draw, r, *, share=1.0) -> float:
    """The largest relative error of predictions, or the one that `share` of them do not exceed."""
    shapes = [draw(r) for _ in range(300)]
    errors = sorted(abs(model.predict(s) / seconds_of(s) - 1) for s in shapes)
    return float(errors[round(share * len(errors)) - 1])


def learnt(machine: Coefficients, r: random.Random, steps: int = 1000) -> StepTimeModel:
    model = StepTimeModel()
    observe(model, machine.seconds, mixed, steps, r)
    return model


@MACHINES
@SEEDS
def test_a_machine_is_learnt_from_noisy_steps_with_spikes(machine, seed):
    r = random.Random(seed)
    model = learnt(machine, r, 2000)
    assert worst_error(model, machine.seconds, mixed, r) < 0.05
    assert worst_error(model, machine.seconds, prefill, r) < 0.05
    assert model.coefficients.step == pytest.approx(machine.step, rel=0.05)
    assert model.coefficients.prefill_token == pytest.approx(machine.prefill_token, rel=0.05)
    assert model.error == pytest.approx(0.02, abs=0.01)  # The median of |noise|, 3% of standard deviation.


def test_without_noise_every_coefficient_is_found():
    r = random.Random(0)
    model = StepTimeModel()
    observe(model, CPU.seconds, mixed, 1000, r, noise=0, spikes=0)
    for name in CPU.__slots__:
        assert getattr(model.coefficients, name) == pytest.approx(getattr(CPU, name), rel=0.01), name
    assert model.error < 1e-3


@MACHINES
@SEEDS
@pytest.mark.parametrize("hiccups", [1, 2, 3])
def test_a_hiccup_does_not_move_it(machine, seed, hiccups):
    r = random.Random(seed)
    model = learnt(machine, r, 300)
    shapes = [mixed(r) for _ in range(100)]
    before = [model.predict(s) for s in shapes]
    for _ in range(hiccups):
        shape = mixed(r)
        model.observe(shape, 50 * machine.seconds(shape))
    assert [model.predict(s) for s in shapes] == pytest.approx(before, rel=0.01)


@MACHINES
@SEEDS
@pytest.mark.parametrize("factor", [0.5, 0.8, 1.25, 2.0])
def test_a_lasting_change_of_speed_is_learnt_within_50_steps(machine, seed, factor):
    r = random.Random(seed)
    model = learnt(machine, r)

    def changed(shape):
        return factor * machine.seconds(shape)

    observe(model, changed, mixed, 50, r)
    assert worst_error(model, changed, mixed, r, share=0.95) < 0.1
    assert worst_error(model, changed, decodes, r) < 0.1


def test_a_kernel_that_alone_has_changed_is_learnt_while_the_rest_is_right():
    """Prefill twice as slow; decodes, most of the steps, as before."""
    slower = replace(GPU, prefill_token=2 * GPU.prefill_token, pair=2 * GPU.pair)
    r = random.Random(0)
    model = learnt(GPU, r)
    observe(model, slower.seconds, mixed, 150, r)
    assert worst_error(model, slower.seconds, mixed, r, share=0.95) < 0.1


@SEEDS
def test_a_change_of_steps_that_are_few_is_learnt_amid_those_that_are_as_before(seed):
    """Mixed steps become dearer. One in twelve is one, and the eleven between them say that all is well."""
    slower = replace(GPU, prefill_token=2 * GPU.prefill_token, pair=2 * GPU.pair, mixed=3 * GPU.mixed)
    r = random.Random(seed)
    model = learnt(GPU, r)

    def beside(r: random.Random) -> StepShape:
        return decodes(r, 32, 64).with_prefill(r.randint(300, 600), 0)

    for _ in range(15):
        observe(model, slower.seconds, beside, 1, r, spikes=0)
        observe(model, slower.seconds, decodes, 11, r, spikes=0)
    assert worst_error(model, slower.seconds, beside, r) < 0.1
    assert worst_error(model, slower.seconds, decodes, r) < 0.1


def test_a_hiccup_amid_a_change_of_speed_is_overcome():
    """While the model is wide open after a change, a hiccup's error is believed; the steps after it must undo it."""
    r = random.Random(0)
    model = learnt(GPU, r)
    twice = Coefficients(*(2 * getattr(GPU, name) for name in GPU.__slots__))
    observe(model, twice.seconds, mixed, 8, r, spikes=0)
    shape = decodes(r).with_prefill(1411, 8192)
    model.observe(shape, 5 * twice.seconds(shape))
    observe(model, twice.seconds, mixed, 60, r, spikes=0)
    assert worst_error(model, twice.seconds, mixed, r, share=0.95) < 0.1


def test_a_first_step_longer_than_rounding_can_bear_is_overcome():
    model = StepTimeModel()
    shape = StepShape(8, 8, 800, 0)
    model.observe(shape, 1e9)
    observe(model, GPU.seconds, lambda _: shape, 100, random.Random(0), spikes=0)
    assert model.predict(shape) == pytest.approx(GPU.seconds(shape), rel=0.05)


@SEEDS
def test_a_single_hiccup_as_the_first_step_is_overcome(seed):
    r = random.Random(seed)
    model = StepTimeModel()
    model.observe(StepShape(1, 1, 10, 0), 1000 * GPU.step)
    observe(model, GPU.seconds, mixed, 100, r)
    assert worst_error(model, GPU.seconds, mixed, r, share=0.95) < 0.1


@MACHINES
@SEEDS
def test_5000_decode_steps_do_not_wear_off_what_was_learnt_about_prefill(machine, seed):
    r = random.Random(seed)
    model = learnt(machine, r)
    observe(model, machine.seconds, decodes, 5000, r)
    assert worst_error(model, machine.seconds, prefill, r) < 0.15
    assert worst_error(model, machine.seconds, decodes, r) < 0.05
    # Nor do they make it credulous: the first prefill after them is a hiccup.
    shape = prefill(r)
    model.observe(shape, 10 * machine.seconds(shape))
    assert worst_error(model, machine.seconds, prefill, r) < 0.15


@MACHINES
@SEEDS
def test_decodes_that_are_not_linear_do_not_carry_prefill_away(machine, seed):
    """Batches padded to 32 and a slower kernel above 64: phases of each, thousands of steps long."""

    def uneven(shape):
        padded = -(-shape.sequences // 32) * 32
        slower = 1.25 if shape.sequences > 64 else 1.0
        return slower * machine.seconds(StepShape(padded, padded, shape.keys_read, 0))

    r = random.Random(seed)
    model = learnt(machine, r)
    for phase in range(20):
        sizes = (1, 32) if phase % 2 else (60, 128)
        observe(model, uneven, lambda r, sizes=sizes: decodes(r, *sizes), 250, r)
    assert worst_error(model, machine.seconds, prefill, r) < 0.15


@SEEDS
def test_decodes_whose_arithmetic_is_free_do_not_make_prefill_look_free(seed):
    """A roofline: decodes wait for the weights whatever their number, a prefill is bound by arithmetic."""

    def roofline(shape: StepShape) -> float:
        return max(12e-3 + 33e-9 * shape.keys_read, 80e-6 * shape.tokens)

    r = random.Random(seed)
    model = StepTimeModel()
    observe(model, roofline, mixed, 1000, r)
    observe(model, roofline, decodes, 5000, r)
    assert worst_error(model, roofline, decodes, r) < 0.05
    assert (
        worst_error(model, roofline, lambda r: StepShape(1, 1, 50, 0).with_prefill(r.randint(512, 4096), 0), r) < 0.25
    )


@pytest.mark.parametrize(
    "draw",
    [
        lambda _: StepShape(8, 8, 800, 0),
        lambda r: StepShape(1, 1, r.randint(10, 4000), 0),
        decodes,
        lambda r: decodes(r, 64, 128),
    ],
    ids=["one shape", "one sequence", "many", "large"],
)
@SEEDS
def test_a_prefill_never_seen_costs_between_a_step_and_its_tokens(draw, seed):
    r = random.Random(seed)
    model = StepTimeModel()
    observe(model, GPU.seconds, draw, 500, r)
    assert worst_error(model, GPU.seconds, draw, r) < 0.05
    seen = [draw(r) for _ in range(300)]
    cheapest_token = min(GPU.seconds(s) / s.tokens for s in seen)
    for tokens in (64, 512, 4096):
        shape = StepShape(tokens, 1, 0, tokens * tokens // 2)
        assert GPU.step / 2 < model.predict(shape) < GPU.step + tokens * cheapest_token


@SEEDS
def test_the_first_prefill_after_decodes_is_a_lesson_not_an_outlier(seed):
    r = random.Random(seed)
    model = StepTimeModel()
    observe(model, CPU.seconds, decodes, 1000, r)
    shape = StepShape(1, 1, 50, 0).with_prefill(1024, 0)
    model.observe(shape, CPU.seconds(shape))
    assert model.predict(shape) == pytest.approx(CPU.seconds(shape), rel=0.05)


@SEEDS
def test_collinear_steps_are_predicted_on_their_line(seed):
    """Every sequence brings 100 keys, every step prefills twice as many tokens as it decodes."""

    def line(r: random.Random) -> StepShape:
        n = r.randint(1, 100)
        return StepShape(3 * n, n + 1, 100 * n, n * n)

    r = random.Random(seed)
    model = StepTimeModel()
    observe(model, GPU.seconds, line, 500, r)
    assert worst_error(model, GPU.seconds, line, r) < 0.05
    # Three times beyond the line's end, and off it.
    assert model.predict(StepShape(900, 301, 30_000, 90_000)) == pytest.approx(
        GPU.seconds(StepShape(900, 301, 30_000, 90_000)), rel=0.25
    )
    assert 0 < model.predict(StepShape(300, 300, 30_000, 0)) < 0.2


def burst(r: random.Random) -> StepShape:
    """Beside decodes, some of many short prompts; or decodes alone."""
    shape = decodes(r, 32, 64)
    for _ in range(r.choice([0, 0, 1, 2, 5, 15])):
        shape = shape.with_prefill(r.randint(20, 30), 0)
    return shape


def long_prompt(r: random.Random) -> StepShape:
    shape = decodes(r, 32, 64)
    return shape.with_prefill(r.randint(100, 600), r.choice([0, 512, 4096])) if r.random() < 0.5 else shape


def some_of_both(r: random.Random) -> StepShape:
    return burst(r) if r.random() < 0.5 else long_prompt(r)


@MACHINES
@SEEDS
@pytest.mark.parametrize("draw", [burst, long_prompt, some_of_both])
def test_what_a_mixed_step_costs_is_told_from_what_its_tokens_do(draw, seed, machine):
    r = random.Random(seed)
    model = StepTimeModel()
    observe(model, machine.seconds, draw, 300, r)
    assert worst_error(model, machine.seconds, draw, r) < 0.05
    tokens = machine.seconds(StepShape(0, 0, 0, 0, 0).with_prefill(25, 0)) - machine.step
    alone = StepShape(64, 64, 64 * 200, 0)
    one, ten = alone.with_prefill(25, 0), alone
    for _ in range(10):
        ten = ten.with_prefill(25, 0)
    before, after = model.predict(alone), model.predict(one)
    assert after - before == pytest.approx(machine.mixed + tokens, rel=0.25)
    assert model.predict(ten) - after == pytest.approx(9 * tokens, rel=0.1)


@SEEDS
def test_two_prompts_in_one_step_tell_what_lone_ones_could_not(seed):
    """All prompts are alike, so that only a step with two of them tells what the second one costs."""
    r = random.Random(seed)
    model = StepTimeModel()
    alone = StepShape(64, 64, 64 * 200, 0)
    observe(model, GPU.seconds, lambda _: alone, 100, r, noise=0.01, spikes=0)
    for _ in range(20):
        observe(model, GPU.seconds, lambda _: alone.with_prefill(25, 0), 1, r, noise=0.01, spikes=0)
        observe(model, GPU.seconds, lambda _: alone, 2, r, noise=0.01, spikes=0)
    assert model.predict(alone.with_prefill(25, 0)) == pytest.approx(GPU.seconds(alone.with_prefill(25, 0)), rel=0.02)
    two = alone.with_prefill(25, 0).with_prefill(25, 0)
    for _ in range(2):
        model.observe(two, GPU.seconds(two))
    five = two.with_prefill(25, 0).with_prefill(25, 0).with_prefill(25, 0)
    assert model.predict(five) == pytest.approx(GPU.seconds(five), rel=0.1)


@SEEDS
def test_decodes_and_prompts_by_themselves_leave_open_what_both_together_cost(seed):
    r = random.Random(seed)
    model = StepTimeModel()
    nothing = StepShape(0, 0, 0, 0)
    observe(model, GPU.seconds, lambda r: nothing.with_prefill(r.randint(20, 4096), 0), 50, r)
    observe(model, GPU.seconds, decodes, 500, r)
    assert model.coefficients.mixed == 0
    shape = decodes(r, 64, 64).with_prefill(25, 0)
    for _ in range(3):
        model.observe(shape, GPU.seconds(shape))
    assert model.predict(shape) == pytest.approx(GPU.seconds(shape), rel=0.03)
    assert model.coefficients.mixed == pytest.approx(GPU.mixed, rel=0.3)
    assert worst_error(model, GPU.seconds, decodes, r) < 0.05


def test_guessed_tokens_make_no_step_mixed_nor_do_prompts_without_decodes():
    nothing, decoding = StepShape(0, 0, 0, 0), StepShape(3, 3, 90, 0)
    guessing = StepShape(3 + 8, 3, 90, 240)
    prompts = nothing.with_prefill(1, 0).with_prefill(500, 0)
    assert not any(shape.mixed for shape in (nothing, decoding, guessing, prompts))
    assert decoding.with_prefill(1, 30).mixed
    assert prompts.with_decode(30).mixed
    assert prompts.with_decode(30) == StepShape(502, 3, 30, 125_000, 2)


def shapes(limit: int = 10**6) -> st.SearchStrategy[StepShape]:
    number = st.integers(0, limit)
    return st.builds(
        lambda decodes, chunks, further, keys, pairs: StepShape(
            decodes + chunks + further, decodes + chunks, keys, pairs, chunks
        ),
        number, number, number, number, number,
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(shapes(), st.floats(1e-9, 1e9)), max_size=60),
    shape=shapes(),
    work=st.sampled_from(
        [
            StepShape(1, 1, 0, 0, 0),
            StepShape(1, 1, 0, 0, 1),
            StepShape(1, 0, 0, 0, 0),
            StepShape(0, 0, 1, 0, 0),
            StepShape(0, 0, 0, 1, 0),
        ]
    ),
    times=st.integers(1, 10**6),
)
def test_more_work_never_takes_less_time_whatever_was_observed(steps, shape, work, times):
    model = StepTimeModel()
    for observed, seconds in steps:
        model.observe(observed, seconds)
    coefficients = model.coefficients
    assert all(0 <= getattr(coefficients, name) < math.inf for name in Coefficients.__slots__)
    more = StepShape(*(of_shape + times * of_work for of_shape, of_work in zip(shape, work, strict=True)))
    assert 0 <= model.predict(shape) <= model.predict(more) < math.inf
    assert model.predict(shape) == pytest.approx(coefficients.seconds(shape))


COST = st.one_of(st.just(0.0), st.floats(1e-12, 1e-2))


@settings(max_examples=500, deadline=None)
@given(
    coefficients=st.builds(Coefficients, COST, COST, COST, COST, COST, COST),
    decoding=shapes(1000),
    limit=st.floats(0, 10),
    context=st.integers(0, 131_072),
    most=st.integers(0, 131_072),
)
def test_prefill_tokens_is_the_most_that_keeps_the_limit(coefficients, decoding, limit, context, most):
    tokens = coefficients.prefill_tokens(decoding, limit, context, most=most)
    assert 0 <= tokens <= most
    if tokens:
        assert coefficients.seconds(decoding.with_prefill(tokens, context)) <= limit
    if tokens < most:
        more = coefficients.seconds(decoding.with_prefill(tokens + 1, context))
        # Half a pair is lost where pairs are rounded down, and a hair where seconds are rounded.
        assert more + coefficients.pair >= limit * (1 - 1e-9)


@pytest.mark.parametrize(("limit", "tokens"), [(math.inf, 4096), (math.nan, 0), (-1.0, 0), (0.0, 0)])
def test_prefill_tokens_of_a_limit_that_is_none(limit, tokens):
    assert GPU.prefill_tokens(StepShape(8, 8, 800, 0), limit, 0, most=4096) == tokens


def test_a_learnt_model_sizes_prefill_as_the_machine_allows():
    r = random.Random(0)
    model = learnt(GPU, r)
    for _ in range(100):
        shape, context = decodes(r), r.randint(0, 30_000)
        limit = GPU.seconds(shape) + r.uniform(0.01, 0.1)
        tokens = model.prefill_tokens(shape, limit, context)
        assert GPU.seconds(shape.with_prefill(tokens, context)) == pytest.approx(limit, rel=0.05)
        assert tokens == pytest.approx(GPU.prefill_tokens(shape, limit, context), rel=0.1)


def test_it_is_ready_after_as_many_steps_as_asked():
    model = StepTimeModel(ready_after=3)
    shape = StepShape(8, 8, 800, 0)
    assert model.predict(shape) == 0
    assert model.error == 0
    readiness = []
    for _ in range(4):
        readiness.append(model.ready)
        model.observe(shape, 0.01)
    assert readiness == [False, False, False, True]
    assert model.predict(shape) == pytest.approx(0.01)


def test_error_is_the_median_of_predictions_made_before_observing():
    model = StepTimeModel(error_window=3)
    shape = StepShape(8, 8, 800, 0)
    observe(model, lambda _: 0.01, lambda _: shape, 200, random.Random(0), noise=0, spikes=0)
    errors = []
    for seconds in (0.010, 0.011, 0.008):
        errors.append(abs(model.predict(shape) / seconds - 1))
        model.observe(shape, seconds)
    assert model.error == pytest.approx(sorted(errors)[1])


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_duration_that_is_none_is_refused(seconds):
    model = StepTimeModel()
    with pytest.raises(ValueError, match="monotonic clock"):
        model.observe(StepShape(1, 1, 1, 0), seconds)
    assert model.predict(StepShape(1, 1, 1, 0)) == 0


@pytest.mark.timing
def test_observing_and_predicting_cost_microseconds_a_step():
    r = random.Random(0)
    model = learnt(GPU, r, 100)
    steps = [(shape, GPU.seconds(shape) * r.gauss(1, 0.03)) for shape in (mixed(r) for _ in range(2000))]

    def seconds_a_step() -> float:
        start = perf_counter()
        for shape, seconds in steps:
            model.predict(shape)
            model.observe(shape, seconds)
        return (perf_counter() - start) / len(steps)

    assert min(seconds_a_step() for _ in range(5)) < 50e-6  # 10 where this was written.
