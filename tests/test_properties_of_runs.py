"""Whatever stands in the files that runs leave and read again: success, or one clear sentence; nothing of the user's
is changed, and nothing is lost.

`config.json`, `sampling.json`, `best.json` and the manifests of checkpoints, made odd by `tests/fuzzing.py`. Each is
read as the programs read it; a few cases of each go through a program itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="property tests need hypothesis")

import torch
from data_helpers import write_custom
from fuzzing import all_bytes, broken, cases
from hypothesis import given
from hypothesis import strategies as st
from sampling_helpers import DIFFUSION, MODEL, save_checkpoint
from training_helpers import make_loop

import image_sample
from guided_diffusion.data.class_lists import recorded_classes
from guided_diffusion.data.specs import DataError
from guided_diffusion.dist_util import World, report_errors
from guided_diffusion.image_datasets import open_dataset
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.runs.log_directory import LogDirectory
from guided_diffusion.runs.picture_record import sampling_record
from guided_diffusion.runs.resume import changed_settings, check_base, find_start
from guided_diffusion.runs.sampling_run import SampleRun
from guided_diffusion.runs.splits import open_layouts, open_splits
from guided_diffusion.script_util import build_config, create_gaussian_diffusion, create_model, network_settings
from guided_diffusion.settings import (
    ConfigError,
    DataConfig,
    SampleConfig,
    TrainConfig,
)
from guided_diffusion.weights import store

ERRORS = (ConfigError, DataError, FileNotFoundError, store.CheckpointError)  # what the programs tell in one sentence


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set, a checkpoint for it, and a results folder with all its pictures."""
    root = tmp_path_factory.mktemp("runs")
    write_custom(root / "data", {"train": 2, "val": 2}, size=(20, 20))
    save_checkpoint(root / "run", root / "data")
    assert sample(root / "run", root / "results") == 0
    (root / "results" / "samples" / "mine.txt").write_text("mine")
    shutil.copytree(root / "results", root / "whole")
    return root


