"""Nothing of the user's is touched by sampling, and no picture passes for what it is not: image_sample.py itself."""

import hashlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
from data_helpers import draw, save, write_custom
from PIL import Image
from sampling_helpers import MODEL, save_checkpoint

import image_sample
from guided_diffusion.runs import sampling_run
from guided_diffusion.runs.picture_record import fingerprint, settings_differences

LAYOUTS = 3
FAST = ("--sampler", "ddpm", "--num_steps", "2", "--s", "1", "--batch_size", "2")


@pytest.fixture
def root(tmp_path):
    write_custom(tmp_path / "data", {"train": 1, "val": LAYOUTS}, size=(20, 20))
    save_checkpoint(tmp_path / "run", tmp_path / "data")
    return tmp_path


@pytest.fixture
def sample(root, monkeypatch, capsys):
    """Runs the entry point in this process; returns (whether it succeeded, all that was said)."""

    def run(results, *flags, run="run"):
        model = ("--model_path", str(root / run / "ema_0.9_best.pt"), "--results_path", str(root / results))
        monkeypatch.setattr(sys, "argv", ["image_sample.py", *model, *FAST, *map(str, flags)])
        capsys.readouterr()
        try:
            code = image_sample.main()
        except SystemExit as error:
            assert str(error.code).startswith("error: ") and "\n" not in str(error.code)  # one sentence
            return False, capsys.readouterr().out + str(error.code)
        assert code == 0
        return True, capsys.readouterr().out

    return run


def contents(folder) -> dict[str, str]:
    """Every file and folder below a folder, with a hash of its bytes, or where it leads to."""

    def content(path):
        if path.is_symlink():
            return os.readlink(path)
        return "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def samples(folder) -> dict[str, str]:
    return contents(folder / "samples")


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


# -- the user's own files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "results,flags",
    [
        ("data", ()),  # the data itself
        ("data/val", ()),  # where images/ and labels/ are the user's
        ("data/val/labels", ()),
        ("data/new/results", ()),  # inside, and not there yet
        (".", ()),  # around the data
        ("hand", ("--labels_dir", "hand")),  # the overview would be a layout of the next run
        ("drawn", ("--labels_dir", "drawn/labels")),
        ("link", ("--labels_dir", "drawn/labels")),
        ("link/below", ("--data_dir", "data")),
    ],
)
def test_a_results_folder_that_touches_the_data_is_refused_before_anything_is_written(root, sample, results, flags):
    for place in ("hand", "drawn/labels"):
        save(root / place / "mine.png", draw(0, (20, 20), 4)[1])
    os.symlink(root / ("data" if "--data_dir" in flags else "drawn"), root / "link")
    before = contents(root)
    for overwrite in ("False", "True"):
        done, told = sample(results, *(root / flag if i % 2 else flag for i, flag in enumerate(flags)),
                            "--overwrite", overwrite)  # fmt: skip
        assert not done and "the results folder" in told and "choose another --results_path" in told, told
        assert contents(root) == before


def test_data_whose_parts_are_links_into_the_results_folder_is_refused(root, sample):
    shutil.move(root / "data" / "val" / "labels", root / "elsewhere" / "labels")
    os.symlink(root / "elsewhere" / "labels", root / "data" / "val" / "labels")
    before = contents(root)
    done, told = sample("elsewhere")
    assert not done and "contains the folder" in told and contents(root) == before


@pytest.mark.parametrize("place", ["photo.jpg", "images/a.png", "labels/a.tif", "samples/mine.png", "samples_3/a.png"])
@pytest.mark.parametrize("record", [None, "{}", '{"images": {}}', "[1, 2]"])
def test_pictures_without_a_record_are_left_alone(root, sample, place, record):
    save(root / "results" / place, draw(0, (20, 20), 4)[0])
    if record is not None:
        (root / "results" / "sampling.json").write_text(record)  # perhaps somebody's own file of that name
    before = contents(root / "results")
    for overwrite in ("False", "True"):
        done, told = sample("results", "--overwrite", overwrite)
        assert not done and "choose another --results_path" in told and contents(root / "results") == before, told


