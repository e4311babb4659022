"""Masks as people have them: read as the ids that they hold, with a note, or refused with the remedy."""

import json
import warnings

import numpy as np
import pytest
from data_helpers import draw, run_script, save, write_benchmark, write_custom, write_png
from PIL import Image

from guided_diffusion.data.listing import list_items
from guided_diffusion.data.notes import Notes
from guided_diffusion.data.segments import read_segments
from guided_diffusion.data.specs import DataError, get_spec
from guided_diffusion.data.transforms import read_image, read_instances, read_label
from guided_diffusion.image_datasets import open_dataset, sampling_batches, training_batches

SPEC = get_spec("custom", num_classes=4)
IDS = draw(0, (40, 30), 4)[1]


def verify(root, report, *more):
    return run_script(
        "scripts/data/verify_data.py", "--data_dir", root, "--dataset_mode", "custom", "--report_dir", report,
        "--workers", 1, *more,
    )  # fmt: skip


def describe(root, **settings):
    (root / "dataset.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture
def scene(tmp_path):
    """One scene, whose files the tests replace."""
    return write_custom(tmp_path / "data", {"train": 1, "val": 1})


def read(root, **options):
    options = {"dataset_mode": "custom", "split": "val", "image_size": 8, "num_classes": 4, **options}
    return open_dataset(data_dir=root, **options)[0]


# --- stored otherwise -------------------------------------------------------------------------------------------------


def as_mode(ids: np.ndarray, mode: str) -> np.ndarray:
    full = np.full_like(ids, 255)
    return np.stack({"RGB": [ids] * 3, "RGBA": [ids] * 3 + [full], "LA": [ids, full]}[mode], axis=-1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_equal_channels_are_ids(tmp_path, mode):
    path, notes = str(save(tmp_path / "a.png", as_mode(IDS, mode))), Notes()
    image, table = read_label(path, SPEC, notes)
    assert np.array_equal(table[np.asarray(image)], IDS)
    assert list(notes) == [f"label maps are stored as {mode}, nowhere transparent: read as ids"] or list(notes) == [
        f"label maps are stored as {mode} with equal channels: read as ids"
    ]
    assert np.array_equal(read_instances(path), IDS)
    wrong = IDS.copy()
    wrong[3, 3] = 9
    with pytest.raises(DataError, match=r"ids that do not fit num_classes 4: 9"):
        read_label(str(save(tmp_path / "b.png", as_mode(wrong, mode))), SPEC)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_maps_are_refused(tmp_path, mode):
    pixels = as_mode(IDS, mode)
    pixels[3, 3, -1] = 0
    path = str(save(tmp_path / "a.png", pixels))
    for reading in (lambda: read_label(path, SPEC), lambda: read_instances(path)):
        with pytest.raises(DataError, match=r"a\.png is partly transparent .*no sure id"):
            reading()


def test_equal_channels_of_16_bits_have_lost_their_ids(tmp_path):
    row = b"\0" + b"\0\2" * 3 * 40  # Pillow would give the high byte, 0, for the id 2
    path = write_png(tmp_path / "a.png", (30, 40), 16, 2, row * 30)
    with pytest.raises(DataError, match=r"a\.png has 3 channels of 16 bits, .*ids are lost; save it with one channel"):
        read_label(str(path), SPEC)


def test_notes_are_told_once(tmp_path):
    root = write_custom(tmp_path / "data", {"train": 6, "val": 1})
    for path in sorted((root / "train/labels").iterdir())[1:]:
        save(path, as_mode(np.asarray(Image.open(path)), "RGB"))
    options = {"dataset_mode": "custom", "image_size": 8, "num_classes": 4, "data_dir": root}
    for workers in (0, 2):
        told, dataset = [], open_dataset(split="train", **options)
        with training_batches(dataset, batch_size=4, num_workers=workers, log=told.append) as batches:
            keys = {frozenset(next(batches)) for _ in range(4)}
        assert keys == {frozenset({"image", "label", "position"})}
        assert len(told) == 1 and "label maps are stored as RGB with equal channels" in told[0]
        for _ in range(2):
            assert len(list(sampling_batches(dataset, range(6), 2, log=told.append))) == 3
        assert len(told) == 1
    result = verify(root, tmp_path / "report", "--num_classes", 4)
    assert result.returncode == 0
    assert "note: 5 label maps are stored as RGB with equal channels: read as ids (first" in result.stdout


# --- values that are no ids -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "remap"),
    [
        ([0, 255], {"255": 1}),
        ([0, 128, 255], {"128": 1, "255": 2}),
        ([0, 127, 255], {"127": 1, "255": 2}),
        ([0, 85, 170, 255], {"85": 1, "170": 2, "255": 3}),
        ([1, 2, 3, 4], {"1": 0, "2": 1, "3": 2, "4": 3}),
        ([0, 50, 100, 150, 200, 250], {"50": 1, "100": 2, "150": 3, "200": 4, "250": 5}),
    ],
)
def test_the_message_proposes_the_remap_that_fits(scene, values, remap):
    mask = np.array(values, np.uint8)[draw(0, (40, 30), len(values))[1]]
    mask[0, : len(values)] = values
    save(scene / "val/labels/scene0.png", mask)
    with pytest.raises(DataError, match=r"do not fit") as error:
        read(scene, num_classes=len(values))
    line = str(error.value).split("put ")[1].split(" into dataset.json")[0]
    assert json.loads("{" + line + "}") == {"remap": remap}
    (scene / "dataset.json").write_text("{" + line + "}")
    ids = read(scene, num_classes=len(values))["label"].numpy()
    assert set(np.unique(ids)) <= set(range(len(values)))
    path, spec = str(scene / "val/labels/scene0.png"), get_spec("custom", scene, len(values))
    image, table = read_label(path, spec)
    assert np.array_equal(np.array(values)[table[np.asarray(image)]], mask)


def test_what_one_map_does_not_say_all_together_do(tmp_path):
    """Classes that are never in one map: each names its own ids, verify_data.py those of all."""
    root = write_custom(tmp_path / "data", {"train": 3, "val": 1})
    for i, value in enumerate((60, 120, 180)):
        save(root / f"train/labels/scene{i}.png", np.where(IDS > 1, value, 0).astype(np.uint8))
    result = verify(root, tmp_path / "report", "--num_classes", 4)
    assert result.returncode == 1
    problems = (tmp_path / "report/problems.txt").read_text().splitlines()
    assert 'hold the ids 0, 60, 120, 180: put "remap": {"60": 1, "120": 2, "180": 3} into' in problems[0]


def test_an_id_for_unlabelled_pixels_is_recognised(scene):
    mask = IDS.copy()
    mask[:5] = 255
    save(scene / "val/labels/scene0.png", mask)
    with pytest.raises(DataError, match=r'"ignore_id": 255 into dataset.json, .* so that --num_classes is 5'):
        read(scene)
    mask[0, 0] = 77
    save(scene / "val/labels/scene0.png", mask)
    with pytest.raises(DataError, match=r": 77, 255; .*; raise --num_classes, or in dataset.json name"):
        read(scene)


# --- names ------------------------------------------------------------------------------------------------------------


def name_files(root, images, labels, instances=()):
    for kind, names in (("images", images), ("labels", labels), ("instances", instances)):
        for name in names:
            save(root / "train" / kind / name, np.zeros((8, 8) if kind != "images" else (8, 8, 3), np.uint8))


NUMBERS = [f"{i:03d}" for i in range(1, 13)]


@pytest.mark.parametrize(
    ("image_end", "label_ends"),
    [
        ("", ["_mask"]),
        ("", ["_labelIds"]),
        ("", ["-seg.final"]),
        ("_image", [""]),
        ("_image", ["_mask"]),
        ("_leftImg", ["_color", "_labelIds"]),
    ],
)
def test_suffixes_are_proposed_and_then_pair_the_files(tmp_path, image_end, label_ends):
    name_files(
        tmp_path, [n + image_end + ".jpg" for n in NUMBERS], [n + e + ".png" for n in NUMBERS for e in label_ends]
    )
    with pytest.raises(DataError, match=r"12 photographs in .* their names pair with") as error:
        list_items(SPEC, tmp_path, "train")
    advice = str(error.value).split(" in dataset.json")[0].split("pair with ")[1]
    lines = advice.replace("one of the lines ", "").replace("the line ", "").split(" or ")
    assert len(lines) == len(label_ends)
    for line, end in zip(lines, label_ends, strict=True):
        (tmp_path / "dataset.json").write_text("{" + line + "}")
        items = list_items(get_spec("custom", tmp_path, 4), tmp_path, "train")
        assert [item.name for item in items] == [n + image_end for n in NUMBERS]
        assert [item.label.endswith(f"{n}{end}.png") for n, item in zip(NUMBERS, items, strict=True)] == [True] * 12


def test_a_suffix_that_does_not_explain_the_names_is_not_proposed(tmp_path):
    name_files(tmp_path, ["1.jpg", "2.jpg", "11.jpg"], ["1_mask.png", "2_labels.png", "11_x.png"])
    with pytest.raises(DataError) as error:
        list_items(SPEC, tmp_path, "train")
    assert '_suffix": ' not in str(error.value)


def test_one_missing_mask_does_not_hide_the_suffix(tmp_path):
    name_files(tmp_path, ["1.jpg", "2.jpg", "11.jpg"], ["2_mask.png", "11_mask.png"], ["2_mask_n.png", "11_mask_n.png"])
    with pytest.raises(DataError, match=r'the line "label_suffix": "_mask" in dataset.json'):
        list_items(SPEC, tmp_path, "train")
    describe(tmp_path, label_suffix="_mask")
    with pytest.raises(DataError) as error:
        list_items(get_spec("custom", tmp_path, 4), tmp_path, "train")
    assert "1 photograph in" in str(error.value) and "1.jpg" in str(error.value)
    assert '"instance_suffix": "_mask_n" in dataset.json' in str(error.value)
    describe(tmp_path, label_suffix="_mask", instance_suffix="_mask_n")
    (tmp_path / "train/images/1.jpg").unlink()
    assert all(i.instance for i in list_items(get_spec("custom", tmp_path, 4), tmp_path, "train"))


@pytest.mark.parametrize("suffix", ["../x", "a/b", 3])
def test_a_suffix_is_the_end_of_a_name(tmp_path, suffix):
    describe(tmp_path, label_suffix=suffix)
    with pytest.raises(DataError, match=r"dataset.json: label_suffix is"):
        get_spec("custom", tmp_path, 4)


# --- files ------------------------------------------------------------------------------------------------------------


def save_pages(path, pictures, **options):
    first, *others = [Image.fromarray(p) if isinstance(p, np.ndarray) else p for p in pictures]
    first.save(path, save_all=True, append_images=others, **options)


@pytest.mark.parametrize("extension", [".tif", ".gif", ".png"])
@pytest.mark.parametrize("kind", ["images", "labels", "instances"])
def test_several_pages_are_refused(scene, kind, extension):
    if kind == "images" and extension == ".gif":
        pytest.skip("no photograph has that extension")
    photograph, ids, _ = draw(0, (40, 30), 4)
    pages = [photograph, photograph[::-1]] if kind == "images" else [ids, ids[::-1]]
    folder = scene / "val" / kind
    folder.mkdir(exist_ok=True)
    (folder / "scene0.png").unlink(missing_ok=True)
    save_pages(folder / f"scene0{extension}", [*pages, *pages])
    with pytest.raises(DataError, match=rf"scene0\{extension} holds [34] pages, of which readers take the first; save"):
        read(scene)
    Image.fromarray(pages[0]).save(folder / f"scene0{extension}")
    assert read(scene)["label"].shape == (1, 8, 8)


def test_smaller_copies_in_a_tiff_are_no_pages(scene):
    photograph = draw(0, (40, 30), 4)[0]
    (scene / "val/images/scene0.png").unlink()
    small = Image.fromarray(photograph[::2, ::2])
    small.encoderinfo = {"tiffinfo": {254: 1}}  # NewSubfileType: a reduced copy
    save_pages(scene / "val/images/scene0.tif", [photograph, small])
    whole = Image.open(scene / "val/images/scene0.tif")
    assert whole.n_frames == 2
    whole.seek(1)
    assert whole.tag_v2[254] == 1
    assert np.array_equal(read_image(str(scene / "val/images/scene0.tif"), SPEC), photograph)


def test_pictures_beyond_the_limit_of_pixels(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow opens up to twice as many; these have 1200
    message = (
        r"photograph .*too large to read safely \(0 megapixels\).*tile_dataset\.py, or raise \"max_pixels\".* 1200$"
    )
    with pytest.raises(DataError, match=message):
        read_image(str(scene / "val/images/scene0.png"), SPEC)
    result = verify(scene, tmp_path / "report", "--num_classes", 4)
    assert result.stderr.count("too large to read safely") >= 3 and "attack" not in result.stderr
    describe(scene, max_pixels=1200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(scene)["image"].shape == (3, 8, 8)
    assert Image.MAX_IMAGE_PIXELS == 500
    describe(scene, max_pixels=1199)
    with pytest.raises(DataError, match=r"label map .* too large"):
        read(scene)
    describe(scene, max_pixels=0)
    with pytest.raises(DataError, match=r"max_pixels is 0"):
        read(scene)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["labels", "instances"])
def test_whole_numbers_of_any_type_are_ids(scene, kind):
    (scene / f"val/{kind}").mkdir(exist_ok=True)
    (scene / f"val/{kind}/scene0.png").unlink(missing_ok=True)
    path = scene / f"val/{kind}/scene0.tif"
    for values in (IDS.astype(np.float32), IDS.astype(np.int32), IDS.astype(np.uint16), IDS.astype(np.float32) - 0.0):
        Image.fromarray(values).save(path)
        notes = Notes()
        image = read_label(str(path), SPEC, notes)[0] if kind == "labels" else read_instances(str(path), notes)
        assert np.array_equal(image, IDS)
        assert bool(notes) == (values.dtype == np.float32)
        assert read(scene)["label"].shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids * np.float32(0.9999), r"no ids, on .* % of its pixels: .*0\.9999.*within 0\.0003 of whole"),
        (lambda ids: ids / np.float32(8), r"no ids, on .*: 0\.\d+, .*are they probabilities\? Save the id of the most"),
        (lambda ids: ids + np.float32(0.5), r": \d\.5, .*; save one id per pixel"),
        (lambda ids: np.where(ids > 2, np.float32("nan"), ids).astype(np.float32), "pixels: nan; save one id"),
        (lambda ids: np.where(ids > 2, np.float32(1e20), ids).astype(np.float32), r"pixels: 1e\+20; save one id"),
        (lambda ids: ids.astype(np.int32) - 1, r"ids that do not fit num_classes 4: -1;"),
        (lambda ids: ids.astype(np.int32) + 70000, r"ids that do not fit num_classes 4: 70000,"),
    ],
)
def test_numbers_that_are_no_ids_are_named(tmp_path, change, message):
    path = str(tmp_path / "a.tif")
    Image.fromarray(change(IDS)).save(path)
    with pytest.raises(DataError, match=message):
        read_label(path, SPEC)


