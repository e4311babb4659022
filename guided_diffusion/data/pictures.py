"""Pictures for people: coloured layouts, contact sheets, and a save that never leaves half a file."""

import contextlib
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .listing import printable
from .own_files import temporary_path

_PAPER, _INK, _FAINT, _FRAME = (255, 255, 255), (28, 32, 38), (110, 116, 126), (222, 225, 230)


def colorize(label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """A label map in its classes' colours: ids [H, W] and uint8 [classes, 3] give uint8 [H, W, 3].

    Raises ValueError where an id has no colour.
    """
    label = np.asarray(label)
    if label.ndim != 2:
        raise ValueError(f"a label map is [H, W], not {list(label.shape)}")
    if label.size and (label.min() < 0 or label.max() >= len(palette)):
        raise ValueError(f"ids {label.min()} to {label.max()} do not fit a palette of {len(palette)} colours")
    return np.asarray(palette, dtype=np.uint8)[label]


def save_png(image: Image.Image | np.ndarray, path: str | os.PathLike) -> None:
    """Writes a PNG under a temporary name in the same folder (made where missing), then renames it into place.

    A link of that name is replaced, what it points to is not. Raises OSError where it cannot be written.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    temporary = temporary_path(path)
    os.makedirs(os.path.dirname(temporary), exist_ok=True)
    try:
        with open(temporary, "xb") as file:
            picture.save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | np.ndarray | None]],
    *,
    column_titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    title: str | None = None,
    legend: Sequence[tuple[str, Sequence[int]]] | None = None,
    cell_height: int = 192,
) -> Image.Image:
    """A page of pictures in rows and columns, for example layout, photograph, sample.

    rows: pictures as PIL images or uint8 arrays [H, W, 3] or [H, W]; None leaves a cell empty. All are brought to
    `cell_height` pixels, small ones by nearest-pixel enlargement, large ones by area. legend: (name, colour) pairs,
    drawn below. Row titles stand under their rows, so that long file names fit.
    """
    if not rows or not any(cell is not None for row in rows for cell in row):
        raise ValueError("a contact sheet needs at least one picture")
    title, row_titles = title and printable(title), row_titles and [printable(text) for text in row_titles]
    cells = [[None if cell is None else _fit(cell, cell_height) for cell in row] for row in rows]
    columns = max(len(row) for row in cells)
    widths = [
        max((row[c].width for row in cells if c < len(row) and row[c] is not None), default=0) for c in range(columns)
    ]
    gap = max(6, cell_height // 24)
    margin = 3 * gap
    small, large = _font(max(13, cell_height // 13)), _font(max(18, cell_height // 8))
    line, title_line = _line_height(small), _line_height(large)
    width = 2 * margin + sum(widths) + gap * (columns - 1)
    if title:
        width = max(width, 2 * margin + round(large.getlength(title)))
    entries = _place_legend([(printable(name), color) for name, color in legend or ()], small, width - 2 * margin, line)
    row_height = cell_height + (line + gap // 2 if row_titles else 0) + gap
    top = margin + (title_line + gap if title else 0)
    body = top + (line + gap // 2 if column_titles else 0)
    legend_top = body + row_height * len(cells) - gap + (2 * gap if entries else 0)
    legend_height = entries[-1][1] + line if entries else 0

    page = Image.new("RGB", (width, legend_top + legend_height + margin), _PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((margin, margin), title, font=large, fill=_INK)
    lefts = [margin + sum(widths[:c]) + gap * c for c in range(columns)]
    for left, column_width, text in zip(lefts, widths, column_titles or (), strict=False):
        draw.text((left, top), _shorten(text, small, column_width), font=small, fill=_FAINT)
    for r, row in enumerate(cells):
        y = body + r * row_height
        for left, cell in zip(lefts, row, strict=False):
            if cell is not None:
                page.paste(cell, (left, y))
                draw.rectangle((left - 1, y - 1, left + cell.width, y + cell.height), outline=_FRAME)
        if row_titles and r < len(row_titles):
            text = _shorten(row_titles[r], small, width - 2 * margin)
            draw.text((margin, y + cell_height + gap // 2), text, font=small, fill=_FAINT)
    for x, y, name, color in entries:
        box = (margin + x, legend_top + y + line // 8, margin + x + line * 3 // 4, legend_top + y + line * 7 // 8)
        draw.rectangle(box, fill=tuple(int(c) for c in color), outline=_FRAME)
        draw.text((margin + x + line, legend_top + y), name, font=small, fill=_INK)
    return page


def _fit(cell: Image.Image | np.ndarray, height: int) -> Image.Image:
    """A picture at `height` pixels: pixels stay visible when it is enlarged, details average when it shrinks."""
    picture = (cell if isinstance(cell, Image.Image) else Image.fromarray(np.ascontiguousarray(cell))).convert("RGB")
    if picture.height == height:
        return picture
    size = (max(1, round(picture.width * height / picture.height)), height)
    enlarged = picture.height < height
    return picture.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, with its middle left out where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    keep = len(text)
    while keep > 2:
        keep -= 1
        short = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
        if font.getlength(short) <= width:
            return short
    return text[:1]


def _place_legend(legend: Sequence, font: ImageFont.FreeTypeFont, width: int, line: int) -> list[tuple]:
    """(x, y, name, colour) of each entry, relative to the legend's corner, in columns of equal width."""
    if not legend:
        return []
    entry = line * 2 + max(round(font.getlength(name)) for name, _ in legend)
    columns = max(1, width // entry)
    per_column = -(-len(legend) // columns)
    columns = -(-len(legend) // per_column)
    step = max(entry, width // columns)
    return sorted(
        (
            (i // per_column * step, i % per_column * (line + line // 4), name, color)
            for i, (name, color) in enumerate(legend)
        ),
        key=lambda placed: placed[1],
    )


def bar_chart(
    names: Sequence[str], values: Sequence[float], colors: Sequence[Sequence[int]], title: str, note: str = ""
) -> Image.Image:
    """Horizontal bars of shares (0 to 1), largest first, on a logarithmic scale so that rare classes can be seen.

    Values of zero are left out. Beyond 40 bars the page has several columns. The scale begins at a tenth of the
    smallest share. Raises ValueError where all are zero.
    """
    order = sorted((i for i in range(len(values)) if values[i] > 0), key=lambda i: -values[i])
    if not order:
        raise ValueError("a bar chart needs a value above zero")
    names, title = [printable(name) for name in names], printable(title)
    decades = 1 - np.log10(values[order[-1]])
    columns = -(-len(order) // 40)
    per_column = -(-len(order) // columns)
    font, large = _font(15), _font(24)
    line, margin, bar = _line_height(font) + 5, 24, 300
    text_width = max(round(font.getlength(names[i])) for i in order) + 12
    column = text_width + bar + round(font.getlength("0.00000 %")) + 40
    top = margin + _line_height(large) + (line if note else 0) + 10
    page = Image.new("RGB", (margin + columns * column, top + per_column * line + margin), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin), title, font=large, fill=_INK)
    if note:
        draw.text((margin, margin + _line_height(large) + 4), note, font=font, fill=_FAINT)
    for place, i in enumerate(order):
        x, y = margin + place // per_column * column, top + place % per_column * line
        draw.text((x, y), names[i], font=font, fill=_INK)
        length = max(1, round(bar * (1 + np.log10(values[i]) / decades)))
        box = (x + text_width, y + 2, x + text_width + length, y + line - 5)
        draw.rectangle(box, fill=tuple(int(c) for c in colors[i]), outline=_FRAME)
        share = f"{100 * values[i]:.3g} %" if values[i] >= 1e-6 else f"{100 * values[i]:.1e} %"
        draw.text((x + text_width + length + 8, y), share, font=font, fill=_FAINT)
    return page
