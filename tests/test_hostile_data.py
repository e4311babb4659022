"""Odd names, odd ids, odd formats: each is read as what it is, or refused in one sentence."""

import io
import json
import os
import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import load_script, run_script, save, write_custom
from evaluation_helpers import load_script as load_evaluation
from PIL import Image, features

from guided_diffusion.data.masks import read_ids
from guided_diffusion.data.pictures import bar_chart, contact_sheet
from guided_diffusion.data.specs import DataError, get_spec
from guided_diffusion.data.transforms import open_map, read_label
from guided_diffusion.dist_util import World
from guided_diffusion.image_datasets import open_dataset
from guided_diffusion.logger import Logger
from guided_diffusion.runs.validation import Validation
from guided_diffusion.seeding import stable_seed

ODD = os.fsdecode(b"gr\xfcn")  # Latin-1, as old archives hold it


def custom(settings, num_classes=None):
    """What a dataset.json with these settings comes to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "dataset.json").write_text(json.dumps(settings), encoding="utf-8")
        return get_spec("custom", folder, num_classes)


# -- names that are no text -----------------------------------------------------------------------------------------


@pytest.fixture
def odd_names(tmp_path):
    root = write_custom(tmp_path / "data", {"train": 2, "val": 1}, settings={"classes": ["a", "b", "c", "d"]})
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            folder = root / split / kind
            try:
                os.rename(folder / "scene0.png", folder / f"{ODD}.png")
            except OSError:
                pytest.skip("this file system takes no such names")
    return root


def test_names_that_are_no_text_are_read_checked_and_cached(odd_names, tmp_path):
    data = open_dataset(data_dir=odd_names, dataset_mode="custom", split="val", image_size=16)
    assert data.names == [ODD] and data[0]["name"] == ODD and data.items[0].image.endswith(f"{ODD}.png")
    (odd_names / "train/labels/scene1.png").unlink()
    save(odd_names / "val/labels" / f"{ODD}.png", np.full((30, 40), 9, np.uint8))
    done = run_script(
        "scripts/data/verify_data.py", "--data_dir", odd_names, "--dataset_mode", "custom", "--workers", 1,
        "--report_dir", tmp_path / "report",
    )  # fmt: skip
    assert done.returncode == 1
    done.stderr.encode(), done.stdout.encode()  # what is printed is text
    assert "gr\\udcfcn.png" in (tmp_path / "report/problems.txt").read_text(encoding="utf-8")


def test_a_cache_of_names_that_are_no_text(odd_names, tmp_path):
    flags = ("--dataset_mode", "custom", "--image_size", 8, "--workers", 1, "--cache_dir", tmp_path / "cache")
    for written in (2, 0):
        done = run_script("scripts/data/cache_dataset.py", "--data_dir", odd_names, *flags)
        assert done.returncode == 0 and f"train: {written} of 2 written" in done.stdout, done.stderr
    done.stdout.encode()
    assert sorted(os.listdir(os.fsencode(tmp_path / "cache/train/images"))) == [b"gr\xfcn.png", b"scene1.png"]


def test_a_run_can_be_saved_whatever_its_images_are_called(odd_names, tmp_path):
    data = open_dataset(data_dir=odd_names, dataset_mode="custom", split="val", image_size=16)
    objective = SimpleNamespace(measured_in_words="")
    measured = Validation(data, objective, World(), images=1, batch_size=1)
    assert measured.measure == json.loads(json.dumps(measured.measure)) and measured.measure.startswith(
        "1 images of 16"
    )
    assert stable_seed("image", 0, ODD, 0) != stable_seed("image", 0, "gr?n", 0)
    logger = Logger(str(tmp_path / "log"))
    logger.log(f"passed over {ODD}")
    logger.open(0)
    logger.close()
    assert "passed over gr\\udcfcn" in (tmp_path / "log/log.txt").read_text(encoding="utf-8")
    tile = np.zeros((8, 8, 3), np.uint8)
    contact_sheet([[tile]], row_titles=[ODD + "\n2"], title=ODD, legend=[(ODD, (1, 2, 3))])
    bar_chart([ODD, "two\nlines"], [0.5, 0.5], [(0, 0, 0)] * 2, ODD)


# -- ignore_id, remap, names, colours --------------------------------------------------------------------------------


def test_an_ignore_id_that_is_a_class_is_an_error_with_the_remap_that_was_meant():
    with pytest.raises(DataError) as caught:
        custom({"classes": ["road", "car", "sky"], "ignore_id": 0})
    said = str(caught.value)
    assert "ignore_id 0 is also the id of class 0 ('road')" in said
    meant = json.loads("{" + said[said.index('"remap"') : said.index("}") + 1] + "}")
    table = custom({"classes": ["road", "car", "sky"], "ignore_id": 0, **meant}).lookup_table(256)
    assert table[:5].tolist() == [3, 0, 1, 2, -1]  # what files of ids 1 to 3 with 0 for unlabelled mean
    with pytest.raises(DataError, match=r'"remap": \{"2": 1, "3": 2\}.*if class 1 is itself'):
        custom({"classes": ["road", "void", "sky"], "ignore_id": 1})
    with pytest.raises(DataError, match="also the id of class 1"):
        custom({"classes": ["road", "car"], "ignore_id": 1, "remap": {"7": 0}})


def test_the_class_that_ignore_id_adds_is_no_id_of_files(tmp_path):
    names = ["road", "car", "sky"]
    assert custom({"classes": names, "ignore_id": 255}).lookup_table(256)[[0, 2, 3, 255]].tolist() == [0, 2, -1, 3]
    assert custom({"classes": names, "ignore_id": 3}).lookup_table(256)[[2, 3, 4]].tolist() == [2, 3, -1]
    assert custom({"classes": names, "ignore_id": 255, "remap": {"3": 0}}).lookup_table(256)[3] == 0
    assert custom({"classes": names, "ignore_id": 255}, 9).lookup_table(256)[[3, 4]].tolist() == [-1, 4]
    root = write_custom(tmp_path, {"train": 1}, classes=4, settings={"classes": names, "ignore_id": 255})
    with pytest.raises(DataError, match=r"ids that do not fit num_classes 4: 3;"):
        read_label(str(root / "train/labels/scene0.png"), get_spec("custom", root))


def test_a_recorded_training_goes_on_being_sampled():
    recorded = {"classes": ["road", "car", "sky"], "ignore_id": 0}
    assert get_spec("custom", None, 4, recorded).lookup_table(256)[:3].tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("remap", "said"),
    [
        ({"7": 0, "07": 1}, "names the id 7 twice, the second time as '07'"),
        ({"²": 0}, "remap holds '²'"),
        ({"٧": 0}, "remap holds"),
        ({"70000": 0}, "0 to 65535"),
        ({"9" * 5000: 0}, "remap holds"),
    ],
)
def test_a_remap_means_one_thing(remap, said):
    with pytest.raises(DataError, match=said):
        custom({"classes": ["a", "b"], "remap": remap})


@pytest.mark.parametrize("name", ["\ud800", "two\nlines", "", " ", "a\0", "\x1b[31m"])
def test_a_class_name_is_a_line_of_text(name):
    with pytest.raises(DataError, match=r"the name of class 1 is .*one line of text"):
        custom({"classes": ["a", name]})


@pytest.mark.parametrize("count", [4, 300])
def test_colours_beyond_num_classes_are_refused_where_a_map_has_them(tmp_path, count):
    classes = [{"name": str(i), "color": [i % 256, i // 256, 7]} for i in range(count)]
    spec = custom({"classes": classes, "label_encoding": "colors"}, count - 1)
    colors = np.array([c["color"] for c in classes], np.uint8)
    good = save(tmp_path / "good.png", colors[np.arange(count - 1)][None])
    label, table = read_label(str(good), spec)
    assert table[np.asarray(label)].tolist() == [list(range(count - 1))]
    bad = save(tmp_path / "bad.png", colors[np.arange(count)][None])
    with pytest.raises(DataError, match=rf"colours of classes beyond num_classes {count - 1}: .*names {count} classes"):
        read_label(str(bad), spec)


# -- lossy label maps ------------------------------------------------------------------------------------------------

LOSSY = {
    "jpeg.png": {"format": "JPEG", "quality": 75},
    "jpeg2000.png": {"format": "JPEG2000"},
    "jpeg.tif": {"format": "TIFF", "compression": "jpeg"},
    "webp.png": {"format": "WEBP", "quality": 75},
    "avif.png": {"format": "AVIF"},
}
# No GIF: reading one is exact, but Pillow renumbers the ids when it writes one.
LOSSLESS = {
    "a.png": {}, "a.bmp": {}, "raw.tif": {}, "lzw.tif": {"compression": "tiff_lzw"}, "a.pgm": {},
    "deflate.tif": {"compression": "tiff_adobe_deflate"}, "packbits.tif": {"compression": "packbits"},
    "zip.tif": {"compression": "tiff_deflate"}, "bits.tif": {"compression": "group4"},
}  # fmt: skip


def ids_map(mode="L"):
    ids = (np.indices((24, 24)).sum(0) // 3 * 5 % 40).astype(np.uint8)
    return Image.fromarray(ids) if mode == "L" else Image.fromarray(ids > 20)


def readers():
    """Every way in for a label map: the loader's and the pipeline's (one function), and the scorers'."""
    load = load_evaluation("label_maps").load_label_map
    return {
        "loader": lambda path: np.asarray(open_map(str(path), "label map")),
        "scorer": lambda path: load(path).numpy(),
    }


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("reader", ["loader", "scorer"])
def test_a_lossy_map_is_known_by_what_decodes_it(tmp_path, name, reader):
    try:
        ids_map().save(tmp_path / name, **LOSSY[name])
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {name}")
    with pytest.raises(ValueError, match=r"stored as .* which may change ids"):
        readers()[reader](tmp_path / name)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("reader", ["loader", "scorer"])
