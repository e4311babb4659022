"""The order of samples: global positions, ranks, resuming, workers and their end, class balance."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import save, write_custom

from guided_diffusion.image_datasets import (
    DataError,
    balance_weights,
    open_dataset,
    sampling_batches,
    training_batches,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = write_custom(tmp_path_factory.mktemp("batches"), {"train": 7}, instances=True)
    return open_dataset(data_dir=root, dataset_mode="custom", split="train", image_size=8, num_classes=4, seed=3)


def take(dataset, count, **options):
    with training_batches(dataset, **{"num_workers": 0, **options}) as batches:
        return [next(batches) for _ in range(count)]


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_see_what_one_sees_with_twice_the_batch(dataset, workers):
    one = take(dataset, 5, batch_size=4, num_workers=workers)
    ranks = [take(dataset, 5, batch_size=2, rank=r, world_size=2, num_workers=workers) for r in (0, 1)]
    for whole, left, right in zip(one, *ranks, strict=True):
        assert_same(whole, {key: torch.cat([left[key], right[key]]) for key in whole})
    assert [b["position"].tolist() for b in one[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert set(one[0]) == {"image", "label", "instance", "position"} and one[0]["image"].shape == (4, 3, 8, 8)


def test_datasets_travel_to_workers_that_are_started_anew(dataset):
    here, there = dataset[2], pickle.loads(pickle.dumps(dataset))[2]
    assert here.pop("name") == there.pop("name")
    assert_same(here, there)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_goes_on_where_it_stopped(dataset, workers):
    run = take(dataset, 6, batch_size=3)
    resumed = take(dataset, 4, batch_size=3, start=6, num_workers=workers)
    for a, b in zip(run[2:], resumed, strict=True):
        assert_same(a, b)
    as_two = take(dataset, 1, batch_size=3, start=6, rank=1, world_size=2)  # more ranks than before
    assert_same(as_two[0], run[3])


def test_every_epoch_has_each_item_once_in_an_order_of_its_own(dataset, monkeypatch):
    indices = []
    monkeypatch.setattr(
        type(dataset), "__getitem__", lambda self, key: indices.append(key) or {"label": torch.zeros(1), "name": ""}
    )
    take(dataset, 21, batch_size=1)
    assert [p for _, p in indices] == list(range(21))
    epochs = [[i for i, p in indices if p // 7 == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_global_random_state_is_left_alone(dataset):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    take(dataset, 2, batch_size=2, num_workers=1)
    assert (torch.rand(1), np.random.rand()) == expected


def test_sampling_batches_take_each_index_once(dataset):
    batches = list(sampling_batches(dataset, [5, 0, 3, 1, 6], 2, num_workers=1))
    assert [b["name"] for b in batches] == [["scene5", "scene0"], ["scene3", "scene1"], ["scene6"]]
    assert batches[2]["image"].shape == (1, 3, 8, 8) and set(batches[0]) == {"name", "image", "label", "instance"}
    assert list(sampling_batches(dataset, [], 2)) == []


def children() -> set[int]:
    return {int(p) for f in Path(f"/proc/{os.getpid()}/task").glob("*/children") for p in f.read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the list of child processes is read from /proc")
def test_close_ends_the_workers(dataset):
    before = children()
    batches = training_batches(dataset, batch_size=2, num_workers=2)
    next(batches)
    assert len(children() - before) == 2
    batches.close()
    deadline = time.time() + 10
    while children() - before and time.time() < deadline:
        time.sleep(0.05)
    assert not children() - before
    with pytest.raises(StopIteration):
        next(batches)


SIGNAL_SCRIPT = """
import os, signal, sys, time
from guided_diffusion.image_datasets import open_dataset, training_batches
stop = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.append(1))
dataset = open_dataset(data_dir=sys.argv[1], dataset_mode="custom", split="train", image_size=8, num_classes=4)
batches = training_batches(dataset, batch_size=2, num_workers=2)
next(batches)
print("ready", flush=True)
while not stop:
    time.sleep(0.01)
time.sleep(0.3)
for _ in range(20):  # more than what was prefetched: the workers are still at work
    next(batches)
