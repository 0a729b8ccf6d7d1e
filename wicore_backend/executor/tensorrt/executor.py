"""`Executor` by TensorRT engines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from wicore_backend.errors import EngineError, ExecutorError
from wicore_backend.executor.base import QKV
from wicore_backend.executor.between import Between
from wicore_backend.executor.segments.contract import (
    Precision,
    Segment,
    SegmentKind,
    segment_spec,
    segments,
)
from wicore_backend.executor.tensorrt.card import Card
from wicore_backend.executor.tensorrt.contexts import SegmentContexts
from wicore_backend.executor.tensorrt.kernel_cache import KernelCache
from wicore_backend.executor.tensorrt.library import Library
from wicore_backend.executor.tensorrt.loading import EngineLoader
from wicore_backend.executor.tensorrt.profiles import Profile
from wicore_backend.executor.tensorrt.records import CONTRACT_VERSION
from wicore_backend.executor.tensorrt.room import check_room, room_for
from wicore_backend.executor.tensorrt.store import EngineSet
from wicore_backend.models.gemma3.config import Gemma3Config

_log = logging.getLogger(__name__)

Embed = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""`Executor.embed`."""
RecordT = TypeVar("RecordT", bound=Callable[..., Any])
"""A `Record` of `engine/recording.py`."""

_KERNELS = "kernels.cache"


