"""Preparing CelebAMask-HQ and COCO-Stuff, on small archives of the real structure made here."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "scripts" / "data"))

import prepare_celebamask as celeba  # noqa: E402
import prepare_cocostuff as coco  # noqa: E402
from preparation import PreparationError, link_or_copy, replacing, run_parallel  # noqa: E402


def read(path):
    return np.asarray(Image.open(path))


def files_below(folder):
    """All files but the script's own record."""
    found = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name != "prepared.json")


def run(script, **flags):
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    command = [sys.executable, ROOT / "scripts" / "data" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


# ---- what both share


def double(value):
    if value == 13:
        raise PreparationError("thirteen is unlucky")
    return 2 * value


@pytest.mark.parametrize("workers", [1, 2])
def test_parallel_work_returns_everything_and_stops_at_an_error(workers):
    assert sorted(run_parallel(double, range(12), workers, "")) == [2 * i for i in range(12)]
    assert run_parallel(double, [], workers, "") == []
    with pytest.raises(PreparationError, match="unlucky"):
        run_parallel(double, range(50), workers, "")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert files_below(tmp_path) == ["a.txt"] and file.read_text() == "old"


def test_copies_where_links_are_impossible(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    link_or_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "x" and not (tmp_path / "a").samefile(tmp_path / "c")
    assert files_below(tmp_path) == ["a", "b", "c"]


# ---- CelebAMask-HQ


@pytest.fixture
def faces(tmp_path):
    """Six faces of 64 pixels in the archive's structure; rows from 3 * id on belong to part id, so later ones cover."""
    source = tmp_path / "CelebAMask-HQ"
    (source / "CelebA-HQ-img").mkdir(parents=True)
    for face in range(6):
        Image.new("RGB", (128, 128), (40 * face, 0, 0)).save(source / "CelebA-HQ-img" / f"{face}.jpg")
        folder = source / "CelebAMask-HQ-mask-anno" / str(face // 2)  # 2,000 a folder in the archive
        folder.mkdir(parents=True, exist_ok=True)
        for class_id, part in enumerate(celeba.PARTS):
            if class_id and (class_id + face) % 5:  # every face lacks some parts
                mask = np.zeros((64, 64), np.uint8)
                mask[3 * class_id :] = 255
                mode = ("L", "RGB", "P")[face % 3]
                Image.fromarray(mask).convert(mode).save(folder / f"{face:05d}_{part}.png")
    mapping = ["idx       orig_idx  orig_file", *(f"{i} {100 + i} {101 + i:06d}.jpg" for i in range(6))]
    (source / celeba.MAPPING_NAME).write_text("\n".join(mapping) + "\n")
    partition = [f"{i:06d}.jpg {'2012010'[i - 100]}" for i in range(100, 107)]  # face 0 is 000101.jpg
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    return source


def prepare_faces(source, out, **changes):
    settings = {"faces": 6, "test_faces": 2, "mapping": None, "partition": None, "workers": 1}
    celeba.prepare(source, out, **settings | changes)


def test_celeba_merges_in_order_and_splits(faces, tmp_path):
    done = run("prepare_celebamask.py", source=faces, out=tmp_path / "out", faces=6, test_faces=2)
    assert done.returncode == 0, done.stderr
    assert "4 train, 2 test" in done.stdout and "6 faces prepared" in done.stdout and "100%" in done.stderr
    splits = {0: "train", 1: "train", 2: "train", 3: "train", 4: "test", 5: "test"}
    expected = [f"{s}/{kind}" for i, s in splits.items() for kind in (f"images/{i}.jpg", f"labels/{i}.png")]
    assert files_below(tmp_path / "out") == sorted(expected)
    for face, split in splits.items():
        labels = read(tmp_path / "out" / split / "labels" / f"{face}.png")
        assert labels.shape == (64, 64) and labels.dtype == np.uint8
        for row in range(64):  # the last part that the face has and that begins above this row
            parts = [i for i in range(1, 19) if (i + face) % 5 and 3 * i <= row]
            assert set(labels[row]) == {max(parts, default=0)}
        image = tmp_path / "out" / split / "images" / f"{face}.jpg"
        assert image.read_bytes() == (faces / "CelebA-HQ-img" / image.name).read_bytes()


def test_celeba_official_partition(faces, tmp_path, capsys):
    prepare_faces(faces, tmp_path / "out", partition=tmp_path / "list_eval_partition.txt")
    found = {s: {p.stem for p in (tmp_path / "out" / s / "labels").iterdir()} for s in ("train", "val", "test")}
    assert found == {"train": {"0", "3", "5"}, "val": {"1", "4"}, "test": {"2"}}
    assert "CelebA's own" in capsys.readouterr().out


def test_celeba_goes_on_where_it_stopped(faces, tmp_path, capsys):
    out = tmp_path / "out"
    prepare_faces(faces, out)
    kept = out / "train" / "labels" / "1.png"
    before = kept.stat().st_mtime_ns
    (out / "train" / "labels" / "2.png").unlink()
    (out / "test" / "images" / "5.jpg").unlink()
    (out / "test" / "labels" / ".5.png.99.tmp").write_bytes(b"half")  # what a killed run leaves
    prepare_faces(faces, out)
    assert "2 faces prepared, 4 were there already" in capsys.readouterr().out
    assert len(files_below(out)) == 12 and kept.stat().st_mtime_ns == before


def test_celeba_refuses_to_mix_splits(faces, tmp_path):
    prepare_faces(faces, tmp_path / "out")
    before = files_below(tmp_path / "out")
    with pytest.raises(PreparationError, match=r"images/1.jpg does not belong there"):
        prepare_faces(faces, tmp_path / "out", partition=tmp_path / "list_eval_partition.txt")
    assert files_below(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (s / "CelebA-HQ-img" / "3.jpg").unlink(), "face 3 has no photograph, 1 of 6"),
        (lambda s: [p.unlink() for p in s.rglob("00002_*.png")], "face 2 has no masks"),
        (lambda s: (s / "CelebAMask-HQ-mask-anno").rename(s / "masks"), "mask-anno is not a folder"),
        (lambda s: (s / "CelebA-HQ-img").rename(s / "img"), "CelebA-HQ-img is not a folder"),
        (lambda s: Image.new("L", (64, 64)).save(s / "CelebAMask-HQ-mask-anno/0/00000_teeth.png"), "00000_teeth.png"),
    ],
)
def test_celeba_incomplete_archives_write_nothing(faces, tmp_path, damage, message):
    damage(faces)
    with pytest.raises(PreparationError, match=message):
        prepare_faces(faces, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda mask: Image.new("L", (32, 32)).save(mask), r"00001_nose.png is \(32, 32\)"),
        (lambda mask: mask.write_bytes(mask.read_bytes()[:60]), "00001_nose.png cannot be read"),
    ],
)
def test_celeba_broken_masks_are_named(faces, tmp_path, damage, message):
    damage(faces / "CelebAMask-HQ-mask-anno" / "0" / "00001_nose.png")
    with pytest.raises(PreparationError, match=message):
        prepare_faces(faces, tmp_path / "out")
    assert "train/labels/1.png" not in files_below(tmp_path / "out")


