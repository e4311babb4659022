"""Everything that is wrong with data people really have: each named when a file is read, with the remedy."""

import json
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import draw, packed_png, save, write_benchmark, write_png
from evaluation_helpers import load_script
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from guided_diffusion.data.specs import get_spec
from guided_diffusion.data.transforms import read_image, read_instances, read_label
from guided_diffusion.image_datasets import DataError, open_dataset

label_maps = load_script("label_maps")


@pytest.fixture
def scene(tmp_path):
    """One good scene of 40 x 30 pixels, whose files the tests replace."""
    photograph, ids, _ = draw(0, (40, 30), 4)
    save(tmp_path / "train/images/a.png", photograph)
    save(tmp_path / "train/labels/a.png", ids)
    return tmp_path


def read(root, **options):
    options = {"dataset_mode": "custom", "split": "train", "image_size": 8, "num_classes": 4, **options}
    return open_dataset(data_dir=root, **options)[0]


def replace_photograph(root, picture: Image.Image | None, name: str, content: bytes | None = None, **options):
    (root / "train/images/a.png").unlink()
    path = root / "train/images" / name
    if content is None:
        picture.save(path, **options)
    else:
        path.write_bytes(content)
    return path


def test_the_scene_is_good(scene):
    assert read(scene)["image"].shape == (3, 8, 8)


def test_truncated_jpeg(scene):
    path = replace_photograph(scene, Image.fromarray(draw(0, (40, 30), 4)[0]), "a.jpg")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(
        DataError, match=r"photograph .*a\.jpg cannot be read \(.*truncated.*\); replace it or remove it"
    ):
        read(scene)