class TensorRTExecutor:
    """`Executor` on a card, by the engines of a set. To be used under `torch.inference_mode()`, on one thread.

    What `first` and `mid` give is in memory of the executor's: queries, keys and values until the next segment, hidden
    states until the one after that. Logits and soft tokens are the caller's.

    Attributes
    ----------
    recordable
        Whether CUDA graphs can have its work. It is to be recorded by what `recording` makes of a recorder.
    """

    def __init__(
        self,
        config: Gemma3Config,
        precision: Precision,
        contexts: Mapping[Segment, SegmentContexts],
        *,
        profiles: Sequence[Profile],
        embed: Embed,
        card: Card,
        kernels: KernelCache,
        recordable: bool,
    ) -> None:
        self.device = card.device
        self.dtype = precision.activations
        self.residual = precision.residual
        self.recordable = recordable
        self._embed = embed
        self._card = card
        self._kernels = kernels
        self._contexts = contexts
        self._first = contexts[Segment(SegmentKind.FIRST)]
        self._mids = [contexts[Segment(SegmentKind.MID, layer)] for layer in range(config.text.num_layers - 1)]
        self._last = contexts[Segment(SegmentKind.LAST)]
        self._vision = contexts.get(Segment(SegmentKind.VISION))
        self._soft_tokens = config.mm_tokens_per_image, config.text.hidden_size
        self._vocab_size = config.text.vocab_size
        self._most_tokens = self._first.most
        self._most_rows = min(profile.rows.max for profile in profiles)
        self._between = Between.of(config, precision, tokens=self._most_tokens, device=card.device)

    @classmethod
    def load(
        cls,
        config: Gemma3Config,
        engines: EngineSet,
        *,
        library: Library,
        card: Card,
        embed: Embed,
        weights: Mapping[Segment, Mapping[str, Tensor]] | None = None,
        reserved_bytes: int = 0,
        kv_cache_bytes: int | None = None,
        graphs: bool = True,
        cache: Path | None = None,
    ) -> TensorRTExecutor:
        """Open `engines` on `card`.

        Parameters
        ----------
        embed
            `Embedding`, with hidden states in the engines' residual type.
        weights
            By segment and name, for engines whose weights are inputs: they are read where they are.
        reserved_bytes
            Device memory that has to be left, the KV cache's aside.
        kv_cache_bytes
            Device memory to be left for the KV cache; None leaves it what remains, and streams no weights.
        graphs
            Whether steps are to be recorded, if they can be.
        cache
            The file that keeps compiled kernels; None is one beside the engines.

        Raises
        ------
        ExecutorError
            If the engines are of another card or library, damaged, not as the contract says, or too large: names what
            was found, what was wanted, and what to do.
        """
        key, given = engines.key, weights or {}
        _check_identity(engines, library, card)
        specs = {segment: segment_spec(config, segment, key.precision) for segment in segments(config)}
        for segment in specs:
            if segment not in engines.engines:
                raise ExecutorError(f"{engines.directory} has no engine for {segment.name}; finish building them")
            if key.weights == "inputs" and not given.get(segment):
                raise ExecutorError(f"the engine of {segment.name} takes its weights as inputs, and was given none")
        buffers = Between.nbytes(config, key.precision, tokens=key.max_batch_tokens)
        room = room_for(engines, card, buffers=buffers, reserved=reserved_bytes, kv_cache=kv_cache_bytes)
        check_room(room, engines, card)
        kernels = KernelCache(cache or engines.directory / _KERNELS)
        loader = EngineLoader(
            engines,
            specs,
            given,
            library=library,
            card=card,
            messages=library.messages(),
            kernels=kernels,
            streaming_budget=room.streaming_budget,
        )
        contexts = loader.load()
        kernels.save()
        stubborn = [segment.name for segment, one in contexts.items() if not one.capturable()]
        if stubborn and graphs:
            _log.warning(
                "%d engines cannot be recorded as CUDA graphs, %s first: steps are computed engine by engine",
                *(len(stubborn), stubborn[0]),
            )
        return cls(
            config,
            key.precision,
            contexts,
            profiles=key.profiles,
            embed=embed,
            card=card,
            kernels=kernels,
            recordable=not stubborn,
        )

    def embed(self, ids: Tensor, soft_tokens: Tensor | None, soft_rows: Tensor | None) -> Tensor:
        return self._embed(ids, soft_tokens, soft_rows)

    def first(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> QKV:
        qkv = self._room(len(hidden)).qkv
        self._first.run((hidden, cos, sin), qkv)
        return qkv

    def mid(self, layer: int, hidden: Tensor, attention: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, QKV]:
        room = self._room(len(hidden))
        following = room.after(layer)
        self._mids[layer].run((hidden, attention, cos, sin), (following, *room.qkv))
        return following, room.qkv

    def last(self, hidden: Tensor, attention: Tensor, rows: Tensor) -> Tensor:
        parts = []
        for some in torch.split(rows.long(), self._most_rows):
            logits = torch.empty(len(some), self._vocab_size, dtype=torch.float32, device=self.device)
            if len(some):
                self._last.run((hidden, attention, some), (logits,))
            parts.append(logits)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def vision(self, pixels: Tensor) -> Tensor:
        assert self._vision is not None, "a text-only model sees no pictures"
        parts = []
        for some in torch.split(pixels, self._vision.most):
            tokens = torch.empty(len(some), *self._soft_tokens, dtype=self.residual, device=self.device)
            self._vision.run((some,), (tokens,))
            parts.append(tokens)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def recording(self, record: RecordT) -> RecordT:
        """`record`, for work that this executor does: each recording has contexts of its own, for ever."""

        def recorded(work: Callable[[], Any]) -> Any:
            with self._own_contexts():
                # Contexts are made, and kernels compiled, by a run: both would break a recording.
                work()
                self._card.settle()
                return record(work)

        return cast(RecordT, recorded)

    def save_kernels(self) -> None:
        """Keep on disk what has been compiled until now."""
        self._kernels.save()

    @contextmanager
    def _own_contexts(self) -> Iterator[None]:
        restores = [contexts.keep_own() for contexts in self._contexts.values()]
        try:
            yield
        finally:
            for restore in restores:
                restore()

    def _room(self, count: int) -> Between:
        """Memory for what a step of so many tokens leaves between its segments."""
        if count > self._most_tokens:
            raise EngineError(
                f"a step of {count} tokens, and these engines compute {self._most_tokens} at most; set "
                f"max_batch_tokens = {self._most_tokens}, or run python -m scripts.build_engines with "
                f"--max-batch-tokens {count}"
            )
        return self._between.first(count)


def _check_identity(engines: EngineSet, library: Library, card: Card) -> None:
    key = engines.key
    problems = []
    if key.compute_capability != card.compute_capability:
        problems.append(f"for {key.compute_capability}, and this card, {card.name}, is {card.compute_capability}")
    if (key.library, key.version) != (library.name, library.version):
        problems.append(f"of {key.library} {key.version}, and this is {library}")
    if key.contract != CONTRACT_VERSION:
        problems.append(f"of contract {key.contract}, and this is {CONTRACT_VERSION}")
    if problems:
        raise ExecutorError(
            f"the engines in {engines.directory} are {'; '.join(problems)}; run python -m scripts.build_engines with "
            f"--target {card.compute_capability} and this library"
        )