def test_celeba_wrong_settings(faces, tmp_path):
    partition, mapping = tmp_path / "list_eval_partition.txt", faces / celeba.MAPPING_NAME
    for changes, message in (
        ({"faces": 8}, "face 6 has no photograph, 2 of 8"),
        ({"test_faces": 6}, "--test_faces 6"),
        ({"mapping": mapping}, "needs --partition"),
        ({"partition": tmp_path / "none.txt"}, "none.txt cannot be read"),
        ({"partition": mapping}, "line 1 has not 2 columns"),
        ({"partition": partition, "mapping": partition}, "line 1 has not 3 columns"),
    ):
        with pytest.raises(PreparationError, match=message):
            prepare_faces(faces, tmp_path / "out", **changes)
    lines = partition.read_text().splitlines()
    partition.write_text("\n".join(lines[:4]))
    with pytest.raises(PreparationError, match=r"says None for 000104\.jpg"):
        prepare_faces(faces, tmp_path / "out", partition=partition)
    mapping.write_text("\n".join(mapping.read_text().splitlines()[:-1]))
    with pytest.raises(PreparationError, match="does not list each of the faces"):
        celeba.partition_split(6, mapping, _write(tmp_path / "full.txt", lines))


def _write(file, lines):
    file.write_text("\n".join(lines))
    return file


