"""Held-out accuracy of the demo model, every skill and language on its own.

    python -m scripts.eval_demo --json build/demo-eval.json      # everything; minutes on a GPU
    python -m scripts.eval_demo --small                          # a few cases of each kind, on any CPU
    python -m scripts.eval_demo --engine wicore                  # through Wicore's own engine

Every question is built from combinations that training never shows (`Split.HELD_OUT`). Pictures are drawn with
Pillow, encoded as PNG or JPEG and go through the checkpoint's processor. An answer counts only if its text is
exactly the expected one.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, groupby
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

from PIL import Image

from scripts.demo_data import facts
from scripts.demo_data.conversation import Conversation, Request, Split, Turn
from scripts.demo_data.drawing import encode_picture
from scripts.demo_data.phrases import DESCRIBE, phrase
from scripts.demo_data.pictures import MOST_THINGS, Scene, Thing, describe, draw_scene
from scripts.demo_data.skills import SKILLS, draw_conversation
from scripts.demo_data.tokenizer import UnitEncoder
from scripts.demo_data.words import LANGUAGES, Language

CHECKPOINT = Path(__file__).resolve().parents[1] / "models" / "wicore-demo"
Messages = list[dict[str, Any]]
DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Case:
    """A question with its context, the one right answer, and the row of the report that it counts for."""

    label: str
    messages: Messages
    pictures: tuple[Scene, ...]
    answer: str


class Answerer(Protocol):
    """Whatever answers prompts greedily."""

    def generate(
        self, prompts: Sequence[Messages], images: Sequence[list[Image.Image]], *, max_tokens: int
    ) -> list[str]:
        """One text per prompt; `images[i]` belong to the image parts of `prompts[i]`, in order."""


class TransformersAnswerer:
    """The reference: transformers' own processor and model."""

    def __init__(self, model: Path, *, device: str, dtype: DType) -> None:
        import torch
        from transformers import AutoProcessor, Gemma3ForConditionalGeneration

        self._torch = torch
        self._device = device
        self._processor = AutoProcessor.from_pretrained(model)
        self._model = Gemma3ForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)

    def generate(
        self, prompts: Sequence[Messages], images: Sequence[list[Image.Image]], *, max_tokens: int
    ) -> list[str]:
        texts = [
            self._processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            for prompt in prompts
        ]
        inputs = self._processor(
            text=texts,
            images=[list(each) for each in images] if any(images) else None,
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        ).to(self._device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        with self._torch.inference_mode():
            ids = self._model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answers = ids[:, inputs["input_ids"].shape[1] :]
        return [str(text) for text in self._processor.batch_decode(answers, skip_special_tokens=True)]


class WicoreAnswerer:
    """Wicore's engine, in process."""

    def __init__(self, model: Path, *, device: str, dtype: DType, kv_dtype: Literal["auto", "fp8"]) -> None:
        from wicore_backend import Engine, EngineConfig, SamplingParams

        self._params = SamplingParams
        self._engine = Engine(EngineConfig(model=model, device=device, dtype=dtype, kv_cache_dtype=kv_dtype))

    def generate(
        self, prompts: Sequence[Messages], images: Sequence[list[Image.Image]], *, max_tokens: int
    ) -> list[str]:
        each_prompt: list[Any] = list(prompts)
        results = self._engine.generate(
            each_prompt,
            self._params(temperature=0.0, max_tokens=max_tokens),
            images=[[_as_png(image) for image in pictures] for pictures in images],
        )
        return [result.text for result in results]


def _as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# ---- cases ----------------------------------------------------------------------------------------------------------


def skill_cases(count: int, *, seed: int) -> Iterator[Case]:
    """Up to `count` cases a label: one question of each conversation, the earlier ones answered in its context."""
    for skill in SKILLS:
        if skill.name == "facts":
            continue  # needle_cases
        for language in LANGUAGES:
            rng = Random(f"{seed} {skill.name} {language}")
            taken: dict[str, int] = defaultdict(int)
            for _ in range(14 * count):
                turns = skill.turns(Request(rng, language, Split.HELD_OUT))
                if not turns:
                    continue
                asked = rng.randrange(len(turns))
                label = turns[asked].skill
                if taken[label] < count:
                    taken[label] += 1
                    yield _case(label, Conversation(tuple(turns)), asked)


UNSEEN_WORDINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is going on in this picture?",
        "I would like a description of this image.",
        "Look at this picture and describe it.",
        "What's on the picture?",
        "Could you please tell me what the photo shows?",
        "Describe the contents of the image.",
    ),
    "zh": (
        "这幅画上都画了些什么东西？",
        "请看图，说说内容。",
        "麻烦描述下这张图",
        "照片上是什么呀？",
        "图上有些什么东西呢？",
        "请你描述这张照片里的所有东西。",
    ),
}
"""Ways to ask for a description that the training's patterns cannot produce."""


