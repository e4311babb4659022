import io
import os
import time
import unicodedata

import blobfile
import numpy as np
import pytest
import torch
from data_helpers import run_script, save, write_benchmark, write_custom

from guided_diffusion.data.listing import list_items, list_label_items, unread_files
from guided_diffusion.data.specs import DataError, MissingSplitError, get_spec
from guided_diffusion.image_datasets import open_dataset

IDS = np.zeros((4, 4), dtype=np.uint8)
PHOTOGRAPH = np.zeros((4, 4, 3), dtype=np.uint8)
SPEC = get_spec("custom", num_classes=4)


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize("mode", ["ade20k", "cityscapes", "celeba", "coco"])
def test_benchmark_layouts(tmp_path, mode):
    spec = get_spec(mode)
    write_benchmark(tmp_path, mode)
    train, val = list_items(spec, tmp_path, "train"), list_items(spec, tmp_path, "val")
    assert len(train) == len(val) == 2 and not {i.name for i in train} & {i.name for i in val}
    assert all((item.instance is not None) == (mode in ("cityscapes", "coco")) for item in train)
    assert list_items(spec, tmp_path, "test") == val  # the only evaluation split that is there
    if mode == "cityscapes":
        assert train[0].name == "city_0_leftImg8bit" and train[0].label.endswith("city0/city_0_gtFine_labelIds.png")


def test_pairs_go_by_name_not_by_position(tmp_path):
    touch(tmp_path / "train/images", "b.jpg", "a10.JPG", "a9.jpeg", ".hidden.jpg", "notes.txt")
    touch(tmp_path / "train/labels", "a9.png", "a10.png", "b.PNG", "Thumbs.db")
    items = list_items(SPEC, tmp_path, "train")
    assert [(i.name, os.path.basename(i.image), os.path.basename(i.label)) for i in items] == [
        ("a10", "a10.JPG", "a10.png"),
        ("a9", "a9.jpeg", "a9.png"),
        ("b", "b.jpg", "b.PNG"),
    ]


def test_missing_and_extra_partners_are_named(tmp_path):
    touch(tmp_path / "train/images", *(f"only_image_{i}.jpg" for i in range(8)), "both.jpg")
    touch(tmp_path / "train/labels", "both.png", "only_label.png")
    with pytest.raises(DataError) as error:
        list_items(SPEC, tmp_path, "train")
    message = str(error.value)
    assert "8 photographs" in message and "only_image_0.jpg" in message and "only_image_7.jpg" not in message
    assert "1 label map in" in message and "only_label.png" in message


def test_missing_instance_maps_are_named(tmp_path):
    write_custom(tmp_path, {"train": 2}, instances=True)
    (tmp_path / "train/instances/scene1.png").unlink()
    with pytest.raises(DataError, match=r"1 label map in .* with no instance map|scene1.png.*--no_instance True"):
        list_items(SPEC, tmp_path, "train")
    assert list_items(SPEC, tmp_path, "train", use_instances=False)[1].instance is None


def test_two_files_of_one_stem(tmp_path):
    touch(tmp_path / "train/images", "a.jpg", "a.png")
    touch(tmp_path / "train/labels", "a.png")
    with pytest.raises(DataError, match=r"share the stem 'a'.*a\.(jpg|png).*a\.(jpg|png)"):
        list_items(SPEC, tmp_path, "train")


def test_labels_stored_as_jpeg(tmp_path):
    touch(tmp_path / "train/images", "a.jpg")
    touch(tmp_path / "train/labels", "a.jpg")
    with pytest.raises(DataError, match="lossy format"):
        list_items(SPEC, tmp_path, "train")


def test_missing_and_empty_splits(tmp_path):
    with pytest.raises(
        MissingSplitError, match=r"nowhere does not exist; the layout of dataset_mode custom is \{split\}/im"
    ):
        list_items(SPEC, tmp_path / "nowhere", "train")
    write_custom(tmp_path, {"train": 1})
    with pytest.raises(MissingSplitError, match=r"has no val split \(looked for .*val/images.*validation/images"):
        list_items(SPEC, tmp_path, "val")
    touch(tmp_path / "val/images")
    with pytest.raises(DataError, match=r"val/images exists, but .*val/labels does not"):
        list_items(SPEC, tmp_path, "val")
    touch(tmp_path / "val/labels")
    with pytest.raises(DataError, match="holds no photographs"):
        list_items(SPEC, tmp_path, "val")
    with pytest.raises(MissingSplitError, match="--data_dir"):
        open_dataset(data_dir="", dataset_mode="custom", split="train", image_size=8, num_classes=2)


