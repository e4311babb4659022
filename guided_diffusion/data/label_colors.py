"""Label maps in their classes' colours: exactly, or to the nearest colour within a tolerance."""

import numpy as np
from PIL import Image

from .errors import DataError
from .notes import Notes

_SHOWN = 5  # colours named in a message
MOVED = "pixels of label maps took the nearest class's colour (tolerance {})"


def ids_from_colors(
    image: Image.Image, path: str, colors: np.ndarray, tolerance: int, notes: Notes | None = None, table: str = ""
) -> Image.Image:
    """The ids of an RGB map in the classes' `colors`, uint8 [classes, 3]; of two classes of one colour, the first.

    tolerance: a pixel of another colour takes the nearest class's, where that is no further away (Euclidean, in levels
    of 0 to 255); `notes` counts those pixels. table: where the colours come from, with a remedy, if
    not from dataset.json. Raises DataError for colours further away.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    packed = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]  # [H, W]
    known, first = np.unique(colors.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32), return_index=True)
    place = np.searchsorted(known, packed).clip(max=len(known) - 1)
    wrong = known[place] != packed
    ids = first[place]
    if wrong.any():
        odd, inverse, counts = np.unique(packed[wrong], return_inverse=True, return_counts=True)
        nearest, distance = _nearest(np.stack([odd >> 16, odd >> 8 & 255, odd & 255], axis=1), colors)
        if (distance > tolerance).any():
            raise DataError(_odd_colors(path, odd, counts, distance, packed.size, colors, tolerance, table))
        ids[wrong] = nearest[inverse]
        if notes is not None:
            notes.add(MOVED.format(tolerance), path, int(wrong.sum()))
    return Image.fromarray(ids.astype(np.uint8 if len(colors) <= 256 else np.int32))


def _nearest(pixels: np.ndarray, colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For pixels [N, 3] the nearest of colors [C, 3] and its distance, both [N]."""
    best, distance = np.zeros(len(pixels), np.int64), np.full(len(pixels), np.inf)
    for i, color in enumerate(colors.astype(np.float64)):  # not [N, C, 3]: an unexpected photograph has many colours
        to_color = np.sqrt(((pixels - color) ** 2).sum(1))
        closer = to_color < distance
        best[closer], distance[closer] = i, to_color[closer]
    return best, distance


def _odd_colors(path, odd, counts, distance, total: int, colors: np.ndarray, tolerance: int, table: str) -> str:
    """What is wrong with a map in which pixels have colours of no class, the most frequent first."""
    far = distance > tolerance
    odd, counts, distance = odd[far], counts[far], distance[far]
    order = np.argsort(-counts, kind="stable")[:_SHOWN]
    shown = ", ".join(str((int(c) >> 16, int(c) >> 8 & 255, int(c) & 255)) for c in odd[order])
    more = f", ... ({len(odd)} in all; was it saved with smoothing?)" if len(odd) > _SHOWN else ""
    said = (
        f"the label map {path} has colours that belong to no class, on {100 * counts.sum() / total:.2g} % of its"
        f" pixels: {shown}{more}; "
    )
    if table:
        return f"{said}known are {table}"
    said += "add them to dataset.json"
    needed = int(np.ceil(distance.max()))
    between = min((_nearest(colors[:i], colors[i : i + 1])[1].min() for i in range(1, len(colors))), default=0)
    if len(odd) > _SHOWN or needed <= between / 2:  # the nearest colour is the only one so near, or edges are blended
        said += f', or take the nearest colour for all of them by "tolerance": {needed} there'
    return said
