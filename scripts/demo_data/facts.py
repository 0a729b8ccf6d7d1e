"""Needles: a named value to be found in a list of facts of any length."""

from __future__ import annotations

from random import Random

from scripts.demo_data.conversation import Request, Split, Turn
from scripts.demo_data.phrases import FACT, phrase
from scripts.demo_data.words import (
    ADJECTIVES,
    ATTRIBUTES,
    GIVEN_NAMES,
    NAME_ENDINGS,
    NAME_SYLLABLES,
    SURNAMES,
    THINGS,
    VERBS,
    Attribute,
    Language,
)

TOKENS_PER_FACT: dict[Language, int] = {"en": 11, "zh": 12}
TOKENS_PER_QUESTION = 26
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
"""The upper bounds of the lengths under which accuracy is reported."""

HEADERS: dict[Language, tuple[str, ...]] = {
    "en": ("Here are some facts:", "Read these facts.", "Remember this list:", "Notes:", "Facts:", ""),
    "zh": ("下面是一些信息：", "请阅读下面的信息。", "请记住这个列表：", "笔记：", "信息：", ""),
}
STATEMENTS: dict[Language, tuple[str, ...]] = {
    "en": (
        "The {attribute} of {name} is {value}.",
        "{name}'s {attribute} is {value}.",
        "{attribute} of {name}: {value}.",
    ),
    "zh": ("{name}的{attribute}是{value}。", "{name}的{attribute}：{value}。", "{name}，{attribute}{value}。"),
}


def draw_name(rng: Random, split: Split, language: Language) -> str:
    """A made-up name, such as Velorin or 张思远; sometimes from the other language."""
    if (language == "zh") == (rng.random() < 0.85):
        return split.draw(
            lambda: rng.choice(SURNAMES) + rng.choice(GIVEN_NAMES) + rng.choice(GIVEN_NAMES),
            lambda name: ("name", name),
        )
    return split.draw(
        lambda: "".join(rng.choices(NAME_SYLLABLES, k=rng.choice((2, 3, 3)))).capitalize() + rng.choice(NAME_ENDINGS),
        lambda name: ("name", name),
    )


def draw_value(rng: Random, attribute: Attribute, language: Language) -> str:
    if attribute.values:
        return rng.choice(attribute.values)[language]
    return f"{rng.randrange(10000):04d}"


def draw_filler(rng: Random, language: Language) -> str:
    """A sentence that states no fact."""
    first, second = rng.choice(THINGS)[language], rng.choice(THINGS)[language]
    adjective, verb = rng.choice(ADJECTIVES)[language], rng.choice(VERBS)[language]
    if language == "zh":
        return f"{adjective}{first}{verb}{second}。"
    return f"The {adjective} {first} {verb} the {second}."


def needles(
    request: Request, *, depth: float | None = None, facts_share: float | None = None, questions: int | None = None
) -> list[Turn]:
    """A list of about `request.tokens` tokens, then questions about facts in it, each asked once.

    `depth` (0 first, 1 last) fixes where the first asked fact stands; by default facts are asked at random.
    `facts_share` is the share of sentences that are facts, the rest being filler. By default longer lists
    are asked more questions.
    """
    rng, language = request.rng, request.language
    if facts_share is None:
        facts_share = 1.0 if rng.random() < 0.65 else rng.uniform(0.03, 0.5)
    if questions is None:
        questions = max(4, min(128, request.tokens // 100))
    budget = max(40, request.tokens - TOKENS_PER_QUESTION * questions)
    sentences: list[str] = []
    facts: list[tuple[str, Attribute, str]] = []
    stated: set[tuple[str, str]] = set()
    statement = rng.choice(STATEMENTS[language])
    mixed = rng.random() < 0.4
    for _ in range(max(2, budget // TOKENS_PER_FACT[language])):
        if sentences and rng.random() >= facts_share:
            sentences.append(draw_filler(rng, language))
            continue
        attribute = rng.choice(ATTRIBUTES)
        name = facts[-1][0] if facts and rng.random() < 0.1 else draw_name(rng, request.split, language)
        if (name, attribute.name.en) in stated:
            continue
        stated.add((name, attribute.name.en))
        value = draw_value(rng, attribute, language)
        if mixed:
            statement = rng.choice(STATEMENTS[language])
        facts.append((name, attribute, value))
        text = statement.format(attribute=attribute.name[language], name=name, value=value)
        sentences.append(text[0].upper() + text[1:])
    asked = rng.sample(range(len(facts)), min(questions, len(facts)))
    if depth is not None:
        asked = [round(depth * (len(facts) - 1))]
    separator = rng.choice(("\n", "\n", "\n- ", " " if language == "en" else ""))
    header = rng.choice(HEADERS[language])
    listing = (header and header + "\n") + separator.lstrip("\n") + separator.join(sentences)
    gap = rng.choice(("\n\n", "\n\n", "\n", " "))
    skill = f"facts/{_length_name(request.tokens)}/{language}"
    turns: list[Turn] = []
    for index in asked:
        name, attribute, value = facts[index]
        question = phrase(rng, FACT, language, attribute=attribute.name[language], name=name)
        turns.append(Turn((question if turns else listing + gap + question,), value, skill))
    return turns


def _length_name(tokens: int) -> str:
    bound = next((bound for bound in LENGTHS if tokens <= bound), LENGTHS[-1])
    return f"{bound // 1024}K" if bound >= 1024 else str(bound)