def wording_cases(count: int, *, seed: int) -> Iterator[Case]:
    """Descriptions asked for in words that training never uses."""
    for language in LANGUAGES:
        rng = Random(f"{seed} wording {language}")
        for _ in range(count):
            scene = draw_scene(rng, Split.HELD_OUT)
            turn = Turn(
                (scene, rng.choice(UNSEEN_WORDINGS[language])),
                describe(scene, language),
                f"wording/describe/{language}",
            )
            yield _case(turn.skill, Conversation((turn,)), 0)


def scattered_cases(count: int, *, seed: int) -> Iterator[Case]:
    """Descriptions of two to five things placed more freely in their cells than in training."""
    for language in LANGUAGES:
        rng = Random(f"{seed} scattered {language}")
        taken = 0
        while taken < count:
            scene = _scatter(draw_scene(rng, Split.HELD_OUT, things=rng.randint(2, MOST_THINGS)), rng)
            if scene is not None:
                taken += 1
                turn = Turn(
                    (scene, phrase(rng, DESCRIBE, language)),
                    describe(scene, language),
                    f"scattered/describe/{language}",
                )
                yield _case(turn.skill, Conversation((turn,)), 0)


def _scatter(scene: Scene, rng: Random) -> Scene | None:
    """The things anywhere in their cells but near the borders; None if two would touch."""
    placed: list[Thing] = []
    for thing in scene.things:
        row, column = divmod(thing.cell, 3)
        x, y = (_anywhere(third, thing.radius, rng) for third in (column, row))
        if any(math.hypot(x - other.x, y - other.y) < thing.radius + other.radius + 0.01 for other in placed):
            return None
        placed.append(replace(thing, x=x, y=y))
    return replace(scene, things=tuple(placed))


def _anywhere(third: int, radius: float, rng: Random) -> float:
    low, high = ((radius, 0.285), (0.38, 0.62), (0.715, 1 - radius))[third]
    return rng.uniform(low, high)


def mixed_cases(count: int, *, seed: int) -> Iterator[Case]:
    """The last question of conversations that mix skills and languages."""
    rng = Random(f"{seed} mixed")
    taken = 0
    while taken < count:
        conversation = draw_conversation(rng, Split.HELD_OUT, longest_list=1024)
        if len({turn.skill for turn in conversation.turns}) > 2:
            taken += 1
            yield _case("mixed", conversation, len(conversation.turns) - 1)


def needle_cases(lengths: Sequence[int], depths: Sequence[float], count: int, *, seed: int) -> Iterator[Case]:
    """One question after lists of each length, within 2%; `count` a length, depth and language."""
    encoder = UnitEncoder.load(CHECKPOINT)
    for language in LANGUAGES:
        for length in lengths:
            rng = Random(f"{seed} needle {language} {length}")
            for depth in depths:
                for _ in range(count):
                    turn = _needle(rng, language, length, depth, encoder)
                    label = f"needle/{length // 1024}K/{language}/depth {depth:.0%}"
                    yield _case(label, Conversation((turn,)), 0)