def test_celeba_full_partition_is_checked_against_the_published_counts(tmp_path):
    mapping = _write(tmp_path / "m.txt", ["idx orig_idx orig_file", *(f"{i} {i} {i}.jpg" for i in range(30_000))])
    codes = [0] * 24_183 + [1] * 2_993 + [2] * 2_824
    partition = _write(tmp_path / "p.txt", [f"{i}.jpg {code}" for i, code in enumerate(codes)])
    split = celeba.partition_split(30_000, mapping, partition)
    assert {name: len(members) for name, members in split.items()} == celeba.PARTITION_FACES
    partition = _write(tmp_path / "p.txt", [f"{i}.jpg {code}" for i, code in enumerate([1, *codes[1:]])])
    with pytest.raises(PreparationError, match="24182"):
        celeba.partition_split(30_000, mapping, partition)
    full = celeba.default_split(celeba.FACES, celeba.TEST_FACES)
    assert len(full["train"]) == 28_000 and full["test"] == list(range(28_000, 30_000))


def test_celeba_parts_are_the_published_classes():
    listed = SHARED / "data" / "classes" / "celebamask.csv"
    if not listed.exists():
        pytest.skip("the published class list is not on this machine")
    with open(listed) as file:
        assert tuple(row["name"] for row in csv.DictReader(file)) == celeba.PARTS


# ---- COCO-Stuff

HEIGHT, WIDTH = 20, 30


def box(left, top, right, bottom):
    """The polygon of the pixels [top:bottom, left:right]."""
    return [left, top, right, top, right, bottom, left, bottom]


def column_runs(mask):
    """COCO's uncompressed run lengths: column by column, beginning with the zeros."""
    values = np.concatenate([[0], mask.ravel(order="F"), [-1]])
    changes = np.flatnonzero(np.diff(values))
    return np.diff([0, *changes]).tolist()


@pytest.fixture
def stuff(tmp_path):
    pytest.importorskip("pycocotools", reason="instance maps need pycocotools")
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "pixelmaps"):
            (tmp_path / kind / f"{split}2017").mkdir(parents=True)
        for i in range(count):
            name = f"{i:012d}"
            Image.new("RGB", (WIDTH, HEIGHT), (50 * i, 9, 9)).save(tmp_path / f"images/{split}2017/{name}.jpg")
            ids = np.full((HEIGHT, WIDTH), 100 + i, np.uint8)
            ids[:, 20:] = 255
            Image.fromarray(ids).save(tmp_path / f"pixelmaps/{split}2017/{name}.png")
        listed = [
            {"id": 7 * i, "file_name": f"{i:012d}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(count + 1)
        ]  # one more than there are photographs, as where a part is used
        rle = np.zeros((HEIGHT, WIDTH), np.uint8)
        rle[1:3, 2:5] = 1
        crowd = np.zeros((HEIGHT, WIDTH), np.uint8)
        crowd[10:, :10] = 1

        def annotation(image, segmentation, iscrowd=0):
            return {"image_id": 7 * image, "iscrowd": iscrowd, "category_id": 1, "segmentation": segmentation}

        annotations = [
            annotation(0, [box(0, 0, 10, 10)]),
            annotation(1, [box(0, 0, 30, 20)]),
            annotation(0, {"size": [HEIGHT, WIDTH], "counts": column_runs(crowd)}, iscrowd=1),
            annotation(0, [box(5, 5, 15, 15), box(25, 0, 28, 4)]),  # one object in two pieces, over the first
            annotation(0, {"size": [HEIGHT, WIDTH], "counts": column_runs(rle)}),
            annotation(count, [box(0, 0, 1, 1)]),
            *(annotation(2 % count, [box(x, y, x + 1, y + 1)]) for y in range(10) for x in range(30)),
        ]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        file = tmp_path / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps({"images": listed, "annotations": annotations}))
    return {"images": tmp_path / "images", "pixelmaps": tmp_path / "pixelmaps", "instances": tmp_path / "annotations"}


