"""Paints one procedural landscape and its label map.

Coordinates run over the unit square, y downwards, so a scene is the same composition at any size. All randomness comes
from the generator given, in an order that does not depend on the size. Everything is drawn at four times the size and
reduced: colours by area, class ids by majority.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

OVERSAMPLING = 4
# How much of the other classes' colours a pixel on an edge takes: 0 is pixel art, large values a plain average.
EDGE_BLENDING = 0.6

# The colours by which label maps are shown; the painted colours are below, per time of day.
CLASSES: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("sky", (135, 190, 235)),
    ("sun", (255, 221, 70)),
    ("mountain", (120, 112, 140)),
    ("grass", (140, 190, 70)),
    ("tree", (30, 92, 48)),
    ("house", (250, 232, 205)),
    ("roof", (190, 62, 48)),
    ("road", (180, 134, 94)),
    ("water", (38, 130, 160)),
)
SKY, SUN, MOUNTAIN, GRASS, TREE, HOUSE, ROOF, ROAD, WATER = range(len(CLASSES))

# Per time of day and class: the colour in shadow and the colour in light (the sky: at the top and at the horizon).
# Chosen so that a class keeps a region of colour space to itself over all times of day.
PALETTES: dict[str, np.ndarray] = {
    name: np.array(colours, dtype=np.float32)
    for name, colours in {
        "day": (
            ((92, 156, 226), (190, 222, 244)),
            ((255, 222, 84), (255, 242, 150)),
            ((88, 84, 112), (150, 142, 164)),
            ((96, 152, 48), (168, 204, 78)),
            ((14, 60, 38), (46, 102, 48)),
            ((236, 216, 190), (255, 244, 222)),
            ((142, 40, 34), (206, 80, 56)),
            ((146, 104, 72), (194, 148, 104)),
            ((20, 104, 134), (64, 170, 184)),
        ),
        "sunset": (
            ((160, 140, 214), (255, 176, 150)),
            ((255, 208, 74), (255, 236, 138)),
            ((82, 68, 92), (136, 112, 130)),
            ((118, 140, 40), (192, 190, 66)),
            ((26, 56, 32), (70, 94, 38)),
            ((238, 214, 190), (255, 240, 220)),
            ((130, 34, 42), (200, 70, 52)),
            ((140, 96, 70), (192, 140, 98)),
            ((46, 106, 140), (98, 158, 176)),
        ),
        "night": (
            ((16, 22, 70), (58, 72, 150)),
            ((255, 236, 150), (255, 246, 186)),
            ((56, 50, 70), (98, 88, 106)),
            ((70, 122, 76), (112, 158, 92)),
            ((8, 36, 34), (24, 68, 50)),
            ((222, 198, 168), (250, 228, 192)),
            ((98, 26, 40), (146, 46, 52)),
            ((112, 80, 70), (156, 114, 92)),
            ((10, 66, 96), (38, 112, 136)),
        ),
    }.items()
}
TIMES = {"day": 0.5, "sunset": 0.3, "night": 0.2}  # with their shares where all are asked for
WARMEST_DAY = 0.35  # how far the light of a day may go towards sunset


def smooth_noise(rng: np.random.Generator, side: int, cells: tuple[int, int]) -> np.ndarray:
    """Smooth noise [side, side] in about [-1, 1], with `cells` (across, down) independent values."""
    across, down = cells
    grid = rng.uniform(-1, 1, (down, across)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))


def brushwork(rng: np.random.Generator, side: int, cells: tuple[int, int]) -> np.ndarray:
    """Three octaves of smooth noise [side, side] in [0, 1]: light and shadow of brush strokes shaped like `cells`."""
    across, down = cells
    octaves = [smooth_noise(rng, side, (across << k, down << k)) * 0.55**k for k in range(3)]
    return np.clip(0.5 + 0.45 * sum(octaves), 0, 1)


def ridge_line(rng: np.random.Generator, x: np.ndarray, cells: int, octaves: int) -> np.ndarray:
    """A rugged line over `x` in about [-1, 1]."""
    line = np.zeros_like(x)
    for k in range(octaves):
        knots = rng.uniform(-1, 1, (cells << k) + 1)
        line += 0.5**k * np.interp(x, np.linspace(0, 1, knots.size), knots).astype(np.float32)
    return line


class Canvas:
    """An image and its label map, painted from back to front."""

    def __init__(self, rng: np.random.Generator, side: int, time: str) -> None:
        self.rng, self.side = rng, side
        warmth = rng.uniform(0, WARMEST_DAY) * (time == "day")
        palette = PALETTES[time] + warmth * (PALETTES["sunset"] - PALETTES[time])
        self.palette = np.clip(palette + rng.normal(0, 4, (len(CLASSES), 1, 3)), 0, 255).astype(np.float32)
        centres = (np.arange(side, dtype=np.float32) + 0.5) / side
        self.x, self.y = centres[None, :], centres[:, None]
        self.image = np.zeros((side, side, 3), np.float32)
        self.labels = np.zeros((side, side), np.uint8)

    def window(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        """The part of the canvas around a rectangle: small objects are then cheap on a large canvas."""
        first = np.clip(np.floor(np.array([top, left]) * self.side), 0, self.side).astype(int)
        last = np.clip(np.ceil(np.array([bottom, right]) * self.side) + 1, 0, self.side).astype(int)
        return slice(first[0], last[0]), slice(first[1], last[1])

    def fill(self, mask: np.ndarray, class_id: int, light: np.ndarray, window=(slice(None), slice(None))) -> None:
        """Paints `mask` with a class; `light` in [0, 1] mixes its shadow and light colours."""
        shadow, lit = self.palette[class_id]
        light = np.clip(np.broadcast_to(light, mask.shape), 0, 1)[mask][:, None]
        self.image[window][mask] = shadow + (lit - shadow) * light
        self.labels[window][mask] = class_id

    def tint(self, weight: np.ndarray, colour: tuple[float, float, float] | np.ndarray, class_id: int) -> None:
        """Mixes a colour into what is painted of one class; `weight` [side, side] in [0, 1]."""
        weight = (weight * (self.labels == class_id))[..., None]
        self.image += (np.asarray(colour, np.float32) - self.image) * weight


def paint_sky(canvas: Canvas, horizon: float, time: str) -> tuple[float, float]:
    """Sky with wisps of cloud, and in most scenes the sun or the moon; returns where the light comes from."""
    rng, x, y = canvas.rng, canvas.x, canvas.y
    wisps = smooth_noise(rng, canvas.side, (4, 12)) + 0.5 * smooth_noise(rng, canvas.side, (10, 28))
    everywhere = np.ones_like(canvas.labels, bool)
    canvas.fill(everywhere, SKY, (y / horizon) ** 1.3 + 0.05 * wisps)
    cloud = np.clip(0.9 * wisps - rng.uniform(-0.1, 0.5), 0, 1) * (0.30 if time == "night" else 0.5)
    canvas.tint(cloud, canvas.palette[SKY, 1] * 1.06, SKY)
    sun_x, sun_y = rng.uniform(0.1, 0.9), horizon * rng.uniform(0.2, 0.75)
    radius, shown = rng.uniform(0.06, 0.105), rng.random() < 0.8
    stars = rng.uniform(0, 1, (40, 3))
    if time == "night":
        for star_x, star_y, glow in stars:
            window = canvas.window(star_x - 0.01, star_y - 0.01, star_x + 0.01, star_y + 0.01)
            near = (x[:, window[1]] - star_x) ** 2 + (y[window[0]] - star_y) ** 2 < (0.002 + 0.002 * glow) ** 2
            canvas.image[window][near] += 60 + 90 * glow
    if shown:
        distance = np.hypot(x - sun_x, y - sun_y)
        canvas.tint(0.35 * np.exp(-((distance / (2.6 * radius)) ** 2)), canvas.palette[SKY, 1] * 1.05, SKY)
        canvas.fill(distance < radius, SUN, 1.15 - 0.7 * distance / radius + 0.1 * wisps)
    return sun_x, sun_y


def paint_mountains(canvas: Canvas, horizon: float, sun_x: float) -> None:
    """One or two ranges, paler with distance, lit on the sun's side."""
    rng, x, y = canvas.rng, canvas.x, canvas.y
    rock, crag = brushwork(rng, canvas.side, (7, 7)), smooth_noise(rng, canvas.side, (12, 12))
    ranges = rng.integers(1, 3)
    height = horizon * rng.uniform(0.35, 0.75)
    for depth in range(ranges):
        crest = np.zeros_like(x)
        for _ in range(rng.integers(2, 4)):
            peak, width = rng.uniform(0, 1), rng.uniform(0.22, 0.5)
            crest = np.maximum(crest, rng.uniform(0.5, 1) * (1 - np.abs(x - peak) / width))
        crest += 0.09 * ridge_line(rng, x, 7, 3)
        top = horizon - height * (0.65**depth) * crest
        # The rock face below a point of the crest leans to the side: the slope is looked up there.
        lean = 0.35 * (y - top) * np.sin(9 * x + depth) + 0.035 * crag
        slope = np.interp(x + lean, x[0], np.gradient(crest[0]) * canvas.side / 4)
        lit = np.tanh(1.2 * slope * np.sign(sun_x - x))
        fade = 0.55 if depth == 0 and ranges == 2 else 0.3
        haze = np.clip((y - top) / (horizon - top + 0.05), 0, 1)
        canvas.fill((y > top) & (y < horizon + 0.05), MOUNTAIN, fade + 0.22 * lit + 0.3 * (rock - 0.5) + 0.25 * haze)


