"""Which classes resizing loses: components of a class (poles, wires, lesions) of which no pixel is left."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from .listing import Item
from .specs import DataError, DatasetSpec
from .transforms import read_label, sampling_geometry

_EIGHT = np.ones((3, 3), dtype=int)  # pixels that touch at a corner are of one component


@dataclass
class Components:
    """By class: how many components label maps hold, and how many are lost."""

    all: Counter = field(default_factory=Counter)
    lost: Counter = field(default_factory=Counter)

    def add(self, other: "Components") -> None:
        self.all.update(other.all)
        self.lost.update(other.lost)


def lost_components(spec: DatasetSpec, image_size: int, item: Item) -> Components:
    """Of one label map, resized as for sampling at `image_size`; none of a map that cannot be read, or does not shrink.

    A component is a connected area (8 neighbours) of one class; it is lost where no pixel of it remains.
    """
    found = Components()
    try:
        label, table = read_label(item.label, spec)
    except DataError:
        return found  # it is in the list of problems
    geometry = sampling_geometry(label.size, image_size, spec.crop)
    if geometry.size[0] >= label.width and geometry.size[1] >= label.height:
        return found
    ids = table[np.asarray(label)]
    left, top = (nearest_pixels(small, large) for small, large in zip(geometry.size, label.size, strict=True))
    for class_id, place in enumerate(ndimage.find_objects(ids + 1)):
        if place is None:
            continue
        parts, count = ndimage.label(ids[place] == class_id, structure=_EIGHT)
        rows, columns = (
            kept[(kept >= part.start) & (kept < part.stop)] - part.start
            for kept, part in zip((top, left), place, strict=True)
        )
        remaining = np.unique(parts[np.ix_(rows, columns)])
        found.all[class_id] += count
        found.lost[class_id] += count - int((remaining > 0).sum())
    return found


def nearest_pixels(small: int, large: int) -> np.ndarray:
    """Which of `large` pixels of a side are taken for `small` ones, int [small]: those under their centres."""
    return np.floor((np.arange(small) + 0.5) * large / small).astype(int).clip(max=large - 1)


def thin_classes(components: Components, share: float = 0.5) -> list[tuple[int, int, int]]:
    """(class, lost components, all components) of the classes that lose more than this share."""
    return [(c, components.lost[c], n) for c, n in sorted(components.all.items()) if components.lost[c] > share * n]
