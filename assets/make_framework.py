"""Draws assets/framework.png, the architecture (arXiv 2207.00050, figure 2), with a procedural scene as the example.

python assets/make_framework.py [--out assets/framework.png]     needs matplotlib: pip install '.[plots]'
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts" / room) for room in ("data", "scenes")]
from make_scenes import draw  # noqa: E402
from preparation import replacing  # noqa: E402
from scene_painting import CLASSES  # noqa: E402

WIDTH, HEIGHT = 13.0, 9.75  # inches; coordinates below are inches from the lower left corner
INK, MUTED, RULE = "#22303F", "#64707D", "#D5DAE0"
# What a colour means, everywhere in the drawing: (fill, line).
ENCODER = ("#DCE7F7", "#4A74B4")
DECODER = ("#DDF0E2", "#3F9160")
LAYOUT = ("#FDE8CC", "#D9821F")
TIMESTEP = ("#EADFF6", "#8458B3")
PLAIN = ("#F4F6F8", "#8A96A3")


def example(size: int = 144) -> dict[str, np.ndarray]:
    """The pictures shown: a scene, its label map in colours, its edges, and the scene at several noise levels."""
    image, labels = draw(0, "val", 38, size)
    edges = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        changes = np.diff(labels.astype(int), axis=axis) != 0
        pad = [(0, 0), (0, 0)]
        for side in ((1, 0), (0, 1)):
            pad[axis] = side
            edges |= np.pad(changes, pad)
    noise = np.random.default_rng(3).standard_normal(image.shape)
    pictures = {
        "image": image,
        "labels": np.array([colour for _, colour in CLASSES], np.uint8)[labels],
        "edges": np.where(edges[..., None], 255, 40).astype(np.uint8).repeat(3, -1),
        "null": np.full_like(image, 40),
        "noise": np.clip(128 + 52 * noise, 0, 255).astype(np.uint8),
    }
    for percent in (99, 60, 25):  # the noise's share of the variance, as in equation 4 of DDPM, arXiv 2006.11239
        kept = 1 - percent / 100
        noisy = np.sqrt(kept) * (image / 127.5 - 1) + np.sqrt(1 - kept) * noise
        pictures[f"noisy{percent}"] = np.clip(127.5 * (noisy + 1), 0, 255).astype(np.uint8)
    return pictures


class Drawing:
    """A page with the few shapes that the figure is made of."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH, HEIGHT), dpi=180, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.page = self.figure.add_axes((0, 0, 1, 1))
        self.page.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.page.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 11, color: str = INK, **style) -> None:
        style = {"ha": "center", "va": "center", "zorder": 6, "family": "DejaVu Sans", **style}
        self.page.text(x, y, text, fontsize=size, color=color, **style)

    def box(self, x: float, y: float, w: float, h: float, colours: tuple[str, str], text: str = "", size: float = 11):
        """A rounded box around the centre (x, y)."""
        shape = FancyBboxPatch(
            (x - w / 2, y - h / 2), w, h, boxstyle=f"round,pad=0,rounding_size={min(0.08, h / 3)}", zorder=3
        )
        shape.set(facecolor=colours[0], edgecolor=colours[1], linewidth=1.4)
        self.page.add_patch(shape)
        self.text(x, y, text, size)

    def panel(self, x: float, y: float, w: float, h: float, title: str, colour: str) -> None:
        shape = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.12", zorder=0)
        shape.set(facecolor="#FBFCFD", edgecolor=RULE, linewidth=1.2)
        self.page.add_patch(shape)
        self.text(x + 0.18, y + h - 0.25, title, 12, colour, ha="left", weight="bold")

    def picture(self, x: float, y: float, side: float, pixels: np.ndarray, line: str = INK) -> None:
        """A square picture around the centre (x, y)."""
        extent = (x - side / 2, x + side / 2, y - side / 2, y + side / 2)
        self.page.imshow(pixels, extent=extent, zorder=4, interpolation="lanczos", aspect="auto")
        frame = Rectangle((extent[0], extent[2]), side, side, fill=False, edgecolor=line, linewidth=1.3, zorder=5)
        self.page.add_patch(frame)

    def line(
        self, points: list[tuple[float, float]], color: str, width: float = 1.6, arrow: bool = True, **style
    ) -> None:
        """A polyline that ends in an arrow head."""
        style = {"zorder": 2, **style}
        x, y = zip(*points, strict=True)
        if not arrow:
            self.page.plot(x, y, color=color, linewidth=width, solid_capstyle="round", solid_joinstyle="round", **style)
            return
        self.page.plot(x[:-1], y[:-1], color=color, linewidth=width, solid_joinstyle="round", **style)
        head = FancyArrowPatch(
            points[-2], points[-1], arrowstyle="-|>,head_length=5,head_width=2.6", shrinkA=0, shrinkB=0
        )
        head.set(color=color, linewidth=width, **style)
        self.page.add_patch(head)

    def operator(self, x: float, y: float, sign: str, color: str = INK) -> None:
        """A circle with a sum or a product sign."""
        circle = Circle((x, y), 0.13, facecolor="white", edgecolor=color, linewidth=1.4, zorder=4)
        self.page.add_patch(circle)
        arm = 0.075 if sign == "+" else 0.055
        strokes = (((-1, 0), (1, 0)), ((0, -1), (0, 1))) if sign == "+" else (((-1, -1), (1, 1)), ((-1, 1), (1, -1)))
        for (x0, y0), (x1, y1) in strokes:
            self.page.plot([x + arm * x0, x + arm * x1], [y + arm * y0, y + arm * y1], color=color, lw=1.5, zorder=5)


