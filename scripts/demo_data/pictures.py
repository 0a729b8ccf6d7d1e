"""Pictures as data (a scene of coloured things), and what can be asked about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from scripts.demo_data.conversation import Request, Split, Turn
from scripts.demo_data.phrases import (
    BACKGROUND,
    CELL,
    COLOUR,
    COUNT,
    DESCRIBE,
    EXISTS,
    PLACE,
    PLAIN,
    SHAPE,
    WHICH_PICTURE,
    phrase,
)
from scripts.demo_data.words import CELLS, COLOURS, SHAPES, SYNONYMS, Language

MOST_THINGS = 5
Paint = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """One thing in a picture; `x`, `y` are its centre in shares of the width and height, `radius` of the shorter side.

    `shape`, `colour` and `cell` index SHAPES, COLOURS and CELLS; `paint` is the RGB it is drawn with.
    """

    shape: int
    colour: int
    cell: int
    x: float
    y: float
    radius: float
    degrees: float
    paint: Paint

    def name(self, language: Language) -> str:
        """`red circle`, `红色圆形`."""
        return _name(self.shape, self.colour, language)


@dataclass(frozen=True)
class Scene:
    """A picture: at most MOST_THINGS things in reading order, one a cell, on a plain background."""

    width: int
    height: int
    background: int
    paint: Paint
    things: tuple[Thing, ...]
    noise: float
    """Standard deviation of pixel noise, in steps of 1/255."""

    def at(self, cell: int) -> Thing | None:
        return next((thing for thing in self.things if thing.cell == cell), None)

    def kinds(self, *, shape: int | None = None, colour: int | None = None) -> list[Thing]:
        """The things of this shape and colour, where None means any."""
        return [
            thing
            for thing in self.things
            if (shape is None or thing.shape == shape) and (colour is None or thing.colour == colour)
        ]


def draw_scene(rng: Random, split: Split, *, things: int | None = None) -> Scene:
    """A random scene; a held-out one holds only combinations of colour, shape and cell that training never shows."""
    count = rng.choices(range(MOST_THINGS + 1), weights=(1, 5, 4, 4, 3, 3))[0] if things is None else things
    width, height = _draw_sides(rng)
    background = rng.randrange(len(COLOURS)) if rng.random() < 0.5 else rng.choice((9, 10, 10, 11))
    cells = sorted(rng.sample(range(len(CELLS)), count))
    drawn = tuple(_draw_thing(rng, split, cell, background, alone=count == 1) for cell in cells)
    return Scene(
        width=width,
        height=height,
        background=background,
        paint=_draw_paint(rng, background),
        things=drawn,
        noise=rng.choice((0.0, 0.0, rng.uniform(0, 4), rng.uniform(0, 10))),
    )


def _draw_sides(rng: Random) -> tuple[int, int]:
    if rng.random() < 0.5:
        side = rng.choice((896, 896, 512, 448, 640, 1024, 300))
        return side, side
    return rng.choice(((640, 480), (480, 640), (800, 600), (1280, 800), (400, 500), (1024, 700)))


def _draw_paint(rng: Random, colour: int) -> Paint:
    spread = rng.choice((0, 0, 12))
    red, green, blue = rng.choice(COLOURS[colour].paints)
    return (
        _jitter(rng, red, spread),
        _jitter(rng, green, spread),
        _jitter(rng, blue, spread),
    )


def _jitter(rng: Random, value: int, spread: int) -> int:
    return min(255, max(0, value + rng.randint(-spread, spread)))


def _draw_thing(rng: Random, split: Split, cell: int, background: int, *, alone: bool) -> Thing:
    def kind() -> tuple[int, int]:
        colour = rng.randrange(len(COLOURS) - 1)
        return colour + (colour >= background), rng.randrange(len(SHAPES))

    colour, shape = split.draw(kind, lambda drawn: ("thing", *drawn, cell))
    row, column = divmod(cell, 3)
    roomiest = 0.42 if cell == 4 else 0.27
    radius = rng.uniform(0.07, roomiest) if alone else rng.uniform(0.07, 0.14)
    return Thing(
        shape=shape,
        colour=colour,
        cell=cell,
        x=_draw_centre(rng, column, radius, alone=alone),
        y=_draw_centre(rng, row, radius, alone=alone),
        radius=radius,
        degrees=rng.uniform(-10, 10) if rng.random() < 0.5 else 0.0,
        paint=_draw_paint(rng, colour),
    )


def _draw_centre(rng: Random, third: int, radius: float, *, alone: bool) -> float:
    """A centre inside the given third, away from its borders, with the thing inside the picture."""
    slack = 0.12 if alone else 0.155 - radius
    middle = (2 * third + 1) / 6
    centre = rng.uniform(middle - slack, middle + slack)
    low, high = ((radius, 0.29), (0.38, 0.62), (0.71, 1 - radius))[third]
    return min(high, max(low, centre))


# ---- what is said about a scene -------------------------------------------------------------------------------------


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("ss", "x")) else "s")


def _name(shape: int | None, colour: int | None, language: Language) -> str:
    """The name of a kind of thing: `red circle`, `circle`, `red thing`."""
    if language == "zh":
        adjective = "" if colour is None else COLOURS[colour].name.zh
        return adjective + ("东西" if shape is None else SHAPES[shape].zh)
    words = [] if colour is None else [COLOURS[colour].name.en]
    return " ".join([*words, "thing" if shape is None else SHAPES[shape].en])


def describe(scene: Scene, language: Language) -> str:
    """The canonical one-sentence description: count, background, and every thing with its place."""
    background = COLOURS[scene.background].name[language]
    count = len(scene.things)
    if language == "zh":
        if not count:
            return f"这是一张纯{background}的图片。"
        parts = [f"{CELLS[thing.cell].zh}有一个{thing.name('zh')}" for thing in scene.things]
        return f"{background}背景上有{count}个东西：{'，'.join(parts)}。"
    if not count:
        return f"This is a plain {background} picture."
    parts = [f"{_article(thing.name('en'))} {CELLS[thing.cell].en}" for thing in scene.things]
    verb, noun = ("is", "thing") if count == 1 else ("are", "things")
    return f"There {verb} {count} {noun} on {_article(background)} background: {', '.join(parts)}."


@dataclass(frozen=True)
class Aspect:
    """One kind of question about a scene; `ask` returns its question and answer, or None if it does not apply."""

    name: str
    weight: int
    ask: Callable[[Scene, Random, Language], tuple[str, str] | None]


def ask_description(scene: Scene, rng: Random, language: Language) -> tuple[str, str]:
    return phrase(rng, DESCRIBE, language), describe(scene, language)


def _asked_name(shape: int | None, colour: int | None, rng: Random, language: Language) -> str:
    """The name of a kind of thing as people say it, with more words than the answers use."""
    name = _name(shape, colour, language)
    for spoken, others in SYNONYMS[language].items():
        if spoken in name and rng.random() < 0.4:
            name = name.replace(spoken, rng.choice(others))
    if language == "zh" and colour is not None and rng.random() < 0.4:
        name = name.replace("色", "色的", 1)
    return name


def _any_kind(scene: Scene, rng: Random) -> tuple[int | None, int | None]:
    """A (shape, colour) to ask about; about half of the time one that the scene holds."""
    thing = rng.choice(scene.things) if scene.things and rng.random() < 0.55 else None
    shape = rng.randrange(len(SHAPES)) if thing is None else thing.shape
    colour = rng.randrange(len(COLOURS)) if thing is None else thing.colour
    if thing is not None and rng.random() < 0.3:  # a near miss
        if rng.random() < 0.5:
            shape = rng.randrange(len(SHAPES))
        else:
            colour = rng.randrange(len(COLOURS))
    return rng.choice(((shape, colour), (shape, colour), (shape, None), (None, colour)))


def ask_existence(scene: Scene, rng: Random, language: Language) -> tuple[str, str]:
    shape, colour = _any_kind(scene, rng)
    kind = _name(shape, colour, language)
    asked = _asked_name(shape, colour, rng, language)
    question = phrase(rng, EXISTS, language, a=_article(asked), kind=asked)
    found = bool(scene.kinds(shape=shape, colour=colour))
    if language == "zh":
        return question, f"有，图片里有{kind}。" if found else f"没有，图片里没有{kind}。"
    return question, f"Yes, there is {_article(kind)}." if found else f"No, there is no {kind}."


def ask_count(scene: Scene, rng: Random, language: Language) -> tuple[str, str]:
    shape, colour = (None, None) if rng.random() < 0.4 else _any_kind(scene, rng)
    kind = _name(shape, colour, language)
    count = len(scene.kinds(shape=shape, colour=colour))
    asked = _asked_name(shape, colour, rng, language)
    question = phrase(rng, COUNT, language, plural=_plural(asked), kind=asked)
    if language == "zh":
        return question, f"有{count}个{kind}。"
    return question, f"There is 1 {kind}." if count == 1 else f"There are {count} {_plural(kind)}."


def ask_colour(scene: Scene, rng: Random, language: Language) -> tuple[str, str] | None:
    if not scene.things and rng.random() < 0.7:
        return phrase(rng, PLAIN, language), describe(scene, language)
    shape = rng.choice(scene.things).shape if scene.things and rng.random() < 0.9 else rng.randrange(len(SHAPES))
    found = scene.kinds(shape=shape)
    if len(found) > 1:
        return None
    question = phrase(rng, COLOUR, language, kind=_asked_name(shape, None, rng, language))
    kind = SHAPES[shape][language]
    if not found:
        return question, f"没有{kind}。" if language == "zh" else f"There is no {kind}."
    colour = COLOURS[found[0].colour].name[language]
    return question, f"{kind}是{colour}的。" if language == "zh" else f"The {kind} is {colour}."


def ask_shape(scene: Scene, rng: Random, language: Language) -> tuple[str, str] | None:
    if not scene.things:
        return None
    thing = rng.choice(scene.things)
    if len(scene.kinds(colour=thing.colour)) > 1:
        return None
    question = phrase(rng, SHAPE, language, kind=_asked_name(None, thing.colour, rng, language))
    kind = _name(None, thing.colour, language)
    shape = SHAPES[thing.shape][language]
    return question, f"{kind}是{shape}。" if language == "zh" else f"The {kind} is {_article(shape)}."


def ask_place(scene: Scene, rng: Random, language: Language) -> tuple[str, str] | None:
    if not scene.things:
        return None
    thing = rng.choice(scene.things)
    shape, colour = rng.choice(((thing.shape, thing.colour), (thing.shape, None), (None, thing.colour)))
    if len(scene.kinds(shape=shape, colour=colour)) > 1:
        return None
    question = phrase(rng, PLACE, language, kind=_asked_name(shape, colour, rng, language))
    kind = _name(shape, colour, language)
    cell = CELLS[thing.cell][language]
    return question, f"{kind}在{cell}。" if language == "zh" else f"The {kind} is {cell}."


def ask_cell(scene: Scene, rng: Random, language: Language) -> tuple[str, str]:
    cell = rng.choice(scene.things).cell if scene.things and rng.random() < 0.75 else rng.randrange(len(CELLS))
    place = CELLS[cell][language]
    thing = scene.at(cell)
    question = phrase(rng, CELL, language, place=place)
    if language == "zh":
        return question, f"{place}有一个{thing.name('zh')}。" if thing else f"{place}什么都没有。"
    if thing is None:
        return question, f"There is nothing {place}."
    return question, f"There is {_article(thing.name('en'))} {place}."


def ask_background(scene: Scene, rng: Random, language: Language) -> tuple[str, str]:
    question = phrase(rng, BACKGROUND, language)
    colour = COLOURS[scene.background].name[language]
    return question, f"背景是{colour}的。" if language == "zh" else f"The background is {colour}."


ASPECTS: tuple[Aspect, ...] = (
    Aspect("describe", 5, ask_description),
    Aspect("exists", 2, ask_existence),
    Aspect("count", 2, ask_count),
    Aspect("colour", 2, ask_colour),
    Aspect("shape", 2, ask_shape),
    Aspect("place", 2, ask_place),
    Aspect("cell", 2, ask_cell),
    Aspect("background", 1, ask_background),
)

ORDINALS: dict[Language, tuple[str, str]] = {"en": ("first", "second"), "zh": ("第一", "第二")}


def about_one(request: Request) -> list[Turn]:
    """One picture and several different questions about it."""
    rng = request.rng
    scene = draw_scene(rng, request.split)
    turns: list[Turn] = []
    for aspect in _draw_aspects(rng, rng.randint(1, 6)):
        asked = aspect.ask(scene, rng, request.language)
        if asked is None:
            continue
        question, answer = asked
        skill = f"picture/{aspect.name if scene.things else 'plain'}/{request.language}"
        turns.append(Turn((question,) if turns else _with_pictures(rng, question, scene), answer, skill))
    return turns


def about_two(request: Request) -> list[Turn]:
    """Two pictures in one prompt, and questions that name the first or the second."""
    rng, language = request.rng, request.language
    scenes = (draw_scene(rng, request.split), draw_scene(rng, request.split))
    turns: list[Turn] = []
    for aspect in _draw_aspects(rng, rng.randint(1, 4)):
        which = rng.randrange(2)
        asked = aspect.ask(scenes[which], rng, language)
        if asked is None:
            continue
        question, answer = asked
        question = phrase(rng, WHICH_PICTURE, language, ordinal=ORDINALS[language][which], question=question)
        pictured = turns == []
        turns.append(
            Turn(
                _with_pictures(rng, question, *scenes) if pictured else (question,),
                answer,
                f"picture/two/{language}",
            )
        )
    return turns


def about_none(request: Request) -> list[Turn]:
    """A question about a picture that was never sent."""
    question, _ = ask_description(draw_scene(request.rng, request.split, things=1), request.rng, request.language)
    answer = "没有图片。" if request.language == "zh" else "There is no picture."
    return [Turn((question,), answer, f"picture/none/{request.language}")]


def _draw_aspects(rng: Random, count: int) -> list[Aspect]:
    return rng.choices(ASPECTS, weights=[aspect.weight for aspect in ASPECTS], k=count)


def _with_pictures(rng: Random, question: str, *scenes: Scene) -> tuple[str | Scene, ...]:
    """The pictures before the text, as most people send them, or after it."""
    return (*scenes, question) if rng.random() < 0.75 else (question, *scenes)
