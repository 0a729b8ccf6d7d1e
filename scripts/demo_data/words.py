"""The one place for the words of the demo model, in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True)
class Word:
    """One thing that has a name in every language."""

    en: str
    zh: str

    def __getitem__(self, language: Language) -> str:
        return self.en if language == "en" else self.zh


@dataclass(frozen=True)
class Colour:
    """A colour word and the RGB values (0 to 255) that people paint when they mean it."""

    name: Word
    paints: tuple[tuple[int, int, int], ...]


COLOURS: tuple[Colour, ...] = (
    Colour(Word("red", "红色"), ((255, 0, 0), (220, 20, 30), (200, 0, 0))),
    Colour(Word("orange", "橙色"), ((255, 165, 0), (255, 140, 0), (245, 130, 30))),
    Colour(Word("yellow", "黄色"), ((255, 255, 0), (250, 225, 30), (255, 230, 0))),
    Colour(Word("green", "绿色"), ((0, 128, 0), (0, 255, 0), (30, 170, 60), (0, 200, 0))),
    Colour(Word("cyan", "青色"), ((0, 255, 255), (0, 220, 230), (40, 205, 215))),
    Colour(Word("blue", "蓝色"), ((0, 0, 255), (30, 60, 220), (30, 100, 235), (0, 0, 190))),
    Colour(Word("purple", "紫色"), ((128, 0, 128), (140, 40, 190), (110, 30, 160))),
    Colour(Word("pink", "粉色"), ((255, 192, 203), (255, 150, 190), (255, 120, 180))),
    Colour(Word("brown", "棕色"), ((139, 69, 19), (120, 72, 40), (110, 60, 20))),
    Colour(Word("black", "黑色"), ((0, 0, 0), (20, 20, 20))),
    Colour(Word("white", "白色"), ((255, 255, 255), (250, 250, 250))),
    Colour(Word("grey", "灰色"), ((128, 128, 128), (150, 150, 150), (110, 110, 110))),
)

SHAPES: tuple[Word, ...] = (
    Word("circle", "圆形"),
    Word("square", "正方形"),
    Word("triangle", "三角形"),
    Word("star", "五角星"),
    Word("diamond", "菱形"),
    Word("heart", "心形"),
    Word("cross", "十字形"),
    Word("ring", "圆环"),
)
"""Order matters: `drawing` and `rendering` draw shape number i of this tuple."""

SYNONYMS: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {"thing": ("object", "shape", "item", "figure"), "star": ("star shape",), "square": ("box",)},
    "zh": {
        "东西": ("物体", "图形", "形状"),
        "五角星": ("星星", "星形"),
        "正方形": ("方块", "方形"),
        "心形": ("爱心",),
        "圆形": ("圆",),
        "十字形": ("十字",),
    },
}
"""Words of questions about pictures that mean the same as the words of the answers."""

CELLS: tuple[Word, ...] = (
    Word("at the top left", "左上角"),
    Word("at the top", "上方"),
    Word("at the top right", "右上角"),
    Word("on the left", "左边"),
    Word("in the centre", "中间"),
    Word("on the right", "右边"),
    Word("at the bottom left", "左下角"),
    Word("at the bottom", "下方"),
    Word("at the bottom right", "右下角"),
)
"""The nine places of a picture in reading order: cell i is row i // 3, column i % 3."""