def paint_ground(canvas: Canvas, horizon: float) -> np.ndarray:
    """Two rolling meadows; returns the line where the ground begins, [1, side]."""
    rng, x, y = canvas.rng, canvas.x, canvas.y
    strokes = brushwork(rng, canvas.side, (9, 7))
    blades = smooth_noise(rng, canvas.side, (56, 26))
    far = horizon + 0.035 * ridge_line(rng, x, 2, 2)
    near = horizon + (1 - horizon) * rng.uniform(0.3, 0.6) + 0.07 * ridge_line(rng, x, 2, 1)
    canvas.fill(y > far, GRASS, 0.75 - 0.9 * (y - far) + 0.35 * (strokes - 0.5))
    canvas.fill(y > near, GRASS, 0.62 - 0.7 * (y - near) + 0.6 * (strokes - 0.5) + 0.16 * blades)
    return far


def paint_water(canvas: Canvas, kind: str, horizon: float, sun_x: float) -> None:
    """A sea below the horizon, a lake in the meadow or a river out of the hills, with ripples and the sun's glitter."""
    rng, x, y = canvas.rng, canvas.x, canvas.y
    ripples = brushwork(rng, canvas.side, (4, 22))
    shore = ridge_line(rng, x, 3, 2)
    down = np.clip((y - horizon) / (1 - horizon), 0, 1)
    centre, sway, phase = rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.25), rng.uniform(0, 6.3)
    if kind == "sea":
        edge = horizon + (1 - horizon) * rng.uniform(0.55, 1.1) + 0.05 * shore
        mask = (y > horizon) & (y < edge)
    elif kind == "lake":
        wide, deep = rng.uniform(0.28, 0.48), rng.uniform(0.13, 0.22) * (1 - horizon) * 1.6
        middle = horizon + (1 - horizon) * rng.uniform(0.35, 0.7)
        mask = ((x - centre) / wide) ** 2 + ((y - middle) / deep) ** 2 < 1 + 0.18 * shore
    else:
        course = centre + sway * np.sin(phase + 5 * np.sqrt(down + 0.02)) * (0.4 + down)
        mask = (np.abs(x - course) < 0.015 + 0.17 * down**1.2) & (y > horizon)
    glitter = 0.45 * np.exp(-(((x - sun_x) / 0.08) ** 2)) * (ripples > 0.55)
    canvas.fill(mask, WATER, 0.85 - 0.75 * down + 0.55 * (ripples - 0.5) + glitter)