def test_coco_layout_and_instances(stuff, tmp_path):
    done = run("prepare_cocostuff.py", **stuff, out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "4 train, 2 val" in done.stdout and "100%" in done.stderr
    names = [f"{split}_{kind}" for split, n in (("train", 4), ("val", 2)) for i in range(n)
             for kind in (f"img/{i:012d}.jpg", f"label/{i:012d}.png", f"inst/{i:012d}.png")]  # fmt: skip
    assert files_below(tmp_path / "out") == sorted(names)
    expected = np.full((HEIGHT, WIDTH), 100)
    expected[:, 20:] = 255
    expected[:10, :10] = 256
    expected[5:15, 5:15] = expected[:4, 25:28] = 257
    expected[1:3, 2:5] = 258
    inst = tmp_path / "out" / "train_inst"
    np.testing.assert_array_equal(read(inst / f"{0:012d}.png"), expected)
    assert (read(inst / f"{1:012d}.png") == 256).all()
    np.testing.assert_array_equal(read(inst / f"{3:012d}.png"), read(tmp_path / "out/train_label" / f"{3:012d}.png"))
    for kind, source in (("img", "images"), ("label", "pixelmaps")):
        for file in (tmp_path / "out" / f"val_{kind}").iterdir():
            assert file.read_bytes() == (stuff[source] / "val2017" / file.name).read_bytes()


def test_coco_more_objects_than_8_bits_hold(stuff, tmp_path):
    coco.prepare(**stuff, out=tmp_path / "out", workers=1)
    instances = read(tmp_path / "out" / "train_inst" / f"{2:012d}.png")
    # 300 objects of one pixel each, row by row: all distinct, none of them a class id
    np.testing.assert_array_equal(instances[:10].ravel(), 256 + np.arange(300))


def test_coco_compressed_run_lengths(stuff):
    mask_tools = coco.load_mask_tools()
    mask = np.random.default_rng(0).integers(0, 2, (HEIGHT, WIDTH)).astype(np.uint8)
    ids = np.full((HEIGHT, WIDTH), 3, np.uint8)
    instances = coco.draw_instances(ids, [mask_tools.encode(np.asfortranarray(mask))])
    np.testing.assert_array_equal(instances, np.where(mask, 256, 3))


def test_coco_goes_on_where_it_stopped(stuff, tmp_path, capsys):
    out = tmp_path / "out"
    coco.prepare(**stuff, out=out, workers=1)
    for file in ("train_inst/000000000001.png", "train_img/000000000002.jpg"):
        (out / file).unlink()
    coco.prepare(**stuff, out=out, workers=1)
    printed = capsys.readouterr().out
    assert "train: 2 images prepared, 2 were there already" in printed and "val: 0 images prepared" in printed
    assert len(files_below(out)) == 18
    (stuff["images"] / "val2017" / f"{1:012d}.jpg").unlink()
    (stuff["pixelmaps"] / "val2017" / f"{1:012d}.png").unlink()
    with pytest.raises(PreparationError, match=r"val_img/000000000001\.jpg does not belong there"):
        coco.prepare(**stuff, out=out, workers=1)


def drop_image_from_json(folders):
    file = folders["instances"] / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"] = [i for i in content["images"] if i["id"] != 21]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f["images"] / "val2017/000000000001.jpg").unlink(), "000000000001 is in .*pixelmaps"),
        (lambda f: (f["pixelmaps"] / "val2017/000000000001.png").unlink(), "000000000001 is in .*images"),
        (lambda f: (f["images"] / "train2017").rename(f["images"] / "train"), "train2017 is not a folder"),
        (lambda f: (f["instances"] / "instances_val2017.json").unlink(), "instances_val2017.json is not there"),
        (lambda f: (f["instances"] / "instances_train2017.json").write_text("[]"), "has not the structure"),
        (lambda f: (f["instances"] / "instances_train2017.json").write_text('{"images": ['), "has not the structure"),
        (drop_image_from_json, "does not list 000000000003.jpg"),
        (lambda f: Image.new("L", (9, 9)).save(f["pixelmaps"] / "train2017/000000000000.png"), r"\(9, 9\)"),
        (lambda f: Image.new("L", (30, 20), 200).save(f["pixelmaps"] / "train2017/000000000000.png"), r"ids \[200\]"),
        (lambda f: Image.new("RGB", (30, 20)).save(f["pixelmaps"] / "train2017/000000000000.png"), "8-bit ids"),
        (lambda f: (f["pixelmaps"] / "train2017/000000000000.png").write_text("text"), "cannot be read"),
    ],
)
def test_coco_unusable_archives_are_named(stuff, tmp_path, damage, message):
    damage(stuff)
    with pytest.raises(PreparationError, match=message):
        coco.prepare(**stuff, out=tmp_path / "out", workers=1)
    assert files_below(tmp_path / "out") == []


def test_coco_without_pycocotools_says_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['pycocotools'] = None; import runpy;"
        f"sys.path.insert(0, {str(ROOT / 'scripts' / 'data')!r});"
        "sys.argv[1:] = '--images a --pixelmaps b --instances c --out d'.split();"
        "runpy.run_module('prepare_cocostuff', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "pip install '.[coco]'" in done.stderr and "Traceback" not in done.stderr
    assert files_below(tmp_path) == []
