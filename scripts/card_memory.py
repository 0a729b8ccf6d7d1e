"""What models take of cards, by the arithmetic that the engine itself uses: tables for docs/operations.md.

python -m scripts.card_memory                            # all ready-made plans, for the published models
python -m scripts.card_memory --plan rtx4090-27b --model models/gemma-3-27b --set max_model_len=32768
python -m scripts.card_memory --write docs/operations.md  # puts the tables in place of those on the page
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from scripts.random_gemma3 import published_config
from scripts.serving.cli import setting
from wicore_backend.config import EngineConfig
from wicore_backend.devices.cards import CARDS, Card
from wicore_backend.devices.memory import CardMemory, kv_layout, sequence_bytes
from wicore_backend.devices.plans import PLANS, Plan
from wicore_backend.errors import WicoreError
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.sizes import gib

MODELS = ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b")
CONTEXTS = (8_192, 32_768, 131_072)
_KV_TYPES: tuple[Literal["auto", "fp8"], ...] = ("auto", "fp8")
_PLACE = re.compile(r"(<!-- tables: python -m scripts\.card_memory -->\n).*?(<!-- end of tables -->)", re.DOTALL)
_SOME_MODEL = Path("a-model")
"""Settings need a checkpoint's directory; memory does not."""


def tables() -> str:
    """The plans, what a sequence takes, and what does not fit, as Markdown."""
    memories = [(plan, plan.memory(published_config(plan.model), _SOME_MODEL)) for plan in PLANS.values()]
    parts = (
        ("Device memory, GiB of one card:", _plan_rows(memories)),
        (
            "Sequences at once, if `max_model_len` is set to their length, and what else is kept, in thousands of "
            "tokens (of the layers that see everything):",
            _context_rows(memories),
        ),
        ("KV cache of one sequence, MiB (layers that see everything + those with a window):", _sequence_rows()),
        ("What does not fit, GiB:", _misfit_rows()),
    )
    return "\n\n".join(f"{title}\n\n{_markdown(rows)}" for title, rows in parts)


def _plan_rows(memories: Iterable[tuple[Plan, CardMemory]]) -> Iterator[Sequence[str]]:
    yield "plan", "card", "model", "weights", "head", "tower", "tokens", "computing", "KV cache", "free"
    for plan, memory in memories:
        parts = [gib(memory.weights.get(part, 0)) for part in ("decoder", "head", "vision tower")]
        table = "host" if memory.settings.host_embeddings else gib(memory.weights["embedding table"])
        working = gib(sum(memory.working.values()))
        card = f"{plan.cards} x {plan.card.name}, one engine each" if plan.cards > 1 else plan.card.name
        model = f"{plan.model.removeprefix('gemma-3-')} {plan.precision}"
        yield f"`{plan.name}`", card, model, *parts, table, working, gib(memory.kv_cache), gib(memory.reserve)


def _context_rows(memories: Iterable[tuple[Plan, CardMemory]]) -> Iterator[Sequence[str]]:
    yield "plan", "context", "KV", *(f"{context:,}" for context in CONTEXTS), "host memory", "disk"
    for plan, memory in memories:
        at_once = [str(_at_once(memory, context)) for context in CONTEXTS]
        kept = [f"{tokens / 1000:,.0f}" for tokens in (memory.host_tokens, memory.disk_tokens)]
        context = memory.settings.context(memory.config.text.max_position_embeddings)
        kv = "fp8" if memory.settings.kv_cache_dtype == "fp8" else str(memory.precision.activations)[6:]
        yield f"`{plan.name}`", f"{context:,}", kv, *at_once, *kept


def _at_once(memory: CardMemory, context: int) -> int:
    """Sequences of `context` tokens that run together on a card set up for sequences of that length."""
    settings = memory.settings.model_copy(update={"max_model_len": context})
    of_context = dataclasses.replace(memory, settings=settings)
    return of_context.sequences(context) if of_context.longest >= context else 0


