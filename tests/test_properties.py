"""Whatever stands in a file or behind a flag: success, or one clear sentence; never a traceback, never a changed file.

The odd values come from the declarations (`tests/fuzzing.py`), so that a new setting or key is under test at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("hypothesis", reason="property tests need hypothesis")

import torch
from data_helpers import REPOSITORY, load_script, write_custom
from fuzzing import all_bytes, broken, cases, flags, in_one_sentence
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion.data import dataset_json, specs
from guided_diffusion.data.listing import read_cache_settings
from guided_diffusion.data.specs import DataError, get_spec
from guided_diffusion.image_datasets import open_dataset
from guided_diffusion.script_util import (
    build_config,
    create_gaussian_diffusion,
    create_model,
    parse_flags,
)
from guided_diffusion.settings import (
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
)

sys.path.insert(0, str(REPOSITORY / "scripts" / "data"))
from preparation import PreparationError, open_output

# -- files -----------------------------------------------------------------------------------------------------------


class JsonFile(NamedTuple):
    """A file under test: its name, valid contents of it, what reads it in a folder, and the errors it may raise."""

    name: str
    examples: list[dict[str, Any]]
    read: Callable[[Path], Any]
    errors: tuple[type[BaseException], ...]
    cases: int
    words: tuple[str, ...] = ()  # that its format knows


DATASET_JSON = [
    {"classes": ["road", "car", {"name": "sky", "color": [1, 2, 3]}, "tree"], "ignore_id": 255, "instances": False},
    {"classes": ["road", "car", "sky"], "remap": {"3": 0, "7": 1}, "crop": "keep_aspect", "grey": True},
    {"classes": [{"name": n, "color": [10 * i, 0, 0]} for i, n in enumerate("abcd")], "label_encoding": "colors"},
    {"label_scale": True, "exif": "apply", "icc": "ignore", "max_pixels": 1000},
    {"image_suffix": "", "label_suffix": "0", "instance_suffix": "_inst"},
    {"classes": [{"name": n, "color": [90 * i, 9, 0]} for i, n in enumerate("ab")], "label_encoding": "colors"}
    | {"tolerance": 90},
    {"classes": ["a", "b"], "label_encoding": "panoptic", "segments_info": ["panoptic.json"], "remap": {"7": 1}},
]


WORDS = tuple(word for kind in dataset_json.JSON_KEYS.values() if isinstance(kind, tuple) for word in kind)


def read_data(folder: Path) -> None:
    """All that the loader makes of a data set, for a network of its own number of classes and of others."""
    for num_classes in (None, 3, 40):
        for split in ("train", "val"):
            options = {"dataset_mode": "custom", "split": split, "image_size": 4, "num_classes": num_classes}
            data = open_dataset(data_dir=folder, **options)
            for i in range(len(data)):
                label = data[i]["label"]
                assert int(label.min()) >= 0 and int(label.max()) < data.num_classes
            assert len(data.spec.class_names) == len(data.spec.palette) == data.num_classes
            "".join(data.spec.class_names).encode()  # text that can be saved


def read_sources(folder: Path) -> None:
    script = load_script("scripts/data/cache_dataset.py")
    for name in script.read_claims(str(folder)):
        assert (folder / name).resolve().is_relative_to(folder.resolve())
    json.dumps([script.record_line(*key, record) for key, record in script.read_records(str(folder)).items()])


CACHE = {"dataset_mode": "custom", "image_size": 4, "scale_jitter": 0.0, "complete": True, "spec": {"num_classes": 4}}
SOURCES = {"lines": ["train", "a.png", [[1, 2], [3, 4], None], ["train/images/a.png"], [[5, 6]]]}
CLAIM = {"lines": ["files", ["train/images/a.png", "b.png"]]}
OUTSIDE = {"lines": ["files", ["../x.png", "b.png"]]}
PREPARED = {"program": "x.py", "files": {"train/images": ["scene0.png"]}, "dataset_json": []}
JSON_FILES = [
    JsonFile("dataset.json", DATASET_JSON, read_data, (DataError,), 500, WORDS),
    JsonFile("cache.json", [CACHE], read_cache_settings, (DataError,), 80),
    JsonFile("cache_sources.jsonl", [SOURCES, CLAIM, OUTSIDE], read_sources, (), 200),
    JsonFile(
        "prepared.json",
        [PREPARED],
        lambda folder: open_output(folder / "out", "x.py", {"train/images": {"scene0.png"}}),
        (PreparationError,),
        60,
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_custom(tmp_path_factory.mktemp("fuzzed"), {"train": 2, "val": 1}, size=(8, 8))


@pytest.mark.parametrize("file", JSON_FILES, ids=[file.name for file in JSON_FILES])
def test_a_file_of_data_is_read_or_refused_in_one_sentence(data, tmp_path_factory, file):
    folder = data
    if file.name != "dataset.json":
        folder = tmp_path_factory.mktemp("folder")
    place = folder / "out" if file.name == "prepared.json" else folder
    place.mkdir(exist_ok=True)

    @cases(file.cases)
    @given(st.sampled_from(file.examples).flatmap(lambda example: broken(example, file.words)))
    def read(content: bytes) -> None:
        if file.name.endswith(".jsonl"):  # a line of it
            content = re.sub(rb'^\{\s*"lines": |\s*\}$', b"", content.replace(b"\n", b""))
        (place / file.name).write_bytes(content)
        before = all_bytes(folder)
        in_one_sentence(lambda: file.read(folder), file.errors)
        if file.name != "prepared.json":  # that one is ours to write
            assert all_bytes(folder) == before

    read()
    (place / file.name).unlink()


def test_every_key_of_dataset_json_is_fuzzed():
    assert {key for example in DATASET_JSON for key in example} == set(dataset_json.JSON_KEYS)


def test_verify_data_says_what_is_wrong_with_any_dataset_json(data, tmp_path):
    main = load_script("scripts/data/verify_data.py").main
    options = ["--data_dir", str(data), "--dataset_mode", "custom", "--workers", "1", "--report_dir", str(tmp_path)]

    @cases(40)
    @given(st.sampled_from(DATASET_JSON).flatmap(lambda example: broken(example, WORDS)))
    def verify(content: bytes) -> None:
        (data / "dataset.json").write_bytes(content)
        before = all_bytes(data)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(options)
        assert code in (0, 1) and bool(code) == bool((tmp_path / "problems.txt").read_text(encoding="utf-8"))
        (out.getvalue() + errors.getvalue()).encode()
        assert all_bytes(data) == before

    verify()
    (data / "dataset.json").unlink()


# -- flags -----------------------------------------------------------------------------------------------------------


def build_network(config: ModelConfig) -> None:
    """Without memory for its weights."""
    with torch.device("meta"):
        create_model(config, learn_sigma=True)


def build_diffusion(config: DiffusionConfig) -> None:
    create_gaussian_diffusion(config)


FLAGS = {
    ModelConfig: (build_network, 150),
    DiffusionConfig: (build_diffusion, 80),
    DataConfig: (DataConfig.check, 60),
    TrainConfig: (TrainConfig.check, 200),
    SampleConfig: (SampleConfig.check, 120),
}


@pytest.mark.parametrize("cls", FLAGS, ids=[cls.__name__ for cls in FLAGS])
def test_flags_are_taken_or_refused_in_one_sentence(cls):
    check, count = FLAGS[cls]
    needed = ["--model_path=x.pt"] if cls is SampleConfig else []

    @cases(count)
    @given(flags(cls))
    def parse(argv: list[str]) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                given_flags = parse_flags([cls], [*needed, *argv])
            except SystemExit as end:  # argparse's own sentence, after the usage
                assert end.code == 2 and errors.getvalue().splitlines()[-1].split(": error: ")[1]
                return

        def take() -> Any:
            config = build_config(cls, given_flags)
            check(config)
            return config

        config = in_one_sentence(take, (ConfigError,))
        if config is not None:  # what is taken can be recorded, and is read back as it is
            text = json.dumps(dataclasses.asdict(config), allow_nan=False)
            assert build_config(cls, json.loads(text)) == config

    parse()


def test_a_spec_follows_from_any_number_of_classes():
    @cases(40)
    @given(st.integers(-3, 400) | st.sampled_from([32768, 2**63]), st.sampled_from(specs.DATASET_MODES))
    def make(count: int, mode: str) -> None:
        spec = in_one_sentence(lambda: get_spec(mode, None, count), (DataError,))
        assert spec is None or (spec.num_classes == count and spec.lookup_table(65536).max() < count)

    make()