def test_lossless_maps_are_read_as_stored(tmp_path, name, reader):
    if name.endswith(".tif") and LOSSLESS[name] and not features.check("libtiff"):
        pytest.skip("this Pillow has no libtiff")
    if name == "bits.tif" and reader == "scorer":
        pytest.skip("the scorers read 8 bits")
    picture = ids_map("1" if name == "bits.tif" else "L")
    picture.save(tmp_path / name, **LOSSLESS[name])
    assert np.array_equal(readers()[reader](tmp_path / name), np.asarray(picture))


def test_verify_data_and_the_pipeline_refuse_a_lossy_map(tmp_path):
    root = write_custom(tmp_path / "data", {"train": 1, "val": 1}, settings={"classes": ["a", "b", "c", "d"]})
    Image.open(root / "val/labels/scene0.png").save(root / "val/labels/scene0.png", format="JPEG", quality=95)
    done = run_script(
        "scripts/data/verify_data.py", "--data_dir", root, "--dataset_mode", "custom", "--workers", 1,
        "--report_dir", tmp_path / "report",
    )  # fmt: skip
    assert done.returncode == 1 and "scene0.png is stored as JPEG" in done.stderr

    with pytest.raises(DataError, match="is stored as JPEG"):
        read_ids(root / "val/labels/scene0.png", "label map")
    with Image.open(root / "val/labels/scene0.png") as picture, pytest.raises(ValueError, match="stored as JPEG"):
        read_ids(picture, "label map")
    with Image.open(root / "train/labels/scene0.png") as picture:
        assert read_ids(picture, "label map").shape == (30, 40)


