"""Real runs of image_sample.py, under mpiexec where it matters: what is written, continued, refused."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import draw, save, write_custom
from PIL import Image
from sampling_helpers import run, run_here, save_checkpoint
from training_helpers import finish, launch, wait_for

import image_sample
from guided_diffusion.runs.stop_signals import EXIT_UNFINISHED
from guided_diffusion.weights import store

LAYOUTS = 5
FAST = ("--sampler", "ddpm", "--num_steps", "3", "--s", "1.5", "--batch_size", "2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sampling")
    write_custom(root / "data", {"train": 2, "val": LAYOUTS}, size=(20, 20))
    save_checkpoint(root / "run", root / "data")
    return root


def sample(root, results, *flags, ranks=0, apart=False):
    """`apart`, or of several ranks: in processes of their own."""
    model = ("--model_path", str(root / "run" / "ema_0.9_best.pt"), "--results_path", str(root / results))
    flags = ("image_sample.py", *model, *FAST, *flags)
    return run(*flags, ranks=ranks) if ranks or apart else run_here(*flags)


def refused(monkeypatch, root, results, message):
    """The entry point in this process, which takes none of the seconds of its start, ends with `message` alone."""
    model = ("--model_path", str(root / "run" / "ema_0.9_best.pt"), "--results_path", str(root / results))
    monkeypatch.setattr(sys, "argv", ["image_sample.py", *model, *FAST])
    with pytest.raises(SystemExit, match=message):
        image_sample.main()


def pictures(folder) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def two_ranks(root):
    result = sample(root, "two", ranks=2)
    assert result.returncode == 0, result.stdout
    return result


def test_what_a_run_writes(root, two_ranks):
    names = [f"scene{i}" for i in range(LAYOUTS)]
    for folder in ("images", "labels", "samples"):
        assert sorted(path.stem for path in (root / "two" / folder).iterdir()) == names
    label = Image.open(root / "two" / "labels" / "scene0.png")
    assert label.mode == "L" and label.size == (16, 16) and max(label.getdata()) < 4
    expected = Image.open(root / "data" / "val" / "labels" / "scene0.png").resize((16, 16), Image.NEAREST)
    assert np.array_equal(label, expected)
    assert (root / "two" / "overview.png").exists()
    record = json.loads((root / "two" / "sampling.json").read_text())
    assert record["images"]["sampler"] == "ddpm" and record["images"]["s"] == 1.5
    assert "2 processes" in two_ranks.stdout


def test_one_rank_other_batches_and_a_part_make_the_same_pictures(root, two_ranks):
    result = sample(root, "one", "--batch_size", "5")
    assert result.returncode == 0, result.stdout
    part = sample(root, "part", "--num_samples", "2", "--batch_size", "1")
    assert part.returncode == 0, part.stdout
    two = pictures(root / "two" / "samples")
    for other in (pictures(root / "one" / "samples"), pictures(root / "part" / "samples")):
        for name, picture in other.items():
            # another batch size may choose another convolution kernel: rounding, at most one level
            assert np.abs(picture - two[name]).max() <= 1
    assert len(pictures(root / "part" / "samples")) == 2


def test_guidance_without_fine_tuning_is_remarked_on(root, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"training": {"drop_rate": 0.0}}))
    shutil.copytree(root / "data", tmp_path / "data")
    for s, told in (("1.5", True), ("1", False)):
        result = sample(tmp_path, f"s{s}", "--num_samples", "1", "--s", s)
        assert result.returncode == 0 and ("guides by noise" in result.stdout) == told, result.stdout


def test_a_folder_whose_config_says_nothing_of_data(root, two_ranks, tmp_path, monkeypatch):
    """As one from a hub: the data is what the flags say, the pictures are the same."""
    shutil.copytree(root / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config = {"model": config["model"], "diffusion": config["diffusion"], "training": None}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    data = ("--data_dir", str(root / "data"), "--dataset_mode", "custom", "--num_workers", "0")
    result = sample(tmp_path, "results", *data, "--num_samples", "2")
    assert result.returncode == 0, result.stdout
    made, expected = pictures(tmp_path / "results" / "samples"), pictures(root / "two" / "samples")
    assert len(made) == 2 and all(np.abs(made[name] - expected[name]).max() <= 1 for name in made)
    refused(monkeypatch, tmp_path, "without", "no data folder given; use --data_dir")  # the defaults name no folder
    assert not (tmp_path / "without").exists()


@pytest.mark.parametrize("content", ["[" * 100_000, '{"images": {}, "run": {}, "run": {}}'])
def test_a_record_of_a_results_folder_that_is_damaged_is_named(root, tmp_path, monkeypatch, content):
    (tmp_path / "sampling.json").write_text(content)
    refused(monkeypatch, root, tmp_path, r"sampling\.json is damaged.*; restore it, or choose another --results_path")


@pytest.mark.parametrize("part", ['"training": []', '"data": []', '"data": {"num_workers": "two"}', '"classes": 5'])
def test_a_config_with_a_malformed_part_is_named(root, tmp_path, monkeypatch, part):
    shutil.copytree(root / "run", tmp_path / "run")
    text = (tmp_path / "run" / "config.json").read_text()
    config = {key: value for key, value in json.loads(text).items() if f'"{key}"' not in part}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config)[:-1] + f", {part}}}")
    refused(monkeypatch, tmp_path, "results", r"config\.json")
    assert not (tmp_path / "results").exists()


def test_a_signal_ends_a_run_in_order(root):
    """Between two steps, with whole pictures only; the same command makes the others and adds up the time."""
    results = root / "stopped"
    model = ["--model_path", root / "run" / "ema_0.9_best.pt", "--results_path", results, "--s", "1.5"]
    arguments = ["image_sample.py", *model, "--num_steps", "50", "--batch_size", "1"]
    log = root / "stopped_log"
    processes = launch([str(part) for part in arguments], log=log)
    wait_for(lambda: (results / "samples").is_dir() and any((results / "samples").glob("*.png")))
    processes[0].send_signal(signal.SIGTERM)
    assert finish(processes) == [EXIT_UNFINISHED]
    told = (root / "stopped_log.0").read_text()
    there = len(pictures(results / "samples"))
    assert 0 < there < LAYOUTS and f"stopped by SIGTERM after {there} of {LAYOUTS} images" in told
    assert not (results / "overview.png").exists()
    assert finish(launch([str(part) for part in arguments])) == [0]
    assert len(pictures(results / "samples")) == LAYOUTS
    made = json.loads((results / "sampling.json").read_text())["run"]["made"]
    assert made["images"] == LAYOUTS and made["seconds"] > 0


def test_a_run_goes_on_where_it_stopped(root, two_ranks):
    shutil.copytree(root / "two", root / "again")
    samples = root / "again" / "samples"
    before = {name: (samples / f"{name}.png").read_bytes() for name in ("scene1", "scene3")}
    kept = (samples / "scene0.png").stat().st_mtime_ns
    (samples / "scene1.png").unlink()
    (samples / "scene3.png").rename(samples / ".sdm-0123456789ab.part")  # as a killed writer leaves it
    (root / "again" / "labels" / "scene0.png").unlink()
    result = sample(root, "again", "--batch_size", "1")
    assert (root / "again" / "labels" / "scene0.png").exists()
    assert "2 images to make" in result.stdout, result.stdout
    assert (samples / "scene0.png").stat().st_mtime_ns == kept
    assert sorted(os.listdir(samples)) == [f"scene{i}.png" for i in range(LAYOUTS)]
    for name, content in before.items():
        (root / "old.png").write_bytes(content)
        new, old = np.asarray(Image.open(samples / f"{name}.png")), np.asarray(Image.open(root / "old.png"))
        assert np.abs(new.astype(int) - old).max() <= 1
    assert "all are there" in sample(root, "again").stdout
    assert f"{LAYOUTS} images to make" in sample(root, "again", "--overwrite", "True").stdout


def test_a_results_folder_belongs_to_one_run(root, two_ranks):
    held = store.lock(str(root / "two"), "results_path")
    result = sample(root, "two", apart=True)
    assert result.returncode == 1 and "in use by another run" in result.stdout and "--results_path" in result.stdout
    held.close()


def test_pictures_of_a_diverged_network_are_not_saved(root, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run")
    path = tmp_path / "run" / "ema_0.9_best.pt"
    weights = torch.load(path, weights_only=True)
    flags = ("--model_path", str(path), "--results_path", str(tmp_path / "results"), *FAST)
    torch.save({name: torch.full_like(value, torch.nan) for name, value in weights.items()}, path)
    result = run_here("image_sample.py", *flags)
    assert result.returncode == 1 and "of the 4096 values of time_embed.0.weight are not finite" in result.stdout
    assert not (tmp_path / "results").exists()
    torch.save({name: torch.full_like(value, 1e30) for name, value in weights.items()}, path)  # finite, as yet
    result = run("image_sample.py", *flags)
    assert result.returncode == 1 and "layouts scene0, scene1" in result.stdout and "not finite" in result.stdout
    assert not list((tmp_path / "results" / "samples").iterdir())


def test_two_configurations_do_not_mix(root, two_ranks):
    result = sample(root, "two", "--s", "2.0", "--seed", "3")
    assert result.returncode == 1
    assert "s: 1.5 there, 2.0 now" in result.stdout and "seed: 0 there, 3 now" in result.stdout
    assert "--overwrite" in result.stdout and "Traceback" not in result.stdout
    result = sample(root, "two", "--split", "train")
    assert result.returncode == 1 and "split: 'val' there, 'train' now" in result.stdout


def test_the_training_split_is_sampled_whole(root):
    """Without the crops and flips of training."""
    assert sample(root, "train_split", "--split", "train").returncode == 0
    for i in range(2):
        source = Image.open(root / "data" / "train" / "labels" / f"scene{i}.png").resize((16, 16), Image.NEAREST)
        assert np.array_equal(source, Image.open(root / "train_split" / "labels" / f"scene{i}.png"))


def test_a_part_made_anew_leaves_no_old_pictures(root, two_ranks):
    shutil.copytree(root / "two", root / "partly")
    anew = ("--seed", "7", "--overwrite", "True")
    assert sample(root, "partly", "--num_samples", "1", *anew).returncode == 0
    assert "4 images to make" in sample(root, "partly", "--seed", "7").stdout


def test_several_samples_of_a_layout(root, two_ranks):
    result = sample(root, "several", "--samples_per_layout", "3", "--num_samples", "2", ranks=2)
    assert result.returncode == 0, result.stdout
    folders = [pictures(root / "several" / f"samples_{i:02d}") for i in range(3)]
    assert all(set(folder) == {"scene0", "scene1"} for folder in folders)
    assert not np.array_equal(folders[0]["scene0"], folders[1]["scene0"])
    assert np.abs(folders[0]["scene0"] - pictures(root / "two" / "samples")["scene0"]).max() <= 1


def test_label_maps_alone(root):
    for i in range(2):
        save(root / "labels_alone" / f"drawn by hand {i}.png", draw(i, (20, 20), 4)[1])
    result = sample(root, "alone", "--labels_dir", str(root / "labels_alone"))
    assert result.returncode == 0, result.stdout
    assert sorted(pictures(root / "alone" / "samples")) == ["drawn by hand 0", "drawn by hand 1"]
    assert not (root / "alone" / "images").exists()


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--sampler", "euler"), "unknown sampler 'euler'"),
        (("--num_steps", "1001"), "num_steps must lie between 1 and the 1000 trained steps; got 1001"),
        (("--guidance_interval", "0.9,0.1"), "guidance_interval must be LOW,HIGH"),
        (("--num_classes", "7"), "num_classes 7 contradicts"),
        (("--num_samples", "0"), "num_samples must be at least 1; got 0"),
        (("--use_ddim", "True"), "--use_ddim True contradicts --sampler ddpm"),
        (("--timestep_respacing", "10"), "give one of them"),
        (("--model_path", "nowhere/model.pt"), "there is no checkpoint nowhere/model.pt"),
        (("--labels_dir", "nowhere"), "nowhere"),
        (("--results_path", "/proc/results"), "/proc/results"),
    ],
)
def test_what_cannot_be_is_refused_before_any_sampling(root, flags, message):
    result = sample(root, "refused", *flags)
    assert result.returncode == 1 and message in result.stdout, result.stdout
    assert "Traceback" not in result.stdout and "denoising" not in result.stdout
    assert not (root / "refused" / "samples").exists() or not os.listdir(root / "refused" / "samples")


def test_a_wrong_id_is_found_before_the_first_image(root):
    shutil.copytree(root / "data", root / "wrong")
    save(root / "wrong" / "val" / "labels" / "scene4.png", np.full((20, 20), 9, np.uint8))
    result = sample(root, "unmade", "--data_dir", str(root / "wrong"))
    assert result.returncode == 1 and "scene4.png" in result.stdout and "9" in result.stdout
    assert not os.listdir(root / "unmade" / "samples")


def test_an_overwriting_run_that_was_stopped_goes_on(root, two_ranks, tmp_path):
    """Started again it makes what is missing, though its flag says to make all anew; other folders are left alone."""
    shutil.copytree(root / "two", tmp_path / "anew")
    mine = tmp_path / "anew" / "samples_backup" / "scene0.png"
    shutil.copytree(root / "two" / "samples", mine.parent)
    arguments = ["image_sample.py", "--model_path", root / "run" / "ema_0.9_best.pt", "--s", "1.5", "--batch_size", "1"]
    arguments = [str(part) for part in (*arguments, "--num_steps", "50", "--results_path", tmp_path / "anew")]
    arguments += ["--overwrite", "True"]
    first = tmp_path / "anew" / "samples" / "scene0.png"
    old = first.stat().st_mtime_ns
    (process,) = launch(arguments)
    wait_for(lambda: first.exists() and first.stat().st_mtime_ns != old)
    process.send_signal(signal.SIGTERM)
    assert finish([process]) == [EXIT_UNFINISHED]
    there = {path.name: path.stat().st_mtime_ns for path in first.parent.glob("*.png")}
    assert 0 < len(there) < LAYOUTS
    for images_to_make in (LAYOUTS - len(there), LAYOUTS):  # goes on; then, finished, begins anew
        log = tmp_path / f"log{images_to_make}"
        assert finish(launch(arguments, log=log)) == [0]
        told = Path(f"{log}.0").read_text()
        assert f"{images_to_make} images to make" in told
        if images_to_make < LAYOUTS:
            assert all((first.parent / name).stat().st_mtime_ns == time for name, time in there.items())
    assert "overwriting" not in json.loads((tmp_path / "anew" / "sampling.json").read_text())["run"] and mine.exists()


def test_a_layout_that_was_drawn_anew_is_sampled_anew(root, tmp_path):
    shutil.copytree(root / "data" / "val" / "labels", tmp_path / "drawn")
    flags = ("--labels_dir", str(tmp_path / "drawn"))
    assert sample(root, tmp_path / "results", *flags).returncode == 0
    before = pictures(tmp_path / "results" / "samples")
    drawn = tmp_path / "drawn" / "scene1.png"
    save(drawn, 3 - np.asarray(Image.open(drawn)))
    result = sample(root, tmp_path / "results", "--labels_dir", f"{tmp_path}/drawn/")  # the same folder
    assert "because their layouts have changed: scene1 (1 in all)\n" in result.stdout, result.stdout
    assert "1 images to make" in result.stdout
    after = pictures(tmp_path / "results" / "samples")
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["scene1"]


def test_a_damaged_photograph_is_found_before_the_first_image(root, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    last = sorted((tmp_path / "data" / "val" / "images").iterdir())[-1]
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    result = sample(root, tmp_path / "results", "--data_dir", str(tmp_path / "data"))
    assert result.returncode == 1 and last.name in result.stdout
    assert not list((tmp_path / "results" / "samples").iterdir())


def test_what_an_id_means_is_that_of_the_training_and_of_the_folder(root, tmp_path):
    """dataset.json's remap: where a results folder goes on, for label maps alone, and for those of such a folder."""
    shutil.copytree(root / "data", tmp_path / "data")
    meaning = (
        json.loads((tmp_path / "data" / "dataset.json").read_text())
        if (tmp_path / "data" / "dataset.json").exists()
        else {}
    )
    swapped = meaning | {"remap": {"0": 3, "3": 0}}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(swapped))
    data = ("--data_dir", str(tmp_path / "data"))
    assert sample(root, tmp_path / "results", *data, "--num_samples", "1").returncode == 0
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(meaning))
    result = sample(root, tmp_path / "results", *data)
    assert result.returncode == 1 and "remap: {'0': 3, '3': 0} there, {} now" in result.stdout, result.stdout

    # A checkpoint that was trained with the remap; its data is not there.
    shutil.copytree(root / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["data_dir"] = str(tmp_path / "gone")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"dataset_json": swapped}))
    annotations = root / "data" / "val" / "labels"
    assert sample(tmp_path, "alone", "--labels_dir", str(annotations)).returncode == 0
    swap = np.array([3, 1, 2, 0])
    stored = np.asarray(Image.open(annotations / "scene0.png").resize((16, 16), Image.NEAREST))
    network = np.asarray(Image.open(tmp_path / "alone" / "labels" / "scene0.png"))
    assert np.array_equal(network, swap[stored]) and not np.array_equal(network, stored)
    again = sample(tmp_path, "again", "--labels_dir", str(tmp_path / "alone" / "labels"))
    assert "taken as the network's" in again.stdout, again.stdout
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "labels" / "scene0.png")), network)
