"""The page of a model that is handed on: what hubs read (YAML), what people read, and an example."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import Image

from ..data.class_lists import CLASSES_KEY
from ..data.json_text import parse_json
from ..data.listing import printable
from ..data.pictures import colorize, contact_sheet
from ..data.specs import DATASET_MODES, distinct_colors, get_spec
from .hub import LIBRARY
from .store import CheckpointError

PIPELINE_TAG = "image-to-image"  # the nearest of the tasks that hubs list
TAGS = ("semantic-image-synthesis", "layout-to-image", "diffusion", "sdm", "pytorch")
_MEANING = {
    "FID": "distance from photographs, lower is better",
    "LPIPS": "difference between samples of one layout, higher is more diverse",
    "mIoU": "percent, whether a segmentation network finds the layout, higher is better",
}


@dataclass(frozen=True)
class Example:
    """A picture of the pipeline, and what it was made from: `label` and `instance` are ids [H, W]."""

    label: np.ndarray
    instance: np.ndarray | None
    sample: Image.Image
    sampling: str  # how, as arguments in Python


@dataclass(frozen=True)
class About:
    """What only its maker can say of a model. `name`: what `from_pretrained` is given. `license`: as hubs call it, such
    as mit or cc-by-4.0. `datasets`: their ids on a hub. `figures`: see `read_figures`."""

    name: str
    license: str = ""
    datasets: Sequence[str] = ()
    figures: Sequence[Mapping[str, Any]] = ()


def card_files(
    config: Mapping[str, Any], about: About, model: Any, example: Example | None
) -> dict[str, Callable[[IO], Any]]:
    """By name, what writes each file beside weights and config. `config` is the folder's, `model` the network."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = model_card(config, about, parameters, model.total_downsampling, example).encode()
    pictures = {}
    if example:
        pictures["example.png"] = example_page(config, example)
        pictures["example_layout.png"] = _map_picture(example.label)
        if example.instance is not None:  # numbered anew, as only edges count, and any integer may stand there
            pictures["example_instances.png"] = _map_picture(
                np.unique(example.instance, return_inverse=True)[1].reshape(example.instance.shape)
            )
    writers = {name: lambda file, p=picture: p.save(file, format="PNG") for name, picture in pictures.items()}
    return {"README.md": lambda file: file.write(text), **writers}


def _map_picture(ids: np.ndarray) -> Image.Image:
    return Image.fromarray(ids.astype(np.uint8 if ids.max() < 256 else np.uint16))


def example_page(config: Mapping[str, Any], example: Example) -> Image.Image:
    """The layout in its classes' colours, the sample beside it, and below the names of the classes that occur."""
    count = config["model"]["num_classes"]
    if entries := config.get(CLASSES_KEY):
        names, colors = [e["name"] for e in entries], np.array([e["color"] for e in entries], dtype=np.uint8)
    else:
        names, colors = [f"class {i}" for i in range(count)], distinct_colors(count)
    return contact_sheet(
        [[colorize(example.label, colors), example.sample]],
        column_titles=("layout", "sample"),
        legend=[(names[i], colors[i]) for i in np.unique(example.label)],
        cell_height=min(max(example.label.shape[0], 256), 512),
    )


