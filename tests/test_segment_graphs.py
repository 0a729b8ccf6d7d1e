"""Exported graphs compute what the torch executor does, for every kind of model that a config can describe."""

from __future__ import annotations

from functools import partial

import onnx
import pytest
import torch

from tests.gemma3_random import write_random_checkpoint
from tests.segment_runs import errors, random_step, run_torch, torch_weights
from wicore_backend.errors import SegmentError
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind, segments
from wicore_backend.executor.segments.export import bindings, export_segments
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.quantization.fp8 import quantized_fp8

EMBEDDED_ONLY = (Precision.INT4, Precision.FP8)
MODELS = {
    "text, two queries a key": ({}, None),
    "pictures": ({}, {}),
    "pictures, head is the embedding": ({"tie_word_embeddings": True}, {"num_hidden_layers": 1}),
    "biases and capped logits": ({"attention_bias": True, "final_logit_softcapping": 2.0}, None),
    "biases, capped logits, pictures of another size": (
        {"attention_bias": True, "final_logit_softcapping": 5.0, "hidden_size": 40},
        {"hidden_size": 18, "num_attention_heads": 3, "image_size": 48, "patch_size": 6},
    ),
    "a key for each query": ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32}, None),
    "one key for all queries": ({"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 10}, None),
    "one layer": ({"num_hidden_layers": 1}, None),
    "a large epsilon": ({"rms_norm_eps": 0.03, "intermediate_size": 72}, {"layer_norm_eps": 0.05}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", ["embedded", "inputs"])
def test_a_graph_computes_what_the_torch_executor_does(tmp_path, name, weights):
    text, vision = MODELS[name]
    write_random_checkpoint(tmp_path / "model", text=text, vision=vision, seed=len(name))
    exported = export_segments(tmp_path / "model", tmp_path / "out", Precision.FP32, weights=weights)
    config, loaded = torch_weights(tmp_path / "model")
    assert list(exported.files) == list(segments(config))
    bound = partial(bindings, config, loaded, precision=Precision.FP32) if weights == "inputs" else None
    reference = partial(run_torch, TorchExecutor(config, loaded))
    for tokens in (1, 9):
        found = errors(exported, random_step(config, tokens=tokens), reference, bindings=bound)
        assert max(found.values()) < 1e-5, found


def test_bindings_are_the_very_tensors_and_all_mid_are_one_file(tmp_path):
    write_random_checkpoint(tmp_path / "model", text={"attention_bias": True}, vision={})
    exported = export_segments(tmp_path / "model", tmp_path / "out", Precision.FP32, weights="inputs")
    config, loaded = torch_weights(tmp_path / "model")
    mids = [file for segment, file in exported.files.items() if segment.kind is SegmentKind.MID]
    assert len({file.path for file in mids}) == 1
    assert len(mids) == 3
    for segment, file in exported.files.items():
        bound = bindings(config, loaded, segment, Precision.FP32)
        assert [(w.name, w.dtype, w.shape) for w in file.weights] == [
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in bound.items()
        ]
    layers, bound = loaded.text.layers, bindings(config, loaded, Segment(SegmentKind.MID, 1), Precision.FP32)
    assert bound["layer.gate_up.weight"] is layers[1].gate_up
    assert bound["layer.out.bias"] is layers[1].out_bias
    assert bound["next_layer.qkv.weight"] is layers[2].qkv
    last = bindings(config, loaded, Segment(SegmentKind.LAST), Precision.FP32)
    assert last["text.head.weight"] is loaded.text.head


def test_weights_that_a_graph_cannot_take_are_refused(tmp_path):
    write_random_checkpoint(tmp_path / "model")
    config, loaded = torch_weights(tmp_path / "model")
    first = Segment(SegmentKind.FIRST)
    with pytest.raises(SegmentError, match=r"torch\.float32 cannot be inputs of segments in bf16"):
        bindings(config, loaded, first, Precision.BF16)
    object.__setattr__(loaded.text, "head", quantized_fp8(loaded.text.embedding))
    with pytest.raises(SegmentError, match="a Fp8Matrix cannot be an input"):
        bindings(config, loaded, first, Precision.FP32)
    for precision in EMBEDDED_ONLY:
        with pytest.raises(SegmentError, match=f"weights in {precision} cannot be inputs"):
            export_segments(tmp_path / "model", tmp_path / "out", precision, weights="inputs")


@pytest.mark.parametrize(
    ("precision", "weights"),
    [(precision, "embedded") for precision in Precision] + [(p, "inputs") for p in Precision if p not in EMBEDDED_ONLY],
)
def test_a_graph_is_standard_and_has_the_tensors_of_the_contract(tmp_path, precision, weights):
    text = {"hidden_size": 64, "intermediate_size": 96, "attention_bias": True, "final_logit_softcapping": 3.0}
    write_random_checkpoint(tmp_path / "model", text=text, vision={})
    exported = export_segments(tmp_path / "model", tmp_path / "out", precision, weights=weights)
    for segment, file in exported.files.items():
        onnx.checker.check_model(file.path, full_check=True)  # types and shapes of all tensors included
        model = onnx.load(file.path)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
        assert all(node.domain == "" for node in model.graph.node)
        assert [_described(value) for value in model.graph.input] == [
            (spec.name, spec.dtype, list(spec.shape)) for spec in (*file.spec.inputs, *file.weights)
        ]
        assert [_described(value) for value in model.graph.output] == [
            (spec.name, spec.dtype, list(spec.shape)) for spec in file.spec.outputs
        ]
        names = {node.name for node in model.graph.node}
        if segment == Segment(SegmentKind.MID, 1) and weights == "embedded":
            assert {"layer.1.out", "layer.1.gate_up", "layer.1.down", "layer.2.qkv", "layer.2.qk.rotated"} <= names


def _described(value: onnx.ValueInfoProto) -> tuple[str, torch.dtype, list[int | str]]:
    kinds = {
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
        onnx.TensorProto.INT64: torch.int64,
    }
    tensor = value.type.tensor_type
    return value.name, kinds[tensor.elem_type], [size.dim_param or size.dim_value for size in tensor.shape.dim]
