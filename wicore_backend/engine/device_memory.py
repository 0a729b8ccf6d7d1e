"""What a model takes of the device beside its weights and its KV cache, to be set aside before the cache gets the rest.

Who takes memory says how much, in a function beside the code that does; here that is put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wicore_backend.attention.gpu.needs import AttentionNeeds
from wicore_backend.config import EngineConfig
from wicore_backend.engine.computation import LOGPROB_ROWS
from wicore_backend.engine.graphs import bucket_sizes
from wicore_backend.engine.logprobs import logprobs_bytes
from wicore_backend.engine.pictures import MAX_BATCH, pixel_bytes
from wicore_backend.engine.plan import MOST_GUESSED
from wicore_backend.engine.prompts import prompt_keys
from wicore_backend.engine.sampler import sampling_bytes
from wicore_backend.engine.segments import token_counts
from wicore_backend.engine.step_inputs import StepInputs
from wicore_backend.engine.vision_graphs import BATCHES
from wicore_backend.executor.needs import activation_bytes, handed_bytes, logits_bytes
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.rope import RotaryTables
from wicore_backend.models.gemma3.vision import encoding_bytes

_WORKSPACE_BYTES = 2**28
"""cuBLAS', for the streams on which steps and pictures are computed, and the code of kernels, loaded as they come."""

_SEGMENT_GRAPH_BYTES = 2**17
"""Of the driver's own, for each graph of a few kernels; ..."""
_LAYER_GRAPH_BYTES = 2**16
"""... and in a graph of a whole step, for each layer."""


@dataclass(frozen=True, slots=True)
class Widening:
    """Bytes that are widened at a time, where something is kept in fewer bits than it is computed in.

    Attributes
    ----------
    matrix
        The largest part of a layer's matrix.
    head
        Of the head.
    keys
        Of a prompt's keys and values.
    """

    matrix: int = 0
    head: int = 0
    keys: int = 0


def device_needs(
    config: Gemma3Config,
    settings: EngineConfig,
    attention: AttentionNeeds,
    widening: Widening,
    *,
    max_model_len: int,
    value_bytes: int,
    own_activations: bool = False,
    recordable: bool = True,
    recorded_segment_bytes: int = 0,
) -> dict[str, int]:
    """Bytes by what they are for, about and rather too many, of a model whose attention is by kernels of its own.

    Parameters
    ----------
    value_bytes
        Of a number that is computed with.
    own_activations
        Whether the executor has what it computes in, and counts it, itself.
    recordable
        Whether the executor can be recorded in CUDA graphs.
    recorded_segment_bytes
        What it then takes for each segment of a recording, beside what the driver does.
    """
    needs = _Needs(config, settings, attention, widening, max_model_len, value_bytes, own_activations)
    encoding = needs.encoding()
    taken = {
        # What has been computed once before it is recorded was computed in the steps' memory.
        "steps": max(needs.step(), encoding),
        "positions": RotaryTables.nbytes(config.text, max_positions=max_model_len, value_bytes=value_bytes),
        "widened keys": widening.keys,
        "decodes": attention.kept(),
        "workspace": _WORKSPACE_BYTES,
    }
    if config.vision is not None:
        taken["pictures"] = encoding + needs.pictures()
    if settings.cuda_graphs and recordable:
        graphs = needs.graphs() + recorded_segments(config, settings) * recorded_segment_bytes
        taken |= {"recorded steps": needs.recorded(), "plans": needs.plans(), "graphs": graphs}
    return taken


def recorded_segments(config: Gemma3Config, settings: EngineConfig) -> int:
    """Segments in all recordings: of decodes, with the head; of prompts by themselves; one by one; of the tower."""
    decodes, prompts = len(bucket_sizes(settings.max_running)), len(token_counts(settings.max_batch_tokens))
    tower = 0 if config.vision is None else len(BATCHES)
    layers = config.text.num_layers  # As many segments lie before the last layer's attention.
    return decodes * (layers + 1) + 2 * prompts * layers + tower


