"""What tests of the TensorRT executor share: a random model with its exported segments, and numbers to compute on."""

from pathlib import Path

import torch

from tests import stand_in_tensorrt as stand_in
from tests.stand_in_engines import StandInCard
from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind
from wicore_backend.executor.segments.export import bindings, export_segments
from wicore_backend.executor.segments.manifest import WeightsAs
from wicore_backend.executor.tensorrt.executor import TensorRTExecutor
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config

CPU = torch.device("cpu")
FIRST, LAST, VISION = Segment(SegmentKind.FIRST), Segment(SegmentKind.LAST), Segment(SegmentKind.VISION)
MID = Segment(SegmentKind.MID, 1)


class Model:
    """A checkpoint, its weights, and its exported segments."""

    def __init__(self, checkpoint: Path, directory: Path, *, weights: WeightsAs = "embedded"):
        self.checkpoint = checkpoint
        self.config = Gemma3Config.from_checkpoint(checkpoint)
        self.exported = export_segments(checkpoint, directory, Precision.FP32, weights=weights)
        self.weights = load_weights(checkpoint, self.config, device=CPU, dtype=torch.float32)
        self.embed = Embedding(self.weights.text.embedding, device=CPU, residual=torch.float32)

    def load(self, engines, *, library=None, card=None, **options):
        return TensorRTExecutor.load(
            self.config,
            engines,
            library=library or stand_in.library(),
            card=card or StandInCard(),
            embed=self.embed,
            **options,
        )

    def bindings(self):
        return {
            segment: bindings(self.config, self.weights, segment, Precision.FP32) for segment in self.exported.files
        }


def segment_inputs(model, tokens, *, seed=0):
    """Hidden states, attention, cosines and sines of `tokens` rows."""
    torch.manual_seed(seed)
    text = model.config.text
    hidden, attention = torch.randn(tokens, text.hidden_size), torch.randn(tokens, text.num_heads * text.head_dim)
    return hidden, attention, torch.randn(tokens, text.head_dim), torch.randn(tokens, text.head_dim)
