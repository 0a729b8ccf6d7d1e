"""Scenes drawn with Pillow and encoded as files: the pictures of the evaluation."""

from __future__ import annotations

import io
import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from scripts.demo_data.pictures import Scene, Thing
from scripts.demo_data.rendering import (
    CROSS_ARM,
    DIAMOND_WAIST,
    HEART_HALF,
    HEART_SHIFT,
    RING_HOLE,
    SQUARE_HALF,
    STAR_INNER,
    TRIANGLE_BASE,
)
from scripts.demo_data.words import SHAPES

Point = tuple[float, float]


def draw_picture(scene: Scene, *, smooth: bool = True, seed: int = 0) -> Image.Image:
    """The scene as an RGB image of its own size; `smooth` draws at double size and shrinks."""
    scale = 2 if smooth else 1
    width, height = scene.width * scale, scene.height * scale
    image = Image.new("RGB", (width, height), scene.paint)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(canvas, thing, scene, width=width, height=height)
    if smooth:
        image = image.resize((scene.width, scene.height), Image.Resampling.BOX)
    if scene.noise:
        noise = np.random.default_rng(seed).normal(0, scene.noise, (scene.height, scene.width, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    return image


def encode_picture(scene: Scene, rng: Random) -> bytes:
    """The scene as a PNG or a JPEG file, with smooth or jagged edges."""
    image = draw_picture(scene, smooth=rng.random() < 0.5, seed=rng.randrange(1 << 30))
    file = io.BytesIO()
    if rng.random() < 0.5:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=rng.randint(70, 95))
    return file.getvalue()


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, scene: Scene, *, width: int, height: int) -> None:
    radius = thing.radius * min(width, height)
    cos, sin = math.cos(math.radians(thing.degrees)), math.sin(math.radians(thing.degrees))

    def place(point: Point) -> Point:
        u, v = point
        return (
            thing.x * width + radius * (u * cos - v * sin),
            thing.y * height + radius * (u * sin + v * cos),
        )

    def disc(centre: Point, share: float, paint: tuple[int, int, int]) -> None:
        x, y = place(centre)
        reach = radius * share
        canvas.ellipse((x - reach, y - reach, x + reach, y + reach), fill=paint)

    def polygon(*points: Point) -> None:
        canvas.polygon([place(point) for point in points], fill=thing.paint)

    match SHAPES[thing.shape].en:
        case "circle":
            disc((0, 0), 1, thing.paint)
        case "square":
            s = SQUARE_HALF
            polygon((-s, -s), (s, -s), (s, s), (-s, s))
        case "triangle":
            polygon((0, -1), (0.95, TRIANGLE_BASE), (-0.95, TRIANGLE_BASE))
        case "star":
            reaches = (1 if corner % 2 == 0 else STAR_INNER for corner in range(10))
            polygon(
                *(
                    (reach * math.sin(corner * math.pi / 5), -reach * math.cos(corner * math.pi / 5))
                    for corner, reach in enumerate(reaches)
                )
            )
        case "diamond":
            polygon((0, -1), (DIAMOND_WAIST, 0), (0, 1), (-DIAMOND_WAIST, 0))
        case "heart":
            half, middle = HEART_HALF / 2, HEART_SHIFT - HEART_HALF / 2
            disc((-half, middle), HEART_HALF / math.sqrt(2), thing.paint)
            disc((half, middle), HEART_HALF / math.sqrt(2), thing.paint)
            polygon(
                (0, HEART_SHIFT - HEART_HALF),
                (HEART_HALF, HEART_SHIFT),
                (0, HEART_SHIFT + HEART_HALF),
                (-HEART_HALF, HEART_SHIFT),
            )
        case "cross":
            polygon((-CROSS_ARM, -1), (CROSS_ARM, -1), (CROSS_ARM, 1), (-CROSS_ARM, 1))
            polygon((-1, -CROSS_ARM), (1, -CROSS_ARM), (1, CROSS_ARM), (-1, CROSS_ARM))
        case "ring":
            disc((0, 0), 1, thing.paint)
            disc((0, 0), RING_HOLE, scene.paint)
        case other:
            raise ValueError(f"no drawing for the shape {other!r}")