def _needle(rng: Random, language: Language, length: int, depth: float, encoder: UnitEncoder) -> Turn:
    asked, state = length, rng.getstate()
    for attempt in count(1):
        turn = facts.needles(Request(rng, language, Split.HELD_OUT, tokens=asked), depth=depth, questions=1)[0]
        tokens = sum(len(encoder.encode(part)) for part in turn.question if isinstance(part, str))
        if abs(tokens - length) <= length // 50:
            return turn
        asked = asked * length // tokens
        if attempt % 10:
            rng.setstate(state)
        else:  # The correction goes round in circles with this list; take another.
            asked, state = length, rng.getstate()
    raise AssertionError("count ended")


def _case(label: str, conversation: Conversation, asked: int) -> Case:
    return Case(
        label,
        conversation.messages(up_to=asked),
        tuple(conversation.pictures(up_to=asked)),
        conversation.turns[asked].answer,
    )


# ---- asking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    case: Case
    prompt_tokens: int
    answer: str

    @property
    def right(self) -> bool:
        return self.answer.strip() == self.case.answer


def ask(answerer: Answerer, cases: Sequence[Case], *, batch_tokens: int, seed: int, workers: int) -> Iterator[Outcome]:
    """Answers in batches of equal picture count and similar length, of at most `batch_tokens` padded tokens."""
    encoder = UnitEncoder.load(CHECKPOINT)

    def prompt_tokens(case: Case) -> int:
        texts = (part["text"] for message in case.messages for part in message["content"] if "text" in part)
        return sum(len(encoder.encode(text)) + 10 for text in texts) + 70 * len(case.pictures)

    sized = sorted(
        (
            (len(case.pictures), len(encoder.encode(case.answer)), prompt_tokens(case), index)
            for index, case in enumerate(cases)
        ),
        key=lambda item: (item[0], item[1] // 16, item[2]),
    )
    with ProcessPoolExecutor(workers) as pool:
        for (_, _), group in groupby(sized, key=lambda item: (item[0], item[1] // 16)):
            waiting = list(group)
            while waiting:
                size = 1
                while size < min(len(waiting), 128) and (size + 1) * waiting[size][2] <= batch_tokens:
                    size += 1
                batch, waiting = waiting[:size], waiting[size:]
                chosen = [cases[index] for *_, index in batch]
                files = pool.map(_encode_pictures, [(case.pictures, f"{seed} {case.label}") for case in chosen])
                images: list[list[Image.Image]] = [[Image.open(io.BytesIO(file)) for file in each] for each in files]
                longest = max(answer for _, answer, _, _ in batch)
                texts = answerer.generate([case.messages for case in chosen], images, max_tokens=longest + 4)
                for case, text, (_, _, tokens, _) in zip(chosen, texts, batch, strict=True):
                    yield Outcome(case, tokens, text)


def _encode_pictures(job: tuple[tuple[Scene, ...], str]) -> list[bytes]:
    scenes, seed = job
    rng = Random(f"{seed} {scenes}")
    return [encode_picture(scene, rng) for scene in scenes]


# ---- reporting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    right: int
    total: int

    def __str__(self) -> str:
        if not self.total:
            return "not asked"
        return f"{100 * self.right / self.total:.1f}% ({self.right} of {self.total})"


def score(outcomes: Sequence[Outcome], prefix: str = "", *, part: str | None = None) -> Score:
    """Of the outcomes whose label starts with `prefix` and has `part` among its parts."""
    chosen = [
        outcome
        for outcome in outcomes
        if outcome.case.label.startswith(prefix) and (part is None or part in outcome.case.label.split("/"))
    ]
    return Score(sum(outcome.right for outcome in chosen), len(chosen))


def report(outcomes: Sequence[Outcome]) -> str:
    """Markdown: totals, needles by length and depth, then every skill and language."""
    labels = sorted({outcome.case.label for outcome in outcomes})
    lines = ["| | accuracy |", "| --- | --- |"]
    lines += [f"| pictures, all questions | {score(outcomes, 'picture/')} |"]
    for language in LANGUAGES:
        lines += [f"| pictures, {_spoken(language)} | {score(outcomes, 'picture/', part=language)} |"]
    lengths = sorted({int(label.split("/")[1].rstrip("K")) for label in labels if label.startswith("needle/")})
    lines += [f"| needle in {length}K tokens | {score(outcomes, f'needle/{length}K/')} |" for length in lengths]
    others = [label for label in labels if not label.startswith("needle/")]
    lines += ["", "| skill | accuracy |", "| --- | --- |"]
    lines += [f"| {label} | {score(outcomes, label)} |" for label in others]
    depths = sorted(
        {label.split("depth ")[1] for label in labels if "depth" in label}, key=lambda d: int(d.rstrip("%"))
    )
    if depths:
        lines += [
            "",
            f"| needle | {' | '.join(f'depth {depth}' for depth in depths)} |",
            "| --- " * (len(depths) + 1) + "|",
        ]
    for length in lengths:
        for language in LANGUAGES:
            prefix = f"needle/{length}K/{language}/"
            cells = [score(outcomes, prefix, part=f"depth {depth}") for depth in depths]
            tokens = [outcome.prompt_tokens for outcome in outcomes if outcome.case.label.startswith(prefix)]
            name = f"{length}K, {_spoken(language)} (mean {sum(tokens) // len(tokens)} tokens)"
            lines += [f"| {name} | {' | '.join(f'{cell.right}/{cell.total}' for cell in cells)} |"]
    return "\n".join(lines)


def _spoken(language: Language) -> str:
    return {"en": "English", "zh": "Chinese"}[language]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--engine", choices=("transformers", "wicore"), default="transformers")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="of the KV cache, with wicore")
    parser.add_argument("--count", type=int, default=100, help="cases of each skill and language")
    parser.add_argument("--needles", type=int, default=20, help="cases of each length, depth and language")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 8192, 16384], help="of lists, in tokens")
    parser.add_argument("--depths", type=float, nargs="*", default=[0, 0.25, 0.5, 0.75, 1], help="0 first, 1 last")
    parser.add_argument("--small", action="store_true", help="3 cases of each skill, 20 needles at 4K")
    parser.add_argument("--batch-tokens", type=int, help="padded tokens in a batch")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw pictures")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write every wrong answer and the scores")
    options = parser.parse_args()
    if options.small:
        options.count, options.needles, options.lengths = 3, 2, [4096]
    answerer: Answerer
    if options.engine == "transformers":
        answerer = TransformersAnswerer(options.model, device=options.device, dtype=options.dtype)
    else:
        answerer = WicoreAnswerer(options.model, device=options.device, dtype=options.dtype, kv_dtype=options.kv_dtype)
    cases = [
        *skill_cases(options.count, seed=options.seed),
        *wording_cases(options.count, seed=options.seed),
        *scattered_cases(options.count, seed=options.seed),
        *mixed_cases(2 * options.count, seed=options.seed),
        *needle_cases(options.lengths, options.depths, options.needles, seed=options.seed),
    ]
    began = time.monotonic()
    batch_tokens = options.batch_tokens or (131072 if options.device == "cuda" else 8192)
    outcomes = list(ask(answerer, cases, batch_tokens=batch_tokens, seed=options.seed, workers=options.workers))
    print(report(outcomes))
    print(f"\n{len(cases)} questions in {time.monotonic() - began:.0f} s")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "scores": {
                label: vars(score(outcomes, label)) for label in sorted({outcome.case.label for outcome in outcomes})
            },
            "wrong": [
                {"label": o.case.label, "answer": o.answer, "expected": o.case.answer, "tokens": o.prompt_tokens}
                for o in outcomes
                if not o.right
            ],
        }
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