def paint_road(canvas: Canvas, horizon: float) -> None:
    """A winding road that narrows towards the horizon."""
    rng, x, y = canvas.rng, canvas.x, canvas.y
    dust = brushwork(rng, canvas.side, (6, 16))
    start, end, sway = rng.uniform(0.15, 0.85), rng.uniform(0.25, 0.75), rng.uniform(-0.28, 0.28)
    top = horizon + 0.03
    down = np.clip((y - top) / (1 - top), 0, 1)
    course = end + (start - end) * down**1.4 + sway * np.sin(np.pi * np.sqrt(down)) * (1 - down * 0.4)
    half = 0.012 + rng.uniform(0.12, 0.2) * down**1.25
    across = (x - course) / half
    light = 0.62 + 0.45 * (dust - 0.5) - 0.28 * np.exp(-(((np.abs(across) - 0.45) / 0.14) ** 2)) * (down > 0.1)
    canvas.fill((np.abs(across) < 1) & (y > top), ROAD, light)


def paint_house(canvas: Canvas, x0: float, base: float, scale: float, sun_x: float) -> None:
    """Walls with a door and windows (class house) under a gabled roof; `x0`, `base`: the middle of its foot."""
    rng = canvas.rng
    wide, high = scale * rng.uniform(0.62, 0.9), scale * rng.uniform(0.42, 0.6)
    roof_high = scale * rng.uniform(0.34, 0.5)
    window = canvas.window(x0 - wide, base - high - roof_high, x0 + wide, base)
    x, y = canvas.x[:, window[1]] - x0, base - canvas.y[window[0]]
    walls = (np.abs(x) < wide / 2) & (y > 0) & (y < high)
    side = 0.25 * np.sign(sun_x - x0) * np.sign(x - 0.12 * wide)
    panes = (np.abs(np.abs(x) - 0.27 * wide) < 0.085 * wide) & (np.abs(y - 0.56 * high) < 0.15 * high)
    door = (np.abs(x) < 0.085 * wide) & (y < 0.5 * high)
    canvas.fill(walls, HOUSE, 0.68 + side - 0.9 * (panes | door), window)
    eaves = wide * 0.60
    roof = (y >= high) & (np.abs(x) < eaves * (1 - (y - high) / roof_high))
    tiles = 0.10 * np.sign(np.sin(2 * np.pi * (y - high) / roof_high * 4))
    canvas.fill(roof, ROOF, 0.62 - 0.35 * (y - high) / roof_high + side + tiles, window)


