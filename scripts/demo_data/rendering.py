"""Scenes drawn on the accelerator in batches, as signed distances with soft edges: the pictures of the training.

`drawing` draws the same scenes with Pillow, as people do; the evaluation uses that one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.demo_data.pictures import MOST_THINGS, Scene
from scripts.demo_data.words import COLOURS, SHAPES

STAR_INNER = 0.42
HEART_HALF = 0.8
HEART_SHIFT = 0.1
CROSS_ARM = 0.33
SQUARE_HALF = 0.85
DIAMOND_WAIST = 0.75
RING_HOLE = 0.56
TRIANGLE_BASE = 0.75
"""Geometry of the shapes in a frame where a shape's radius is 1 and y points down; `drawing` shares it."""

THING_FIELDS = 12
"""shape, colour, x, y, radius in widths, radius in heights, cos, sin, red, green, blue, is there"""
SCENE_FIELDS = 6
"""red, green, blue, noise, edge width in pixels, colour"""


def scene_parameters(scenes: Sequence[Scene], *, softness: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(scenes [M, SCENE_FIELDS], things [M, MOST_THINGS, THING_FIELDS]) in float32; paints from 0 to 1."""
    fields = torch.zeros(len(scenes), SCENE_FIELDS)
    things = torch.zeros(len(scenes), MOST_THINGS, THING_FIELDS)
    things[..., 4:7] = 1.0
    for row, (scene, edge) in enumerate(zip(scenes, softness, strict=True)):
        red, green, blue = scene.paint
        fields[row] = torch.tensor([red / 255, green / 255, blue / 255, scene.noise / 255, edge, scene.background])
        shorter = min(scene.width, scene.height)
        for slot, thing in enumerate(scene.things):
            angle = math.radians(thing.degrees)
            things[row, slot] = torch.tensor(
                [
                    thing.shape,
                    thing.colour,
                    thing.x,
                    thing.y,
                    thing.radius * shorter / scene.width,
                    thing.radius * shorter / scene.height,
                    math.cos(angle),
                    math.sin(angle),
                    *(value / 255 for value in thing.paint),
                    1.0,
                ]
            )
    return fields, things


def signed_distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """About the distance to the border of each point's shape in units of its radius, negative inside."""
    across, down = u.abs(), v.abs()
    from_centre = (u * u + v * v).sqrt()
    circle = from_centre - 1
    square = torch.maximum(across, down) - SQUARE_HALF
    # Apex at (0, -1), base from -0.95 to 0.95 at TRIANGLE_BASE.
    slope = 0.95 / (1 + TRIANGLE_BASE)
    triangle = torch.maximum(v - TRIANGLE_BASE, (across - slope * (v + 1)) / math.hypot(1, slope))
    # One of ten mirrored sectors: the edge from the tip (angle 0) to the inner corner (angle 36 degrees).
    turn = math.pi / 5
    angle = torch.atan2(u, -v)
    angle = (angle - 2 * turn * torch.round(angle / (2 * turn))).abs()
    x, y = from_centre * torch.cos(angle), from_centre * torch.sin(angle)
    inner_x, inner_y = STAR_INNER * math.cos(turn), STAR_INNER * math.sin(turn)
    length = math.hypot(1 - inner_x, inner_y)
    star = ((x - 1) * inner_y + y * (1 - inner_x)) / length
    diamond = (across / DIAMOND_WAIST + down - 1) / math.hypot(1 / DIAMOND_WAIST, 1)
    tip = (across + (v - HEART_SHIFT).abs() - HEART_HALF) / math.sqrt(2)
    lobe_x, lobe_y = across - HEART_HALF / 2, v - HEART_SHIFT + HEART_HALF / 2
    lobes = (lobe_x * lobe_x + lobe_y * lobe_y).sqrt() - HEART_HALF / math.sqrt(2)
    heart = torch.minimum(tip, lobes)
    cross = torch.minimum(torch.maximum(across - CROSS_ARM, down - 1), torch.maximum(across - 1, down - CROSS_ARM))
    half = (1 - RING_HOLE) / 2
    ring = (from_centre - (1 + RING_HOLE) / 2).abs() - half
    distances = (circle, square, triangle, star, diamond, heart, cross, ring)
    assert len(distances) == len(SHAPES)
    chosen = distances[0]
    for index, distance in enumerate(distances[1:], start=1):
        chosen = torch.where(shape == index, distance, chosen)
    return chosen


def _local(thing: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points of the picture in the frame of a thing [M, THING_FIELDS]."""
    column = thing[:, :, None, None]
    dx, dy = (x - column[:, 2]) / column[:, 4], (y - column[:, 3]) / column[:, 5]
    return dx * column[:, 6] + dy * column[:, 7], dy * column[:, 6] - dx * column[:, 7]


def _grid(side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres as shares of the side: x [1, 1, side], y [1, side, 1]."""
    centres = (torch.arange(side, device=like.device, dtype=torch.float32) + 0.5) / side
    return centres[None, None, :], centres[None, :, None]


def render(scenes: Tensor, things: Tensor, *, side: int) -> Tensor:
    """Normalised pixels [M, 3, side, side] in bfloat16, as the processor gives them: 2 * value - 1, noise added."""
    x, y = _grid(side, scenes)
    channels = [scenes[:, channel, None, None].expand(-1, side, side) for channel in range(3)]
    for slot in range(MOST_THINGS):
        thing = things[:, slot]
        u, v = _local(thing, x, y)
        radius = thing[:, 4:6].mean(dim=1)[:, None, None] * side
        distance = signed_distance(thing[:, 0, None, None], u, v) * radius
        cover = (0.5 - distance / scenes[:, 4, None, None]).clamp(0, 1) * thing[:, 11, None, None]
        channels = [
            channel + cover * (thing[:, 8 + index, None, None] - channel) for index, channel in enumerate(channels)
        ]
    picture = torch.stack(channels, dim=1)
    picture = picture + torch.randn_like(picture) * scenes[:, 3, None, None, None]
    return (picture.clamp(0, 1) * 2 - 1).to(torch.bfloat16)


def cell_labels(scenes: Tensor, things: Tensor, *, side: int) -> tuple[Tensor, Tensor]:
    """What stands at the middle of each cell of a side x side grid.

    Returns (shape [M, side * side], where len(SHAPES) means background; colour [M, side * side]) as int64.
    """
    x, y = _grid(side, scenes)
    shape = torch.full((len(scenes), side, side), len(SHAPES), device=scenes.device, dtype=torch.int64)
    colour = scenes[:, 5, None, None].long().expand(-1, side, side)
    for slot in range(MOST_THINGS):
        thing = things[:, slot]
        u, v = _local(thing, x, y)
        inside = (signed_distance(thing[:, 0, None, None], u, v) <= 0) & (thing[:, 11, None, None] > 0)
        shape = torch.where(inside, thing[:, 0, None, None].long(), shape)
        colour = torch.where(inside, thing[:, 1, None, None].long(), colour)
    return shape.flatten(1), colour.flatten(1)


LABEL_CLASSES = (len(SHAPES) + 1, len(COLOURS))
"""How many shapes and colours `cell_labels` tells apart."""
