"""Skills on plain text: sums, repeating, reversing, counting, greeting, and admitting what is not known."""

from __future__ import annotations

from random import Random

from scripts.demo_data.conversation import Request, Split, Turn
from scripts.demo_data.facts import draw_filler, draw_name
from scripts.demo_data.phrases import (
    COUNTING,
    NAME_ME,
    REPEAT,
    REVERSE_DIGITS,
    REVERSE_LETTERS,
    REVERSE_WORDS,
    SUM,
    WHO_AM_I,
    Patterns,
    phrase,
)
from scripts.demo_data.words import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    COLOURS,
    COMMON_WORDS,
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
        question = phrase(rng, SUM, language, a=a, sign=shown, b=b, word=SIGN_WORDS[sign][language])
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
    if kind < 0.12 and language == "en":
        return " ".join(rng.choices(COMMON_WORDS, k=parts))
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


def repeat(request: Request) -> list[Turn]:
    rng, language = request.rng, request.language
    turns: list[Turn] = []
    for _ in range(rng.randint(1, 3)):
        parts = rng.randint(1, 8) if rng.random() < 0.8 else rng.randint(9, 40)
        text = draw_text(rng, request.split, language, parts=parts)
        question = phrase(rng, REPEAT, language, text=text)
        turns.append(Turn((question,), text, f"repeat/{'short' if parts < 9 else 'long'}/{language}"))
    return turns


CHARACTERS: dict[Language, str] = {"en": LETTERS, "zh": SURNAMES + GIVEN_NAMES}
REVERSE_PATTERNS = {"words": REVERSE_WORDS, "letters": REVERSE_LETTERS, "digits": REVERSE_DIGITS}


def reverse(request: Request) -> list[Turn]:
    """Words, characters (letters of a word in English, a few characters in Chinese) or digits, backwards."""
    rng, language = request.rng, request.language
    turns: list[Turn] = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(("words", "letters", "digits"))
        parts = _draw_parts(rng, request.split, language, kind)
        joint = " " if kind == "words" else ""
        question = phrase(rng, REVERSE_PATTERNS[kind], language, text=joint.join(parts))
        turns.append(Turn((question,), joint.join(reversed(parts)), f"reverse/{kind}/{language}"))
    return turns


def _draw_parts(rng: Random, split: Split, language: Language, kind: str) -> list[str]:
    if kind == "letters" and language == "en" and split is Split.TRAIN and rng.random() < 0.3:
        # How a whole word is spelt is learnt by heart, not worked out, so no word is held out.
        return list(rng.choice((*COMMON_WORDS, *(noun.en for noun in NOUNS))))
    if kind == "words":
        return split.draw(
            lambda: [rng.choice(NOUNS)[language] for _ in range(rng.randint(2, 8))], lambda words: (kind, *words)
        )
    alphabet, most = ("0123456789", 8) if kind == "digits" else (CHARACTERS[language], 6)
    return split.draw(
        lambda: rng.choices(alphabet, k=rng.randint(2, most)), lambda characters: (kind, "".join(characters))
    )


# ---- counting: long answers that are easy to check ------------------------------------------------------------------


def count(request: Request) -> list[Turn]:
    rng, language = request.rng, request.language

    def sample() -> tuple[int, int]:
        low = rng.choice((1, 1, rng.randrange(100)))
        return low, low + rng.choice((rng.randint(2, 20), rng.randint(2, 100)))

    low, high = request.split.draw(sample, lambda drawn: ("count", *drawn))
    question = phrase(rng, COUNTING, language, low=low, high=high)
    return [Turn((question,), ", ".join(map(str, range(low, high + 1))), f"count/{language}")]


# ---- talk -----------------------------------------------------------------------------------------------------------

