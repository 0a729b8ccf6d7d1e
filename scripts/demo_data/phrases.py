"""How people ask: patterns of questions, in which `[a|b|]` stands for any one of its parts.

Slots in braces are filled by the skill: `{kind}` is a kind of thing in a picture, `{a}` the same with its article.
"""

from __future__ import annotations

import re
from functools import cache
from random import Random

from scripts.demo_data.words import Language

CHOICE = re.compile(r"\[([^\[\]]*)\]")
Patterns = dict[Language, tuple[str, ...]]

DESCRIBE: Patterns = {
    "en": (
        "Describe [this|the] [picture|image].",
        "[Describe|Please describe|Can you describe|Could you describe|Now describe] [this|the|my] "
        "[picture|image|photo|drawing|scene][| for me| in one sentence| briefly| in a few words][.||, please.]",
        "What [is|do you see|can you see|is shown|is there|can be seen|is drawn] [in|on] [this|the] "
        "[picture|image|photo|drawing]?",
        "What [do|can] you see[| here| there| now| in it]?",
        "What[ is|'s] [this|it|here|that|shown here|shown|there to see]?",
        "What does [this|the] [picture|image|photo|drawing] [show|contain|look like|have in it]?",
        "[Tell me|Say|Explain] what [you see|is in this picture|this picture shows|the image shows|this is|is here].",
        "Describe[| it| this| what you see| what is here| everything].",
        "[Give me|Write] a [short |full |]description[| of this picture| of the image].",
        "Can you [tell me what this is|see what is in this image|describe what is in this image|say what you see]?",
    ),
    "zh": (
        "描述这张图片[。|]",
        "[请|请你|帮我|能不能|]描述[一下|][这张|这幅|这个|][图片|图像|照片|图|画][的内容|内容|里的东西|][。|]",
        "[这张|这幅|这个|][图片|图像|照片|图|画][里|上|中|里面][有|画了|是|都有][什么|什么东西|些什么][？|]",
        "[你|请说说你|告诉我你][看到|看见]了[什么|些什么][？|]",
        "这[是|里有|张图是|张图片是|是一张]什么[|图片|东西][？|]",
        "[请|]说[说|一说][这张图片|图|照片]里有什么[。|]",
        "[图片|照片|图]的内容是什么[？|]",
        "用一句话描述[|一下]这张[图片|照片|图]。",
        "这张[图片|照片|图]是什么样的[？|]",
    ),
}
PLAIN: Patterns = {
    "en": (
        "[What|Which] [colour|color] is [this|it|this picture|the picture|the image|this image|here]?",
        "What [colour|color] do you see?",
        "What is the [colour|color] of [this|the] [picture|image]?",
    ),
    "zh": (
        "[这|这是|图片是|这张图片是|这张图是][什么颜色|什么颜色的][？|]",
        "你看到了什么颜色？",
        "[图片|图]的颜色是什么？",
    ),
}
EXISTS: Patterns = {
    "en": (
        "[Is there|Do you see|Can you see|Is there maybe|Do you find] {a}"
        "[| in the picture| in this picture| in the image| here| anywhere]?",
        "Does [the picture|this picture|the image|it] [show|have|contain] {a}?",
    ),
    "zh": (
        "[图片里|图里|这张图片里|照片里|图中|这里|]有{kind}吗[？|]",
        "[图片里|图里|这张图片里|照片里|图中|这里|]有没有{kind}[？|]",
        "你[看到|看见]{kind}了吗[？|]",
    ),
}
COUNT: Patterns = {
    "en": (
        "How many {plural} [are there|do you see|can you see|are in the picture|are in this image|are shown|"
        "does the picture have|are here][| in total]?",
        "[Count|Please count|Can you count] the {plural}[.| in the picture.| for me.]",
        "What is the number of {plural}?",
        "[Tell me|Say] how many {plural} there are.",
    ),
    "zh": (
        "[图片里|图里|这张图片里|照片里|图中|这里|][|一共]有[几个|多少个|多少]{kind}[？|]",
        "[请|]数一数[图里的|图片里的|]{kind}[。|]",
        "{kind}[|一共]有[几个|多少个][？|]",
        "[图里|图片里]{kind}的数量是多少[？|]",
    ),
}
COLOUR: Patterns = {
    "en": (
        "[What|Which] [colour|color] [is|has] the {kind}[| in the picture]?",
        "[What is|What's|Tell me|Name|Say] the [colour|color] of the {kind}.",
        "[Which|What] [colour|color] does the {kind} have?",
        "The {kind} is what [colour|color]?",
    ),
    "zh": (
        "[图里的|图片里的|这个|]{kind}是什么颜色[|的][？|]",
        "[请|]说出[图里|]{kind}的颜色。",
        "{kind}的颜色是什么[？|]",
        "{kind}[什么颜色|是哪种颜色][？|]",
    ),
}
SHAPE: Patterns = {
    "en": (
        "[What|Which] shape [is|has] the {kind}[| in the picture]?",
        "[What is|What's|Tell me|Name|Say] the shape of the {kind}.",
        "Which shape does the {kind} have?",
        "What[ is|'s] the {kind}?",
    ),
    "zh": (
        "[图里的|图片里的|这个|]{kind}是什么形状[|的][？|]",
        "[请|]说出[图里|]{kind}的形状。",
        "{kind}的形状是什么[？|]",
        "{kind}是[什么|什么东西][？|]",
    ),
}
PLACE: Patterns = {
    "en": (
        "Where is the {kind}[| in the picture| in this image| located| now]?",
        "[Where do you see|Where can I find|Where do I find] the {kind}?",
        "[Tell me|Say|Can you tell me] where the {kind} is.",
        "In which part of the [picture|image] is the {kind}?",
    ),
    "zh": (
        "[图里的|图片里的|]{kind}在[哪里|哪儿|什么位置|什么地方|图片的哪里|图里的什么位置][？|]",
        "[请|]说出{kind}的位置。",
        "{kind}的位置[在哪里|是什么][？|]",
        "[请|]告诉我{kind}在哪里。",
    ),
}
CELL: Patterns = {
    "en": (
        "What[ is|'s| can you see| do you see| is there] {place}[| of the picture| of the image]?",
        "[Tell me|Say|Describe] what is {place}.",
        "Which thing is {place}?",
        "Is there [something|anything] {place}?",
    ),
    "zh": (
        "[图片|图片的|图的|]{place}[有什么|是什么|有什么东西|有哪个东西][？|]",
        "[请|]告诉我{place}有什么。",
        "{place}有东西吗[？|]",
    ),
}
BACKGROUND: Patterns = {
    "en": (
        "[What|Which] [colour|color] [is|has] the background[| of the picture| of the image]?",
        "[What is|What's|Tell me|Name] the [background colour|background color|colour of the background].",
        "The background is what colour?",
    ),
    "zh": (
        "[图片的|图的|图里的|]背景是什么颜色[|的][？|]",
        "[请|]说出背景的颜色。",
        "背景[的颜色是什么|什么颜色][？|]",
    ),
}
WHICH_PICTURE: Patterns = {
    "en": (
        "Look at the {ordinal} picture. {question}",
        "{ordinal} picture: {question}",
        "In the {ordinal} [image|picture]: {question}",
    ),
    "zh": ("看{ordinal}张图片。{question}", "{ordinal}张[图片|图]：{question}"),
}
SUM: Patterns = {
    "en": (
        "[What is|What's|How much is|Calculate|Compute|Work out|Please calculate|Can you work out] "
        "{a}[ {sign} |{sign}]{b}[?|.|]",
        "[What is|What's|How much is|Calculate|Compute|] {a} {word} {b}[?|.|]",
        "{a}[ {sign} |{sign}]{b}[| = ?| =|=?|=]",
    ),
    "zh": (
        "[|请问|请告诉我]{a}[ {sign} |{sign}|{word}]{b}[等于多少|等于几|是多少|等于什么][？|]",
        "[计算|请计算|算一算|帮我算] {a}[ {sign} |{sign}|{word}]{b}[。|]",
        "{a}[ {sign} |{sign}]{b}[| = ?| =|=?|=]",
    ),
}
REPEAT: Patterns = {
    "en": ("[Repeat|Repeat after me|Say this again|Please repeat|Repeat this text|Echo|Please say|Copy this]: {text}",),
    "zh": ("[重复|请重复|跟我说|请把这句话再说一遍|请跟我说|再说一遍|重复这句话]：{text}",),
}
REVERSE_WORDS: Patterns = {
    "en": (
        "[Reverse the words|Say these words in reverse order|Reverse the order of these words|Words backwards]: {text}",
    ),
    "zh": ("[把这些词倒过来说|倒序说出这些词|把这些词倒过来]：{text}",),
}
REVERSE_LETTERS: Patterns = {
    "en": ("[Reverse the letters|Spell this backwards|Reverse|Write this backwards|Reverse this word]: {text}",),
    "zh": ("[把这些字倒过来写|倒着写|反转|把这些字倒过来]：{text}",),
}
REVERSE_DIGITS: Patterns = {
    "en": ("[Reverse the digits|Write this number backwards|Reverse|Reverse this number]: {text}",),
    "zh": ("[把这些数字倒过来|倒着写这个数|反转|倒着写]：{text}",),
}
COUNTING: Patterns = {
    "en": (
        "[Count|Please count|Can you count|Count up] from {low} to {high}[.|]",
        "[List|Say] the numbers from {low} to {high}[.|]",
    ),
    "zh": ("[请|]从{low}数到{high}[。|]", "[请|]说出从{low}到{high}的数字[。|]"),
}
FACT: Patterns = {
    "en": (
        "[What is|What's|Tell me|Give me|Find|Look up|I need|Say|Do you know] the {attribute} of {name}[?|.|]",
        "[What is|What's|Tell me|Give me|Find|Look up] {name}'s {attribute}[?|.|]",
        "[{name}'s {attribute}|The {attribute} of {name}][?|]",
        "Which {attribute} [does {name} have|belongs to {name}]?",
    ),
    "zh": (
        "{name}的{attribute}是[什么|多少|哪个][？|]",
        "[请|]告诉我{name}的{attribute}[。|]",
        "[找出|请找出|说出|查一下]{name}的{attribute}[。|]",
        "{name}的{attribute}[？|呢？|]",
        "[列表|上面|信息]里{name}的{attribute}是什么[？|]",
    ),
}
NAME_ME: Patterns = {
    "en": ("[My name is|I am|I'm|Call me|Hello, my name is|Hi, I am] {name}[.|!|]",),
    "zh": ("[我叫|我是|我的名字是|你好，我叫|请叫我]{name}[。|！|]",),
}
WHO_AM_I: Patterns = {
    "en": (
        "[What is my name|What's my name|Who am I|Do you know my name|Do you remember my name|Tell me my name][?|]",
    ),
    "zh": ("[我叫什么名字|我叫什么|我是谁|你记得我的名字吗|我的名字是什么][？|]",),
}


@cache
def _options(choice: str) -> tuple[str, ...]:
    return tuple(choice.split("|"))


def phrase(rng: Random, patterns: Patterns, language: Language, **slots: object) -> str:
    """One of the patterns with its choices made and its slots filled, sometimes as carelessly typed as people do.

    Slots are filled last, so what they hold is never taken for a choice.
    """
    pattern = rng.choice(patterns[language])
    pattern = CHOICE.sub(lambda match: rng.choice(_options(match[1])), pattern).strip()
    if language == "en" and rng.random() < 0.2:
        pattern = pattern[0].lower() + pattern[1:]
    if rng.random() < 0.15 and not pattern.endswith("}"):
        pattern = pattern.rstrip("?.。？ ")
    return pattern.format(**slots)
