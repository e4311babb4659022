"""A checkpoint's weights for data with other classes.

Of all weights, only SPADE's first convolutions (arXiv 1903.07291, figure 3) depend on the class list: they read one
channel per class, then the instance edge. All others are taken as they are, save that the half of the output that
predicts the variance comes or goes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..settings import ConfigError, TrainConfig
from . import store
from .checkpoint_classes import known_classes
from .class_map import MEAN, NONE, Row, match_classes, read_class_map, without_meaning
from .from_shapes import read_shapes
from .reading import Note

JSON_NAME, TEXT_NAME = "transfer.json", "transfer.txt"  # in the log directory
LAYOUT_WEIGHT = ".mlp_shared.0.weight"  # the end of the names of weights [128, layout channels, 3, 3]
OUTPUT = ("out.2.weight", "out.2.bias")  # [3 or 6, ...]
_IMAGE_CHANNELS = 3
_SHOWN = 12


def adapt(
    state: Mapping[str, torch.Tensor],
    rows: Sequence[Row],
    *,
    old_edge: bool,
    new_edge: bool,
    learn_sigma: bool,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """An SDM network's state dict for other classes, and with or without a learned variance.

    Exact where it can be: renumbered classes give the outputs that they gave; a new edge channel, or a new half of the
    output, starts at zero.

    :param state: of a network with C classes, whose first SPADE convolutions are [128, C (+ 1 if `old_edge`), 3, 3].
    :param rows: for each new class, the old classes whose weights' mean it takes; none: it starts with new weights.
    :param seed: of new weights.
    """
    adapted = dict(state)
    for name, weight in state.items():
        if name.endswith(LAYOUT_WEIGHT):
            adapted[name] = _layout_weight(weight, rows, old_edge, new_edge, seed + zlib.crc32(name.encode()))
    for name in OUTPUT:
        means = state[name][:_IMAGE_CHANNELS]
        adapted[name] = state[name]
        if learn_sigma and len(state[name]) == _IMAGE_CHANNELS:
            adapted[name] = torch.cat([means, torch.zeros_like(means)])
        elif not learn_sigma:
            adapted[name] = means.clone()
    return adapted


def _layout_weight(
    weight: torch.Tensor, rows: Sequence[Row], old_edge: bool, new_edge: bool, seed: int
) -> torch.Tensor:
    """[128, old layout channels, 3, 3] -> [128, new ones, 3, 3], float32."""
    weight = weight.float()  # the mean of weights in 16 bits is none of them
    generator = torch.Generator().manual_seed(seed % 2**64)
    bound = ((len(rows) + new_edge) * weight[0, 0].numel()) ** -0.5  # as PyTorch begins a convolution
    channels = []
    for row in rows:
        if len(row.sources) == 1:
            channels.append(weight[:, row.sources[0]])
        elif row.sources:
            channels.append(weight[:, list(row.sources)].mean(dim=1))
        else:
            channels.append(torch.empty_like(weight[:, 0]).uniform_(-bound, bound, generator=generator))
    if new_edge:
        channels.append(weight[:, -1] if old_edge else torch.zeros_like(weight[:, 0]))
    return torch.stack(channels, dim=1)


# -- a transfer of a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a run asks for: a checkpoint, a class map (empty: none), and for which network.

    :param classes: of the new data, one for each of the network's. :param edge: the network reads the instance edge.
    """

    checkpoint: str
    class_map: str
    classes: tuple[str, ...]
    edge: bool
    learn_sigma: bool
    seed: int
    weights_key: str = ""  # which weights, where the file holds several

    @staticmethod
    def of(config: TrainConfig, classes: Sequence[str], layout_channels: int, out_channels: int) -> Request | None:
        """None: the settings ask for no transfer. `layout_channels`, `out_channels`: of the network."""
        if not config.transfer_from:
            return None
        edge, learn_sigma = layout_channels > len(classes), out_channels > _IMAGE_CHANNELS
        return Request(
            config.transfer_from, config.class_map, tuple(classes), edge, learn_sigma, config.seed, config.weights_key
        )

    def read(self) -> Transfer:
        """Reads the checkpoint and the map.

        :raises CheckpointError: it is damaged, is no SDM network, or does not fit its own config. :raises ConfigError:
            the map is wrong, or names are needed that are not known.
        """
        state = _read(self.checkpoint, self.weights_key)
        channels = read_shapes(state, self.checkpoint).layout_channels
        old_classes, old_edge = known_classes(self.checkpoint, channels)
        class_map = read_class_map(self.class_map) if self.class_map else None
        if class_map is None and without_meaning(old_classes):
            raise ConfigError(
                f"what the {len(old_classes)} classes of {self.checkpoint} are called is not recorded: put a "
                'dataset.json with their names beside it, {"classes": ["sky", "road", ...]}, or give a --class_map '
                'that names them by id, {"road": "7"}'
            )
        return Transfer(
            request=self,
            sha256=store.file_hash(self.checkpoint),
            class_map_sha256=store.file_hash(self.class_map) if self.class_map else "",
            old_classes=old_classes,
            rows=tuple(match_classes(old_classes, self.classes, class_map, self.class_map)),
            old_edge=old_edge,
            old_learn_sigma=len(state[OUTPUT[0]]) > _IMAGE_CHANNELS,
        )