ANIMALS: tuple[Word, ...] = (
    Word("cat", "猫"),
    Word("dog", "狗"),
    Word("horse", "马"),
    Word("cow", "牛"),
    Word("sheep", "羊"),
    Word("pig", "猪"),
    Word("tiger", "老虎"),
    Word("lion", "狮子"),
    Word("bear", "熊"),
    Word("rabbit", "兔子"),
    Word("monkey", "猴子"),
    Word("snake", "蛇"),
    Word("mouse", "老鼠"),
    Word("bird", "鸟"),
    Word("fish", "鱼"),
    Word("duck", "鸭子"),
    Word("panda", "熊猫"),
    Word("wolf", "狼"),
    Word("fox", "狐狸"),
    Word("frog", "青蛙"),
)
CITIES: tuple[Word, ...] = (
    Word("Beijing", "北京"),
    Word("Shanghai", "上海"),
    Word("London", "伦敦"),
    Word("Paris", "巴黎"),
    Word("Tokyo", "东京"),
    Word("Berlin", "柏林"),
    Word("Rome", "罗马"),
    Word("Madrid", "马德里"),
    Word("Moscow", "莫斯科"),
    Word("Cairo", "开罗"),
    Word("Sydney", "悉尼"),
    Word("Chicago", "芝加哥"),
    Word("Boston", "波士顿"),
    Word("Vienna", "维也纳"),
    Word("Oslo", "奥斯陆"),
    Word("Lima", "利马"),
    Word("Hangzhou", "杭州"),
    Word("Guangzhou", "广州"),
    Word("Chengdu", "成都"),
    Word("Nanjing", "南京"),
)
FRUITS: tuple[Word, ...] = (
    Word("apple", "苹果"),
    Word("banana", "香蕉"),
    Word("pear", "梨"),
    Word("peach", "桃子"),
    Word("grape", "葡萄"),
    Word("lemon", "柠檬"),
    Word("mango", "芒果"),
    Word("melon", "西瓜"),
    Word("cherry", "樱桃"),
    Word("plum", "李子"),
)
THINGS: tuple[Word, ...] = (
    Word("sun", "太阳"),
    Word("moon", "月亮"),
    Word("river", "河流"),
    Word("mountain", "高山"),
    Word("tree", "树木"),
    Word("flower", "花朵"),
    Word("house", "房子"),
    Word("door", "大门"),
    Word("window", "窗户"),
    Word("table", "桌子"),
    Word("chair", "椅子"),
    Word("book", "书本"),
    Word("paper", "纸张"),
    Word("water", "清水"),
    Word("stone", "石头"),
    Word("cloud", "白云"),
    Word("train", "火车"),
    Word("boat", "小船"),
    Word("road", "道路"),
    Word("garden", "花园"),
    Word("school", "学校"),
    Word("music", "音乐"),
    Word("letter", "信件"),
    Word("clock", "时钟"),
    Word("lamp", "台灯"),
    Word("bread", "面包"),
    Word("rice", "米饭"),
    Word("tea", "绿茶"),
    Word("milk", "牛奶"),
    Word("snow", "雪花"),
)
ADJECTIVES: tuple[Word, ...] = (
    Word("small", "小小的"),
    Word("big", "很大的"),
    Word("old", "古老的"),
    Word("new", "崭新的"),
    Word("quiet", "安静的"),
    Word("warm", "温暖的"),
    Word("cold", "寒冷的"),
    Word("bright", "明亮的"),
    Word("dark", "黑暗的"),
    Word("slow", "缓慢的"),
    Word("quick", "快速的"),
    Word("happy", "快乐的"),
)
VERBS: tuple[Word, ...] = (
    Word("sees", "看见"),
    Word("likes", "喜欢"),
    Word("finds", "找到"),
    Word("follows", "跟着"),
    Word("remembers", "记得"),
    Word("forgets", "忘记"),
    Word("paints", "画出"),
    Word("needs", "需要"),
)

# Names are put together from parts, so that there are far more of them than a model could learn by heart.
NAME_SYLLABLES: tuple[str, ...] = tuple(
    consonant + vowel
    for consonant, vowels in {
        "b": "aeio", "d": "aeio", "f": "aei", "g": "ao", "h": "ae", "k": "aeio", "l": "aeiou", "m": "aeiou",
        "n": "aeio", "p": "aeo", "r": "aeiou", "s": "aeio", "t": "aeio", "v": "aeio", "w": "ai", "y": "ao", "z": "aeo",
    }.items()
    for vowel in vowels
)  # fmt: skip
NAME_ENDINGS: tuple[str, ...] = ("", "", "", "n", "r", "s", "l", "x")
SURNAMES = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧"
GIVEN_NAMES = "明华丽强芳军洋勇艳杰娟涛超霞平刚桂英建文志国玉兰秀春梅海燕小红晓东宇轩子涵雨欣佳怡浩然梦琪思远天佑安宁"

_COMMON = """
a all and are as at be but by can do down for from get go had has have he her here him his how i if in is it
its just know like long look made make many me more my no not now of off on one only or other our out over
people run said say see she so some take than that the their them then there these they thing this time to
today too two under up us very walk want was way we well went were what when where which who will with word
work would year yes you your jumps lazy brown quick dog fox hello world test please thank open close left
right
"""
COMMON_WORDS: tuple[str, ...] = tuple(_COMMON.split())
"""Everyday English for texts to repeat."""


@dataclass(frozen=True)
class Attribute:
    """Something a fact says about a name. `values` is empty for a number of four digits."""

    name: Word
    values: tuple[Word, ...] = ()


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(Word("code", "密码")),
    Attribute(Word("number", "编号")),
    Attribute(Word("colour", "颜色"), tuple(colour.name for colour in COLOURS)),
    Attribute(Word("animal", "动物"), ANIMALS),
    Attribute(Word("city", "城市"), CITIES),
    Attribute(Word("fruit", "水果"), FRUITS),
)
