"""Where no step is recorded, loading a model compiles every kernel that a step then launches.

What OpenAI Triton compiles a kernel for is told from its launches: constants, options, types, and of each number and
address whether it is 1 or a multiple of 16.
"""

from __future__ import annotations

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.test_decode_graphs import MAX_KEYS, Model, after, decodes, prompts
from wicore_backend.attention.gpu.paged import GpuPagedAttention
from wicore_backend.engine.rehearsal import rehearse, rehearsed_steps
from wicore_backend.engine.runner import run_layers

SEQUENCES, TOKENS = 9, 40


@pytest.fixture(scope="module")
def model(tmp_path_factory, kernel_device):
    if kernel_device.type == "cuda":
        pytest.skip("launches are looked at under the interpreter")
    return Model(tmp_path_factory.mktemp("model"), kernel_device)


@pytest.fixture
def launched(monkeypatch):
    """What each kernel was compiled for. Nothing is computed."""
    found: dict[str, set[tuple]] = {}

    def run(kernel, *args, grid, warmup, **options):
        del grid, warmup
        signature = inspect.signature(kernel.fn)
        given = {name: options.pop(name) for name in list(options) if name in signature.parameters}
        bound = signature.bind(*args, **given)
        bound.apply_defaults()
        any_number = set(kernel.kwargs.get("do_not_specialize") or ())
        parts = []
        for name, value in bound.arguments.items():
            constant = "constexpr" in str(signature.parameters[name].annotation)
            parts.append((name, value if constant else compiled_for(value, exactly=name not in any_number)))
        found.setdefault(kernel.fn.__name__, set()).add((*parts, *sorted(options.items())))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return found


def compiled_for(value, *, exactly: bool):
    if isinstance(value, torch.Tensor):
        return value.dtype, exactly and value.data_ptr() % 16 == 0
    if isinstance(value, int | np.integer):
        return "int", exactly and ("one" if value == 1 else value % 16 == 0)
    return type(value).__name__


def attention_over(model):
    text = model.config.text
    return partial(
        GpuPagedAttention,
        query_heads=text.num_heads,
        scale=text.attention_scale,
        window=text.window,
        softcap=None,
        processors=4,
    )


def served(model, step):
    """A step as `ModelRunner` has it computed."""
    tokens = len(step.positions)
    hidden = model.executor.embed(torch.zeros(tokens, dtype=torch.int64), None, None)
    plan, rope = model.attention.plan(step), model.rotary.lookup(torch.from_numpy(step.positions))
    hidden, attended = run_layers(model.executor, model.attention, plan, model.layout.layers, hidden, rope)
    model.attention.collect(plan)
    model.executor.last(hidden, attended, torch.arange(min(tokens, SEQUENCES)))


STEPS = [
    *(decodes([(7 * n + 3) % MAX_KEYS for n in range(count)]) for count in range(1, SEQUENCES + 1)),
    *(decodes([40] * count, measured={1: [0]}) for count in (1, 2, 5)),
    *(prompts([count]) for count in range(1, TOKENS + 1)),
    *(prompts([count], measured={1: [0]}) for count in (1, 16, 33)),
    *(prompts([9, 3], decoded=[5] * count, measured={1: [0, count]}) for count in (1, 2, 4)),
    *(after(prompts([40]), computed) for computed in (1, 8, 39)),
]


@torch.inference_mode()
def test_no_step_that_is_served_launches_what_was_not_launched_at_load(model, launched):
    sizes = {"max_sequences": SEQUENCES, "max_tokens": TOKENS}
    rehearse(model.executor, attention_over(model), model.pools, model.rotary, **sizes)
    at_load = {name: set(variants) for name, variants in launched.items()}
    for step in STEPS:
        served(model, step)
    assert {"decode_kernel", "prefill_kernel", "write_kernel", "prefill_mass_kernel"} <= at_load.keys()
    late = {name: variants - at_load.get(name, set()) for name, variants in launched.items()}
    assert not {name: variants for name, variants in late.items() if variants}


@torch.inference_mode()
def test_steps_of_all_sizes_of_graphs_are_computed_and_the_models_own_pools_stay_as_they_are(model, launched):
    del launched
    seen = []
    model.reset()

    def watched(pools):
        attention = attention_over(model)(pools)
        make_plan = attention.plan

        def plan(step):
            seen.append((step.decodes, len(step.positions), bool(step.measured)))
            return make_plan(step)

        attention.plan = plan
        return attention

    rehearse(model.executor, watched, model.pools, model.rotary, max_sequences=9, max_tokens=40)
    measured = False, True
    assert seen == [
        *((count, count, measured[count in (1, 9)]) for count in (9, 8, 4, 2, 1)),
        *((0, count, measured[count == 40]) for count in (40, 32, 16)),
    ]
    for group, keys in model.keys.items():
        assert torch.equal(model.pools.tensors[group], keys)


def test_the_longest_step_is_rehearsed_also_where_no_graph_would_be_of_it(model):
    sizes = [len(step.positions) for step in rehearsed_steps(model.layout, max_sequences=1, max_tokens=2000)]
    assert sizes[:3] == [1, 2000, 1024]


def test_what_cannot_be_rehearsed_is_logged_and_no_more(model, caplog):
    def broken(_pools):
        raise torch.OutOfMemoryError("no room")

    rehearse(model.executor, broken, model.pools, model.rotary, max_sequences=1, max_tokens=16)
    assert "steps cannot be rehearsed; the first ones will show why" in caplog.text
    assert "no room" in caplog.text