@dataclass(frozen=True, slots=True)
class _Needs:
    config: Gemma3Config
    settings: EngineConfig
    attention: AttentionNeeds
    widening: Widening
    max_keys: int
    value_bytes: int
    own_activations: bool

    def step(self) -> int:
        """Of the largest step that is not recorded, its head and the choice of its tokens."""
        settings, vocab = self.settings, self.config.text.vocab_size
        tokens, sequences = settings.max_batch_tokens, settings.max_running
        rows = sequences + min(MOST_GUESSED, sequences * settings.max_guessed_tokens)
        telling = logprobs_bytes(rows=rows, vocab=vocab)
        choosing = self._logits(rows) + max(sampling_bytes(rows=rows, vocab=vocab), telling)
        of_prompt = min(LOGPROB_ROWS, tokens)
        telling_prompt = self._logits(of_prompt) + logprobs_bytes(rows=of_prompt, vocab=vocab)
        before = vocab * sequences * torch.float32.itemsize  # The last step's logits, until its tokens are told.
        plan = self.attention.step(tokens=tokens, sequences=sequences, max_keys=self.max_keys)
        return self._activations(tokens) + plan + max(choosing, telling_prompt) + before

    def encoding(self) -> int:
        """Of the vision tower."""
        if self.config.vision is None or self.own_activations:
            return 0
        return encoding_bytes(self.config.vision, pictures=MAX_BATCH, value_bytes=self.value_bytes)

    def pictures(self) -> int:
        """Of what goes into the vision tower and what comes out of it, in a graph's memory and outside."""
        assert self.config.vision is not None
        pixels = pixel_bytes(self.config.vision, pictures=MAX_BATCH, value_bytes=self.value_bytes)
        tokens = MAX_BATCH * self.config.mm_tokens_per_image
        return 2 * (pixels + tokens * self.config.text.hidden_size * self.value_bytes)

    def recorded(self) -> int:
        """Of what recorded steps compute. They share their memory (`CudaRecorder`), so that the widest one counts."""
        tokens, sequences = self._recorded_tokens[-1], self.settings.max_running
        inputs = StepInputs.nbytes(self.config.text, tokens=tokens, value_bytes=self.value_bytes)
        return self._activations(max(sequences, tokens)) + self._logits(sequences) + inputs

    def plans(self) -> int:
        """Of the plans of recorded steps, which each size has for itself."""
        sequences, keys = self.settings.max_running, self.max_keys
        decodes = (self.attention.decode_bucket(sequences=n, max_keys=keys) for n in bucket_sizes(sequences))
        recorded_keys = prompt_keys(keys)
        prompts = (self.attention.prompt_bucket(tokens=n, max_keys=recorded_keys) for n in self._recorded_tokens)
        return self.attention.masses(sequences=sequences, max_keys=keys) + sum(decodes) + sum(prompts)

    def graphs(self) -> int:
        """Of the driver."""
        sizes, whole = len(self._recorded_tokens), len(bucket_sizes(self.settings.max_running))
        of_layer = sizes * _SEGMENT_GRAPH_BYTES + (sizes + whole) * _LAYER_GRAPH_BYTES
        return self.config.text.num_layers * of_layer

    @property
    def _recorded_tokens(self) -> Sequence[int]:
        return token_counts(self.settings.max_batch_tokens)

    def _activations(self, tokens: int) -> int:
        if self.own_activations:
            return handed_bytes(self.config.text, tokens=tokens, value_bytes=self.value_bytes)
        return activation_bytes(self.config.text, tokens=tokens, value_bytes=self.value_bytes) + self.widening.matrix

    def _logits(self, rows: int) -> int:
        return logits_bytes(self.config.text, rows=rows, value_bytes=self.value_bytes) + self.widening.head
