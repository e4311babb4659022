"""The LPIPS scorer against the lpips package, torchmetrics and torchvision's transforms; and bad input."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.error
import warnings
from itertools import combinations

import lpips
import numpy as np
import pytest
import torch
from evaluation_helpers import (
    CAMVID,
    call,
    fails,
    last_number,
    load_script,
    needs_camvid,
    run_script,
    seeded_state,
    truncate,
    write_photographs,
    write_pictures,
)
from PIL import Image
from torchvision import models, transforms

scorer = load_script("lpips")
network_weights = load_script("network_weights")

SAMPLES = 3
RANDOM = ("--weights", "random")


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory):
    """Seeded AlexNet weights in a file such as torchvision's."""
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(seeded_state(models.alexnet()), path)
    return path


@pytest.fixture(scope="module")
def distance(alexnet_file):
    return scorer.PairwiseDistance(network_weights.Weights(alexnet_file, "", False), images_per_pass=2)


@pytest.fixture(scope="module")
def reference(alexnet_file):
    """The lpips package's metric on the same AlexNet."""
    return package_metric(alexnet_file)


def package_metric(alexnet_file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(alexnet_file, weights_only=True)
    slices = [getattr(metric.net, f"slice{k}") for k in range(1, 6)]
    for part in slices:
        for index, layer in part.named_children():
            for name, parameter in layer.named_parameters():
                parameter.data.copy_(state[f"features.{index}.{name}"])
    return metric.eval()


@pytest.fixture
def results(tmp_path):
    """Three samples of each of four layouts."""
    for index in range(SAMPLES):
        write_pictures(tmp_path / "results" / f"samples_{index:02d}", 4, seed=index)
    return tmp_path / "results"


def published_by_torchvision(path):
    """The published preprocessing put together from torchvision's transforms."""
    steps = [
        transforms.Resize([256, 256]),
        transforms.Resize([299, 299]),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    return transforms.Compose(steps)(Image.open(path).convert("RGB"))


def test_a_script_named_as_the_package_imports_the_package():
    package = scorer.import_lpips_package()
    assert package is lpips
    assert hasattr(package, "LPIPS")
    assert str(scorer.__file__) != package.__file__


@torch.inference_mode()
def test_all_pairs_equal_the_package(distance, reference):
    images = torch.rand(5, 3, 80, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = torch.tensor(list(combinations(range(5), 2)))
    expected = reference(images[pairs[:, 0]], images[pairs[:, 1]]).flatten()
    # the 1e-5; seen 3e-8 at distances of 0.1: float32 means in another order
    torch.testing.assert_close(distance(images), expected, atol=1e-6, rtol=1e-5)


@needs_camvid
@torch.inference_mode()
def test_pairs_of_photographs_equal_the_package_under_both_preprocessings(distance, reference):
    paths = sorted((CAMVID / "val" / "images").glob("*.jpg"))[::40]
    layout = scorer.Layout("x", tuple(paths))
    for name, (sizes, _) in scorer.PREPROCESSINGS.items():
        ours = distance(scorer.scale(scorer.load_samples(layout, sizes), name))
        if name == "published":
            images = torch.stack([published_by_torchvision(path) for path in paths])
        else:
            images = torch.stack([transforms.ToTensor()(Image.open(path)) for path in paths]) * 2 - 1
        first, second = zip(*combinations(range(len(paths)), 2), strict=True)
        expected = reference(images[list(first)], images[list(second)]).flatten()
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)  # the tolerance


@torch.inference_mode()
def test_standard_preprocessing_equals_torchmetrics(distance, alexnet_file, results, monkeypatch):
    from torchmetrics.functional.image.lpips import _LPIPS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    state = torch.load(alexnet_file, weights_only=True)
    features = [value for key, value in state.items() if key.startswith("features.")]
    for parameter, value in zip(metric.net.parameters(), features, strict=True):
        parameter.data.copy_(value)
    paths = tuple(folder / "000.png" for folder in sorted(results.iterdir()))
    images = scorer.scale(scorer.load_samples(scorer.Layout("000", paths), ()), "standard")
    expected = [metric(images[i : i + 1], images[j : j + 1]).item() for i, j in combinations(range(SAMPLES), 2)]
    assert distance(images).tolist() == pytest.approx(expected, abs=1e-5)


@torch.inference_mode()
def test_published_preprocessing_equals_torchvision(results):
    path = results / "samples_00" / "000.png"
    sizes = scorer.PREPROCESSINGS["published"][0]
    ours = scorer.scale(scorer.load_samples(scorer.Layout("000", (path, path)), sizes), "published")
    torch.testing.assert_close(ours[0], published_by_torchvision(path), atol=1e-6, rtol=0)  # float32 rounding


def test_identical_samples_are_at_distance_zero(results, capsys):
    for folder in ("samples_01", "samples_02"):
        shutil.rmtree(results / folder)
        shutil.copytree(results / "samples_00", results / folder)
    for preprocessing in scorer.PREPROCESSINGS:
        call("lpips", results, *RANDOM, "--preprocessing", preprocessing)
        assert last_number(capsys.readouterr().out) == 0


@needs_camvid
def test_diversity_grows_with_the_difference_of_the_samples(tmp_path, capsys):
    scores = []
    for deviation in (5, 25, 80):
        results = tmp_path / str(deviation)
        write_photographs(results / "samples_0", "val", 2)

        def noise(image, deviation=deviation):
            grain = np.random.default_rng(0).normal(0, deviation, (image.height, image.width, 3))
            return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))

        write_photographs(results / "samples_1", "val", 2, noise)
        call("lpips", results, *RANDOM)
        scores.append(last_number(capsys.readouterr().out))
    assert 0 < scores[0] < scores[1] < scores[2]