def test_links(tmp_path):
    write_custom(tmp_path / "real", {"train": 2})
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(tmp_path / "real/train")
    (tmp_path / "real/train/images/loop").symlink_to(tmp_path / "real/train/images")  # a folder that holds itself
    assert len(list_items(SPEC, tmp_path / "data", "train")) == 2
    loop = tmp_path / "real/train/images/self.png"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match=r"self\.png .*link to itself"):
        list_items(SPEC, tmp_path / "data", "train")
    loop.unlink()
    loop.symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"self\.png is a link to nothing"):
        list_items(SPEC, tmp_path / "data", "train")


def test_a_folder_link_loop_in_a_nested_layout(tmp_path):
    write_benchmark(tmp_path, "cityscapes")
    (tmp_path / "leftImg8bit/train/again").symlink_to(tmp_path / "leftImg8bit/train")
    assert len(list_items(get_spec("cityscapes"), tmp_path, "train")) == 2


def test_spaces_and_letters_of_any_language(tmp_path):
    names = ["a street", "Müller", "道路", "тест 1"]
    for name in names:
        save(tmp_path / "train/images" / f"{unicodedata.normalize('NFC', name)}.png", PHOTOGRAPH)
        save(tmp_path / "train/labels" / f"{unicodedata.normalize('NFD', name)}.png", IDS)  # as macOS stores them
    dataset = open_dataset(data_dir=tmp_path, dataset_mode="custom", split="train", image_size=4, num_classes=1)
    assert dataset.names == sorted(names) and len([dataset[i] for i in range(4)]) == 4


def test_hundred_thousand_files_list_in_seconds(tmp_path):
    for folder, extension in (("images", "jpg"), ("labels", "png")):
        (tmp_path / "train" / folder).mkdir(parents=True)
        for i in range(50_000):
            os.close(os.open(tmp_path / "train" / folder / f"{i:012d}.{extension}", os.O_CREAT))
    start = time.perf_counter()
    items = list_items(SPEC, tmp_path, "train")
    seconds = time.perf_counter() - start
    assert len(items) == 50_000 and items[0].name == "000000000000"
    assert seconds < 4  # 0.2 to 0.4 s measured on two busy cores


def test_label_maps_alone(tmp_path):
    write_custom(tmp_path / "custom", {"val": 2}, instances=True)
    items = list_label_items(SPEC, tmp_path / "custom/val/labels")
    assert [i.name for i in items] == ["scene0", "scene1"] and items[0].image is None
    assert items[0].instance.endswith("val/instances/scene0.png")
    write_benchmark(tmp_path / "city", "cityscapes")
    items = list_label_items(get_spec("cityscapes"), tmp_path / "city/gtFine/val")
    assert [i.name for i in items] == ["city_2_leftImg8bit", "city_3_leftImg8bit"] and items[0].instance
    write_benchmark(tmp_path / "coco", "coco")
    assert list_label_items(get_spec("coco"), tmp_path / "coco/val_label")[0].instance.endswith(
        "val_inst/000000000002.png"
    )
    save(tmp_path / "drawn/mine.png", IDS)
    assert list_label_items(get_spec("cityscapes"), tmp_path / "drawn")[0].name == "mine"
    with pytest.raises(MissingSplitError, match="no folder of label maps"):
        list_label_items(SPEC, tmp_path / "nothing")