def test_overwriting_removes_what_the_record_names_and_nothing_else(root, sample):
    assert sample("results")[0]
    mine = [root / "results" / place for place in ("samples/mine.png", "labels/notes.txt", "samples_old/scene0.png")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    before = samples(root / "results")
    done, told = sample("results", "--seed", "5", "--overwrite", "True")
    assert done and "samples/mine.png" in told and "move them away" in told
    after = samples(root / "results")
    assert [name for name in after if after[name] == before[name]] == ["mine.png"]
    assert all(path.read_bytes() == b"mine" for path in mine)


def test_a_picture_that_the_record_does_not_name_is_neither_taken_for_a_sample_nor_replaced(root, sample):
    assert sample("results", "--num_samples", "1")[0]
    save(root / "results" / "samples" / "scene2.png", draw(9, (16, 16), 4)[0])
    before = contents(root / "results")
    for flags in ((), ("--overwrite", "True")):
        done, told = sample("results", *flags)
        assert not done and "samples/scene2.png" in told and contents(root / "results") == before


@pytest.mark.parametrize("name", ["samples", "images", "labels", ".lock", "sampling.json"])
def test_nothing_is_written_through_a_link(root, sample, name):
    theirs = root / "theirs"
    if "." in name:
        theirs.write_text("my own text")
    else:
        save(theirs / "scene0.png", draw(9, (16, 16), 4)[0])
    (root / "results").mkdir()
    os.symlink(theirs, root / "results" / name)
    before = contents(root)
    for overwrite in ("False", "True"):
        done, told = sample("results", "--overwrite", overwrite)
        assert not done and name in told and "link" in told and contents(root) == before


def test_a_link_among_the_samples_is_replaced_and_not_followed(root, sample):
    assert sample("results")[0]
    theirs = save(root / "theirs.png", draw(9, (30, 30), 4)[0])  # another size: no sample of this run
    before = theirs.read_bytes()
    place = root / "results" / "samples" / "scene1.png"
    place.unlink()
    os.symlink(theirs, place)
    done, told = sample("results")
    assert done and "not the samples that were made: samples/scene1.png (1 in all)" in told
    assert theirs.read_bytes() == before and not place.is_symlink() and pixels(place).shape == (16, 16, 3)


def test_a_record_that_names_another_folder_moves_nothing(root, sample):
    assert sample("results")[0]
    path = root / "results" / "sampling.json"
    record = json.loads(path.read_text())
    record["pictures"]["../../data/val/images/scene0"] = {}
    path.write_text(json.dumps(record))
    before = contents(root)
    for flags in ((), ("--overwrite", "True", "--seed", "1")):
        done, told = sample("results", *flags)
        assert not done and "sampling.json is damaged" in told and contents(root) == before


# -- a picture's record is true ---------------------------------------------------------------------------------------


def test_the_record_holds_hashes_of_what_a_picture_was_made_from(root, sample):
    assert sample("results")[0]
    record = json.loads((root / "results" / "sampling.json").read_text())
    assert sorted(record["pictures"]) == [f"scene{i}" for i in range(LAYOUTS)]
    for name, entry in record["pictures"].items():
        with Image.open(root / "data" / "val" / "labels" / f"{name}.png") as label:
            ids = np.asarray(label.resize((16, 16), Image.NEAREST))
        expected = hashlib.blake2b(b"(1, 16, 16)" + ids.astype("<i4").tobytes(), digest_size=16).hexdigest()
        assert entry["label"] == expected and set(entry) == {"label", "photograph", "samples"}
        shown = pixels(root / "results" / "samples" / f"{name}.png")
        expected = hashlib.blake2b(b"(16, 16, 3)" + shown.tobytes(), digest_size=16).hexdigest()
        assert entry["samples"] == {"samples": expected}


def test_a_fingerprint_tells_shapes_apart():
    ids = np.arange(6, dtype=np.int32)
    assert fingerprint(ids.reshape(2, 3)) != fingerprint(ids.reshape(3, 2))
    assert fingerprint(ids.reshape(2, 3).astype(np.int64)) == fingerprint(ids.reshape(2, 3))


def test_a_changed_photograph_is_written_again_and_its_sample_stays(root, sample):
    assert sample("results")[0]
    before = samples(root / "results")
    path = root / "data" / "val" / "images" / "scene1.png"
    save(path, 255 - pixels(path))
    done, told = sample("results")
    assert done and "because the photographs have changed: scene1 (1 in all)" in told and "all are there" in told
    assert samples(root / "results") == before
    assert sample("fresh")[0]
    assert contents(root / "results" / "images") == contents(root / "fresh" / "images")
    record, fresh = (json.loads((root / name / "sampling.json").read_text()) for name in ("results", "fresh"))
    assert record["pictures"] == fresh["pictures"]


def test_a_changed_instance_map_is_sampled_again(root, sample):
    write_custom(root / "with", {"train": 1, "val": LAYOUTS}, size=(20, 20), instances=True)
    model = type(MODEL)(**{**vars(MODEL), "no_instance": False})
    save_checkpoint(root / "edges", root / "with", model)
    assert sample("results", run="edges")[0]
    before = samples(root / "results")
    path = root / "with" / "val" / "instances" / "scene2.png"
    save(path, (np.arange(400).reshape(20, 20) // 7).astype(np.uint16))
    done, told = sample("results", run="edges")
    assert done and "because their layouts have changed: scene2 (1 in all)" in told and "1 images to make" in told
    after = samples(root / "results")
    assert [name for name in before if after[name] != before[name]] == ["scene2.png"]
    record = root / "results" / "sampling.json"  # of an older version: nobody knows
    content = json.loads(record.read_text())
    del content["pictures"]
    record.write_text(json.dumps(content))
    done, told = sample("results", run="edges")
    assert not done and "older version" in told and "instance maps" in told and samples(root / "results") == after
    assert sample("results", "--overwrite", "True", run="edges")[0]


def test_changed_grey_and_changed_class_order_are_noticed(root, sample):
    names = ["sky", "road", "tree", "car"]

    def describe(**settings):
        (root / "data" / "dataset.json").write_text(json.dumps(settings))

    describe(classes=names)
    assert sample("results")[0]
    describe(classes=["heaven", *names[1:]])  # a new name is no other meaning
    assert sample("results")[0]
    describe(classes=["road", "sky", *names[2:]])
    done, told = sample("results")
    assert not done and "classes: 'road' was class 1, now 0" in told
    describe(classes=names, grey=True)
    done, told = sample("results")
    assert done and f"the photographs have changed: scene0, scene1, scene2 ({LAYOUTS} in all)" in told
    page = pixels(root / "results" / "images" / "scene0.png")
    assert np.array_equal(page[..., 0], page[..., 1]) and np.array_equal(page[..., 0], page[..., 2])


def test_results_of_two_sources_with_the_same_names_do_not_mix(root, sample):
    assert sample("results")[0]
    before = contents(root / "results")
    done, told = sample("results", "--labels_dir", root / "data" / "val" / "labels")
    assert (
        not done and "labels_dir: none there" in told and "data_dir: " in told and contents(root / "results") == before
    )
    assert sample("alone", "--labels_dir", root / "data" / "val" / "labels")[0]
    done, told = sample("alone")
    assert not done and "data_dir: none there" in told


def test_a_setting_on_one_side_alone_counts_unless_it_is_a_default():
    now = {"seed": 0, "s": 1.5, "dynamic_threshold": 0.0, "data_dir": "/d", "remap": {}}
    assert settings_differences(now, now) == []
    assert settings_differences({k: v for k, v in now.items() if k != "dynamic_threshold"}, now) == []
    assert settings_differences(now, {**now, "dynamic_threshold": 0.9}) == ["dynamic_threshold: 0.0 there, 0.9 now"]
    for key in ("data_dir", "remap", "seed"):
        without = {k: v for k, v in now.items() if k != key}
        assert settings_differences(without, now) == [f"{key}: none there, {now[key]!r} now"]
        assert settings_differences(now, without) == [f"{key}: {now[key]!r} there, none now"]
    assert settings_differences({**now, "a later setting": 1}, now) == ["a later setting: 1 there, none now"]


def test_two_spellings_of_a_folder_are_one(root, sample, monkeypatch):
    os.symlink(root / "data", root / "link")
    monkeypatch.chdir(root)
    for number, spelling in enumerate(("data", root / "data", "./data/", "run/../data", "link")):
        done, told = sample("results", "--data_dir", spelling)
        assert done and ("all are there" in told) == bool(number), told
    # An older version recorded it as it was given.
    record = json.loads((root / "results" / "sampling.json").read_text())
    record["images"]["data_dir"] = "data"
    (root / "results" / "sampling.json").write_text(json.dumps(record))
    assert sample("results", "--data_dir", root / "data")[0]


def test_samples_without_a_record_are_not_taken_over(root, sample):
    assert sample("results")[0]
    (root / "results" / "sampling.json").unlink()
    before = contents(root / "results")
    done, told = sample("results", "--seed", "7", "--s", "1.2")
    assert not done and "no sampling.json" in told and contents(root / "results") == before


def test_what_was_removed_from_the_data_is_set_aside_and_named(root, sample):
    assert sample("results")[0]
    before = contents(root / "results")

    def remove(name):
        for kind in ("images", "labels"):
            (root / "data" / "val" / kind / f"{name}.png").unlink()

    stored = (root / "data" / "val" / "labels" / "scene1.png").read_bytes()
    photograph = (root / "data" / "val" / "images" / "scene1.png").read_bytes()
    remove("scene1")
    done, told = sample("results")
    assert done and f"moved to {root / 'results' / 'set_aside'}" in told and ": scene1 (1 in all)" in told
    for kind in ("images", "labels", "samples"):
        assert sorted(os.listdir(root / "results" / kind)) == ["scene0.png", "scene2.png"]
        moved = contents(root / "results" / "set_aside")
        assert moved[f"{kind}/scene1.png"] == before[f"{kind}/scene1.png"]
    # Back again, drawn anew: the old sample stays where it is; then gone again, into a folder of its own.
    (root / "data" / "val" / "labels" / "scene1.png").write_bytes(stored)
    (root / "data" / "val" / "images" / "scene1.png").write_bytes(photograph)
    done, told = sample("results")
    assert done and "1 images to make" in told
    remove("scene1")
    assert sample("results")[0]
    assert os.listdir(root / "results" / "set_aside_2" / "samples") == ["scene1.png"]
    assert contents(root / "results" / "set_aside") == moved


@pytest.mark.parametrize("flags", [(), ("--overwrite", "True"), ("--seed", "5", "--overwrite", "True")])
def test_a_picture_in_the_place_of_a_sample_is_set_aside_and_the_sample_made_again(root, sample, flags):
    assert sample("results")[0]
    before, path = samples(root / "results"), root / "results" / "samples" / "scene1.png"
    made = pixels(path)
    save(path, draw(9, (16, 16), 4)[0])  # of the right size
    foreign = path.read_bytes()
    done, told = sample("results", *flags)
    assert done and "not the samples that were made: samples/scene1.png (1 in all)" in told
    assert f"{1 if not flags else LAYOUTS} images to make" in told
    assert (root / "results" / "set_aside" / "samples" / "scene1.png").read_bytes() == foreign
    if "5" not in flags:  # but for rounding, as it was made alone
        assert np.abs(pixels(path).astype(int) - made).max() <= 1
    assert samples(root / "results").keys() == before.keys()
    assert "all are there" in sample("results", *flags[:2] if "5" in flags else ())[1]


def test_samples_exchanged_for_each_other_are_noticed_whatever_their_layouts(root, sample):
    assert sample("results", "--samples_per_layout", "2")[0]
    place, before = root / "results", contents(root / "results" / "samples_01")
    shutil.copy(place / "samples_00" / "scene0.png", place / "samples_01" / "scene0.png")
    label = root / "data" / "val" / "labels" / "scene2.png"
    save(label, 3 - pixels(label))  # whose samples are made anew for this reason
    shutil.copy(place / "samples_00" / "scene0.png", place / "samples_00" / "scene2.png")
    done, told = sample("results", "--samples_per_layout", "2")
    assert done and "samples_00/scene2.png, samples_01/scene0.png (2 in all)" in told and "3 images to make" in told
    after = contents(place / "samples_01")
    assert [name for name in before if after[name] != before[name]] == ["scene2.png"]
    assert len(list((place / "set_aside").rglob("*.png"))) == 2


def test_what_a_killed_run_made_is_known(root, sample, monkeypatch):
    """Its notes stand beside the record, which is written at the end."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sampling_run.SampleRun, "_note_time", killed)
        sample("results")
    notes = root / "results" / ".sdm-made-0.jsonl"
    assert len(notes.read_text().splitlines()) == LAYOUTS
    with open(notes, "a") as file:
        file.write('["samples", "scene1"')  # half a line
    made = samples(root / "results")
    save(root / "results" / "samples" / "scene1.png", draw(9, (16, 16), 4)[0])
    done, told = sample("results")
    assert done and "samples/scene1.png (1 in all)" in told and "1 images to make" in told and not notes.exists()
    assert samples(root / "results").keys() == made.keys()
    record = json.loads((root / "results" / "sampling.json").read_text())
    assert all(entry["samples"] for entry in record["pictures"].values())


def test_samples_of_a_version_that_noted_no_hashes_count_as_made(root, sample):
    assert sample("results")[0]
    path = root / "results" / "sampling.json"
    whole = json.loads(path.read_text())
    older = json.loads(path.read_text())
    for entry in older["pictures"].values():
        del entry["samples"]
    path.write_text(json.dumps(older))
    done, told = sample("results")
    assert done and "all are there" in told and json.loads(path.read_text())["pictures"] == whole["pictures"]


def test_a_label_that_is_gone_is_not_restored_beside_a_sample_of_another(root, sample):
    assert sample("results")[0]
    before = samples(root / "results")
    path = root / "data" / "val" / "labels" / "scene0.png"
    save(path, 3 - pixels(path))
    (root / "results" / "labels" / "scene0.png").unlink()
    done, told = sample("results")
    assert done and "because their layouts have changed: scene0" in told
    after = samples(root / "results")
    assert [name for name in before if after[name] != before[name]] == ["scene0.png"]


def test_labels_and_photographs_that_somebody_changed_are_restored(root, sample):
    assert sample("results")[0]
    before = contents(root / "results")
    for kind in ("labels", "images"):
        path = root / "results" / kind / "scene0.png"
        save(path, pixels(path)[::-1].copy())
    done, told = sample("results")
    after = contents(root / "results")
    assert done and "all are there" in told and {n for n in before if after[n] != before[n]} <= {"sampling.json"}


def test_a_folder_of_an_older_version_goes_on_where_that_is_safe(root, sample):
    """Its record says nothing of single pictures: a sample counts where the label map beside it is the data's."""
    assert sample("results")[0]
    path = root / "results" / "sampling.json"
    record = json.loads(path.read_text())
    del record["pictures"]
    del record["images"]["classes"]
    path.write_text(json.dumps(record))
    before = samples(root / "results")
    layout = root / "data" / "val" / "labels" / "scene2.png"
    save(layout, 3 - pixels(layout))
    label = root / "results" / "labels" / "scene1.png"
    label.rename(root / "kept.png")
    done, told = sample("results")  # a sample with nothing beside it that says what it was made from
    assert not done and "does not name" in told and "samples/scene1.png" in told
    (root / "kept.png").rename(label)
    done, told = sample("results")
    assert done and "taken over from an older version of this program" in told and ": scene0, scene1 (2 in all)" in told
    assert "because their layouts have changed: scene2 (1 in all)" in told and "1 images to make" in told
    assert samples(root / "results")["scene0.png"] == before["scene0.png"]
    assert len(json.loads(path.read_text())["pictures"]) == LAYOUTS and "all are there" in sample("results")[1]


def test_files_that_change_while_a_run_reads_them_stop_it(root, sample, monkeypatch):
    look = sampling_run.SampleRun._look

    def and_then_change(self):
        looks = look(self)
        path = root / "data" / "val" / "labels" / "scene2.png"
        save(path, 3 - pixels(path))
        return looks

    monkeypatch.setattr(sampling_run.SampleRun, "_look", and_then_change)
    done, told = sample("results", "--num_workers", "0")
    assert not done and "scene2 were changed while this run read them" in told
    assert not (root / "results" / "samples" / "scene2.png").exists()


def test_a_run_can_tell_what_it_would_make_and_writes_nothing(root, sample, monkeypatch):
    assert sample("results")[0]
    layout = root / "data" / "val" / "labels" / "scene1.png"
    save(layout, 3 - pixels(layout))
    (root / "results" / "samples" / "scene2.png").unlink()
    before = contents(root / "results")

    def tell(self):
        self.log(f"would make {self.missing()}")
        return True

    with monkeypatch.context() as patch:
        patch.setattr(sampling_run.SampleRun, "run", tell)
        for results, flags, count in (
            ("results", (), 2),
            ("results", ("--seed", "3", "--overwrite", "True"), 3),
            ("new", ("--num_samples", "2", "--samples_per_layout", "3"), 6),
        ):
            done, told = sample(results, *flags)
            total = 6 if results == "new" else LAYOUTS
            assert done and f"would make ({count}, {total})" in told, told
    assert contents(root / "results") == before and not (root / "new").exists()
    assert "2 images to make" in sample("results")[1]


# -- what dataset.json means ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trained,now,message",
    [
        ({"remap": {"0": 3, "3": 0}}, {}, "the stored id 0 meant class 3, now 0"),
        ({"classes": ["a", "b", "c"], "ignore_id": 255}, {"classes": ["a", "b", "c", "d"]}, "class 3, now none"),
        ({"classes": ["a", "b", "c", "d"]}, {"classes": ["b", "a", "c", "d"]}, "'a' was class 0, now 1"),
        ({}, {"grey": True}, "grey: False then, True now"),
        (
            {"classes": [{"name": n, "color": [i, 0, 0]} for i, n in enumerate("abcd")]},
            {"classes": [{"name": n, "color": [i, 0, 0]} for i, n in enumerate("abcd")], "label_encoding": "colors"},
            "label_encoding: ids then, colors now",
        ),
    ],
)
def test_a_dataset_json_that_contradicts_the_training_is_refused(root, sample, trained, now, message):
    save_checkpoint(root / "run", root / "data", dataset_json=trained)
    (root / "data" / "dataset.json").write_text(json.dumps(now))
    done, told = sample("results")
    assert not done and message in told and "dataset.json" in told, told
    assert not (root / "results").exists()


def test_names_colours_and_crops_may_differ_from_the_training(root, sample):
    save_checkpoint(root / "run", root / "data", dataset_json={"classes": ["a", "b", "c", "d"]})
    now = {"classes": [{"name": n, "color": [9, 9, i]} for i, n in enumerate("xbcd")], "exif": "ignore"}
    (root / "data" / "dataset.json").write_text(json.dumps(now))
    assert sample("results", "--num_samples", "1")[0]


# -- errors in place of tracebacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 11])
@pytest.mark.parametrize("damage", [b"", b"no picture", "half", "another size"])
def test_a_sample_that_is_no_whole_picture_is_made_again(root, sample, damage, number):
    """Also beyond the overview's eighth row, where nothing else opens it."""
    labels = root / "many"
    for i in range(12):
        save(labels / f"{i:02d}.png", draw(i, (16, 16), 4)[1])
    flags = ("--labels_dir", labels, "--batch_size", "12")
    assert sample("results", *flags)[0]
    before = samples(root / "results")
    path = root / "results" / "samples" / f"{number:02d}.png"
    whole = path.read_bytes()
    if damage == "another size":
        save(path, np.zeros((8, 8, 3), np.uint8))
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    done, told = sample("results", *flags)
    why = "moved to" if damage == "another size" else f"no whole picture: {number:02d}"
    assert done and "1 images to make" in told and why in told
    assert samples(root / "results").keys() == before.keys() and pixels(path).shape == (16, 16, 3)


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--s", "1e300"), "s must be a finite number; got 1e+300 (1 or less: no guidance; at most 1000)"),
        (("--s", "nan"), "s must be a finite number"),
        (("--num_steps", "0", "--timestep_respacing", "²"), "'²' is not a positive whole number"),
        (("--num_steps", "0", "--timestep_respacing", "ddim²"), "'²' is not a positive whole number"),
        (("--num_steps", "0", "--timestep_respacing", "٣"), "is not a positive whole number"),
    ],
)
def test_values_that_no_sampler_takes(root, sample, flags, message):
    done, told = sample("results", *flags)
    assert not done and message in told and not (root / "results").exists()