def test_the_score_is_the_mean_over_layouts_of_the_mean_over_pairs(results, alexnet_file, reference, tmp_path, capsys):
    flags = ["--weights", alexnet_file, "--preprocessing", "standard"]
    call("lpips", results, *flags, "--json", tmp_path / "r.json")
    printed = last_number(capsys.readouterr().out)
    means = []
    for name in ("000", "001", "002", "003"):
        images = [Image.open(folder / f"{name}.png") for folder in sorted(results.iterdir())]
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1 for image in images]
        with torch.inference_mode():
            means.append(np.mean([reference(a, b).item() for a, b in combinations(tensors, 2)]))
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["score"] == pytest.approx(np.mean(means), abs=1e-5)
    assert printed == pytest.approx(record["score"], abs=1e-4)
    assert (record["layouts"], record["samples_per_layout"]) == (4, SAMPLES)
    assert record["preprocessing"].startswith("standard")
    assert list(record["scores"].values()) == pytest.approx(means, abs=1e-5)


def test_the_script_runs_by_itself_from_its_own_folder_too(results):
    here = run_script("lpips", results, *RANDOM)
    assert here.returncode == 0, here.stderr
    assert "preprocessing: published" in here.stdout
    assert here.stdout.splitlines()[-1].startswith("LPIPS: ")
    assert "not comparable" in here.stdout.splitlines()[-1]


def test_batches_and_workers_do_not_change_the_score(results, capsys):
    scores = []
    for flags in (["--batch_size", 1], ["--batch_size", 2, "--num_workers", 2], ["--batch_size", 16]):
        call("lpips", results, *RANDOM, *flags)
        scores.append(last_number(capsys.readouterr().out))
    assert scores == [scores[0]] * 3


