"""The scripts that write data sets never touch a person's own files: one sentence, and the same bytes afterwards."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import REPOSITORY, load_script, run_script, save, write_custom
from PIL import Image

sys.path.insert(0, str(REPOSITORY / "scripts" / "data"))

import prepare_celebamask
from preparation import PreparationError, _short, open_output, replacing
from prepare_camvid import CLASSES, prepare


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder with its bytes, and every link with what it names."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def refusal(script: str, *arguments) -> str:
    """The one sentence with which a script refuses; anything but that fails."""
    try:
        done = run_script(script, *arguments)
    except SystemExit as end:
        assert isinstance(end.code, str)
        return end.code
    assert done.returncode == 1
    return done.stderr


@pytest.fixture
def camvid(tmp_path):
    """CamVid's structure, with a dataset.json of the user's own."""
    root = tmp_path / "camvid"
    for split in ("train", "val", "test"):
        for i in range(2):
            ids = np.full((9, 12), (i + len(split)) % len(CLASSES), np.uint8)
            save(root / split / "images" / f"{i}.png", np.dstack([ids * 20] * 3))
            save(root / split / "labels" / f"{i}.png", ids)
    (root / "dataset.json").write_text('{"classes": ["mine"]}')
    return root


# -- where data sets are written -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "where"), [("camvid", "is"), ("camvid/prepared", "lies inside"), (".", "contains"), ("link", "is")]
)
def test_a_data_set_is_not_written_into_its_source(camvid, tmp_path, out, where):
    (tmp_path / "link").symlink_to(camvid)
    before = contents(tmp_path)
    said = refusal("scripts/data/prepare_camvid.py", "--source", camvid, "--out", tmp_path / out)
    assert f"{where} {camvid}" in said and "choose another folder" in said
    assert contents(tmp_path) == before


SCRIPTS = {
    "scripts/data/prepare_camvid.py": ("--out", "--source", "camvid"),
    "scripts/scenes/make_medical_example.py": ("--data_dir", "--train", 2, "--val", 1, "--size", 16),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_of_other_files_is_not_written_to(camvid, tmp_path, script):
    flag, *more = SCRIPTS[script]
    more = [camvid if part == "camvid" else part for part in more]
    own = write_custom(tmp_path / "own", {"train": 2, "val": 1}, settings={"classes": ["a", "b", "c", "d"]})
    before = contents(own)
    assert "holds other files" in refusal(script, flag, own, *more)
    assert contents(own) == before
    (own.parent / "file").write_text("mine")
    assert "is not a folder" in refusal(script, flag, own.parent / "file", *more)
    assert (own.parent / "file").read_text() == "mine"
    for _ in range(2):  # what it made itself it makes again
        run_script(script, flag, tmp_path / "new", *more)
    made = contents(tmp_path / "new")
    (tmp_path / "new/dataset.json").write_text('{"classes": ["edited"]}')
    assert "dataset.json is not as this script wrote it" in refusal(script, flag, tmp_path / "new", *more)
    assert contents(tmp_path / "new") == made | {"dataset.json": b'{"classes": ["edited"]}'}


def test_only_what_the_record_names_is_replaced_or_removed(camvid, tmp_path):
    out = tmp_path / "out"
    prepare(camvid, out, every=2)
    (out / "train/images/.notes.png.7.tmp").write_text("looks like a leftover")
    (out / "train/images/.0.png.7.tmp").write_text("is a leftover")
    prepare(camvid, out, every=2)
    assert (out / "train/images/.notes.png.7.tmp").exists() and not (out / "train/images/.0.png.7.tmp").exists()
    save(out / "train/images/1.png", np.zeros((3, 3), np.uint8))  # a name that the next run would use
    before = contents(out)
    with pytest.raises(PreparationError, match=r"images/1\.png is in the way"):
        prepare(camvid, out)
    assert contents(out) == before
    with pytest.raises(PreparationError, match=r"was made by 'prepare_camvid\.py', not by make_scenes\.py"):
        open_output(out, "make_scenes.py", {"train/images": {"a.png"}})
    for record in (
        "[]",
        "{",
        '{"files": {"\\ud800": ["a.png"]}, "dataset_json": []}',
        '{"files": {"../x": ["a.png"]}, "dataset_json": []}',
        '{"files": {}}',
    ):
        (out / "prepared.json").write_text(record)
        with pytest.raises(PreparationError, match=r"prepared\.json is no record"):
            prepare(camvid, out)


def test_nothing_is_written_through_a_link(camvid, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere / "0.png", np.zeros((3, 3), np.uint8))
    before = contents(elsewhere)
    prepare(camvid, tmp_path / "out", every=2)
    for file in (tmp_path / "out/train/images").iterdir():
        file.unlink()
    (tmp_path / "out/train/images").rmdir()
    (tmp_path / "out/train/images").symlink_to(elsewhere)
    with pytest.raises(PreparationError, match="images is a link or a file"):
        prepare(camvid, tmp_path / "out", every=2)
    assert contents(elsewhere) == before


def test_a_full_disk_is_one_sentence(camvid, tmp_path, monkeypatch):
    module = load_script("scripts/data/prepare_camvid.py")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "link_or_copy", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        module.main(["--source", str(camvid), "--out", str(tmp_path / "out")])


# -- sources ---------------------------------------------------------------------------------------------------------


def test_links_to_nothing_and_twins_in_a_source_are_named(camvid, tmp_path):
    (camvid / "val/images/1.png").unlink()
    (camvid / "val/images/1.png").symlink_to("gone.png")
    with pytest.raises(PreparationError, match=r"val/images/1\.png is a link to nothing"):
        prepare(camvid, tmp_path / "out")
    (camvid / "val/images/1.png").unlink()
    for name in ("1.png", "1.jpg"):
        save(camvid / "val/images" / name, np.zeros((9, 12, 3), np.uint8))
    with pytest.raises(PreparationError, match="share a stem"):
        prepare(camvid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_that_are_there_twice_or_lead_nowhere_are_named(tmp_path):
    for folder in ("0", "1"):
        save(tmp_path / "anno" / folder / "00000_skin.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(PreparationError, match=r"00000_skin\.png and .*00000_skin\.png are both that mask"):
        prepare_celebamask.find_masks(tmp_path / "anno")
    (tmp_path / "anno/1/00000_skin.png").unlink()
    (tmp_path / "anno/1/00001_skin.png").symlink_to("gone.png")
    with pytest.raises(PreparationError, match=r"00001_skin\.png is a link to nothing"):
        prepare_celebamask.find_masks(tmp_path / "anno")
    (tmp_path / "img").mkdir()
    (tmp_path / "img/0.jpg").symlink_to("0.jpg")
    with pytest.raises(PreparationError, match=r"0\.jpg is a link to nothing"):
        prepare_celebamask.files_by_stem(tmp_path / "img", ".jpg")


@pytest.mark.parametrize("polygons", ['{"imgWidth": 8, "imgHei', "[]", "{}", "", '{"imgWidth": 8, "imgHeight": 8}'])
def test_a_cut_polygon_file_is_named(tmp_path, polygons):
    pytest.importorskip("cityscapesscripts")
    folder = tmp_path / "gtFine/train/a"
    folder.mkdir(parents=True)
    (folder / "a_polygons.json").write_text(polygons)
    before = contents(tmp_path)
    said = refusal("scripts/data/prepare_cityscapes.py", "--data_dir", tmp_path, "--workers", 1)
    assert "a_polygons.json cannot be drawn" in said and contents(tmp_path) == before
    (folder / "a_labelIds.png").symlink_to("gone.png")
    said = refusal("scripts/data/prepare_cityscapes.py", "--data_dir", tmp_path, "--workers", 1)
    assert "a_labelIds.png is a link to nothing" in said


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path):
    """A data set, its cache, and a function that makes the cache again: its printed lines."""
    data = write_custom(tmp_path / "data", {"train": 2, "val": 1}, size=(90, 70))

    def make(data_dir=data, cache_dir=tmp_path / "cache", code=0):
        options = ("--dataset_mode", "custom", "--num_classes", 4, "--image_size", 16, "--workers", 1)
        done = run_script("scripts/data/cache_dataset.py", "--data_dir", data_dir, "--cache_dir", cache_dir, *options)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    make()
    return data, tmp_path / "cache", make


@pytest.mark.parametrize(
    "files",
    [
        ["../x.png"],
        ["train/../../x.png"],
        ["/x.png"],
        ["dataset.json"],
        ["train/images/notes.txt"],
        ["\ud800.png"],
        [7],
        "x",
    ],
)
def test_a_line_of_the_record_reaches_nothing_outside_the_cache(cached, tmp_path, files):
    _, cache, make = cached
    save(tmp_path / "x.png", np.zeros((3, 3), np.uint8))
    save(tmp_path / "y.png", np.zeros((3, 3), np.uint8))
    (cache / "train/images/notes.txt").write_text("mine")
    with open(cache / "cache_sources.jsonl", "a") as file:
        file.write(json.dumps(["train", "gone.png", [None] * 3, files]) + "\n" + json.dumps(["files", files]) + "\n")
    before = {name: content for name, content in contents(tmp_path).items() if "cache_sources" not in name}
    make()
    assert {name: content for name, content in contents(tmp_path).items() if "cache_sources" not in name} == before


def test_the_cache_replaces_nothing_that_is_not_its_own(cached, tmp_path):
    data, cache, make = cached
    save(data / "train/images/new.png", np.zeros((70, 90, 3), np.uint8))
    save(data / "train/labels/new.png", np.zeros((70, 90), np.uint8))
    save(cache / "train/images/new.png", np.zeros((3, 3), np.uint8))
    before = (cache / "train/images/new.png").read_bytes()
    assert "new.png is in the way" in make(code=1)
    assert (cache / "train/images/new.png").read_bytes() == before
    (cache / "train/images/new.png").unlink()
    (cache / "train/images").rename(tmp_path / "elsewhere")
    (cache / "train/images").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in make(code=1)


@pytest.mark.parametrize("place", [".", "data", "data/cache"])
def test_a_cache_lies_apart_from_its_source(cached, tmp_path, place):
    _, _, make = cached
    before = contents(tmp_path)
    assert "must be a folder apart from" in make(cache_dir=tmp_path / place, code=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("harm", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c[:-20] + b"\0" * 20])
@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_damaged_file_of_a_cache_is_made_again(cached, kind, harm):
    _, cache, make = cached
    file = cache / "train" / kind / "scene1.png"
    whole = file.read_bytes()
    file.write_bytes(harm(whole))
    assert "train: 1 of 2 written" in make() and file.read_bytes() == whole
    assert "train: 0 of 2 written" in make()


def test_a_full_disk_under_a_cache_is_one_sentence(cached, monkeypatch):
    data, cache, _ = cached
    script = load_script("scripts/data/cache_dataset.py")

    def full(*_):
        raise OSError(28, "No space left on device", "cache.json")

    monkeypatch.setattr(script.os, "replace", full)
    flags = [
        "--data_dir",
        data,
        "--dataset_mode",
        "custom",
        "--num_classes",
        4,
        "--image_size",
        16,
        "--cache_dir",
        cache,
    ]
    assert script.main([str(flag) for flag in (*flags, "--cache_dir", cache)]) == 1
    assert not list(cache.rglob("*.part*"))


def test_a_killed_run_is_gone_on_with(cached):
    _, cache, make = cached
    record = cache / "cache_sources.jsonl"
    claims = [line for line in record.read_text().splitlines() if line.startswith('["files"')]
    record.write_text("\n".join(claims) + '\n["train", "sce')  # killed before a line of the record was whole
    (cache / "train/images" / ".00000000.part1").write_text("not ours by its name")
    half = load_script("scripts/data/cache_dataset.py")._short("scene0.png")
    (cache / "train/images" / f".{half}.part1").write_text("half")
    assert "train: 2 of 2 written" in make()
    assert sorted(p.name for p in (cache / "train/images").iterdir()) == [
        ".00000000.part1", "scene0.png", "scene1.png",
    ]  # fmt: skip


def test_a_long_name_is_cached(cached):
    data, cache, make = cached
    name = "n" * 246 + ".png"  # 250 bytes
    Image.new("RGB", (90, 70)).save(data / "train/images" / name)
    Image.new("L", (90, 70)).save(data / "train/labels" / name)
    assert "train: 1 of 3 written" in make() and (cache / "train/images" / name).exists()


def test_a_description_that_is_not_the_caches_own_is_not_replaced(cached):
    data, cache, make = cached
    place, source = cache / "dataset.json", data / "dataset.json"
    place.write_text('{"classes": ["mine"]}')
    for content in (None, '{"classes": ["a", "b", "c", "d"]}'):
        if content:
            source.write_text(content)
        assert "dataset.json is in the way" in make(code=1) and place.read_text() == '{"classes": ["mine"]}'
    place.unlink()
    make()
    assert place.read_text() == source.read_text()
    source.write_text('{"classes": ["A", "b", "c", "d"]}')  # what this script wrote it replaces, and removes
    make()
    assert place.read_text() == source.read_text()
    place.unlink()
    place.symlink_to(source)
    source.write_text('{"classes": ["B", "b", "c", "d"]}')
    assert "dataset.json is in the way" in make(code=1) and place.is_symlink()
    place.unlink()
    make()
    source.unlink()
    make()
    assert not place.exists()


def test_a_name_of_250_bytes_is_prepared_and_leaves_nothing_half_written(camvid, tmp_path, monkeypatch):
    name = "n" * 246 + ".png"
    for part in ("images", "labels"):
        shutil.copy(camvid / "val" / part / "1.png", camvid / "val" / part / name)
    prepare(camvid, tmp_path / "out")
    assert name in {path.name for path in (tmp_path / "out").rglob("*.png")}
    module = load_script("scripts/data/prepare_camvid.py")

    def full(*_):
        raise OSError(28, "No space left on device", name)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="No space left on device"):
        patch.setattr(os, "replace", full)
        module.main(["--source", str(camvid), "--out", str(tmp_path / "new")])
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    (tmp_path / "new" / f".{_short('prepared.json')}.7.tmp").write_text("of a killed run")
    prepare(camvid, tmp_path / "new")


def test_replacing_leaves_no_half_file(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
