"""What structured output costs: tokens a second with and without a grammar in paired rounds, and a mask by itself.

    python -m scripts.benchmark_structured [--rounds 12]

Each round makes the same number of tokens with and without, in turns, on one engine; the ratios are of rounds, so that
what else the machine does falls on both. The large vocabulary is the demo's with random words added to Gemma-3's size.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from scripts.serving.installation import ROOT
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.grammar.source import source_of
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.engine.request import FinishedEvent
from wicore_backend.processor.tokenizer import Tokenizer

MODEL = ROOT / "models" / "wicore-demo"
GEMMA_VOCAB = 262_208
TOKENS = 96
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CALL = {"begin": '{"name": "add", "parameters": ', "json_schema": PERSON, "end": "}"}
GRAMMARS: dict[str, dict[str, Any]] = {
    "a list of objects by a schema": {"json_schema": {"type": "array", "items": PERSON, "minItems": 1000}},
    "any JSON": {"json_schema": {"type": "array", "minItems": 1000}},
    "text or calls of tools": {"tags": {"trigger": '{"name": "', "tags": [CALL]}},
    "a regular expression": {"regex": "([a-z]+ ){1000}"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    print("| grammar | answers at once | tokens/s without | with | ratio of rounds: median (quartiles) |")
    print("|---|---|---|---|---|")
    with Engine(EngineConfig(model=MODEL, device="cpu", dtype="float32")) as engine:
        for name, grammar in GRAMMARS.items():
            for answers in (1, 16):
                compare(engine, name, grammar, answers, given.rounds)
    print()
    print("| grammar | vocabulary | compile ms | mask us: median | 99% |")
    print("|---|---|---|---|---|")
    for vocab in (2048, GEMMA_VOCAB):
        tokenizer = tokenizer_of(vocab)
        for name, grammar in GRAMMARS.items():
            print(f"| {name} | {vocab:,} | {mask_costs(tokenizer, grammar)} |")


def compare(engine: Engine, name: str, grammar: dict[str, Any], answers: int, rounds: int) -> None:
    """A row of the first table."""

    def rate(form: dict[str, Any] | None) -> float:
        params = SamplingParams(
            max_tokens=TOKENS,
            min_tokens=TOKENS,
            temperature=1.0,
            seed=1,
            n=answers,
            grammar=Grammar(**form) if form else None,
        )
        with engine.stream("What is in this picture?", params) as stream:
            *_, last = stream
        assert isinstance(last, FinishedEvent)
        usage = last.usage
        assert usage.completion_tokens == TOKENS * answers, "an answer ended early"
        assert usage.ttft_s is not None
        return usage.completion_tokens / (usage.total_s - usage.ttft_s)

    rate(None)
    rate(grammar)
    pairs = [(rate(None), rate(grammar)) if turn % 2 else (rate(grammar), rate(None))[::-1] for turn in range(rounds)]
    low, middle, high = statistics.quantiles([masked / free for free, masked in pairs], n=4)
    free, masked = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"| {name} | {answers} | {free:.0f} | {masked:.0f} | {middle:.3f} ({low:.3f} to {high:.3f}) |", flush=True)


def tokenizer_of(vocab: int) -> LLTokenizer:
    """The demo's tokenizer with as many random words as are missing."""
    tokenizer = Tokenizer.from_checkpoint(MODEL)
    draw = random.Random(0)
    letters = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789"{}:,[] \n_-éñ日本語'
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(vocab - tokenizer.vocab_size)]

    class Words:
        def __init__(self) -> None:
            own = range(tokenizer.vocab_size)
            self.eos_token_id, self.bos_token_id = 1, 2
            self.special_token_ids = [token for token in own if tokenizer.is_special(token)]
            self.tokens = [*map(tokenizer.token_bytes, own), *(word.encode() for word in words)]

        def __call__(self, text: bytes) -> list[int]:
            return tokenizer.encode(text.decode())

    return LLTokenizer(TokenizerWrapper(Words()), n_vocab=vocab, eos_token=[1, 6])


def mask_costs(tokenizer: LLTokenizer, grammar: dict[str, Any]) -> str:
    """Time to compile, and of the masks along a random answer."""
    source = source_of(Grammar(**grammar))
    compile_s = timed(lambda: LLMatcher(tokenizer, source))
    draw, times = random.Random(1), []
    for _ in range(10):
        matcher = LLMatcher(tokenizer, source)
        for _ in range(TOKENS):
            bits = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
            times.append(timed(partial(matcher.unsafe_compute_mask_ptr, bits.ctypes.data, bits.nbytes)))
            allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
            if not matcher.consume_token(int(draw.choice(allowed))) or matcher.is_stopped():
                break
    median, last = np.percentile(times, [50, 99]) * 1e6
    return f"{compile_s * 1e3:.1f} | {median:.0f} | {last:.0f}"


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