def sample(run: Path, results: Path) -> int | str:
    """What image_sample.py ends with; its output must be text that a terminal takes."""
    flags = ["--sampler", "ddpm", "--num_steps", "1", "--s", "1", "--results_path", str(results), "--num_workers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["image_sample.py", "--model_path", str(run / "ema_0.9_best.pt"), *flags])
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
        patch.setattr(sys, "stderr", io.StringIO())
        try:
            return image_sample.main()
        except SystemExit as end:
            return end.code


def ends_in_one_sentence(code: int | str) -> None:
    assert code == 0 or (isinstance(code, str) and code.startswith("error: ") and "\n" not in code), code


def as_a_program(call: Callable[[], Any]) -> None:
    """Calls it as the programs do, which end with a sentence where the user is at fault."""
    try:
        with report_errors(World(), ERRORS):
            call()
    except SystemExit as end:
        ends_in_one_sentence(end.code)


def fuzzed(count: int, *examples: dict[str, Any], words: tuple[str, ...] = ()) -> Any:
    """Decorates a property of the bytes of a file, which are like one of the examples."""

    def decorate(check: Any) -> Any:
        given_bytes = st.sampled_from(examples).flatmap(lambda example: broken(example, words))
        return cases(count)(given(given_bytes)(check))

    return decorate


# -- config.json -----------------------------------------------------------------------------------------------------


def config_examples(root: Path) -> Iterator[dict[str, Any]]:
    """As a training writes it, with the classes of one's own data; and of a published data set."""
    parts = {"model": MODEL, "diffusion": DIFFUSION, "training": TrainConfig()}
    parts = {name: dataclasses.asdict(part) for name, part in parts.items()}
    data = dataclasses.asdict(DataConfig(data_dir=str(root / "data"), dataset_mode="custom"))
    described = {"classes": ["sky", {"name": "road", "color": [1, 2, 3]}, "tree", "car"], "grey": True}
    classes = [{"name": name, "color": [0, 0, i]} for i, name in enumerate("abcd")]
    start = {"checkpoint": "x/model.pt", "sha256": "00"}
    yield {**parts, "data": data, "dataset_json": described, "classes": classes, "start": start, "torch": "2"}
    yield {**parts, "data": data | {"dataset_mode": "ade20k"}}


def as_the_programs_read_it(run: Path) -> None:
    """What starts of sampling, resuming and fine-tuning do with a config before there is a network."""
    model_path = str(run / "model.pt")
    recorded = store.read_config(model_path)
    data = build_config(DataConfig, {}, recorded and recorded.get("data"), "config.json")
    data.check()
    network_settings({}, recorded, "config.json")
    model, diffusion, precision = network_settings({}, recorded, "config.json", training=True)
    recorded_classes(recorded, model.num_classes, "config.json")
    with torch.device("meta"):
        create_model(model, diffusion.learn_sigma)
    create_gaussian_diffusion(diffusion)
    config, training = SampleConfig(model_path=model_path), TrainConfig(precision=precision)
    training.check()
    parts = {"data": data, "training": training, "model": model, "diffusion": diffusion}
    record = {name: dataclasses.asdict(part) for name, part in parts.items()}
    "".join(changed_settings(recorded or {}, record))
    check_base((recorded or {}).get("start", {}), dataclasses.replace(training, resume_checkpoint="x/model.pt"))
    for action in (
        lambda: open_layouts(config, data, model, recorded or {}, alone=False, log=lambda _: None),
        lambda: open_splits(data, training, model, recorded),
    ):
        as_a_program(action)


def test_config_json(root):
    run, words = root / "run", ("custom", "ade20k", "cityscapes", "linear", "cosine", "min_snr", "fp16", "bf16", "1,2")

    @fuzzed(300, *config_examples(root), words=words)
    def read(content: bytes) -> None:
        (run / "config.json").write_bytes(content)
        before = all_bytes(root / "data")
        as_a_program(lambda: as_the_programs_read_it(run))
        assert all_bytes(root / "data") == before and sorted(os.listdir(run)) == ["config.json", "ema_0.9_best.pt"]

    @fuzzed(20, *config_examples(root), words=words)
    def run_program(content: bytes) -> None:
        (run / "config.json").write_bytes(content)
        before = all_bytes(root / "data"), all_bytes(run)
        shutil.rmtree(root / "new", ignore_errors=True)
        ends_in_one_sentence(sample(run, root / "new"))
        assert (all_bytes(root / "data"), all_bytes(run)) == before  # the checkpoint, too

    whole = (run / "config.json").read_bytes()
    try:
        read()
        run_program()
    finally:
        (run / "config.json").write_bytes(whole)


# -- sampling.json ---------------------------------------------------------------------------------------------------


def test_sampling_json(root):
    config = SampleConfig(
        model_path=str(root / "run" / "ema_0.9_best.pt"), results_path=str(root / "results"), sampler="ddpm",
        num_steps=1, s=1.0,
    )  # fmt: skip
    pipeline = SDMPipeline.from_checkpoint(config.model_path, device="cpu")
    data = DataConfig(data_dir=str(root / "data"), dataset_mode="custom", num_workers=0)
    dataset = open_dataset(
        data_dir=data.data_dir, dataset_mode="custom", split="val", image_size=16, num_classes=4, use_instances=False,
        training=False,
    )  # fmt: skip
    record = sampling_record(config, config.sampling(), pipeline, dataclasses.asdict(data), dataset.spec)
    example = json.loads((root / "whole" / "sampling.json").read_text())
    assert example["images"] == record["images"]
    # What is no longer in the data, and what older versions have not.
    others = example | {"pictures": example["pictures"] | {"gone": {"label": "00"}}}
    older = {name: part for name, part in example.items() if name != "pictures"}
    told: list[str] = []

    def anew(content: bytes) -> dict[str, bytes]:
        shutil.rmtree(root / "results")
        shutil.copytree(root / "whole", root / "results")
        (root / "results" / "sampling.json").write_bytes(content)
        return files()

    def files() -> dict[str, bytes]:
        return {name: content for name, content in all_bytes(root).items() if not name.endswith(".pt")}

    def checked_after(before: dict[str, bytes]) -> None:
        after = files()
        ours = ("results/sampling.json", "results/overview.png", "results/.lock")
        kept = {hashlib.sha256(content).digest() for content in after.values()}
        for name, content in before.items():
            made_anew = name.startswith(("results/samples/scene", "results/labels/scene", "results/images/scene"))
            assert name in ours or made_anew or after[name] == content, name
            assert name in ours or "samples/" not in name or name in after or hashlib.sha256(content).digest() in kept

    @fuzzed(150, example, others, older)
    def prepare(content: bytes) -> None:
        before = anew(content)
        run = SampleRun(
            pipeline=pipeline, dataset=dataset, config=config, sampling=config.sampling(),
            record=json.loads(json.dumps(record)), inputs=[data.data_dir], num_workers=0, world=World(),
            log=told.append,
        )  # fmt: skip
        told.clear()
        as_a_program(run.missing)
        assert files() == before
        as_a_program(run._prepare)
        assert not any("\n" in line for line in told)
        "".join(told).encode()
        after = files()
        assert all(after[name] == content for name, content in before.items() if not name.startswith("results/"))
        assert after["results/samples/mine.txt"] == b"mine"

    @fuzzed(20, example, others, older)
    def run_program(content: bytes) -> None:
        before = anew(content)
        ends_in_one_sentence(sample(root / "run", root / "results"))
        checked_after(before)

    prepare()
    run_program()


def test_a_results_folder_whose_name_is_no_text(root):
    folder = root / os.fsdecode(b"results\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes names of text alone")
    assert sample(root / "run", folder) == 0 and (folder / "samples" / "scene0.png").exists()
    shutil.rmtree(folder)


# -- best.json and manifests ------------------------------------------------------------------------------------------

RATES = ("0.9",)
STEPS = (2, 4)


def contents_of(step: int) -> dict[str, bytes]:
    names = (store.model_name(step), store.ema_name("0.9", step), store.optimizer_name(step))
    return {name: name.encode() for name in names}


def manifest_of(step: int) -> dict[str, Any]:
    files = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents_of(step).items()
    }
    best = {"0.9": {"step": 2, "loss": 0.25, "measure": "m"}}
    return {
        "step": step, "files": files, "samples_seen": 4 * step, "world_size": 1, "validation_loss": {"0.9": 1 / step},
        "measure": "m", "good": True, "best": best, "diverged": False, "emergency": "an error",
    }  # fmt: skip


