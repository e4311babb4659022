"""The same photograph twice, also saved again as JPEG or at another size: fingerprints, and the pairs that match."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

_SIDE, _KEPT = 32, 8  # of the grey picture that is transformed, and of its lowest frequencies
_FREQUENCIES = np.cos(np.pi / _SIDE * np.arange(_KEPT)[:, None] * (np.arange(_SIDE) + 0.5))  # [8, 32]: DCT-II
_GREY = np.array([0.299, 0.587, 0.114])
_BITS = 8  # of 64 that may differ
_LEVELS = 3.0  # mean difference of colours that may be, of 0 to 255
_BLANK = 2.0  # standard deviation of colours below which a picture has no content to tell it from others by
_BLOCK = 2048  # fingerprints that are compared with all others at once


@dataclass(frozen=True)
class Fingerprint:
    """bits: of the lowest frequencies of the grey picture, bool [64]; colors: of 8 x 8 parts, uint8 [192]; pixels: a
    checksum of all, with the size."""

    bits: np.ndarray
    colors: np.ndarray
    pixels: tuple[int, int, int]


def fingerprint(image: Image.Image) -> Fingerprint:
    """Of a photograph in RGB. Bits after the perceptual hash by DCT (Zauner, 2010): which of the 8 x 8 lowest
    frequencies of the picture at 32 x 32 lie above their median."""
    small = image.reduce((max(image.width // (4 * _SIDE), 1), max(image.height // (4 * _SIDE), 1)))
    small = small.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    spectrum = _FREQUENCIES @ (np.asarray(small) @ _GREY) @ _FREQUENCIES.T
    colors = np.asarray(small.resize((_KEPT, _KEPT), Image.Resampling.BOX)).ravel()
    checksum = zlib.crc32(image.tobytes())
    return Fingerprint((spectrum > np.median(spectrum)).ravel(), colors, (checksum, *image.size))


def find_duplicates(prints: Sequence[Fingerprint], most: int = 10_000) -> list[tuple[int, int, bool]]:
    """Pairs (i, j, the pixels are equal) with i < j of pictures that look the same, `most` of them at most.

    Near duplicates differ in 8 of 64 bits and by 3 levels of colour on average, at most. Of pictures without content
    only equal ones are found.
    """
    if not prints:
        return []
    signs = np.stack([p.bits for p in prints]).astype(np.float32) * 2 - 1  # [N, 64]: products count equal bits
    colors = np.stack([p.colors for p in prints]).astype(np.int16)  # [N, 192]
    blank = colors.std(axis=1) < _BLANK
    found = []
    for first in range(0, len(prints), _BLOCK):
        block = signs[first : first + _BLOCK]
        rows, columns = np.nonzero(block @ signs[first:].T >= 64 - 2 * _BITS)
        rows, columns = rows[rows < columns] + first, columns[rows < columns] + first
        for part in range(0, len(rows), 100_000):
            i, j = rows[part : part + 100_000], columns[part : part + 100_000]
            near = np.abs(colors[i] - colors[j]).mean(axis=1) <= _LEVELS
            for a, b in zip(i[near].tolist(), j[near].tolist(), strict=True):
                equal = prints[a].pixels == prints[b].pixels
                if equal or not (blank[a] or blank[b]):
                    found.append((a, b, equal))
                    if len(found) == most:
                        return found
    return found