# --- panoptic maps ----------------------------------------------------------------------------------------------------


@pytest.fixture
def panoptic(tmp_path):
    """Label maps of segments with large ids, in the format of COCO's panoptic task, and what they mean."""
    root, meaning = write_custom(tmp_path / "data", {"train": 2, "val": 1}, size=(40, 30)), {}
    for kind in ("images", "labels"):  # names of two splits differ, as COCO's do
        (root / "val" / kind / "scene0.png").rename(root / "val" / kind / "other.png")
    for split in ("train", "val"):
        annotations = []
        for path in sorted((root / split / "labels").iterdir()):
            ids = np.asarray(Image.open(path)).astype(np.int64)
            segments = 70_000 * (ids + 1) + 300 * (np.arange(40) // 20)[None]  # two segments of each class
            segments[:3] = 0  # nothing there
            save(path, np.stack([segments & 255, segments >> 8 & 255, segments >> 16], -1).astype(np.uint8))
            known = [{"id": int(s), "category_id": int(s) // 70_000} for s in np.unique(segments) if s]
            annotations.append({"file_name": path.name, "segments_info": known})
            meaning[str(path)] = np.where(segments == 0, 4, ids), segments
        (root / f"panoptic_{split}.json").write_text(json.dumps({"annotations": annotations}))
    classes = ["a", "b", "c", "d"]
    files = ["panoptic_train.json", "panoptic_val.json"]
    remap = {"1": 0, "2": 1, "3": 2, "4": 3}
    describe(root, classes=classes, label_encoding="panoptic", segments_info=files, remap=remap, ignore_id=0)
    return root, meaning


def test_panoptic_maps_as_labels(panoptic, tmp_path):
    root, meaning = panoptic
    spec = get_spec("custom", root)
    for path in [p for p in meaning if "train" in p]:
        image, table = read_label(path, spec)
        assert np.array_equal(table[np.asarray(image)], meaning[path][0])
    sample = open_dataset(data_dir=root, dataset_mode="custom", split="train", image_size=8)[0]
    assert sample["label"].shape == (1, 8, 8)
    cache = ["--data_dir", root, "--dataset_mode", "custom", "--image_size", 8, "--cache_dir", tmp_path / "cache"]
    assert run_script("scripts/data/cache_dataset.py", *cache, "--workers", 1).returncode == 0
    again = open_dataset(data_dir=tmp_path / "cache", dataset_mode="custom", split="train", image_size=8)[0]
    assert (again["label"] == sample["label"]).all() and (again["image"] == sample["image"]).all()


def test_panoptic_maps_as_instances(panoptic):
    _, meaning = panoptic
    path, (_, segments) = next(iter(meaning.items()))
    notes = Notes()
    assert np.array_equal(read_instances(path, notes), segments)
    assert list(notes) == ["instance maps are stored as RGB: read as R + 256 G + 65536 B"]


def test_what_is_wrong_with_panoptic_maps_is_named(panoptic):
    root, meaning = panoptic
    path = next(p for p in meaning if "train" in p)
    good = (root / "panoptic_train.json").read_text()
    first = json.loads(good)["annotations"][0]["segments_info"][0]
    number, category = f'"id": {first["id"]},', f'"category_id": {first["category_id"]}'

    def rewrite(old, new):
        (root / "panoptic_train.json").write_text(good.replace(old, new))
        read_segments.cache_clear()

    for old, new, message in (
        ("scene", "scenery", "does not list the label map .*scene0"),
        ('"category_id"', '"category"', r"panoptic_train\.json .* is not as expected .*category_id"),
        (number, '"id": 5,', rf"segments that .* does not list: {first['id']}$"),
        (category, '"category_id": 0', "pixels of no segment, and 0 is a category, too"),
        (category, '"category_id": 9', "ids that do not fit num_classes 5: 9"),
    ):
        rewrite(old, new)
        with pytest.raises(DataError, match=message):
            read_label(path, get_spec("custom", root))
    (root / "panoptic_train.json").unlink()
    read_segments.cache_clear()
    with pytest.raises(DataError, match=r"panoptic_train\.json .*not as expected \(FileNotFoundError"):
        open_dataset(data_dir=root, dataset_mode="custom", split="train", image_size=8)
    describe(root, classes=["a"], label_encoding="panoptic")
    with pytest.raises(DataError, match=r"needs the files that say which class a segment has"):
        get_spec("custom", root)


# --- softened edges ---------------------------------------------------------------------------------------------------

COLORS = np.array([[0, 0, 0], [230, 25, 75], [0, 130, 200], [210, 245, 60]], np.uint8)
NAMED = [{"name": "abcd"[i], "color": color} for i, color in enumerate(COLORS.tolist())]


def test_softened_colors_are_refused_and_the_tolerance_reads_them(scene, tmp_path):
    """Against a plain search for the nearest colour."""
    noise = np.random.default_rng(0).integers(-9, 10, (30, 40, 3))
    softened = np.clip(COLORS[IDS].astype(int) + noise, 0, 255).astype(np.uint8)
    softened[10:] = COLORS[IDS][10:]
    save(scene / "val/labels/scene0.png", softened)
    describe(scene, classes=NAMED, label_encoding="colors")
    share = 100 * (softened != COLORS[IDS]).any(-1).mean()
    message = (
        rf'no class, on {share:.2g} % of its pixels: .* in all; was it saved with smoothing.*"tolerance": 1[0-6] there'
    )
    with pytest.raises(DataError, match=message) as error:
        read(scene)
    needed = int(str(error.value).split('"tolerance": ')[1].split()[0])
    distance = np.sqrt(((softened[..., None, :].astype(float) - COLORS) ** 2).sum(-1))
    assert needed == np.ceil(distance.min(-1).max())
    describe(scene, classes=NAMED, label_encoding="colors", tolerance=needed - 1)
    with pytest.raises(DataError, match=r"no class, on 0"):
        read(scene)
    describe(scene, classes=NAMED, label_encoding="colors", tolerance=needed)
    notes, path = Notes(), str(scene / "val/labels/scene0.png")
    ids = np.asarray(read_label(path, get_spec("custom", scene), notes)[0])
    assert np.array_equal(ids, IDS) and np.array_equal(ids, distance.argmin(-1))
    moved = (softened != COLORS[IDS]).any(-1).sum()
    result = verify(scene, tmp_path / "report")
    assert f"note: {moved} pixels of label maps took the nearest class's colour (tolerance {needed})" in result.stdout


def test_masks_stored_as_jpeg_are_read_with_a_tolerance_alone(scene):
    (scene / "val/labels/scene0.png").unlink()
    Image.fromarray(COLORS[IDS]).save(scene / "val/labels/scene0.jpg", quality=95, subsampling=0)
    describe(scene, classes=NAMED, label_encoding="colors")
    with pytest.raises(DataError, match=r"lossy format"):
        read(scene)
    describe(scene, classes=NAMED, label_encoding="colors", tolerance=100)
    spec = get_spec("custom", scene)
    ids = read_label(list_items(spec, scene, "val")[0].label, spec)[0]
    assert (np.asarray(ids) == IDS).mean() > 0.99


def test_softened_edges_of_a_mask_of_two_values(scene):
    """0 and 255 with a blurred edge: the share of other values is named, and what is proposed reads them."""
    mask = Image.fromarray(np.where(IDS > 1, 255, 0).astype(np.uint8)).resize((160, 120))
    save(scene / "val/labels/scene0.png", np.asarray(mask))
    save(scene / "val/images/scene0.png", np.zeros((120, 160, 3), np.uint8))
    odd = (~np.isin(np.asarray(mask), (0, 255))).mean()
    with pytest.raises(
        DataError, match=rf"{100 * odd:.2g} % of the pixels have one of \d+ other values than 0, 255"
    ) as error:
        read(scene, num_classes=2)
    assert "raise --num_classes" not in str(error.value)
    lines = str(error.value).split(" by ")[1].removesuffix(" in dataset.json")
    (scene / "dataset.json").write_text("{" + lines + "}")
    ids = read_label(str(scene / "val/labels/scene0.png"), get_spec("custom", scene))[0]
    assert np.array_equal(np.asarray(ids), (np.asarray(mask) > 127).astype(int))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 500, "label_encoding": "colors"}, "0 to 441"),
        ({"tolerance": 5}, "tolerance is for label maps of colours"),
        ({"segments_info": ["../a.json"]}, "must be a file in the folder"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    describe(tmp_path, classes=NAMED, **settings)
    with pytest.raises(DataError, match=message):
        get_spec("custom", tmp_path)


# --- layouts in a data set's colours ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "suffix"), [("cityscapes", "_gtFine_color"), ("ade20k", ""), ("celeba", ""), ("coco", "")]
)
def test_layouts_in_the_customary_colors_are_read_by_the_palette(tmp_path, mode, suffix):
    spec, told = get_spec(mode), []
    colors = [tuple(color) for color in spec.palette.tolist()]
    usable = [i for i in range(spec.num_classes) if colors.index(colors[i]) == i and len(set(colors[i])) > 1]
    ids = np.array(usable)[np.random.default_rng(0).integers(0, len(usable), (16, 16))]
    pixels = np.concatenate([spec.palette[ids], np.full((16, 16, 1), 255, np.uint8)], -1)  # RGBA, as Cityscapes' are
    path = save(tmp_path / "layouts" / f"a{suffix}.png", pixels)
    options = {"data_dir": None, "dataset_mode": mode, "split": "val", "image_size": 16, "use_instances": False}
    dataset = open_dataset(labels_dir=tmp_path / "layouts", **options)
    batch = next(sampling_batches(dataset, [0], 1, log=told.append))
    assert np.array_equal(batch["label"][0, 0], ids)
    assert told == [f"note: {path}: label maps are pictures in the colours of {mode}: read by its palette"]
    pixels[3, 3, :3] = (1, 2, 3)
    save(path, pixels)
    with pytest.raises(DataError, match=rf"\(1, 2, 3\); known are the colours of dataset_mode {mode}; store ids"):
        dataset[0]


def test_of_two_classes_of_one_color_the_first_counts(tmp_path):
    """Cityscapes' cars and license plates have one colour."""
    save(tmp_path / "a.png", np.full((8, 8, 3), (0, 0, 142), np.uint8))
    dataset = open_dataset(
        data_dir=None, dataset_mode="cityscapes", split="val", image_size=8, labels_dir=tmp_path, use_instances=False
    )
    assert (dataset[0]["label"] == 26).all()


def test_in_training_data_such_colors_stay_an_error(tmp_path):
    write_benchmark(tmp_path, "ade20k")
    for path in (tmp_path / "annotations/training").iterdir():
        save(path, get_spec("ade20k").palette[np.asarray(Image.open(path))])
    with pytest.raises(DataError, match=r"is a picture of mode RGB, not of one id per pixel"):
        open_dataset(data_dir=tmp_path, dataset_mode="ade20k", split="train", image_size=8)[0]
