"""Panoptic maps: an id of a segment in each pixel's colour, whose class a JSON file says.

The format of COCO's panoptic task (Kirillov et al., arXiv 1801.00868): the id is R + 256 G + 65536 B, 0 where there is
no segment, and `segments_info` lists id and category_id of each file's segments.
"""

from functools import lru_cache
from os.path import basename, splitext
from unicodedata import normalize

import numpy as np
from PIL import Image

from .errors import DataError
from .json_text import parse_json
from .listing import read_bytes
from .picture_files import COLORS

VOID = 0  # the id of no segment, in the map, and of no category, among the categories


@lru_cache(maxsize=4)  # each process reads a file once
def read_segments(files: tuple[str, ...]) -> dict[str, dict[int, int]]:
    """Stem of a map's file -> id of a segment -> id of its category. Raises DataError, naming the JSON file."""
    found: dict[str, dict[int, int]] = {}
    for file in files:
        try:
            for entry in parse_json(read_bytes(file))["annotations"]:
                segments = {int(s["id"]): int(s["category_id"]) for s in entry["segments_info"]}
                stem = normalize("NFC", splitext(entry["file_name"])[0])
                if found.setdefault(stem, segments) != segments:
                    raise DataError(f"{file}: the segments of {entry['file_name']} are listed twice, not alike")
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file} (segments_info in dataset.json) is not as expected ({type(error).__name__}: {error}); it holds"
                ' {"annotations": [{"file_name": "a.png", "segments_info": [{"id": 7, "category_id": 1}]}]}'
            ) from error
    return found


def ids_of_segments(image: Image.Image, path: str, files: tuple[str, ...]) -> Image.Image:
    """The categories of a panoptic map's pixels, mode I (int32). Raises DataError for a segment that no file lists."""
    segments = read_segments(files).get(normalize("NFC", splitext(basename(path))[0]))
    if segments is None:
        raise DataError(f"{', '.join(files)} (segments_info in dataset.json) does not list the label map {path}")
    present, place = np.unique(packed_ids(image, path), return_inverse=True)
    unknown = [i for i in present.tolist() if i not in segments and i != VOID]
    if unknown:
        raise DataError(
            f"the label map {path} has segments that {', '.join(files)} does not list:"
            f" {', '.join(map(str, unknown[:5]))}"
        )
    if VOID in present and VOID not in segments and VOID in segments.values():
        raise DataError(
            f"the label map {path} has pixels of no segment, and 0 is a category, too: give the categories ids from 1"
            " on"
        )
    categories = np.array([segments.get(i, VOID) for i in present.tolist()], dtype=np.int32)
    return Image.fromarray(categories[place].reshape(image.height, image.width))


def packed_ids(image: Image.Image, path: str) -> np.ndarray:
    """int32 [H, W]: R + 256 G + 65536 B of a map in colours, the stored number of one with a single channel."""
    if image.mode in COLORS:
        red, green, blue = (np.asarray(band).astype(np.int32) for band in image.split()[:3])
        return red | (green << 8) | (blue << 16)
    if image.mode in ("1", "L", "P") or image.mode.startswith("I"):
        return np.asarray(image).astype(np.int32)
    raise DataError(f"the label map {path} is a picture of mode {image.mode}; segments' ids are stored as RGB")