print("saved", flush=True)
if sys.argv[2] == "raise":
    raise SystemExit(7)
batches.close()
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs a system that names a signal's sender")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ending", ["close", "raise"])
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_main_process(tmp_path, number, ending):
    write_custom(tmp_path, {"train": 7})
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNAL_SCRIPT, str(tmp_path), ending],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, number)
        assert process.stdout.readline() == "saved\n"
        assert process.wait(timeout=20) == (0 if ending == "close" else 7)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_stops_the_run_by_name_or_is_skipped_and_counted(tmp_path, workers):
    write_custom(tmp_path, {"train": 6})
    (tmp_path / "train/images/scene4.png").write_bytes(b"no picture")
    options = {"data_dir": tmp_path, "dataset_mode": "custom", "split": "train", "image_size": 8, "num_classes": 4}
    with pytest.raises(DataError, match=r"scene4\.png cannot be read") as error:
        take(open_dataset(**options), 4, batch_size=2, num_workers=workers)
    assert "Traceback" not in str(error.value)
    with training_batches(open_dataset(**options, skip_bad=True), batch_size=2, num_workers=workers) as batches:
        seen = [next(batches) for _ in range(6)]
        assert list(batches.skipped) == ["scene4"] and "cannot be read" in batches.skipped["scene4"]
    assert all(b["image"].shape == (2, 3, 8, 8) for b in seen)
    assert [p for b in seen for p in b["position"].tolist()] == list(range(12))
    with pytest.raises(DataError, match=r"scene4\.png"):  # sampling never passes over what it was asked for
        list(sampling_batches(open_dataset(**{**options, "skip_bad": True}), range(6), 2))


def test_when_everything_is_bad(tmp_path):
    write_custom(tmp_path, {"train": 2})
    for i in range(2):
        (tmp_path / f"train/images/scene{i}.png").write_bytes(b"")
    bad = open_dataset(
        data_dir=tmp_path, dataset_mode="custom", split="train", image_size=8, num_classes=4, skip_bad=True
    )
    with pytest.raises(DataError, match="none of the 2 items can be used"):
        take(bad, 1, batch_size=1)


@pytest.fixture
def unbalanced(tmp_path):
    """20 scenes of class 0; one of them holds a pixel of class 1."""
    for i in range(20):
        ids = np.zeros((8, 8), np.uint8)
        ids[0, 0] = i == 13
        save(tmp_path / f"train/labels/{i:02d}.png", ids)
        save(tmp_path / f"train/images/{i:02d}.png", np.full((8, 8, 3), i, np.uint8))
    return open_dataset(data_dir=tmp_path, dataset_mode="custom", split="train", image_size=8, num_classes=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_class_balance_draws_rare_classes_more_often(unbalanced, workers):
    weights = balance_weights(unbalanced, num_workers=workers)
    assert weights[13] == pytest.approx(np.sqrt(0.5 / 0.05)) and (np.delete(weights, 13) == 1).all()
    batches = take(unbalanced, 50, batch_size=20, class_balance=True, num_workers=workers)
    seen = np.bincount([int(v) for b in batches for v in b["image"][:, 0, 0, 0]], minlength=20)
    expected = 1000 * weights / weights.sum()
    # Systematic resampling: in each of 50 epochs an item is drawn floor or ceil of its expected count, so that the sum
    # of the 50 deviates by less than 4 standard deviations of a fair coin per epoch, 4 * sqrt(50) / 2 = 14.
    assert np.abs(seen - expected).max() < 14
    halves = [take(unbalanced, 3, batch_size=2, rank=r, world_size=2, class_balance=weights) for r in (0, 1)]
    one = take(unbalanced, 3, batch_size=4, class_balance=weights)
    for whole, left, right in zip(one, *halves, strict=True):
        assert_same(whole, {key: torch.cat([left[key], right[key]]) for key in whole})


def test_wrong_arguments(dataset):
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "rank": 2, "world_size": 2}, {"batch_size": 1, "start": -1}):
        with pytest.raises(DataError, match="out of range"):
            training_batches(dataset, **wrong)