def draw_network(d: Drawing, pictures: dict[str, np.ndarray]) -> None:
    """The U-Net in the upper half: what goes into the encoder, and what goes into the middle block and decoder."""
    axis, bar, pitch = 7.2, 0.46, 0.76
    heights = (2.5, 1.95, 1.45, 1.0)
    encoder = [2.75 + pitch * i for i in range(4)]
    middle = encoder[-1] + 1.02
    decoder = [middle + 1.02 + pitch * i for i in range(4)]
    time_rail, layout_rail = 5.56, 5.28

    d.text((encoder[0] + encoder[-1]) / 2, 9.5, "Encoder", 14, ENCODER[1], weight="bold")
    d.text((encoder[0] + encoder[-1]) / 2, 9.22, "sees the noisy image, never the layout", 11, MUTED)
    d.text((decoder[0] + decoder[-1]) / 2, 9.5, "Decoder", 14, DECODER[1], weight="bold")
    d.text((decoder[0] + decoder[-1]) / 2, 9.22, "reads the layout through SPADE", 11, MUTED)

    d.picture(1.15, axis, 1.5, pictures["noisy60"], ENCODER[1])
    d.text(1.15, axis + 0.93, r"noisy image $x_t$", 11.5)
    d.line([(1.9, axis), (encoder[0] - bar / 2, axis)], INK)

    # Skip connections in brackets over the bars, level by level.
    for x0, x1, height in zip(encoder, reversed(decoder), heights, strict=True):
        top, rail = axis + height / 2, axis + height / 2 + 0.2
        d.line([(x0, top), (x0, rail), (x1, rail), (x1, top)], MUTED, 1.3)
    d.text(middle, axis + heights[0] / 2 + 0.35, "skip connections", 10.5, MUTED)

    places = [*encoder, middle, *decoder]
    sides = [*heights, 0.72, *reversed(heights)]
    for i, (x, height) in enumerate(zip(places, sides, strict=True)):
        colours, width = (ENCODER if i < 4 else DECODER), (0.62 if i == 4 else bar)
        d.box(x, axis, width, height, colours)
        if i:
            gap = (places[i - 1] + (0.31 if i == 5 else bar / 2), x - width / 2)
            d.line([(gap[0], axis), (gap[1], axis)], INK)
        foot = axis - height / 2
        shift = 0.0 if i < 4 else -0.1
        d.line([(x + shift, time_rail), (x + shift, foot)], TIMESTEP[1], 1.3)
        if i >= 4:
            d.line([(x + 0.1, layout_rail), (x + 0.1, foot)], LAYOUT[1], 1.8)
    for i in range(4):
        scale = "H, W" if i == 0 else rf"$\frac{{1}}{{{2**i}}}$"
        for x in (encoder[i], decoder[3 - i]):
            d.text(x, axis, scale, 9.5 if i == 0 else 14, MUTED, rotation=90 if i == 0 else 0)
    d.text(middle, axis, "middle", 9.5, MUTED, rotation=90)

    d.picture(11.85, axis, 1.5, pictures["noise"], DECODER[1])
    d.line([(decoder[-1] + bar / 2, axis), (11.1, axis)], INK)
    d.text(11.85, axis + 0.93, r"noise $\epsilon_\theta(x_t \mid y)$", 11.5)
    d.text(11.85, axis - 0.93, r"and step variance $\Sigma_\theta$", 11)

    d.box(1.15, time_rail, 1.5, 0.36, TIMESTEP, r"timestep $t$", 11)
    d.line([(1.9, time_rail), (decoder[-1] - 0.1, time_rail)], TIMESTEP[1], 1.6, arrow=False)
    draw_layout(d, pictures, layout_rail, decoder[-1] + 0.1)