@pytest.mark.parametrize(
    "content", [b"", b"this is a text file, whatever its name says", b"\x89PNG\r\n\x1a\n" + b"\0" * 50]
)
def test_no_picture_at_all(scene, content):
    replace_photograph(scene, None, "a.png", content)
    with pytest.raises(DataError, match=r"photograph .*a\.png cannot be read"):
        read(scene)
    (scene / "train/labels/a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"label map .*a\.png cannot be read"):
        read(scene)


def test_a_file_that_vanished(scene):
    dataset = open_dataset(data_dir=scene, dataset_mode="custom", split="train", image_size=8, num_classes=4)
    (scene / "train/labels/a.png").unlink()
    with pytest.raises(DataError, match="does not exist, or not any more"):
        dataset[0]


def test_sixteen_bit_photograph(scene):
    replace_photograph(scene, Image.fromarray(np.full((30, 40), 3000, np.uint16)), "a.tif")
    with pytest.raises(DataError, match=r"a\.tif has more than 8 bits per channel .* convert it to 8 bits"):
        read(scene)


def test_cmyk_and_opaque_rgba_photographs_are_converted(scene):
    gray = Image.new("RGB", (40, 30), (90, 90, 90))
    path = replace_photograph(scene, gray.convert("CMYK"), "a.jpg", quality=100)
    assert abs(read(scene)["image"].float() - 90).max() <= 3  # JPEG's rounding
    path.unlink()
    gray.convert("RGBA").save(scene / "train/images/a.png")
    assert (read(scene)["image"] == 90).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_photographs_are_refused(scene, mode):
    picture = Image.new("RGBA", (40, 30), (90, 90, 90, 255))
    picture.putpixel((3, 3), (90, 90, 90, 0))
    replace_photograph(scene, picture.convert(mode), "a.png")
    with pytest.raises(DataError, match=r"a\.png is partly transparent; flatten it"):
        read(scene)


def turned(root, label_turned: bool):
    """A photograph whose tag says: turn me by 90 degrees for display. Its left half is stored bright."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, :20] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # display needs a turn to the right, so that the left half comes to lie on top
    replace_photograph(root, Image.fromarray(pixels), "a.png", exif=exif)
    ids = (pixels[..., 0] == 0).astype(np.uint8)
    save(root / "train/labels/a.png", np.rot90(ids, -1).copy() if label_turned else ids)


def test_exif_orientation_is_refused_unless_dataset_json_decides(scene):
    turned(scene, label_turned=True)
    with pytest.raises(DataError, match=r'a\.png has an EXIF orientation tag.*"exif" in dataset.json to "apply"'):
        read(scene)
    for rule, label_turned in (("apply", True), ("ignore", False)):
        turned_again = scene / "train/images/a.png"
        assert turned_again.exists()
        turned(scene, label_turned)
        (scene / "dataset.json").write_text(f'{{"exif": "{rule}"}}')
        sample = read(scene, split="train", random_crop=False, random_flip=False)
        bright = (sample["image"][0] > 100).numpy()
        assert (bright == (sample["label"][0] == 0).numpy()).all() and 0 < bright.mean() < 1
        assert bright[0].all() == (rule == "apply")  # the bright half is above or, as stored, to the left


def test_benchmarks_ignore_exif_because_their_labels_match_the_stored_pixels(tmp_path):
    write_benchmark(tmp_path, "ade20k")
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (tmp_path / "images/training").iterdir():
        Image.open(path).save(path, exif=exif)
    assert read(tmp_path, dataset_mode="ade20k", num_classes=151)["label"].shape == (1, 8, 8)


def test_colored_label_without_a_table(scene):
    save(scene / "train/labels/a.png", draw(0, (40, 30), 4)[0])
    with pytest.raises(DataError, match=r"label map .*a\.png is a picture of mode RGB.*\"label_encoding\": \"colors\""):
        read(scene)


def test_colors_of_no_class(scene):
    classes = [{"name": "a", "color": [1, 2, 3]}, {"name": "b", "color": [0, 0, 9]}]
    (scene / "dataset.json").write_text(json.dumps({"label_encoding": "colors", "classes": classes}))
    label = np.full((30, 40, 3), (1, 2, 3), np.uint8)
    label[4, 5] = (7, 8, 9)
    save(scene / "train/labels/a.png", label)
    with pytest.raises(
        DataError, match=r"a\.png has colours that belong to no class, on 0\.083 % of its pixels: \(7, 8, 9\); add them"
    ):
        read(scene, num_classes=2)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_ids_out_of_range_are_found_even_if_shrinking_would_lose_them(scene, depth):
    ids = np.zeros((30, 40), depth)
    ids[0, 0], ids[29, 39] = 4, 200
    save(scene / "train/labels/a.png", ids)
    expected = (
        r"a\.png has ids that do not fit num_classes 4: 4, 200; the classes are 0 \(class 0\) to 3 \(class 3\); raise"
    )
    with pytest.raises(DataError, match=expected):
        read(scene)


def test_ids_of_another_data_set(tmp_path):
    write_benchmark(tmp_path, "coco")
    ids = np.full((32, 64), 190, np.uint8)
    save(tmp_path / "train_label/000000000000.png", ids)
    with pytest.raises(DataError, match=r"do not fit num_classes 183: 190; .*check --num_classes"):
        read(tmp_path, dataset_mode="coco", num_classes=183)
    save(tmp_path / "train_label/000000000000.png", np.full((32, 64), 255, np.uint8))
    with pytest.raises(DataError, match="do not fit num_classes 182: 255"):
        read(tmp_path, dataset_mode="coco", num_classes=182)


def test_many_wrong_ids_are_cut_short(scene):
    save(scene / "train/labels/a.png", (np.arange(1200) % 256).astype(np.uint8).reshape(30, 40))
    with pytest.raises(DataError, match=r"4, 5, 6, 7, 8, 9, 10, 11, 12, 13, \.\.\. \(252 in all\)"):
        read(scene)


def test_different_sizes_of_photograph_label_and_instances(scene):
    save(scene / "train/labels/a.png", np.zeros((15, 20), np.uint8))
    with pytest.raises(DataError, match=r"a\.png is 40 x 30 but .*labels/a\.png is 20 x 15; .*\"label_scale\": true"):
        read(scene)
    (scene / "dataset.json").write_text('{"label_scale": true}')
    assert read(scene)["label"].shape == (1, 8, 8)
    save(scene / "train/labels/a.png", np.zeros((20, 20), np.uint8))
    with pytest.raises(DataError, match=r"is 40 x 30 but .*labels/a\.png is 20 x 20; they must have one size"):
        read(scene)
    save(scene / "train/labels/a.png", np.zeros((30, 40), np.uint8))
    save(scene / "train/instances/a.png", np.zeros((30, 41), np.uint16))
    with pytest.raises(DataError, match=r"instances/a\.png is 41 x 30"):
        read(scene)


def test_instances_that_are_no_ids(scene):
    (scene / "train/instances").mkdir()
    Image.fromarray(draw(0, (40, 30), 4)[0]).convert("CMYK").save(scene / "train/instances/a.tif")
    with pytest.raises(DataError, match=r"instance map .*a\.tif is a picture of mode CMYK, not of one id per pixel"):
        read(scene)


def test_aspects_that_differ_where_the_aspect_is_kept(scene):
    (scene / "dataset.json").write_text('{"crop": "keep_aspect"}')
    save(scene / "train/images/b.png", np.zeros((30, 60, 3), np.uint8))
    save(scene / "train/labels/b.png", np.zeros((30, 60), np.uint8))
    dataset = open_dataset(data_dir=scene, dataset_mode="custom", split="train", image_size=15, num_classes=4)
    assert dataset.shape == (15, 20) and dataset[0]["image"].shape == (3, 15, 20)
    with pytest.raises(DataError, match=r"images/b\.png becomes 30 x 15 where a becomes 20 x 15"):
        dataset[1]


def test_wrong_sizes_and_splits(scene):
    with pytest.raises(DataError, match="image_size is 0"):
        read(scene, image_size=0)
    with pytest.raises(DataError, match="scale_jitter is -1"):
        read(scene, scale_jitter=-1)
    with pytest.raises(DataError, match="splits are train, val, test"):
        read(scene, split="training")


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])  # two decoders of Pillow
@pytest.mark.parametrize("orientation", range(2, 9))
def test_tiff_photographs_obey_the_rule_for_orientation_tags(scene, orientation, compression):
    pixels = draw(0, (40, 30), 4)[0]
    options = {"compression": compression, "tiffinfo": {0x0112: orientation}}
    path = str(replace_photograph(scene, Image.fromarray(pixels), "a.tif", **options))
    with pytest.raises(DataError, match=r"a\.tif has an EXIF orientation tag"):
        read(scene)
    spec = get_spec("custom", num_classes=4)
    assert np.array_equal(read_image(path, replace(spec, exif="ignore")), pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(scene / "turned.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(scene / "turned.png"))
    for name in (path, str(scene / "turned.png")):
        assert np.array_equal(read_image(name, replace(spec, exif="apply")), expected), name


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_tiff_tags_that_turn_nothing(scene, orientation):
    pixels = draw(0, (40, 30), 4)[0]
    path = replace_photograph(scene, Image.fromarray(pixels), "a.tif", tiffinfo={0x0112: orientation})
    for rule in ("ignore", "apply"):
        assert np.array_equal(read_image(str(path), replace(get_spec("custom", num_classes=4), exif=rule)), pixels)


def test_a_damaged_exif_block_does_no_harm_where_it_is_ignored(scene):
    picture = Image.fromarray(draw(0, (40, 30), 4)[0])
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n8\nno hexadecimal number")  # as ImageMagick writes it, damaged
    replace_photograph(scene, picture, "a.png", pnginfo=text)
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        read(scene)
    (scene / "dataset.json").write_text('{"exif": "ignore"}')
    assert read(scene)["image"].shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["labels", "instances"])
def test_turned_tiff_maps_are_refused(scene, kind):
    ids = draw(0, (40, 30), 4)[1]
    (scene / "train" / kind).mkdir(exist_ok=True)
    (scene / "train" / kind / "a.png").unlink(missing_ok=True)
    Image.fromarray(ids).save(scene / "train" / kind / "a.tif")
    read(scene)
    Image.fromarray(ids).save(scene / "train" / kind / "a.tif", tiffinfo={0x0112: 3})
    with pytest.raises(DataError, match=r"a\.tif has an orientation tag \(3\).*save it without the tag"):
        read(scene)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("palette", [False, True])
def test_maps_of_few_bits(scene, bits, palette):
    """Grey of 2 and 4 bits comes scaled out of Pillow, 3 of 3 as 255; palette indices and single bits do not."""
    ids = draw(0, (40, 30), 2**bits)[1]
    label = packed_png(scene / "train/labels/a.png", ids, bits, palette)
    spec = get_spec("custom", num_classes=256)  # so that scaled ids are in the range
    if palette or bits == 1:
        assert np.array_equal(read_label(str(label), spec)[0], ids)
        assert np.array_equal(read_instances(str(label)), ids)
        if bits > 1:
            assert np.array_equal(label_maps.load_label_map(label), ids)
        return
    message = rf"a\.png is grey with {bits} bits per pixel, .*save it with 8 bits, or as a palette PNG"
    for reading, kind in (
        (lambda: read_label(str(label), spec), "label map"),
        (lambda: read_instances(str(label)), "ins"),
    ):
        with pytest.raises(DataError, match=f"the {kind}.*{message}"):
            reading()
    with pytest.raises(ValueError, match=f"grey with {bits} bits per pixel"):
        label_maps.load_label_map(label)
    assert read_image(str(label), spec).size == (40, 30)  # as a photograph it is brightness


@pytest.mark.parametrize(
    ("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)]
)  # grey, RGB, grey and RGB + alpha
def test_photographs_of_16_bits_are_refused_in_every_mode(scene, color_type, channels):
    row = b"\0" + b"\xff\xfe" * channels * 40
    (scene / "train/images/a.png").unlink()
    path = write_png(scene / "train/images/a.png", (30, 40), 16, color_type, row * 30)
    with pytest.raises(
        DataError, match=r"a\.png has more than 8 bits per channel \(mode .*16B\); convert it to 8 bits"
    ):
        read(scene)
    script = load_script("result_folders")
    assert "more than 8 bits per channel" in script._look_at(path)
    path.unlink()
    save(path, draw(0, (40, 30), 4)[0])
    assert script._look_at(path) == ((40, 30), "RGB")