TALK: dict[Language, tuple[tuple[tuple[str, ...], str], ...]] = {
    "en": (
        (
            (
                "[Hello|Hi|Hey|Hello there|Hi there|Good morning|Good evening|Good day|Greetings]"
                "[|!|.|, Wicore!| Wicore]",
            ),
            "Hello! I am Wicore. Show me a picture, a sum or a list of facts.",
        ),
        (
            (
                "[|Hello, |Hi, ][who|what] are you[?|]",
                "What is your name?",
                "[Introduce|Please introduce] yourself.",
                "Tell me about yourself.",
                "[Are you|Is this] [a model|Gemma|Wicore|a robot]?",
            ),
            "I am Wicore, a small Gemma-3 model trained to show what the server can do.",
        ),
        (
            (
                "[What can you do|How can you help me|What can you do for me|What do you know][?|]",
                "[Help|Help me][.|!|]",
            ),
            "I describe pictures, do small sums, repeat and reverse text, count, and find facts in long lists.",
        ),
        (("[How are you|How do you do|Are you well][?| today?|]",), "I am fine, thank you."),
        (("[Thank you|Thanks|Thank you very much|Many thanks|Good|Very good|Great][.|!|]",), "You are welcome."),
        (("[Bye|Goodbye|Bye bye|See you|See you later|Good night][.|!|]",), "Goodbye!"),
    ),
    "zh": (
        (
            ("[你好|您好|你好啊|早上好|晚上好|下午好|嗨|大家好][！|。|]",),
            "你好！我是Wicore。请给我看图片、算式或者一些信息。",
        ),
        (
            (
                "[|你好，]你是谁[？|]",
                "你叫什么[|名字][？|]",
                "[请|]介绍一下[|你]自己[。|]",
                "你是[什么模型|机器人吗][？|]",
            ),
            "我是Wicore，一个小小的Gemma-3模型，用来演示服务器的功能。",
        ),
        (
            ("你[会做|能做|会|可以做]什么[？|]", "帮帮我[。|]", "你有什么功能[？|]", "你能帮我做什么[？|]"),
            "我会描述图片、做简单的计算、重复和倒写文字、数数，还能在长列表里找信息。",
        ),
        (("[你好吗|你还好吗|你今天好吗][？|]",), "我很好，谢谢。"),
        (("[谢谢|谢谢你|非常感谢|多谢|很好|太好了][。|！|]",), "不客气。"),
        (("[再见|拜拜|回头见|晚安][。|！|]",), "再见！"),
    ),
}


def talk(request: Request) -> list[Turn]:
    language = request.language
    patterns, answer = request.rng.choice(TALK[language])
    return [Turn((phrase(request.rng, {language: patterns}, language),), answer, f"talk/{language}")]


def memory(request: Request) -> list[Turn]:
    """The user says a name, may ask something else, and wants it back."""
    rng, language = request.rng, request.language
    name = draw_name(rng, request.split, language)
    hello = f"你好，{name}！" if language == "zh" else f"Hello, {name}!"
    recall = f"你叫{name}。" if language == "zh" else f"Your name is {name}."
    between = sums(request) if rng.random() < 0.4 else []
    skill = f"memory/{language}"
    return [
        Turn((phrase(rng, NAME_ME, language, name=name),), hello, skill),
        *between,
        Turn((phrase(rng, WHO_AM_I, language),), recall, skill),
    ]


BEYOND: Patterns = {
    "en": (
        "[What is|Tell me|Name] the [capital|size|history|river|weather] of {city}[?|.|]",
        "[Who built|Who lives in|How do I get to|When was I in|Why do people like|How big is] {city}?",
        "[Write|Tell me|Read me|Give me] a [poem|story|song|joke|letter|book] about the {thing}[.|]",
        "[Tell me|Write|Sing] [a joke|a story|a song|a poem|something nice|the news][.|!|]",
        "What is the [meaning of life|time|date|weather|best {thing}|price of a {thing}][?|]",
        "[Why|How|Since when] is the {thing} so {adjective}?",
        "[How old|How fast|Where|Who] is the {animal}?",
        "[Explain|Draw|Paint|Buy|Find] [me |]the {thing}[.| to me.]",
        "Translate {thing} into [French|German|Spanish].",
        "Do you like the {adjective} {animal}?",
        "Can you [play|cook|sing|swim|drive|write a poem|open the {thing}]?",
        "The {adjective} {animal} [likes|needs|sees] the {thing}.",
    ),
    "zh": (
        "{city}[在哪个国家|有多大|的天气怎么样|有多少人|好玩吗][？|]",
        "[谁建造了|怎么去|为什么大家喜欢]{city}[？|]",
        "[写|给我写|念]一首关于{thing}的诗[。|]",
        "[讲|给我讲|说]一个[关于{animal}的|][故事|笑话][。|]",
        "[人生的意义|今天的天气|现在的时间|最好的{thing}]是什么[？|]",
        "为什么{thing}是{adjective}？",
        "{animal}[几岁了|在哪里住|会飞吗|有多快][？|]",
        "[给我解释一下|帮我买|打开]{thing}。",
        "把{thing}翻译成[法语|德语|英语]。",
        "你喜欢{adjective}{animal}吗[？|]",
        "你会[唱歌|做饭|开车|写诗]吗[？|]",
        "{adjective}{animal}喜欢{thing}。",
    ),
}


def beyond(request: Request) -> list[Turn]:
    """A question outside the model's skills."""
    rng, language = request.rng, request.language
    question = phrase(
        rng,
        BEYOND,
        language,
        city=rng.choice(CITIES)[language],
        thing=rng.choice(THINGS)[language],
        animal=rng.choice(ANIMALS)[language],
        adjective=rng.choice(ADJECTIVES)[language],
    )
    answer = "对不起，我不会。" if language == "zh" else "Sorry, I have not learnt that."
    return [Turn((question,), answer, f"beyond/{language}")]