def paint_tree(canvas: Canvas, x0: float, base: float, scale: float, conifer: bool, sun_x: float) -> None:
    """A fir or a round tree, lit on the sun's side; `x0`, `base`: the foot of its trunk."""
    rng = canvas.rng
    window = canvas.window(x0 - scale * 0.6, base - scale * 1.25, x0 + scale * 0.6, base)
    x, y = (canvas.x[:, window[1]] - x0) / scale, (base - canvas.y[window[0]]) / scale
    towards = float(np.sign(sun_x - x0)) or 1.0
    trunk = (np.abs(x) < 0.055) & (y > 0) & (y < 0.4)
    canvas.fill(trunk, TREE, np.float32(0.1), window)
    if conifer:
        for tier in range(3):
            foot, tip, half = 0.12 + 0.27 * tier, 0.62 + 0.27 * tier, 0.34 - 0.08 * tier
            spread = half * (tip - y) / (tip - foot)
            mask = (y > foot + 0.04 * np.cos(x * 40)) & (np.abs(x) < spread)
            canvas.fill(mask, TREE, 0.35 + 1.1 * towards * x + 0.5 * (y - foot), window)
        return
    leaves = rng.uniform(-1, 1, (9, 3))
    blobs = [(0.0, 0.62, 0.33), *((0.24 * a, 0.62 + 0.25 * b, 0.19 + 0.05 * c) for a, b, c in leaves)]
    for blob_x, blob_y, radius in blobs:
        inside = (x - blob_x) ** 2 + (y - blob_y) ** 2 < radius**2
        light = (
            0.35 + 0.9 * towards * (x - blob_x) + 0.9 * (y - blob_y) + 0.35 * (blob_y - 0.6) + 0.2 * towards * blob_x
        )
        canvas.fill(inside, TREE, light, window)


