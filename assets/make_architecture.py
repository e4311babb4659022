"""Draws assets/architecture.png: the rooms of the package in layers, and the ways of training and of sampling through
them. The rooms and their order are read from the table that tests/test_import_rules.py enforces.

python assets/make_architecture.py [--out assets/architecture.png]     needs matplotlib: pip install '.[plots]'
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path

from make_framework import DECODER, ENCODER, INK, LAYOUT, MUTED, PLAIN, TIMESTEP, WIDTH, Drawing, example, replacing

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "tests" / "test_import_rules.py"

# What a room is for, in a few words. A room of the table that is missing here is an error.
ROOMS = {
    "hosts": "the machine",
    "data": "files on their way to integers",
    "layouts": "label maps into the network",
    "sampling": "from noise to an image",
    "objectives": "what training minimises",
    "weights": "checkpoints",
    "runs": "what a run leaves behind",
}
PROGRAMS = ("image_train.py", "image_sample.py")

# The stations of a way: the room or module, and what happens there.
TRAINING = (
    ("data", "pairs files, checks\nids, crops both"),
    ("image_datasets", "batches of\nsmall integers"),
    ("layouts", "one-hot classes,\nedges; some dropped"),
    ("objectives", "adds noise at a\ntimestep; the loss"),
    ("unet", "predicts from image,\ntimestep, layout"),
    ("fp16_util", "scales the loss,\nsteps the optimizer"),
    ("weights", "writes weights,\naverages, optimizer"),
)
SAMPLING = (
    ("data", "reads the label map,\nchecks its ids"),
    ("layouts", "one-hot classes\nand edges"),
    ("unet", "encodes the layout:\nscale, shift kept"),
    ("sampling", "the loop, over all\nlevels of noise"),
    ("layouts", "rounds to 8 bits"),
    ("runs", "writes samples\nand a record"),
)


def read_table() -> tuple[dict[str, set[str]], set[str], set[str]]:
    """From the import rules: what each room or module may import, the modules at the door, those of pure arithmetic."""
    found = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(RULES.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("ALLOWED", "DOOR", "PURE")
    }
    return found["ALLOWED"], found["DOOR"], found["PURE"]


def layers(allowed: dict[str, set[str]]) -> list[list[str]]:
    """The entries by layer, from the ground up: each stands one layer above the highest that it may import."""
    heights: dict[str, int] = {}
    for name, below in allowed.items():  # the table names an entry only after those that it may import
        heights[name] = 1 + max((heights[other] for other in below), default=-1)
    return [[name for name in allowed if heights[name] == height] for height in range(max(heights.values()) + 1)]


def described() -> str:
    """What the drawing shows of the table, as text: it is kept in the picture, so that a stale one is noticed."""
    allowed, door, pure = read_table()
    return json.dumps({"layers": layers(allowed), "door": sorted(door), "pure": sorted(pure)})


def draw_layers(d: Drawing, bottom: float, height: float) -> None:
    allowed, door, pure = read_table()
    rows = layers(allowed)
    d.panel(0.3, bottom, WIDTH - 0.6, height, "rooms and modules: each may import from rows below its own", INK)
    high, gap, centre = 0.36, 0.13, WIDTH / 2
    pitch = (height - 0.68) / len([*rows, PROGRAMS])
    for i, row in enumerate([*rows, PROGRAMS]):
        y = bottom + 0.36 + pitch * i
        widths = [1.36 if name in door or name in PROGRAMS else 2.7 for name in row]
        x = centre - (sum(widths) + gap * (len(row) - 1)) / 2
        for name, width in zip(row, widths, strict=True):
            colours = PLAIN if name in PROGRAMS else (DECODER if name in pure else ENCODER)
            middle = x + width / 2
            if name in door or name in PROGRAMS:
                d.box(middle, y, width, high, colours, name, 9.5)
            else:
                d.box(middle, y, width, high, colours)
                d.text(x + 0.1, y, f"{name}/", 10.5, weight="bold", ha="left")
                d.text(x + width - 0.1, y, ROOMS[name], 8.5, MUTED, ha="right")
            x += width + gap
    draw_legend(d, 0.62, bottom + height - 0.8)
    d.line([(WIDTH - 0.85, bottom + height - 0.75), (WIDTH - 0.85, bottom + 1.3)], MUTED, 2.2)
    d.text(WIDTH - 1.1, bottom + 3.0, "imports", 10.5, MUTED, rotation=90)


def draw_legend(d: Drawing, x: float, y: float) -> None:
    lines = (
        (ENCODER, "may know files, processes, pictures"),
        (DECODER, "arithmetic: knows none of these"),
        (PLAIN, "the two programs"),
    )
    for i, (colours, text) in enumerate(lines):
        row = y - 0.3 * i
        d.box(x + 0.14, row, 0.28, 0.18, colours)
        d.text(x + 0.4, row, text, 9.5, MUTED, ha="left")
    d.text(x, y - 0.92, "name/", 10.5, ha="left", weight="bold")
    d.text(x + 0.62, y - 0.92, "a room: a folder of modules", 9.5, MUTED, ha="left")


def station(d: Drawing, x: float, y: float, width: float, name: str, text: str, pure: set[str]) -> None:
    """A box of one step: the room or module in bold, what happens there below."""
    d.box(x, y, width, 0.92, DECODER if name in pure else ENCODER)
    d.text(x, y + 0.27, f"{name}/" if name in ROOMS else name, 10.5, weight="bold")
    d.text(x, y - 0.13, text, 8.5, linespacing=1.25)


def draw_training(d: Drawing, bottom: float, height: float, pictures: dict) -> None:
    pure = read_table()[2]
    d.panel(0.3, bottom, WIDTH - 0.6, height, "training: the way of a photograph and its label map", INK)
    y, first, pitch, width = bottom + 0.76, 2.3, 1.6, 1.42
    for i, (key, line) in enumerate((("image", ENCODER[1]), ("labels", LAYOUT[1]))):
        d.picture(0.86 + 0.28 * i, y + 0.2 - 0.36 * i, 0.62, pictures[key], line)
    places = [first + pitch * i for i in range(len(TRAINING))]
    for i, (x, (name, text)) in enumerate(zip(places, TRAINING, strict=True)):
        if name != "fp16_util":
            d.line([(1.42 if i == 0 else places[i - 1] + width / 2, y), (x - width / 2, y)], INK, 1.4)
        station(d, x, y, width, name, text, pure)
    # The objective asks the network for a prediction, and hands the gradients of its loss on.
    top, foot = y + 0.46, y - 0.46
    d.line([(places[4], top), (places[4], top + 0.17), (places[3], top + 0.17), (places[3], top)], TIMESTEP[1], 1.4)
    d.text((places[3] + places[4]) / 2, top + 0.3, "prediction", 9.5, TIMESTEP[1])
    d.line([(places[3], foot), (places[3], foot - 0.15), (places[5], foot - 0.15), (places[5], foot)], TIMESTEP[1], 1.4)
    d.text((places[5] + places[6]) / 2, foot - 0.14, "gradients of the loss", 9.5, TIMESTEP[1])


def draw_sampling(d: Drawing, bottom: float, height: float, pictures: dict) -> None:
    pure = read_table()[2]
    d.panel(0.3, bottom, WIDTH - 0.6, height, "sampling: the way of a label map", INK)
    y, width = bottom + 0.98, 1.42
    places = [2.06, 3.66, 5.26, 7.34, 9.38, 10.98]
    d.picture(0.84, y, 0.66, pictures["labels"], LAYOUT[1])
    for i, (x, (name, text)) in enumerate(zip(places, SAMPLING, strict=True)):
        begin = 1.17 if i == 0 else places[i - 1] + width / 2
        d.line([(begin, y), (x - width / 2, y)], LAYOUT[1] if i < 4 else INK, 1.4)
        station(d, x, y, width, name, text, pure)
    d.picture(12.2, y, 0.66, pictures["image"], DECODER[1])
    d.line([(places[-1] + width / 2, y), (11.87, y)], INK, 1.4)
    # The loop, below its box: what is asked at every level.
    row, loop = bottom + 0.22, places[3]
    names = (("unet", "denoise"), ("guidance", "combine"), ("prediction", "image"), ("solver", "step"))
    for i, (name, verb) in enumerate(names):
        x = loop - 2.61 + 1.74 * i
        d.box(x, row, 1.56, 0.25, DECODER, f"{name}: {verb}", 9)
        if i:
            d.line([(x - 0.96, row), (x - 0.78, row)], INK, 1.3)
    d.line([(loop, y - 0.46), (loop, row + 0.13)], MUTED, 1.3)
    d.text(loop + 0.12, row + 0.215, "asks at every level", 9, MUTED, ha="left")
    # The checkpoint comes in from above.
    d.line([(places[2], y + 0.66), (places[2], y + 0.46)], INK, 1.4)
    d.text(places[2] + 0.1, y + 0.6, "checkpoint, read by pipeline", 9, MUTED, ha="left")


def draw_architecture() -> Drawing:
    drawing, pictures = Drawing(), example()
    draw_layers(drawing, 4.2, 5.4)
    draw_training(drawing, 2.25, 1.8, pictures)
    draw_sampling(drawing, 0.15, 1.95, pictures)
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "architecture.png", help="the picture to write")
    out = parser.parse_args().out
    with replacing(out) as temporary:
        metadata = {"Software": None, "Description": described()}
        draw_architecture().figure.savefig(temporary, format="png", metadata=metadata)
    print(out)


if __name__ == "__main__":
    main()