@dataclass(frozen=True)
class Transfer:
    """What becomes of a checkpoint's weights: who takes what."""

    request: Request
    sha256: str
    class_map_sha256: str
    old_classes: tuple[str, ...]
    rows: tuple[Row, ...]
    old_edge: bool
    old_learn_sigma: bool

    def weights(self, note: Note | None = None) -> dict[str, torch.Tensor]:
        """The new network's state dict. :raises CheckpointError: the file has been damaged since."""
        asked = self.request
        return adapt(
            _read(asked.checkpoint, asked.weights_key, note), self.rows, old_edge=self.old_edge, new_edge=asked.edge,
            learn_sigma=asked.learn_sigma, seed=asked.seed,
        )  # fmt: skip

    def base(self) -> dict[str, str]:
        """What config.json says the run began from."""
        return {
            "transfer_from": self.request.checkpoint,
            "sha256": self.sha256,
            "class_map": self.request.class_map,
            "class_map_sha256": self.class_map_sha256,
        }

    def table(self) -> list[str]:
        """Lines for a reader: each new class, and what it starts from."""
        cells = [("class", "starts from", "because of")]
        cells += [(f"{i} {row.name}", self._sources(row), row.how) for i, row in enumerate(self.rows)]
        cells += [("instance edge", self.edge(), ""), ("learned variance", self.variance(), "")]
        widths = [max(len(line[column]) for line in cells) for column in range(3)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        if means := sum(row.how == MEAN for row in self.rows):
            lines.append(
                f"without a namesake: {means} of {len(self.rows)} classes; --class_map can say what they resemble"
            )
        unused = [f"{i} {self.old_classes[i]}" for i in self.unused()]
        if unused:
            more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
            lines.append(f"classes of the checkpoint that none is like: {', '.join(unused[:_SHOWN])}{more}")
        return lines

    def _sources(self, row: Row) -> str:
        if row.how == NONE:
            return "new weights"
        if row.how == MEAN:
            return f"the mean of all {len(self.old_classes)}"
        names = [f"{i} {self.old_classes[i]}" for i in row.sources]
        return names[0] if len(names) == 1 else f"the mean of {', '.join(names)}"

    def unused(self) -> list[int]:
        """The checkpoint's classes that no new class takes, but in the mean of all."""
        used = {i for row in self.rows if row.how != MEAN for i in row.sources}
        return [i for i in range(len(self.old_classes)) if i not in used]

    def edge(self) -> str:
        return _change(self.old_edge, self.request.edge)

    def variance(self) -> str:
        return _change(self.old_learn_sigma, self.request.learn_sigma)

    def write(self, folder: str) -> None:
        """Writes transfer.json and transfer.txt into the log directory. :raises CheckpointError: it cannot."""
        classes = [
            {"id": i, "name": row.name, "from": list(row.sources), "names": [self.old_classes[s] for s in row.sources],
             "how": row.how}
            for i, row in enumerate(self.rows)
        ]  # fmt: skip
        content = {
            **self.base(),
            "old_classes": list(self.old_classes),
            "classes": classes,
            "unused": self.unused(),
            "instance_edge": self.edge(),
            "learned_variance": self.variance(),
        }
        store.write_json(os.path.join(folder, JSON_NAME), content)
        with store.atomic_write(os.path.join(folder, TEXT_NAME)) as file:
            head = f"what starts from {self.request.checkpoint}"
            file.write("\n".join([head, *self.table(), ""]).encode())


def _change(before: bool, now: bool) -> str:
    return {(True, True): "comes along", (True, False): "is dropped", (False, True): "starts at zero"}.get(
        (before, now), "neither had nor needed"
    )


def _read(checkpoint: str, key: str, note: Note | None = None) -> dict[str, torch.Tensor]:
    """:raises CheckpointError: it cannot be read, or is no SDM network."""
    state = store.load_weights(checkpoint, key, note)
    read_shapes(state, checkpoint)
    shapes = {tuple(weight.shape) for name, weight in state.items() if name.endswith(LAYOUT_WEIGHT)}
    if len(shapes) > 1 or any(len(shape) != 4 for shape in shapes) or any(state[name].ndim == 0 for name in OUTPUT):
        raise store.CheckpointError(
            f"{checkpoint} holds no SDM network: its first SPADE convolutions, which read one layout, have the shapes "
            f"{', '.join(map(str, sorted(map(list, shapes))))}; give an SDM checkpoint (--transfer_from)"
        )
    return state