def read_figures(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[dict[str, Any]]:
    """What scorers wrote with `--json`. :raises CheckpointError: a file is none of theirs."""
    figures = []
    for path in map(os.fspath, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        try:
            with open(path, "rb") as file:
                figure = parse_json(file.read())
            score, metric = figure["score"], figure["metric"]
            if not isinstance(metric, str) or type(score) not in (int, float) or not math.isfinite(score):
                raise TypeError(f"metric {metric!r}, score {score!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is no record of a score ({type(error).__name__}: {error}); give files that the scripts in "
                "evaluations/ wrote with --json"
            ) from error
        figures.append(figure)
    return figures


def model_card(
    config: Mapping[str, Any], about: About, parameters: int, step: int, example: Example | None = None
) -> str:
    """The text of README.md. `step`: height and width of a layout must be multiples of it."""
    model = config["model"]
    edges = not model["no_instance"]
    guided = (config.get("training") or {}).get("drop_rate") != 0
    size = model["image_size"]
    parts = [
        _metadata(about.license, about.datasets),
        f"# {_escaped(about.name)}",
        "It turns a semantic layout, one class id per pixel, into a photograph: a diffusion network of SDM ([Semantic "
        "Image Synthesis via Diffusion Models](https://arxiv.org/abs/2207.00050)), trained at "
        f"{size} pixels on {len(config.get(CLASSES_KEY) or ()) or model['num_classes']} classes.",
    ]
    if example:
        parts += [
            "![a layout and the picture that the network makes of it](example.png)",
            f"*A layout and a sample of it (`{example.sampling}`).*",
        ]
    call = ["layout.png"] + ["instance_map=instances.png"] * edges
    call = ", ".join(re.sub(r"(\w+\.png)", r'"\1"', word) for word in call) + ("" if guided else ", s=1.0")
    parts += [
        "## Use",
        f"```python\nfrom guided_diffusion.pipeline import SDMPipeline\n\npipeline = SDMPipeline.from_pretrained("
        f'{json.dumps(about.name, ensure_ascii=False)})\npipeline({call})[0].save("sample.png")\n```',
        f"The package is `{LIBRARY}` (`pip install .` in a clone of it; `.[hub]` for models on a hub).",
        _inputs(size, step, edges, guided, example),
        "## Classes",
        *_classes(config),
        "## Network",
        _table(("", ""), _network(config, parameters)),
    ]
    if about.figures:
        parts += ["## Figures", _table(("metric", "score", "of", "how"), map(_figure, about.figures))]
        parts += _warnings(about.figures)
    parts += [
        "## Limits",
        "A sample is made up: it shows what photographs of the training data look like, with their bias, and is no "
        "evidence of a place, a person or a finding. Layouts unlike those of the training give worse pictures.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(license: str, datasets: Sequence[str]) -> str:
    """The YAML that hubs read; a string of JSON is one of YAML."""
    lines = [f"library_name: {LIBRARY}", f"pipeline_tag: {PIPELINE_TAG}"]
    lines += [f"license: {json.dumps(license)}"] if license else []
    datasets = [datasets] if isinstance(datasets, str) else datasets
    lines += ["datasets:", *(f"- {json.dumps(dataset)}" for dataset in datasets)] if datasets else []
    lines += ["tags:", *(f"- {tag}" for tag in TAGS)]
    return "\n".join(["---", *lines, "---"])


def _inputs(size: int, step: int, edges: bool, guided: bool, example: Example | None) -> str:
    text = (
        "`layout.png` has one channel, with the id of a class (below) at each pixel; its height and width are "
        f"multiples of {step}, and pictures are best near the size of the training ({size})."
    )
    if example:
        text += " `example_layout.png` is such a file."
    if edges:
        text += " `instances.png` has a number for each object: its edges are drawn."
        text += " `example_instances.png` is one." * (example is not None)
    if not guided:
        text += " The network was trained without dropped layouts, so guidance is off (`s=1.0`)."
    return text


def _classes(config: Mapping[str, Any]) -> list[str]:
    entries = config.get(CLASSES_KEY)
    if not entries:
        return [f"{config['model']['num_classes']} ids; what they mean is not recorded."]
    stored = _stored_ids(config, len(entries))
    rows = []
    for i, entry in enumerate(entries):
        color = "#{:02x}{:02x}{:02x}".format(*entry["color"])
        rows.append((str(i), _escaped(entry["name"]), f"`{color}`", *([stored[i]] if stored else [])))
    table = _table(("id", "class", "colour", *(["in the data set's files"] if stored else [])), rows)
    if not stored:
        return [table]
    note = "The ids of the first column are those of `layout.png`. `image_sample.py` reads the data set's own files."
    return [table, note]


def _stored_ids(config: Mapping[str, Any], count: int) -> list[str]:
    """For each class, the ids (or the colour) that files of the data set have for it; [] where they are the same."""
    mode = (config.get("data") or {}).get("dataset_mode")
    if mode not in DATASET_MODES:
        return []
    spec = get_spec(mode, None, count, config.get("dataset_json", {}) if mode == "custom" else None)
    if spec.label_colors is not None:
        return ["the colour"] * count
    if not spec.remap:
        return []
    table = spec.lookup_table(max(count, *spec.remap) + 1)
    found = [np.flatnonzero(table == i).tolist() for i in range(count)]
    return [", ".join(map(str, ids[:6])) + ", ..." * (len(ids) > 6) if ids else "none" for ids in found]


def _network(config: Mapping[str, Any], parameters: int) -> list[tuple[str, str]]:
    model, diffusion = config["model"], config["diffusion"]
    predicts = "the image" if diffusion["predict_xstart"] else "the velocity" if diffusion["predict_v"] else "the noise"
    predicts += " and its variance" * diffusion["learn_sigma"]
    edges = "" if model["no_instance"] else ", and the edges of instances"
    pictures = "grey" if (config.get("dataset_json") or {}).get("grey") else "colour"
    drop_rate = (config.get("training") or {}).get("drop_rate")
    rows = [
        ("parameters", f"{parameters / 1e6:.1f} million, float32"),
        ("layout", f"{model['num_classes']} classes{edges}"),
        ("pictures", f"{pictures}, trained at {model['image_size']} pixels"),
        ("predicts", predicts),
        ("trained steps of noise", f"{diffusion['diffusion_steps']}, {diffusion['noise_schedule']}"),
    ]
    if drop_rate is not None:
        rows.append(("layouts dropped in training", f"{100 * drop_rate:g} %"))
    return rows + ([("precision to use", config["precision"])] if config.get("precision") else [])


def _figure(figure: Mapping[str, Any]) -> tuple[str, ...]:
    metric, how = figure["metric"], []
    preprocessing = figure.get("preprocessing")
    if isinstance(preprocessing, Mapping):
        how += [f"{key}: {value}" for key, value in preprocessing.items()]
    elif preprocessing:
        how.append(str(preprocessing))
    if isinstance(segmenter := figure.get("segmenter"), Mapping) and "source" in segmenter:
        how.append(f"segmenter: {segmenter['source']}")
    if figure.get("comparable") is False:
        how.append("not comparable with published scores")
    how.append(str(figure.get("date", ""))[:10])
    meaning = f" ({_MEANING[metric]})" if metric in _MEANING else ""
    text = _escaped(_without_folders("; ".join(filter(None, how))))
    return f"{_escaped(metric)}{meaning}", f"{figure['score']:.4g}", _counted(figure), text


def _counted(figure: Mapping[str, Any]) -> str:
    """How many images, or layouts, a score is of."""
    if isinstance(figure.get("layouts"), int):
        return f"{figure['layouts']} layouts, {figure.get('samples_per_layout', '?')} samples each"
    sources = figure["sources"] if isinstance(figure.get("sources"), list) else [figure]
    images = [source.get("images") for source in sources if isinstance(source, Mapping)]
    counts = [str(i.get("counted", i.get("count", "?"))) for i in images if isinstance(i, Mapping)]
    return f"{' and '.join(counts)} images" if counts else ""


def _warnings(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"- {_escaped(figure['metric'])}: {_escaped(_without_folders(str(warning)))}"
        for figure in figures
        for warning in (figure["warnings"] if isinstance(figure.get("warnings"), list) else [])
    ]
    return ["Warnings of the scorers:", "\n".join(lines)] if lines else []


def _without_folders(text: str) -> str:
    """Paths on the machine that scored, down to their last part: they are nobody else's business."""
    return re.sub(r"(?<![\w.:/])(?:~|\.{1,2})?/(?:[^\s/;,()]+/)*([^\s/;,()]+)/?", r"\1", text)


def _escaped(text: str) -> str:
    """Text of others as Markdown shows it, letter for letter."""
    return re.sub(r"([\\`*_\[\]|<>#])", r"\\\1", printable(text))


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
