"""What a model is put together of follows its executor: what is set aside, and what is compiled before it serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.random_gemma3 import published_config
from wicore_backend.attention.gpu import hopper, paged, tuning
from wicore_backend.attention.gpu.tuning import Tuning
from wicore_backend.config import EngineConfig
from wicore_backend.devices.memory import kv_layout
from wicore_backend.engine import assembly, rehearsal
from wicore_backend.engine.device_memory import recorded_segments
from wicore_backend.engine.executor_loading import LoadedExecutor
from wicore_backend.executor.needs import activation_bytes, handed_bytes
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.tensorrt.contexts import EXECUTION_CONTEXT_BYTES
from wicore_backend.models.gemma3.vision import encoding_bytes

SETTINGS = EngineConfig(model=Path("model"), max_model_len=8192)
OF_GRAPHS = {"recorded steps", "plans", "graphs"}


@pytest.fixture
def needs(monkeypatch):
    """What is set aside for an executor on a card with an RTX 4090's sizes."""
    config, cuda = published_config("gemma-3-27b"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=128))
    monkeypatch.setattr(tuning, "tuning_for", lambda *_: Tuning.of(128, torch.bfloat16, shared_bytes=101_376))
    monkeypatch.setattr(hopper, "fits", lambda *_, **__: False)
    layout = kv_layout(config, SETTINGS, Precision.BF16)

    def of(loaded: LoadedExecutor | None, settings: EngineConfig = SETTINGS) -> dict[str, int]:
        dtype = torch.bfloat16
        return assembly.device_needs(config, settings, layout, device=cuda, dtype=dtype, kv_dtype=dtype, loaded=loaded)

    return of


def loaded(*, own_activations: bool, recordable: bool = True, segment_bytes: int = 0) -> LoadedExecutor:
    executor = SimpleNamespace(recordable=recordable)
    return LoadedExecutor(executor, own_activations=own_activations, recorded_segment_bytes=segment_bytes)


def test_what_an_executor_took_to_compute_in_is_not_set_aside_again(needs):
    """Engines and sessions have it by the time that the KV cache gets what is free: it was counted twice."""
    config = published_config("gemma-3-27b")
    torchs, engines = needs(loaded(own_activations=False)), needs(loaded(own_activations=True))
    of_step = {"tokens": SETTINGS.max_batch_tokens, "value_bytes": 2}  # So many are recorded, too.
    computed, handed = activation_bytes(config.text, **of_step), handed_bytes(config.text, **of_step)
    for what in ("steps", "recorded steps"):
        assert torchs[what] - engines[what] == computed - handed > 0
    encoding = encoding_bytes(config.vision, pictures=2, value_bytes=2)
    assert torchs["pictures"] - engines["pictures"] == encoding > 0
    recorded = loaded(own_activations=True, segment_bytes=EXECUTION_CONTEXT_BYTES)
    assert needs(None) == needs(recorded), "an executor that asks before it is loaded is TensorRT's"


def test_graphs_are_set_aside_for_executors_that_can_be_recorded(needs):
    assert needs(loaded(own_activations=True)).keys() >= OF_GRAPHS
    without, with_contexts = (needs(loaded(own_activations=True, segment_bytes=size)) for size in (0, 1000))
    segments = recorded_segments(published_config("gemma-3-27b"), SETTINGS)
    assert with_contexts["graphs"] - without["graphs"] == 1000 * segments
    assert sum(with_contexts.values()) - sum(without.values()) == 1000 * segments
    assert not needs(loaded(own_activations=True, recordable=False)).keys() & OF_GRAPHS
    assert not needs(None, SETTINGS.model_copy(update={"cuda_graphs": False})).keys() & OF_GRAPHS


@pytest.mark.parametrize(("graphs", "recordable"), [(False, True), (True, False)])
def test_attention_and_steps_are_rehearsed_where_nothing_is_recorded(monkeypatch, graphs, recordable):
    """Or the first requests wait for a compiler."""
    done = []
    config = replace(published_config("gemma-3-4b"), vision=None)
    attention = SimpleNamespace(rehearse=lambda: done.append("rehearsed"))
    monkeypatch.setattr(paged, "GpuPagedAttention", lambda *_, **__: attention)
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_, **sizes: done.append(sizes))
    monkeypatch.setattr(assembly, "RotaryTables", lambda *_, **__: None)
    monkeypatch.setattr(assembly, "PictureEncoder", lambda *_, **__: None)
    monkeypatch.setattr(assembly, "ModelRunner", lambda **parts: parts)
    executor = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, recordable=recordable, vision=None, config=config
    )
    pools = SimpleNamespace(layout=kv_layout(config, SETTINGS, Precision.BF16), wait=None)
    parts = assembly.make_runner(
        config,
        LoadedExecutor(executor),
        pools,
        normalization=None,
        max_model_len=8192,
        max_running=4,
        max_batch_tokens=512,
        graphs=graphs,
        image_cache_bytes=0,
        sampling=None,
    )
    assert parts["attention"] is attention
    assert done == ["rehearsed", {"max_sequences": 4, "max_tokens": 512}]
