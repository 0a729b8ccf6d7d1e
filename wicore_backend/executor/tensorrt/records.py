"""What engines are told apart by, and what is known of each: the contents of `engines.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.tensorrt.library import LibraryName
from wicore_backend.executor.tensorrt.profiles import Profile

CONTRACT_VERSION = 1
"""Of `executor/segments/contract.py` and of how graphs are made: one more makes all engines stale."""

Size = Annotated[int, Field(ge=0)]
Shape = tuple[int, ...]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EngineKey(_Record):
    """Everything that an engine depends on, its segment aside. A change of any makes engines stale.

    Attributes
    ----------
    model
        The checkpoint's fingerprint, in hexadecimal.
    weights
        Whether they are in the engines, or given to them as inputs.
    version
        Of the library.
    compute_capability
        "sm89": of the card that the engines are for.
    card
        The name of the card on which kernels were timed, which runs them best; None if none was there.
    weight_streaming
        Weights may stay in host memory, as far as a budget says.
    searched
        Matrices that were rounded to INT4 have the best of many scales; False in every other precision.
    """

    model: Annotated[str, Field(pattern=r"^[0-9a-f]{8,128}$")]
    precision: Precision
    weights: Literal["embedded", "inputs"] = "embedded"
    library: LibraryName
    version: Annotated[str, Field(pattern=r"^[\w.+-]+$")]
    compute_capability: Annotated[str, Field(pattern=r"^sm\d{2,3}$")]
    card: str | None = None
    profiles: Annotated[tuple[Profile, ...], Field(min_length=1)]
    weight_streaming: bool = False
    searched: bool = False
    contract: int = CONTRACT_VERSION

    @property
    def folder(self) -> str:
        """Where its engines are kept, below the directory of all engines."""
        return f"{self.precision}/{self.library}-{self.version}-{self.compute_capability}"

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that its engines compute at once."""
        return max(profile.tokens.max for profile in self.profiles)

    def differences(self, other: EngineKey) -> Sequence[str]:
        """What is not as in `other`, in words: "version 1.6 instead of 1.7"."""
        return [
            f"{name} {_said(mine)} instead of {_said(theirs)}"
            for name in type(self).model_fields
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]


class EngineTensor(_Record):
    """An input or output of an engine.

    Attributes
    ----------
    dtype
        "bfloat16": PyTorch's name, or the library's where PyTorch has no such type.
    shape
        -1 stands for a size that differs from step to step.
    ranges
        Of an input, the least, usual and largest shape in each profile.
    """

    name: str
    dtype: str
    shape: Shape
    ranges: tuple[tuple[Shape, Shape, Shape], ...] = ()


class EngineReport(_Record):
    """What an engine says of itself, or the library said while it was built.

    Attributes
    ----------
    layers
        How many of each type there are, for all profiles together.
    precisions
        How many of their results and constants are of each type, if known.
    weight_bytes
        Of device memory, however many contexts there are.
    activation_bytes
        Of device memory in each profile, which all engines may share.
    """

    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    layers: Mapping[str, Size]
    precisions: Mapping[str, Size]
    weight_bytes: Size
    activation_bytes: tuple[Size, ...]


class EngineRecord(_Record):
    """An engine in a file.

    Attributes
    ----------
    segments
        By name, those that it computes: several if their weights are inputs.
    file
        Beside `engines.json`.
    digest
        xxh3-128 of the file, in hexadecimal.
    seconds
        That building took.
    """

    segments: Annotated[tuple[str, ...], Field(min_length=1)]
    file: Annotated[str, Field(pattern=r"^[a-z0-9_]+\.engine$")]
    nbytes: Size
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    seconds: float
    report: EngineReport


class EngineManifest(_Record):
    """`engines.json`."""

    format: Literal[2] = 2
    key: EngineKey
    engines: tuple[EngineRecord, ...] = ()

    @classmethod
    def parse(cls, text: bytes, name: str) -> Self:
        """What `text` holds.

        Raises
        ------
        ExecutorError
            If that is not such a manifest; it names the first things that are wrong, and begins with `name`.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)[:3]
            told = "; ".join(".".join(map(str, p["loc"])) + ": " + p["msg"] for p in problems)
            raise ExecutorError(f"{name} is no list of engines ({told}); build them again") from None


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return "for " + ", ".join(f"{profile.tokens.min} to {profile.tokens.max} tokens" for profile in value)
    return str(value)