def write_run(folder: Path) -> Path:
    """A log directory of two sets that were saved, and files of somebody's own."""
    folder.mkdir(parents=True)
    for step in STEPS:
        for name, content in contents_of(step).items():
            (folder / name).write_bytes(content)
        (folder / store.manifest_name(step)).write_text(json.dumps(manifest_of(step)))
    (folder / "model.pt").write_bytes(contents_of(4)[store.model_name(4)])
    (folder / "ema_0.9_best.pt").write_bytes(contents_of(4)[store.ema_name("0.9", 4)])
    (folder / "best.json").write_text(json.dumps({"0.9": {"step": 4, "loss": 0.25, "measure": "m"}}))
    for name in ("mine.txt", "model000002.pt.copy", "best.json.mine"):
        (folder / name).write_text(f"mine: {name}")
    return folder


def find_and_go_on(run: Path, log: Any) -> None:
    """What a start does, and the next save, but for the network."""
    ranks = dict(world_size=1, global_batch=4, log=log)
    other = LogDirectory(str(run.parent / "fine-tuning"))
    as_a_program(lambda: find_start(other, str(run / store.model_name(4)), RATES, **ranks))
    assert not list(run.parent.glob("fine-tuning/*[!k]"))  # but a lock
    directory = LogDirectory(str(run), keep=1)
    as_a_program(lambda: find_start(LogDirectory(str(run), reads_only=True), "", RATES, **ranks))
    start = find_start(directory, "", RATES, **ranks)
    directory.open()
    if start.continues:
        directory.publish(start.step, RATES, note=log)
    contents = {name: (lambda: {"x": torch.zeros(1)}) for name in contents_of(6)}
    best = directory.best(RATES, log)
    manifest = {"good": True, "best": best, "validation_loss": {"0.9": 0.5}, "measure": "m"}
    directory.write(6, contents, manifest, {"torch": "2"})
    directory.publish(6, RATES, note=log)
    directory.note_divergence()
    directory.prune(6)


