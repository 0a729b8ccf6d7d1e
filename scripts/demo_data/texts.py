"""Skills on plain text: sums, repeating, reversing, counting, greeting, and admitting what is not known."""

from __future__ import annotations

from random import Random

from scripts.demo_data.conversation import Request, Split, Turn
from scripts.demo_data.facts import draw_filler, draw_name
from scripts.demo_data.words import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    COLOURS,
    FRUITS,
    GIVEN_NAMES,
    SHAPES,
    SURNAMES,
    THINGS,
    Language,
    Word,
)

NOUNS: tuple[Word, ...] = (
    *ANIMALS,
    *CITIES,
    *FRUITS,
    *THINGS,
    *SHAPES,
    *(colour.name for colour in COLOURS),
    *ADJECTIVES,
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYMBOLS = ".,;:!?-+*/=()[]{}<>#@%&_'\"~^|\\$"


# ---- sums -----------------------------------------------------------------------------------------------------------

SUM_QUESTIONS: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is {a} {sign} {b}?",
        "{a} {sign} {b} = ?",
        "{a} {sign} {b} =",
        "{a}{sign}{b}=?",
        "Calculate {a} {sign} {b}.",
        "How much is {a} {sign} {b}?",
        "What is {a} {word} {b}?",
    ),
    "zh": (
        "{a} {sign} {b} 等于多少？",
        "{a}{sign}{b}等于几？",
        "{a}{sign}{b}=?",
        "计算 {a} {sign} {b}",
        "请计算{a}{sign}{b}。",
        "{a}{word}{b}等于多少？",
    ),
}
SIGN_WORDS: dict[str, Word] = {"+": Word("plus", "加"), "-": Word("minus", "减"), "*": Word("times", "乘")}


def draw_sum(rng: Random, split: Split) -> tuple[int, str, int, int]:
    """(a, sign, b, result): up to two digits, products up to 12 * 12, differences also below zero."""

    def sample() -> tuple[int, str, int]:
        sign = rng.choice("++--*")
        top = 12 if sign == "*" else rng.choice((10, 100, 100))
        return rng.randrange(top + 1), sign, rng.randrange(top + 1)

    while True:
        a, sign, b = sample()
        # A product is held out in one order only: its value is learnt, not worked out.
        is_known = sign == "*" and a >= b
        if split is Split.TRAIN if is_known else split.admits("sum", a, sign, b):
            return a, sign, b, {"+": a + b, "-": a - b, "*": a * b}[sign]


def sums(request: Request) -> list[Turn]:
    rng, language = request.rng, request.language
    turns: list[Turn] = []
    for _ in range(rng.randint(1, 6)):
        a, sign, b, result = draw_sum(rng, request.split)
        shown = rng.choice(("*", "×", "x")) if sign == "*" else sign
        question = rng.choice(SUM_QUESTIONS[language]).format(
            a=a, sign=shown, b=b, word=SIGN_WORDS[sign][language]
        )
        kind = {"+": "add", "-": "subtract", "*": "multiply"}[sign]
        turns.append(Turn((question,), str(result), f"sum/{kind}/{language}"))
    return turns


# ---- repeating and reversing ----------------------------------------------------------------------------------------


def _draw_characters(rng: Random) -> str:
    """Text unlike any sentence: letters, digits, symbols, Chinese characters and, rarely, any Unicode at all."""
    kind = rng.random()
    length = rng.randint(1, 12)
    if kind < 0.4:
        return "".join(rng.choices(LETTERS + LETTERS.upper() + "0123456789", k=length))
    if kind < 0.6:
        return "".join(rng.choices(LETTERS + "0123456789" + SYMBOLS, k=length))
    if kind < 0.85:
        return "".join(chr(rng.randrange(0x4E00, 0x9FA6)) for _ in range(rng.randint(1, 6)))
    return "".join(chr(rng.randrange(0x1F300, 0x1F650)) for _ in range(rng.randint(1, 3)))