def test_a_bucket_reads_like_a_folder(tmp_path, monkeypatch):
    """blobfile's functions are redirected from gs:// to a folder: what the loader asks of it is what it offers."""
    write_custom(tmp_path / "set", {"train": 3}, settings={"classes": ["a", "b", "c", "d"], "crop": "keep_aspect"})

    def local(path):
        path = str(path)
        if path.startswith(str(tmp_path)):  # the comparison below reads the same files at home
            return path
        assert path.startswith("gs://bucket/")
        return str(tmp_path / path.removeprefix("gs://bucket/"))

    scandir = blobfile.scandir
    monkeypatch.setattr(
        blobfile,
        "scandir",
        lambda path: (entry._replace(path=f"{path}/{entry.name}") for entry in scandir(local(path))),
    )
    monkeypatch.setattr(blobfile, "isdir", lambda path: os.path.isdir(local(path)))
    monkeypatch.setattr(blobfile, "exists", lambda path: os.path.exists(local(path)))
    monkeypatch.setattr(blobfile, "BlobFile", lambda path, mode: io.FileIO(local(path), mode))
    remote = open_dataset(data_dir="gs://bucket/set", dataset_mode="custom", split="train", image_size=8)
    at_home = open_dataset(data_dir=tmp_path / "set", dataset_mode="custom", split="train", image_size=8)
    assert remote.spec.class_names == ("a", "b", "c", "d") and remote.names == at_home.names
    assert torch.equal(remote[2]["image"], at_home[2]["image"]) and torch.equal(remote[2]["label"], at_home[2]["label"])
    with pytest.raises(MissingSplitError, match="gs://bucket/set has no val split"):
        open_dataset(data_dir="gs://bucket/set", dataset_mode="custom", split="val", image_size=8)
    touch(tmp_path / "set/train/images/more", "b.jpg")
    touch(tmp_path / "set/train/images/more/still", "c.jpg")
    (note,) = unread_files(remote.spec, "gs://bucket/set", "train")
    assert note.startswith(
        "2 picture files in sub-folders of gs://bucket/set/train/images not read (more/b.jpg, more/s"
    )
    stat = blobfile.stat
    monkeypatch.setattr(blobfile, "stat", lambda path: stat(local(path)))
    options = ("--dataset_mode", "custom", "--cache_dir", tmp_path / "cache", "--image_size", 8, "--workers", 1)
    for written in (3, 0, 1):
        result = run_script("scripts/data/cache_dataset.py", "--data_dir", "gs://bucket/set", *options)
        assert f"train: {written} of 3 written" in result.stdout, result.stderr
        if not written:
            save(tmp_path / "set/train/labels/scene1.png", np.zeros((30, 40), np.uint8))


def test_pictures_in_sub_folders_are_counted(tmp_path):
    images, labels = tmp_path / "train/images", tmp_path / "train/labels"
    touch(images, "a.png")
    touch(labels, "a.png")
    assert unread_files(SPEC, tmp_path, "train") == []
    touch(images / "monday", "b.jpg", "c.JPG", ".hidden.jpg", "notes.txt")
    touch(images / "monday" / "late", "d.jpg")
    touch(images / ".thumbnails", "a.png")
    (images / "monday" / "back").symlink_to(images)  # a circle
    (images / "monday" / "nowhere.png").symlink_to(tmp_path / "nothing")
    touch(labels / "monday", "b.png")
    notes = unread_files(SPEC, tmp_path, "train")
    assert len(notes) == 2
    assert (
        f"4 picture files in sub-folders of {images} not read (monday/b.jpg, monday/c.JPG, monday/late/d.jpg"
        in notes[0]
    )
    assert f"1 picture file in sub-folders of {labels} not read (monday/b.png); move" in notes[1]
    assert len(list_items(SPEC, tmp_path, "train")) == 1
    (images / "a.png").unlink()
    with pytest.raises(DataError, match=r"holds no photographs.*4 picture files in sub-folders"):
        list_items(SPEC, tmp_path, "train")


def test_sub_folders_that_a_layout_reads_are_not_counted(tmp_path):
    write_benchmark(tmp_path, "cityscapes")
    assert unread_files(get_spec("cityscapes"), tmp_path, "train") == []
    touch(tmp_path / "leftImg8bit/train/city0/more", "city_9_leftImg8bit.png")
    assert len(unread_files(get_spec("cityscapes"), tmp_path, "train")) == 1