@pytest.mark.parametrize("name", ["best.json", "checkpoint000004.json", ".checkpoint000004.json.part"])
def test_what_a_training_leaves(tmp_path, name):
    examples = {"best.json": [{"0.9": {"step": 4, "loss": 0.25, "measure": "m"}, "0.99": {"step": 2, "loss": None}}]}
    example = examples.get(name, [manifest_of(4)])
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model000004.pt").write_bytes(b"another's")
    words = ("../outside/model000004.pt", "mine.txt", "model000002.pt", "model000004.pt", "ema_0.9_000004.pt", ".", "m")
    told: list[str] = []

    @fuzzed(150, *example, words=words)
    def go_on(content: bytes) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = write_run(tmp_path / "run")
        (run / name).write_bytes(content)
        if name.endswith(".part"):
            (run / "checkpoint000004.json").unlink()
        before, best = all_bytes(tmp_path), (run / "ema_0.9_best.pt").read_bytes()
        told.clear()
        as_a_program(lambda: find_and_go_on(run, told.append))
        assert not any("\n" in line for line in told), told
        after = all_bytes(tmp_path)
        theirs = [path for path in before if not path.startswith("run/") or "mine" in path or path.endswith(".copy")]
        assert {path: before[path] for path in theirs} == {path: after.get(path) for path in theirs}
        if best not in [content for path, content in after.items() if "best" in path]:  # for another measured one
            assert isinstance(json.loads(after["run/best.json"])["0.9"]["loss"], float)

    go_on()


def test_a_manifest_is_quoted_in_one_line(tmp_path):
    run, told = write_run(tmp_path / "run"), []
    manifest = manifest_of(4)
    manifest["files"]["two\nlines\ud800"] = {"size": 1, "sha256": ""}
    (run / "checkpoint000004.json").write_text(json.dumps(manifest))
    find_and_go_on(run, told.append)
    assert any("two\\nlines\\ud800 is missing" in line for line in told) and not any("\n" in line for line in told)


def test_a_training_goes_on_or_says_why_not(root, tmp_path):
    first = make_loop(root / "data", tmp_path / "run", max_steps=1, save_interval=1, ema_rate="0.9")
    assert first.run()
    first.logger.close()
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    names = ("best.json", "checkpoint000001.json", "config.json")
    examples = [(name, json.loads((tmp_path / "whole" / name).read_text())) for name in names]

    @cases(8)
    @given(st.sampled_from(examples).flatmap(lambda e: st.tuples(st.just(e[0]), broken(e[1]))))
    def go_on(case: tuple[str, bytes]) -> None:
        name, content = case
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        (tmp_path / "run" / name).write_bytes(content)
        before = all_bytes(root / "data")

        def train() -> None:
            loop = make_loop(root / "data", tmp_path / "run", max_steps=2, save_interval=1, ema_rate="0.9")
            loop.run()
            loop.logger.close()

        as_a_program(train)
        assert all_bytes(root / "data") == before

    go_on()
