"""The registry of skills, and conversations that mix them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from scripts.demo_data import facts, pictures, texts
from scripts.demo_data.conversation import Conversation, Request, Split, Turn
from scripts.demo_data.words import LANGUAGES


@dataclass(frozen=True)
class Skill:
    """A generator of turns. `weight` is how often a mixed conversation draws it."""

    name: str
    weight: float
    turns: Callable[[Request], list[Turn]]


SKILLS: tuple[Skill, ...] = (
    Skill("picture", 16, pictures.about_one),
    Skill("two pictures", 2.5, pictures.about_two),
    Skill("no picture", 0.4, pictures.about_none),
    Skill("facts", 1.5, facts.needles),
    Skill("sums", 4, texts.sums),
    Skill("repeat", 3, texts.repeat),
    Skill("reverse", 6, texts.reverse),
    Skill("count", 0.7, texts.count),
    Skill("talk", 1, texts.talk),
    Skill("memory", 0.7, texts.memory),
    Skill("beyond", 1, texts.beyond),
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are Wicore.",
    "Be kind and exact.",
    "你是一个有用的助手。",
    "请简短回答。",
)


def draw_conversation(rng: Random, split: Split, *, longest_list: int) -> Conversation:
    """Mostly one skill, sometimes several in one context; a list of facts takes up to `longest_list` tokens."""
    turns: list[Turn] = []
    language = rng.choice(LANGUAGES)
    seen_picture = False
    episodes = rng.choice((1, 1, 1, 2, 3))
    while episodes > 0 or not turns:
        episodes -= 1
        skill = rng.choices(SKILLS, weights=[skill.weight for skill in SKILLS])[0]
        if skill.name in ("no picture", "two pictures") and seen_picture:
            continue
        if rng.random() < 0.2:
            language = rng.choice(LANGUAGES)
        request = Request(rng, language, split, tokens=draw_length(rng, longest=longest_list))
        drawn = skill.turns(request)
        seen_picture = seen_picture or skill.name in ("picture", "two pictures")
        turns.extend(drawn)
    return Conversation(tuple(turns), system=rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.1 else None)


def draw_needles(rng: Random, split: Split, *, tokens: int) -> Conversation:
    """A list of facts of about `tokens` tokens and nothing else."""
    request = Request(rng, rng.choice(LANGUAGES), split, tokens=tokens)
    return Conversation(tuple(facts.needles(request)))


def draw_length(rng: Random, *, longest: int, shortest: int = 128) -> int:
    """A length between the two, each doubling equally likely."""
    return int(shortest * (longest / shortest) ** rng.random())
