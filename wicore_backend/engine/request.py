"""A request on its way through the engine: what was asked, how far it is, and what its caller is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.errors import InvalidArgumentError, WicoreError
from wicore_backend.hmt.blocks import SequenceBlocks
from wicore_backend.hmt.lower_tiers import Restore
from wicore_backend.hmt.names import BlockNames
from wicore_backend.processor.prompt import Prompt


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """The model's own end, a stop token or a stop string."""
    LENGTH = "length"
    """max_tokens, or the end of the context."""
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REJECTED = "rejected"
    """It never ran: the queue was full, the engine was draining, or it could not have met its deadline."""
    ERROR = "error"


class PriorityClass(IntEnum):
    """Names for priorities. Any other integer is one as well; smaller goes first."""

    REALTIME = -10
    INTERACTIVE = 0
    BATCH = 10

    @classmethod
    def parse(cls, value: int | str) -> int:
        """The priority that a number or a name stands for.

        Raises
        ------
        InvalidArgumentError
            For an unknown name.
        """
        if isinstance(value, int):
            return value
        try:
            return int(cls[value.upper()])
        except KeyError:
            names = ", ".join(c.name.lower() for c in cls)
            raise InvalidArgumentError(f"priority {value!r} is neither an integer nor one of {names}") from None


class DeadlineKind(StrEnum):
    """What has to happen in time."""

    QUEUE = "queue"
    """The request's first step."""
    FIRST_TOKEN = "first_token"
    TOTAL = "total"
    """The end of the answer."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long after its arrival, in seconds, a request may take; None is no limit."""

    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None

    def items(self) -> Iterator[tuple[DeadlineKind, float]]:
        """Those that there are."""
        given = zip(DeadlineKind, (self.queue_s, self.first_token_s, self.total_s), strict=True)
        return ((kind, seconds) for kind, seconds in given if seconds is not None)

    @property
    def first_token(self) -> float | None:
        """When the first token is of no use any more."""
        return min((s for s in (self.first_token_s, self.total_s) if s is not None), default=None)


@dataclass(frozen=True, slots=True)
class Retention:
    """What a request says of the worth of its cached blocks; policies of the colder tiers may heed it (a2cr does)."""

    seconds: float | None = None
    """For so long they are to leave after all that nobody wished to keep; None is no wish."""
    session_end: bool = False
    """No other request follows this one."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token, and those of the most likely alternatives at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. Times are in seconds; None where the request ended before."""

    prompt_tokens: int
    completion_tokens: int
    """Of all answers that were made."""
    queue_s: float | None
    ttft_s: float | None
    total_s: float
    cached_tokens: int = 0
    """Tokens of the prompt that did not have to be computed."""
    restore_s: float = 0.0
    """Waited for blocks from the disk. Before the first step it is a part of `queue_s`."""

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an answer of less than two."""
        if self.ttft_s is None or self.completion_tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """Tokens of an answer. `text` is what they add to it, and lags behind the tokens while a character, or what
    may be a stop string, is incomplete."""

    token_ids: tuple[int, ...]
    text: str
    index: int = 0
    """Which of the request's answers they belong to."""
    reason: FinishReason | None = None
    """Why that answer ends here, if it does."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """With the first tokens, if asked for: one for each token of the prompt, None for the first."""


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The one last event of every request. `error` is there unless the answers are whole (stop, length)."""

    reason: FinishReason
    """Of the first answer, if there are several."""
    usage: Usage
    error: WicoreError | None = None


Event = TokensEvent | FinishedEvent
Sink = Callable[[Event], None]
"""Takes a request's events on the engine's thread, so it must be quick and must not raise."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What was asked. `arrival` is a reading of the engine's clock, in seconds."""

    id: str
    prompt: Prompt
    params: SamplingParams
    sink: Sink
    arrival: float
    priority: int = PriorityClass.INTERACTIVE
    """Smaller goes first; see WaitingQueue."""
    tenant: str = ""
    """On whose account it runs. Tenants of a priority get equal service, and share no cached block."""
    deadlines: Deadlines = Deadlines()
    retention: Retention = Retention()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """One answer to a request: its tokens and its memory.

    Of `tokens` (prompt and answer), the first `computed` have their keys in the cache. A sequence is

    - *waiting* in the queue while `blocks` and `leader` are None: new, or preempted;
    - *parked* while it has a `leader`, which is computing the same prompt, or while its `restore` is not done;
    - *running* while it has `blocks`: *decoding* with one token left to compute, *prefilling* with more.
    """

    request: Request
    max_tokens: int
    """Prompt and answer together."""
    names: BlockNames | None = None
    """None if it neither uses nor leaves cached blocks."""
    twin_key: bytes | None = None
    """Names the prompt: sequences of the same key compute it once. None if it has to be computed for itself."""
    index: int = 0
    """Which of the request's answers this is."""
    tokens: list[int] = field(init=False)
    ahead: int | None = None
    """While its next token has been chosen and nobody has read it from the device yet: its row among those chosen."""
    computed: int = 0
    blocks: SequenceBlocks | None = None
    cost: int = 0
    """Tokens that it was expected to take when it was queued."""
    promoted: bool = False
    """Has waited so long that nobody goes before it any more."""
    leader: Sequence | None = None
    followers: list[Sequence] = field(default_factory=list)
    restore: Restore | None = None
    """Blocks that are brought up, or have been, from the cold tier for it."""
    restore_began: float | None = None
    """When it began to wait for them, while it does; it stays if the sequence ends meanwhile."""
    restore_s: float = 0.0
    """How long it has waited for such blocks before."""
    computes: bool = False
    """It has been found that computing is faster than to wait for the cold tier."""
    preemptions: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache, the first time."""

    def __post_init__(self) -> None:
        self.tokens = self.request.prompt.token_ids.tolist()

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def arrival(self) -> float:
        return self.request.arrival

    @property
    def rank(self) -> tuple[bool, int, float, int]:
        """Order in which running sequences get memory and time; smaller is better."""
        return (not self.promoted, self.request.priority, self.request.arrival, self.index)

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) + (self.ahead is not None) - self.computed

    @property
    def running_blocks(self) -> SequenceBlocks:
        """The blocks of a running sequence."""
        assert self.blocks is not None, f"request {self.request.id} is waiting"
        return self.blocks

    def restore_seconds(self, now: float) -> float:
        """How long it has waited for the cold tier."""
        return self.restore_s + (0.0 if self.restore_began is None else now - self.restore_began)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_len :]