def _sequence_rows() -> Iterator[Sequence[str]]:
    yield "model", "KV", *(f"{context:,}" for context in CONTEXTS)
    for model in MODELS:
        config = published_config(model)
        for kv in _KV_TYPES:
            settings = EngineConfig(model=_SOME_MODEL, kv_cache_dtype=kv)
            layout = kv_layout(config, settings, Precision.BF16)
            sizes = (sequence_bytes(layout, tokens, max_chunk=settings.max_batch_tokens) for tokens in CONTEXTS)
            cells = [f"{_mib(size[LayerGroup.GLOBAL])} + {_mib(size[LayerGroup.LOCAL])}" for size in sizes]
            yield model.removeprefix("gemma-3-"), "16 bits" if kv == "auto" else kv, *cells


def _misfit_rows() -> Iterator[Sequence[str]]:
    yield "card", "model", "weights", "computing", "of", "longest sequence"
    for card in CARDS.values():
        for model in MODELS:
            for precision in sorted(card.precisions - {Precision.FP32, Precision.FP16} or card.precisions):
                memory = _bare(card, published_config(model), precision)
                if memory.longest < CONTEXTS[0]:
                    weights, working = (gib(sum(part.values())) for part in (memory.weights, memory.working))
                    name = f"{model.removeprefix('gemma-3-')} {precision}"
                    yield card.name, name, weights, working, gib(card.memory_bytes), str(memory.longest or "none")


def _bare(card: Card, config: Gemma3Config, precision: Precision) -> CardMemory:
    """With the least that an engine takes: eight sequences, tokens in host memory, all that is free."""
    settings = EngineConfig(model=_SOME_MODEL, max_running=8, hmt_gpu_threshold=0.95, host_embeddings=True)
    return CardMemory.of(config, settings, precision, card=card)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    head, *rest = rows
    lines = [f"| {' | '.join(row)} |" for row in (head, *rest)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def with_tables(page: str) -> str:
    """`page` with the tables in their place.

    Raises
    ------
    ValueError
        If it has no such place.
    """
    if not _PLACE.search(page):
        raise ValueError("the page has no place for the tables: <!-- tables: python -m scripts.card_memory -->")
    return _PLACE.sub(lambda place: f"{place[1]}{tables()}\n{place[2]}", page)


def describe(plan: Plan, memory: CardMemory) -> str:
    """One plan in full, for a terminal."""
    sizes = {
        **{f"weights: {part}": size for part, size in memory.weights.items()},
        **memory.working,
        "KV cache": memory.kv_cache,
        "left free": memory.reserve,
    }
    lines = [f"{plan.card.name}, {memory.precision}: {gib(memory.card_bytes)} GiB"]
    lines += [f"  {part:<28}{gib(size):>8}" for part, size in sizes.items()]
    lines += ["host memory"] + [f"  {part:<28}{gib(size):>8}" for part, size in memory.on_host.items()]
    context = memory.settings.context(memory.config.text.max_position_embeddings)
    if memory.longest < context:
        lines.append(
            f"does not fit: the longest sequence that it holds is {memory.longest:,} of {context:,} tokens; lower "
            "max_model_len or max_running, or take fewer bits"
        )
    else:
        lines.append(f"longest sequence {context:,} tokens, {memory.sequences(context)} of that length at once")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, help="one plan in full")
    parser.add_argument("--model", type=Path, help="a checkpoint in place of the published model")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables in their place on a page")
    args = parser.parse_args()
    try:
        if args.plan:
            plan = PLANS[args.plan]
            plan = dataclasses.replace(plan, settings={**plan.settings, **dict(args.settings)})
            model = args.model or Path(plan.model)
            config = Gemma3Config.from_checkpoint(model) if args.model else published_config(plan.model)
            print(describe(plan, plan.memory(config, model)))
        elif args.write:
            args.write.write_text(with_tables(args.write.read_text()))
        else:
            print(tables())
    except WicoreError as error:
        raise SystemExit(f"card_memory: {error}") from None


if __name__ == "__main__":
    main()