def draw_layout(d: Drawing, pictures: dict[str, np.ndarray], rail: float, end: float) -> None:
    """The layout under the network: one-hot classes and the edges, on a rail that passes the encoder by."""
    for x, key, name in ((2.75, "labels", "classes, one-hot"), (4.4, "edges", "instance edges")):
        d.picture(x, 4.56, 0.92, pictures[key], LAYOUT[1])
        d.text(x, 3.94, name, 10.5)
    d.text(3.575, 4.56, "+", 17, LAYOUT[1])
    d.text(1.15, 4.72, r"layout $y$", 13, LAYOUT[1], weight="bold")
    d.text(1.15, 4.44, "label map, instances", 10.5, MUTED)
    d.line([(4.86, 4.56), (5.45, 4.56), (5.45, rail), (end, rail)], LAYOUT[1], 2.0, arrow=False)
    d.text(8.2, 4.72, "every norm of the middle block and the decoder", 10.5, MUTED)
    d.text(8.2, 4.46, "takes its scale and shift, pixel by pixel, from here", 10.5, MUTED)


def draw_block(d: Drawing, x: float, y: float, w: float, h: float, spade: bool) -> None:
    """A residual block, from top to bottom, with the norms of the encoder or those of the decoder."""
    colours = DECODER if spade else ENCODER
    d.panel(x, y, w, h, "decoder res-block" if spade else "encoder res-block", colours[1])
    norm, norm_colours = ("SPADE", LAYOUT) if spade else ("GroupNorm", colours)
    steps = [
        (norm, norm_colours),
        ("SiLU", PLAIN),
        ("conv 3×3", colours),
        (norm, norm_colours),
        ("scale, shift", TIMESTEP),
        ("SiLU", PLAIN),
        ("conv 3×3", colours),
    ]
    column, top, pitch, high = x + 1.05, y + h - 0.78, 0.33, 0.245
    end = top - pitch * len(steps)
    d.line([(column, top + 0.3), (column, end - 0.3)], INK, 1.3)
    for i, (name, fill) in enumerate(steps):
        row = top - pitch * i
        d.box(column, row, 1.12, high, fill, name, 10)
        if name == "SPADE":
            d.line([(x + w - 0.36, row), (column + 0.56, row)], LAYOUT[1], 1.6)
            d.text(x + w - 0.22, row, "$y$", 11.5, LAYOUT[1])
        if fill is TIMESTEP:
            d.line([(x + w - 0.36, row), (column + 0.56, row)], TIMESTEP[1], 1.6)
            d.text(x + w - 0.22, row, "$t$", 11.5, TIMESTEP[1])
    d.line([(column, top + 0.22), (x + 0.25, top + 0.22), (x + 0.25, end), (column - 0.13, end)], MUTED, 1.3)
    d.operator(column, end, "+")


def draw_spade(d: Drawing, x: float, y: float, w: float, h: float) -> None:
    """SPADE itself: a group norm without parameters, scaled and shifted for each pixel by the layout."""
    d.panel(x, y, w, h, "SPADE", LAYOUT[1])
    left, right, top = x + 0.8, x + 2.2, y + h - 0.67
    d.text(left, top + 0.08, "features $h$", 10.5)
    d.text(right, top + 0.08, "layout $y$", 10.5, LAYOUT[1])
    rows = [top - 0.46, top - 0.86, top - 1.39]
    d.line([(right, top - 0.08), (right, rows[1] - 0.14)], LAYOUT[1], 1.6, arrow=False)
    d.box(right, rows[0], 1.3, 0.27, LAYOUT, "resize", 10)
    d.box(right, rows[1], 1.3, 0.27, LAYOUT, "conv 3×3, ReLU", 10)
    fork = rows[1] - 0.23
    d.line([(right, rows[1] - 0.14), (right, fork)], LAYOUT[1], 1.6, arrow=False)
    scale_x, shift_x = right - 0.4, right + 0.4
    product, total = rows[2] - 0.38, rows[2] - 0.82
    for column, row, sign in ((scale_x, product, r"$1+\gamma$"), (shift_x, total, r"$\beta$")):
        d.line([(right, fork), (column, fork), (column, rows[2] + 0.14)], LAYOUT[1], 1.6)
        d.box(column, rows[2], 0.72, 0.27, LAYOUT, "conv 3×3", 9.5)
        d.line([(column, rows[2] - 0.14), (column, row), (left + 0.13, row)], LAYOUT[1], 1.6)
        d.text(column - 0.07, row + 0.13, sign, 11.5, LAYOUT[1], ha="right")
    d.line([(left, top - 0.08), (left, rows[0] + 0.22)], INK, 1.3)
    d.box(left, rows[0], 1.2, 0.44, DECODER, "GroupNorm,\nno parameters", 9.5)
    d.line([(left, rows[0] - 0.22), (left, product + 0.13)], INK, 1.3)
    d.operator(left, product, "x", LAYOUT[1])
    d.line([(left, product - 0.13), (left, total + 0.13)], INK, 1.3)
    d.operator(left, total, "+", LAYOUT[1])
    d.line([(left, total - 0.13), (left, total - 0.45)], INK, 1.3)
    d.text(left + 0.17, total - 0.34, r"$(1+\gamma(y))\,\odot\,\mathrm{GN}(h)\,+\,\beta(y)$", 11, ha="left")