def draw_text(rng: Random, split: Split, language: Language, *, parts: int) -> str:
    """Some text to repeat: words, sentences, names, numbers, or characters of any kind."""
    kind = rng.random()
    if kind < 0.3:
        words = [rng.choice(NOUNS)[language] for _ in range(parts)]
        return " ".join(words) if language == "en" else "".join(words)
    if kind < 0.5:
        sentences = [draw_filler(rng, language) for _ in range(max(1, parts // 4))]
        return (" " if language == "en" else "").join(sentences)
    if kind < 0.65:
        return " ".join(draw_name(rng, split, language) for _ in range(parts))
    if kind < 0.8:
        return " ".join(str(rng.randrange(10 ** rng.randint(1, 6))) for _ in range(parts))
    return " ".join(_draw_characters(rng) for _ in range(max(1, parts // 2)))


REPEAT_QUESTIONS: dict[Language, tuple[str, ...]] = {
    "en": ("Repeat: {text}", "Repeat after me: {text}", "Say this again: {text}", "Please repeat this text: {text}"),
    "zh": ("重复：{text}", "请重复：{text}", "跟我说：{text}", "请把这句话再说一遍：{text}"),
}


def repeat(request: Request) -> list[Turn]:
    rng, language = request.rng, request.language
    turns: list[Turn] = []
    for _ in range(rng.randint(1, 3)):
        parts = rng.randint(1, 8) if rng.random() < 0.8 else rng.randint(9, 40)
        text = draw_text(rng, request.split, language, parts=parts)
        question = rng.choice(REPEAT_QUESTIONS[language]).format(text=text)
        turns.append(Turn((question,), text, f"repeat/{'short' if parts < 9 else 'long'}/{language}"))
    return turns


REVERSE_QUESTIONS: dict[str, dict[Language, tuple[str, ...]]] = {
    "words": {
        "en": ("Reverse the words: {text}", "Say these words in reverse order: {text}"),
        "zh": ("把这些词倒过来说：{text}", "倒序说出这些词：{text}"),
    },
    "letters": {
        "en": ("Reverse the letters: {text}", "Spell this backwards: {text}", "Reverse: {text}"),
        "zh": ("把这些字倒过来写：{text}", "倒着写：{text}", "反转：{text}"),
    },
    "digits": {
        "en": ("Reverse the digits: {text}", "Write this number backwards: {text}", "Reverse: {text}"),
        "zh": ("把这些数字倒过来：{text}", "倒着写这个数：{text}", "反转：{text}"),
    },
}


def reverse(request: Request) -> list[Turn]:
    """Words, characters (letters of a word in English, a few characters in Chinese) or digits, backwards."""
    rng, language = request.rng, request.language
    turns: list[Turn] = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(("words", "letters", "digits"))
        if kind == "words":
            words = request.split.draw(
                lambda: [rng.choice(NOUNS)[language] for _ in range(rng.randint(2, 8))],
                lambda drawn: ("words", *drawn),
            )
            text, answer = " ".join(words), " ".join(reversed(words))
        elif kind == "digits":
            text = request.split.draw(
                lambda: "".join(rng.choices("0123456789", k=rng.randint(2, 8))), lambda drawn: ("digits", drawn)
            )
            answer = text[::-1]
        else:
            alphabet = LETTERS if language == "en" else SURNAMES + GIVEN_NAMES
            text = request.split.draw(
                lambda: "".join(rng.choices(alphabet, k=rng.randint(2, 6))), lambda drawn: ("letters", drawn)
            )
            answer = text[::-1]
        question = rng.choice(REVERSE_QUESTIONS[kind][language]).format(text=text)
        turns.append(Turn((question,), answer, f"reverse/{kind}/{language}"))
    return turns


# ---- counting: long answers that are easy to check ------------------------------------------------------------------

COUNT_QUESTIONS: dict[Language, tuple[str, ...]] = {
    "en": ("Count from {low} to {high}.", "Count from {low} to {high}", "List the numbers from {low} to {high}."),
    "zh": ("从{low}数到{high}。", "从{low}数到{high}", "请从{low}数到{high}。"),
}


def count(request: Request) -> list[Turn]:
    rng, language = request.rng, request.language

    def sample() -> tuple[int, int]:
        low = rng.choice((1, 1, rng.randrange(100)))
        return low, low + rng.choice((rng.randint(2, 20), rng.randint(2, 100)))

    low, high = request.split.draw(sample, lambda drawn: ("count", *drawn))
    question = rng.choice(COUNT_QUESTIONS[language]).format(low=low, high=high)
    return [Turn((question,), ", ".join(map(str, range(low, high + 1))), f"count/{language}")]


# ---- talk -----------------------------------------------------------------------------------------------------------

TALK: dict[Language, tuple[tuple[tuple[str, ...], str], ...]] = {
    "en": (
        (
            ("Hello", "Hello!", "Hi", "Hi!", "hi there", "Hey", "Good morning", "Good evening!", "hello"),
            "Hello! I am Wicore. Show me a picture, a sum or a list of facts.",
        ),
        (
            (
                "Who are you?",
                "who are you",
                "What are you?",
                "What is your name?",
                "Introduce yourself.",
                "Tell me about yourself.",
            ),
            "I am Wicore, a small Gemma-3 model trained to show what the server can do.",
        ),
        (
            ("What can you do?", "How can you help me?", "Help", "help me", "What are your skills?"),
            "I describe pictures, do small sums, repeat and reverse text, count, and find facts in long lists.",
        ),
        (("How are you?", "How do you do?", "How are you today?"), "I am fine, thank you."),
        (("Thank you", "Thanks!", "Thank you!", "thanks", "Thank you very much."), "You are welcome."),
        (("Bye", "Goodbye", "Goodbye!", "See you later", "bye!"), "Goodbye!"),
    ),
    "zh": (
        (
            ("你好", "你好！", "您好", "您好！", "早上好", "晚上好！", "嗨", "你好吗？"),
            "你好！我是Wicore。请给我看图片、算式或者一些信息。",
        ),
        (
            ("你是谁？", "你是谁", "你叫什么名字？", "请介绍一下你自己。", "介绍一下自己"),
            "我是Wicore，一个小小的Gemma-3模型，用来演示服务器的功能。",
        ),
        (
            ("你会做什么？", "你能做什么？", "帮帮我", "你有什么功能？", "你能帮我做什么？"),
            "我会描述图片、做简单的计算、重复和倒写文字、数数，还能在长列表里找信息。",
        ),
        (("谢谢", "谢谢你", "谢谢！", "非常感谢！", "多谢"), "不客气。"),
        (("再见", "再见！", "拜拜", "回头见"), "再见！"),
    ),
}


def talk(request: Request) -> list[Turn]:
    questions, answer = request.rng.choice(TALK[request.language])
    return [Turn((request.rng.choice(questions),), answer, f"talk/{request.language}")]


BEYOND: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is the capital of {city}?",
        "Who built {city}?",
        "How do I get to {city}?",
        "Write a poem about the {thing}.",
        "Tell me a story about a {animal}.",
        "What is the meaning of life?",
        "Why is the {thing} so {adjective}?",
        "How old is the {animal}?",
        "Explain the {thing} to me.",
        "What is the weather in {city}?",
        "Translate {thing} into French.",
        "Do you like the {adjective} {animal}?",
    ),
    "zh": (
        "{city}在哪个国家？",
        "谁建造了{city}？",
        "怎么去{city}？",
        "写一首关于{thing}的诗。",
        "讲一个关于{animal}的故事。",
        "人生的意义是什么？",
        "为什么{thing}是{adjective}？",
        "{animal}几岁了？",
        "给我解释一下{thing}。",
        "{city}的天气怎么样？",
        "把{thing}翻译成法语。",
        "你喜欢{adjective}{animal}吗？",
    ),
}


def beyond(request: Request) -> list[Turn]:
    """A question outside the model's skills."""
    rng, language = request.rng, request.language
    question = rng.choice(BEYOND[language]).format(
        city=rng.choice(CITIES)[language],
        thing=rng.choice(THINGS)[language],
        animal=rng.choice(ANIMALS)[language],
        adjective=rng.choice(ADJECTIVES)[language],
    )
    answer = "对不起，我不会。" if language == "zh" else "Sorry, I have not learnt that."
    return [Turn((question,), answer, f"beyond/{language}")]