# -- addresses, reports, notes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["s3://bucket/set", "ftp://host/set", "https://example.com/set", "gs:/x"])
def test_an_address_that_cannot_be_read(tmp_path, address):
    flags = ("--dataset_mode", "custom", "--num_classes", 4, "--data_dir", address)
    done = run_script("scripts/data/verify_data.py", *flags, "--report_dir", tmp_path / "report")
    assert done.returncode == 1 and f"{address} cannot be read: a data set is a local folder" in done.stderr
    done = run_script("scripts/data/cache_dataset.py", *flags, "--image_size", 8, "--cache_dir", tmp_path / "cache")
    assert done.returncode == 1 and "cannot be read" in done.stderr and not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(data_dir=address, dataset_mode="ade20k", split="train", image_size=8)
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(data_dir=None, labels_dir=address, dataset_mode="ade20k", split="val", image_size=8)


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    root = write_custom(tmp_path / "data", settings={"classes": ["a", "b", "c", "d"]})
    flags = ["--data_dir", root, "--dataset_mode", "custom", "--workers", 1, "--report_dir"]
    (tmp_path / "file").write_text("mine")
    done = run_script("scripts/data/verify_data.py", *flags, tmp_path / "file")
    assert done.returncode == 1 and "the report cannot be written" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    script = load_script("scripts/data/verify_data.py")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "save_png", full)
    assert script.main([str(flag) for flag in (*flags, tmp_path / "report")]) == 1


@pytest.mark.parametrize("note", [b"", b"\xff\xfe\x00", b"[1]", b"7", b"{}", b'{"complete": ', None])
def test_a_garbled_note_of_a_cache(tmp_path, note):
    root = write_custom(tmp_path / "data", settings={"classes": ["a", "b", "c", "d"]})
    if note is None:
        (root / "cache.json").mkdir()
    else:
        (root / "cache.json").write_bytes(note)
    flags = ("--data_dir", root, "--dataset_mode", "custom", "--report_dir", tmp_path / "report")
    done = run_script("scripts/data/verify_data.py", *flags)
    assert done.returncode == 1 and "cache.json is not the note of a cache" in done.stderr
    with pytest.raises(DataError, match="is not the note of a cache"):
        open_dataset(data_dir=root, dataset_mode="custom", split="train", image_size=8)


def test_data_errors_travel_between_processes():
    assert str(pickle.load(io.BytesIO(pickle.dumps(DataError("a sentence"))))) == "a sentence"
