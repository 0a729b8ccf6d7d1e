"""Every setting of the engine, once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.processor.limits import PromptLimits
from wicore_backend.settings import Settings

if TYPE_CHECKING:
    from wicore_backend.hmt.codecs import CodecName

Positive = Annotated[int, Field(ge=1)]


def _not_empty(path: object) -> object:
    if path == "":
        raise ValueError("an empty path would be the directory that the server was started in; leave the setting out")
    return path


def _from_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # "~nobody"
        raise ValueError(str(error)) from None


def _device(name: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name) is None:
        raise ValueError("it is auto, cpu, cuda or cuda:N")
    return name


Directory = Annotated[Path, Field(strict=False), AfterValidator(_from_home), BeforeValidator(_not_empty)]
"""A path; `~` is the home directory, as in a shell."""

ExecutorSetting = Literal["auto", "torch", "tensorrt", "onnx"]


class EngineConfig(Settings):
    """Settings of one engine. Sizes are in tokens unless the name says otherwise."""

    model: Directory
    """Directory of a Gemma-3 checkpoint in Hugging Face layout."""

    device: Annotated[str, AfterValidator(_device)] = "auto"
    """Where the model runs; auto takes the first CUDA device and otherwise the CPU."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights, activations and KV cache; auto is float32 on the CPU and bfloat16 on CUDA, but
    float16 on cards before Ampere, where executor = 'torch' has to be told."""

    executor: ExecutorSetting = "auto"
    """What computes the layers between their attentions, and pictures. torch: PyTorch, on a GPU by kernels of its own.
    tensorrt: engines that were built for this model and this card (`python -m scripts.build_engines`). onnx: ONNX
    Runtime, on the CPU, or with its package for GPUs on CUDA; what it runs is exported from the checkpoint when the
    model is loaded for the first time. auto takes tensorrt where `engines` has engines for the card, and else torch."""

    engines: Directory | None = None
    """Directory of this model's exported graphs and built engines. None is one in the user's cache
    ($XDG_CACHE_HOME/wicore, ~/.cache/wicore), named after the model and what is in its checkpoint."""

    engine_precision: Literal["auto", "fp32", "bf16", "fp16", "int4", "fp8"] = "auto"
    """In which precision tensorrt and onnx compute: `engines` has a directory for each. auto is, with tensorrt, the
    most exact of those that there are engines in for the card, and with onnx that of `dtype`."""

    host_embeddings: bool = False
    """With tensorrt and onnx on CUDA: keep the embeddings of tokens in page-locked host memory, from where a step reads
    a row for each token. That saves device memory: 2.8 GB for gemma-3-27b."""

    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """How keys and values are kept; auto is `dtype`. fp8 (e4m3) is LOSSY: a byte each, half of a 16-bit type's memory,
    reads and copies, each number rounded to 4 significant bits. Blocks then go to host memory and disk as they are, so
    that `host_cache_codec` and `nvme_codec` have to be exact."""

    int4_prefill_dtype: Literal["auto", "fp8"] = "auto"
    """In what a prompt's tokens are multiplied by a checkpoint's INT4 weights, with the executor torch on CUDA; auto is
    `dtype`. fp8 (e4m3) is LOSSY: in steps of more than 128 tokens weights are rounded once more and activations, too,
    each row by a scale of its own, and tensor cores multiply them at twice the rate. It takes bfloat16 and a card from
    Ada on; elsewhere it stays at auto, with a warning. Steps of fewer tokens, as of most decodes, are as with auto."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of one operator; None is PyTorch's choice, and in a server one less than the CPUs."""

    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest sequence, prompt and answer; None takes the checkpoint's own limit."""

    max_batch_tokens: Positive = 512
    """Tokens that one step computes at most: decodes first, then chunks of prompts."""

    max_running: Positive = 64
    """Sequences that are computed at the same time."""

    max_waiting: Annotated[int, Field(ge=0)] = 1024
    """Answers that may wait for their turn; one more is refused with a time to retry after, or, if it is of a higher
    class, has the newest of the lowest class refused."""

    max_waiting_tokens: Positive = 2**21
    """The same bound in tokens: of the prompts that wait and the answers that they are expected to have."""

    target_tpot_ms: Annotated[float, Field(gt=0)] | None = None
    """Time per output token to keep: beside decodes, a step takes only as much of the waiting prompts as fits in this
    time. None takes `max_decode_slowdown` times what the decodes take alone."""

    max_decode_slowdown: Annotated[float, Field(gt=1)] = 1.5
    """How many times longer prompts may make a step, if `target_tpot_ms` is None."""

    priority_ageing_s: Annotated[float, Field(ge=0)] = 30.0
    """After this long in the queue a request may go before higher classes, in its turn."""

    tenant_weights: Mapping[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """Shares of the service for tenants who compete; 1 for who is not named."""

    prefix_cache: bool = True
    """Keep what has been computed, so that prompts that begin alike are computed once."""

    step_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """After this long in one step the engine counts as hung."""

    block_size: Annotated[int, Field(ge=1, le=256)] = 32
    """Tokens a block of the KV cache."""

    max_guessed_tokens: Annotated[int, Field(ge=0, le=64)] = 8
    """Tokens that a step guesses for a sequence at most, from what stands in its prompt and answer, and computes beside
    the one that is due. Answers stay what they are; they come sooner where they repeat what they were given. Guesses
    are made while measurements say that they pay. 0 makes none."""

    cuda_graphs: bool = True
    """Record steps as CUDA graphs when the model is loaded, which takes some seconds, and some memory for every
    sequence of `max_running`. False computes them kernel by kernel: tokens take several times as long."""

    kv_cache_bytes: Positive | None = None
    """Device memory of the KV cache; None takes `hmt_gpu_threshold` of what is free on CUDA, 1 GiB on the CPU. What is
    on its way to or from host memory takes a 16th of it on CUDA, at most 1 GiB: besides, if a number is given here."""

    image_cache_bytes: Annotated[int, Field(ge=0)] | None = None
    """Device memory that keeps what became of the pictures seen last, so that a picture that comes again is not encoded
    again; None takes 256 MiB on CUDA and 64 MiB on the CPU. A picture takes 2.6 MiB in gemma-3-27b."""

    hmt_gpu_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of the free CUDA memory, weights loaded, that the KV cache takes when `kv_cache_bytes` is None."""

    host_cache_bytes: Annotated[int, Field(ge=0)] | None = None
    """Host memory that keeps what the device's cache gives up. None takes 4 GiB on CUDA, and on the CPU none, but
    256 MiB if there is a `nvme_cache_path`."""

    host_cache_codec: Literal["exact", "fp8", "q8", "q4"] = "exact"
    """How blocks are kept there. All but exact are LOSSY: a prompt whose beginning comes back from host memory is
    answered from keys and values that were rounded, as with `nvme_codec`. q8 and fp8 hold twice as many blocks of a
    16-bit type, and move them twice as fast; q4 nearly four times. The disk then takes the same bytes, so `nvme_codec`
    has to be the same."""

    hmt_cpu_threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of that host memory above which blocks leave for `nvme_cache_path`."""

    hmt_policy: Literal["a2cr", "a2cr_product", "a2cr_weighted", "lru", "lfu", "arc", "s3fifo", "w_tinylfu"] = "a2cr"
    """Which blocks leave host memory, and the disk, first; on CUDA also which the device's cache gives up."""

    nvme_cache_path: Directory | None = None
    """A directory of the engine's own for what host memory gives up, and what is cached when the engine ends: another
    engine of the same model goes on with it. None keeps nothing on disk."""

    nvme_cache_bytes: Positive = 8 * 2**30
    """All that its files may take; taken at once."""

    nvme_codec: Literal["exact", "fp8", "q8", "q4"] | None = None
    """How blocks are stored there: exact keeps every bit, q8 and fp8 take half of a 16-bit type, q4 a quarter. All but
    exact are lossy: what comes back from the disk was rounded, once. None is q8, or exact if `kv_cache_dtype` is
    fp8."""

    nvme_write_behind_bytes_per_second: Annotated[int, Field(ge=0)] = 200_000_000
    """While it is idle, the engine stores at this pace what is cached and not on disk yet, so that it outlives a kill.
    0 stores only what leaves host memory, and what is cached when the engine ends."""

    kv_budget_tokens: Positive | None = None
    """LOSSY. Tokens that an answer's sequence keeps on the device while it is decoded, of its layers with unlimited
    attention: the first, the recent, and those that attention falls on most; it cannot see the others. What leaves
    comes back when attention asks for it, if it was computed with the prompt and the device's cache or host memory
    still has it (`host_cache_bytes`; without, little comes back). None keeps everything: exact answers."""

    limits: PromptLimits = PromptLimits()
    """What one prompt may bring."""

    pan_and_scan: bool | None = None
    """Send crops of long pictures along with them; None does as the checkpoint's preprocessor_config.json says."""

    @property
    def disk_codec(self) -> CodecName:
        """What `nvme_codec` says or stands for."""
        return self.nvme_codec or ("q8" if self.kv_cache_dtype == "auto" else "exact")

    def context(self, positions: int) -> int:
        """The longest sequence of a model that has `positions` of them.

        Raises
        ------
        InvalidArgumentError
            If `max_model_len` is beyond that.
        """
        if self.max_model_len is not None and self.max_model_len > positions:
            raise InvalidArgumentError(
                f"max_model_len = {self.max_model_len:,} is beyond the {positions:,} positions of {self.model.name}"
            )
        return self.max_model_len or positions

    def prompt_limits(self, positions: int) -> PromptLimits:
        """`limits`, with no more tokens than leave room in the context for one token of an answer."""
        tokens = min(self.limits.max_prompt_tokens, self.context(positions) - 1)
        return self.limits.model_copy(update={"max_prompt_tokens": tokens})