def paint_objects(canvas: Canvas, horizon: float, sun_x: float) -> None:
    """Houses and trees on the land, from far to near; nearer ones are larger."""
    rng = canvas.rng
    houses, trees = rng.choice(4, p=(0.3, 0.3, 0.25, 0.15)), rng.integers(0, 8)
    conifers = rng.random() < 0.5
    near = rng.uniform(0.35, 0.9)
    places = []
    for number in range(houses + trees):
        down = near * rng.uniform(0.05, 1)
        size = 0.12 + 0.30 * down if number < houses else 0.15 + 0.42 * down
        places.append((down, rng.uniform(0.05, 0.95), size * rng.uniform(0.85, 1.2), number < houses))
    for down, x0, scale, house in sorted(places):
        base = horizon + 0.04 + (0.94 - horizon) * down
        row, column = (min(int(value * canvas.side), canvas.side - 1) for value in (base, x0))
        seeds = rng.spawn(1)[0]
        if canvas.labels[row, column] not in (GRASS, HOUSE, ROOF, TREE):
            continue  # nothing stands on water or on the road
        previous, canvas.rng = canvas.rng, seeds
        if house:
            paint_house(canvas, x0, base, scale, sun_x)
        else:
            paint_tree(canvas, x0, base, scale, conifers, sun_x)
        canvas.rng = previous


def reduce(image: np.ndarray, labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours by area and class ids by majority over the blocks that make one pixel."""
    factor = labels.shape[0] // size
    blocks = labels.reshape(size, factor, size, factor).transpose(0, 2, 1, 3).reshape(size, size, -1)
    votes = np.stack([(blocks == class_id).sum(-1) for class_id in range(len(CLASSES))], axis=-1)
    majority = votes.argmax(-1).astype(np.uint8)
    pixels = image.reshape(size, factor, size, factor, 3).transpose(0, 2, 1, 3, 4).reshape(size, size, -1, 3)
    weight = (blocks == majority[..., None]) + np.float32(EDGE_BLENDING)
    colours = (pixels * weight[..., None]).sum(2) / weight.sum(-1)[..., None]
    return np.clip(np.rint(colours), 0, 255).astype(np.uint8), majority


def paint_scene(rng: np.random.Generator, size: int, times: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Paints one scene: image [size, size, 3] uint8 and label map [size, size] uint8 with ids into CLASSES.

    times: the times of day (of TIMES) to choose from; the composition does not depend on them.
    """
    shares = np.array([TIMES[time] for time in times])
    time = rng.choice(times, p=shares / shares.sum())
    horizon = rng.uniform(0.22, 0.72)
    canvas = Canvas(rng, size * OVERSAMPLING, time)
    sun_x, _ = paint_sky(canvas, horizon, time)
    if rng.random() < 0.7:
        paint_mountains(canvas, horizon, sun_x)
    paint_ground(canvas, horizon)
    water = rng.choice(("none", "sea", "lake", "river"), p=(0.4, 0.2, 0.2, 0.2))
    if water != "none":
        paint_water(canvas, water, horizon, sun_x)
    if rng.random() < {"none": 0.75, "river": 0.3}.get(water, 0):
        paint_road(canvas, horizon)
    paint_objects(canvas, horizon, sun_x)
    canvas.image += 5 * smooth_noise(rng, canvas.side, (64, 64))[..., None]  # the grain of the paper
    return reduce(canvas.image, canvas.labels, size)