def draw_guidance(d: Drawing, x: float, y: float, w: float, h: float, pictures: dict[str, np.ndarray]) -> None:
    """One step of sampling: a pass with the layout and one without, combined; then the steps of a sample."""
    d.panel(x, y, w, h, "classifier-free guidance", INK)
    inputs, decoders, results = x + 1.52, x + 2.72, x + 3.62
    centre = y + h - 1.33
    d.picture(x + 0.52, centre, 0.62, pictures["noisy60"], ENCODER[1])
    d.text(x + 0.36, centre - 0.44, "$x_t$", 11)
    d.box(inputs, centre, 0.78, 0.34, ENCODER, "encoder", 10)
    d.line([(x + 0.83, centre), (inputs - 0.39, centre)], INK, 1.3)
    for side, key, name in ((1, "labels", r"$\epsilon(y)$"), (-1, "null", r"$\epsilon(\varnothing)$")):
        row = centre + 0.54 * side
        d.picture(inputs, row, 0.48, pictures[key], LAYOUT[1])
        d.line([(inputs + 0.24, row + 0.08 * side), (decoders - 0.41, row + 0.08 * side)], LAYOUT[1], 1.6)
        turn, entry = inputs + 0.58, row - 0.08 * side
        d.line([(inputs + 0.39, centre), (turn, centre), (turn, entry), (decoders - 0.41, entry)], INK, 1.3)
        d.box(decoders, row, 0.82, 0.36, DECODER, "decoder", 10)
        d.line([(decoders + 0.41, row), (results - 0.24, row)], INK, 1.3)
        d.text(results + 0.03, row, name, 12)
    d.text(inputs - 0.32, centre + 0.54, r"layout $y$", 10.5, LAYOUT[1], ha="right")
    d.text(inputs - 0.32, centre - 0.6, r"null $\varnothing$", 10.5, LAYOUT[1], ha="right")
    formula = r"$\epsilon\;=\;\epsilon(\varnothing)\,+\,s\,\left(\epsilon(y)-\epsilon(\varnothing)\right)$"
    d.text(x + w / 2, y + 1.07, formula, 12.5)
    strip = (("noisy99", "$x_T$"), ("noisy60", ""), ("noisy25", ""), ("image", "$x_0$"))
    for i, (key, name) in enumerate(strip):
        column = x + 0.75 + 0.84 * i
        d.picture(column, y + 0.52, 0.62, pictures[key])
        if i:
            d.line([(column - 0.53, y + 0.52), (column - 0.31, y + 0.52)], INK, 1.3)
        if name:
            d.text(column + (-0.47 if i == 0 else 0.47), y + 0.52, name, 11)


def draw_framework() -> Drawing:
    drawing, pictures = Drawing(), example()
    draw_network(drawing, pictures)
    draw_block(drawing, 0.3, 0.2, 2.3, 3.4, spade=False)
    draw_block(drawing, 2.8, 0.2, 2.3, 3.4, spade=True)
    draw_spade(drawing, 5.3, 0.2, 3.1, 3.4)
    draw_guidance(drawing, 8.6, 0.2, 4.1, 3.4, pictures)
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "framework.png", help="the picture to write")
    out = parser.parse_args().out
    with replacing(out) as temporary:
        draw_framework().figure.savefig(temporary, format="png", metadata={"Software": None})
    print(out)


if __name__ == "__main__":
    main()