def test_test_list_chooses_layouts(results, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("001.png\n\n003\n")
    call("lpips", results, *RANDOM, "--test_list", tmp_path / "names.txt", "--json", tmp_path / "r.json")
    assert list(json.loads((tmp_path / "r.json").read_text())["scores"]) == ["001", "003"]
    (tmp_path / "names.txt").write_text("001\n999\n")
    with fails("names.txt names layouts without samples: 999"):
        call("lpips", results, *RANDOM, "--test_list", tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("\n")
    with fails("names.txt: lists no names"):
        call("lpips", results, *RANDOM, "--test_list", tmp_path / "names.txt")
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe")
    with fails("names.txt: not a text file"):
        call("lpips", results, *RANDOM, "--test_list", tmp_path / "names.txt")


def test_the_package_missing_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # what Python holds of a package that cannot be imported
    with fails("pip install lpips"):
        scorer.import_lpips_package()


def test_missing_weights_are_an_error_before_any_image_is_read(results, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(scorer, "check_images", lambda *_: pytest.fail("images were looked at first"))
    with fails(f"(?s){scorer.ALEXNET_WEIGHTS.url}.*{tmp_path / 'hub' / 'checkpoints'}"):
        call("lpips", results)


def test_too_few_sample_folders(results, tmp_path):
    with fails("nowhere: no such folder"):
        call("lpips", tmp_path / "nowhere", *RANDOM)
    with fails("has none"):
        call("lpips", results / "samples_00", *RANDOM)
    for index in range(1, SAMPLES):
        shutil.rmtree(results / f"samples_{index:02d}")
    with fails("at least two sub-folders named samples.*has only samples_00"):
        call("lpips", results, *RANDOM)


def test_a_sample_counts_once_whatever_its_folder_is_called(results, capsys):
    """`samples` and samples_00 of one results folder hold the same picture; so do samples_00 and samples_000."""
    call("lpips", results, *RANDOM)
    alone = last_number(capsys.readouterr().out)
    shutil.copytree(results / "samples_00", results / "samples")
    call("lpips", results, *RANDOM)
    printed = capsys.readouterr()
    assert last_number(printed.out) == alone
    assert "samples/ is left out" in printed.err + printed.out
    shutil.copytree(results / "samples_00", results / "samples_000")
    with fails("samples_00, samples_000 are of different runs"):
        call("lpips", results, *RANDOM)


def test_a_layout_missing_from_one_folder_is_an_error_or_left_out(results, tmp_path, capsys):
    (results / "samples_01" / "002.png").unlink()
    with fails(r"1 of 4 layouts lack samples: 002 \(not in samples_01\)"):
        call("lpips", results, *RANDOM)
    call("lpips", results, *RANDOM, "--skip_bad", "True", "--json", tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["names"] == {"matched": 3, "incomplete": ["002"]}
    assert "002" in capsys.readouterr().err


def test_no_layout_in_all_folders(results):
    for index, path in enumerate(sorted((results / "samples_01").iterdir())):
        path.rename(path.with_name(f"other_{index}.png"))
    with fails("no layout has a sample in each of"):
        call("lpips", results, *RANDOM, "--skip_bad", "True")


def test_unreadable_samples_are_named_or_their_layout_is_left_out(results, tmp_path, capsys):
    bad = results / "samples_02" / "001.png"
    truncate(bad, 0.5)
    with fails(f"{bad}.*--skip_bad True"):
        call("lpips", results, *RANDOM)
    call("lpips", results, *RANDOM, "--skip_bad", "True", "--json", tmp_path / "r.json")
    assert list(json.loads((tmp_path / "r.json").read_text())["scores"]) == ["000", "002", "003"]


def test_samples_of_different_sizes_need_the_resizing_preprocessing(results, capsys):
    path = results / "samples_02" / "001.png"
    Image.open(path).resize((50, 40)).save(path)
    with fails("001: samples of different sizes.*--preprocessing published"):
        call("lpips", results, *RANDOM, "--preprocessing", "standard")
    call("lpips", results, *RANDOM)
    assert "images of 2 sizes" in capsys.readouterr().err


def test_samples_too_small_for_the_network(results, capsys):
    for size, message in ((30, "images of 30x30 are too small"), (31, None)):
        for path in results.glob("*/*.png"):
            Image.open(path).resize((size, size)).save(path)
        if message:
            with fails(message):
                call("lpips", results, *RANDOM, "--preprocessing", "standard")
        else:
            call("lpips", results, *RANDOM, "--preprocessing", "standard")
            assert last_number(capsys.readouterr().out) > 0


def test_two_images_of_one_name_are_an_error(results):
    Image.open(results / "samples_00" / "001.png").save(results / "samples_00" / "001.jpg")
    with fails("have the same name; remove one"):
        call("lpips", results, *RANDOM)