def test_a_full_disk_while_the_overview_is_drawn_costs_no_picture(root, sample, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sampling_run, "save_png", full)
        done, told = sample("results")
    assert not done and "overview.png: " in told and "No space left" in told and "all pictures are there" in told
    before = samples(root / "results")
    assert len(before) == LAYOUTS
    done, told = sample("results")
    assert done and "all are there" in told and samples(root / "results") == before
    assert (root / "results" / "overview.png").exists()


@pytest.mark.parametrize(
    "place", ["labels", "samples/scene1.png", "labels/scene1.png", "overview.png", "sampling.json"]
)
def test_a_folder_where_a_file_belongs_and_the_reverse(root, sample, place):
    assert sample("results")[0]
    path = root / "results" / place
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("a file")
    else:
        path.unlink()
        (path / "inside").mkdir(parents=True)
    for flags in ((), ("--seed", "1", "--overwrite", "True")):
        done, told = sample("results", *flags)
        assert not done and place in told, told
    assert path.is_file() == (place == "labels")


def test_colours_beyond_the_network_s_classes_are_found_before_anything_is_written(root, sample):
    colors = [[40 * i, 10, 10] for i in range(5)]
    settings = {"classes": [{"name": f"c{i}", "color": c} for i, c in enumerate(colors)], "label_encoding": "colors"}
    (root / "data" / "dataset.json").write_text(json.dumps(settings))
    for i in range(LAYOUTS):
        ids = draw(i, (20, 20), 5)[1]
        save(root / "data" / "val" / "labels" / f"scene{i}.png", np.array(colors, np.uint8)[ids])
    done, told = sample("results")  # the network has four classes
    assert not done and "colours of classes beyond num_classes 4: (160, 10, 10)" in told
    assert not os.listdir(root / "results" / "labels")


def test_a_name_of_251_bytes(root, sample):
    name = "ä" * 125 + "x"
    save(root / "long" / f"{name}.png", draw(0, (16, 16), 4)[1])
    done, told = sample("results", "--labels_dir", root / "long")
    assert done, told
    for kind in ("labels", "samples"):
        assert os.listdir(root / "results" / kind) == [f"{name}.png"]


def test_a_name_that_is_not_utf_8(root, sample):
    """Names are the system's own bytes."""
    name = os.fsdecode(b"caf\xe9")
    save(root / "latin" / f"{name}.png", draw(0, (16, 16), 4)[1])
    for told_of in ("1 images to make", "all are there"):
        done, told = sample("results", "--labels_dir", root / "latin")
        assert done and told_of in told
    assert os.listdir(root / "results" / "samples") == [f"{name}.png"]
    (root / "latin" / f"{name}.png").rename(root / "latin" / "cafe.png")
    done, told = sample("results", "--labels_dir", root / "latin")  # and can be told
    assert done and "moved to" in told
