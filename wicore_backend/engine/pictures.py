"""From pictures to soft tokens: each encoded once, in batches, and on CUDA beside the steps that run meanwhile."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wicore_backend.executor.tensorrt.profiles import MAX_IMAGES
from wicore_backend.executor.upload import to_device
from wicore_backend.models.gemma3.config import VisionConfig
from wicore_backend.processor.images import PixelNormalization
from wicore_backend.processor.prompt import PromptImage

MAX_BATCH = MAX_IMAGES
"""Pictures that go through the tower at once, which bounds what its activations take: one fills an H200, and eight took
as long as one after the other (docs/benchmarks/loading-and-pictures.md)."""

_Key = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Picture:
    """What was seen, and by whom: tenants learn nothing of each other's pictures, not even by how long one takes."""

    tenant: str
    image: PromptImage

    @property
    def key(self) -> _Key:
        """Equal for pictures that look the same to the same tenant."""
        return self.tenant, self.image.digest


@dataclass(slots=True, eq=False)
class _Encoded:
    """Soft tokens [M, D], and what says that they are there, if another stream makes them."""

    tokens: Tensor
    done: torch.cuda.Event | None = None


def pixel_bytes(vision: VisionConfig, *, pictures: int, value_bytes: int) -> int:
    """Memory that the pixels of so many pictures take until they are normalised."""
    return pictures * vision.num_channels * vision.image_size**2 * (1 + torch.int32.itemsize + value_bytes)


class PictureEncoder:
    """Encodes pictures and keeps what came of them: of those used last, up to `cache_bytes` on the device.

    To be used under `torch.inference_mode()`, on one thread.

    Parameters
    ----------
    encode
        Soft tokens [N, M, D] of pixels [N, 3, S, S], for at most `MAX_BATCH` pictures: `Executor.vision`.
    device, dtype
        Of the pixels.
    cache_bytes
        0 keeps nothing, and then nothing is encoded ahead.

    Attributes
    ----------
    encoded, hits
        Pictures that went through the tower, and pictures that did not have to.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        normalization: PixelNormalization,
        *,
        device: torch.device,
        dtype: torch.dtype,
        cache_bytes: int,
    ) -> None:
        self._encode_pixels = encode
        # A byte of a channel becomes one of 256 values: looked up, they are the same on every device.
        self._values = torch.from_numpy(normalization.table()).to(device, dtype).flatten()
        self._channels = torch.arange(3, dtype=torch.int32, device=device).view(1, 3, 1, 1) * 256
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[_Key, _Encoded] = OrderedDict()
        self._bytes = 0
        self._ahead = device.type == "cuda"
        self._awaited: dict[str, set[_Key]] = {}  # by who awaits them: encoded ahead, and not asked for since
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.encoded = self.hits = 0

    def soft_tokens(self, pictures: Rows[Picture]) -> Tensor:
        """Soft tokens [pictures * M, D] of the pictures, one after the other, in the order of the current stream."""
        missing = {p.key: p for p in pictures if p.key not in self._cache}
        self.hits += len(pictures) - len(missing)
        made = self._encode(list(missing.values()))
        for keys in self._awaited.values():
            keys -= {p.key for p in pictures}
        found = [made[p.key] if p.key in made else self._cache[p.key] for p in pictures]
        for picture, encoded in zip(pictures, found, strict=True):
            self._arrive(encoded)
            if picture.key in self._cache:
                self._cache.move_to_end(picture.key)
        tokens = torch.cat([encoded.tokens for encoded in found])
        self._keep(made)
        return tokens

    def foresee(self, request_id: str, pictures: Iterable[Picture]) -> None:
        """Begin to encode, beside the device's other work, what will be asked for: as far as half the cache has room.

        On a CPU there is no beside, and nothing is done. To be followed by `forget`.
        """
        if not self._ahead:
            return
        awaited = self._awaited.setdefault(request_id, set())
        for picture in pictures:
            if 2 * self._awaited_bytes() >= self._cache_bytes:
                return
            if picture.key not in self._cache:
                self._keep(self._encode([picture]))
                awaited.add(picture.key)
            elif any(picture.key in keys for keys in self._awaited.values()):
                awaited.add(picture.key)

    def forget(self, request_id: str) -> None:
        """The request has ended: what was encoded ahead for it, and nobody asked for, is the first to leave."""
        unasked = self._awaited.pop(request_id, set()).difference(*self._awaited.values())
        for key in unasked & self._cache.keys():
            self._cache.move_to_end(key, last=False)

    def _awaited_bytes(self) -> int:
        awaited = set().union(*self._awaited.values()) & self._cache.keys()
        return sum(self._cache[key].tokens.nbytes for key in awaited)

    def _encode(self, pictures: list[Picture]) -> dict[_Key, _Encoded]:
        """Each in memory of its own, so that one that is kept does not hold what a batch took."""
        made: dict[_Key, _Encoded] = {}
        # All on one stream, since graphs of the tower share their memory. A stream of None is the current one.
        with torch.cuda.stream(self._beside):
            for first in range(0, len(pictures), MAX_BATCH):
                batch = pictures[first : first + MAX_BATCH]
                pixels = to_device(np.stack([p.image.pixels for p in batch]), self._values.device)
                places = pixels.int().add_(self._channels)
                tokens = self._encode_pixels(self._values.index_select(0, places.flatten()).view(places.shape))
                made |= {p.key: _Encoded(own.clone()) for p, own in zip(batch, tokens, strict=True)}
            if self._beside is not None and made:
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
                for encoded in made.values():
                    encoded.done = done
        self.encoded += len(pictures)
        return made

    def _arrive(self, encoded: _Encoded) -> None:
        """Make it safe to read on the current stream."""
        if encoded.done is not None:
            stream = torch.cuda.current_stream(encoded.tokens.device)
            stream.wait_event(encoded.done)
            encoded.tokens.record_stream(stream)  # It is the other stream's memory, and may be given up before.

    def _keep(self, made: dict[_Key, _Encoded]) -> None:
        self._cache |= made
        self._bytes += sum(encoded.tokens.nbytes for encoded in made.values())
        while self._bytes > self._cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= dropped.tokens.nbytes
