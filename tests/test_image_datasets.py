"""Pixels, against the golden numbers of the original and against plain statements of what each transform gives."""

import json
import math

import numpy as np
import pytest
import torch
from data_helpers import draw, save, shared_or_skip, write_benchmark, write_custom
from PIL import Image

from guided_diffusion.image_datasets import open_dataset

GOLDEN_SETS = [
    ("ade20k", "val"),
    ("ade20k", "train_center"),
    ("celeba", "test"),
    ("cityscapes", "val"),
    ("coco", "val"),
    ("coco", "train_center"),
]


def open_custom(root, split="train", image_size=16, **options):
    return open_dataset(
        data_dir=root, dataset_mode="custom", split=split, image_size=image_size, **{"num_classes": 4, **options}
    )


@pytest.mark.parametrize(("mode", "split"), GOLDEN_SETS)
def test_golden_pixels(mode, split):
    golden = np.load(shared_or_skip("golden", "datasets.npz"))
    folder = shared_or_skip("data", f"{mode}_sample")
    dataset = open_dataset(
        data_dir=folder,
        dataset_mode=mode,
        split="train" if split == "train_center" else split,
        image_size=64,
        random_crop=False,
        random_flip=False,
    )
    stems = {key.split("/")[2] for key in golden.files if key.startswith(f"{mode}/{split}/")}
    assert stems
    for stem in stems:
        sample = dataset[dataset.names.index(stem)]
        expected = golden[f"{mode}/{split}/{stem}/image"].astype(int)
        assert np.abs(sample["image"].numpy().astype(int) - expected).max() <= 1  # Pillow versions differ in rounding
        for key in ("label", "instance"):
            if f"{mode}/{split}/{stem}/{key}" in golden:
                assert np.array_equal(sample[key].numpy(), golden[f"{mode}/{split}/{stem}/{key}"]), key


def shrink(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The published recipe, once more: halve with a box filter while twice too large, then one bicubic step."""
    while min(picture.size) >= 2 * min(size):
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.BOX)
    return picture.resize(size, Image.BICUBIC)


@pytest.mark.parametrize("flip", [False, True])
def test_random_crop_is_one_window_of_one_resized_scene(tmp_path, flip):
    """Image, labels and instances are the same window of the same resized scene, for a side that the recipe allows."""
    write_custom(tmp_path, {"train": 1}, size=(50, 34), instances=True)
    dataset = open_custom(tmp_path, random_flip=flip)
    photograph, ids, instances = draw(0, (50, 34), 4)
    windows = {}
    for side in range(16, math.ceil(16 / 0.8) + 1):
        shorter = shrink(Image.fromarray(photograph), (round(25 * side / 17), side))  # 50 x 34 is halved once first
        nearest = [
            np.asarray(Image.fromarray(a).resize(shorter.size, Image.NEAREST)) for a in (ids, instances.astype("int32"))
        ]
        for y in range(side - 15):
            for x in range(shorter.width - 15):
                cut = np.s_[y : y + 16, x : x + 16]
                for mirrored in (False, True):
                    picture, label, instance = (
                        a[cut][:, ::-1] if mirrored else a[cut] for a in (np.asarray(shorter), *nearest)
                    )
                    windows[picture.tobytes()] = (side, x, y, mirrored), label, instance
    seen = set()
    for position in range(60):
        sample = dataset[0, position]
        found, label, instance = windows[sample["image"].permute(1, 2, 0).numpy().tobytes()]
        assert np.array_equal(sample["label"][0], label) and np.array_equal(sample["instance"][0], instance)
        seen.add(found)
    sides, flips = {side for side, *_ in seen}, [mirrored for *_, mirrored in seen]
    assert sides == {16, 17, 18, 19, 20}  # a given side is missed by 60 draws with probability (4/5)^60 = 2e-6
    assert any(flips) == flip and not all(flips)


def test_sampling_squeezes_the_whole_picture(tmp_path):
    write_custom(tmp_path, {"val": 1}, size=(50, 34), instances=True)
    sample = open_custom(tmp_path, "val")[0]
    photograph, ids, instances = draw(0, (50, 34), 4)
    assert np.array_equal(sample["image"].permute(1, 2, 0), shrink(Image.fromarray(photograph), (16, 16)))
    # Pillow's nearest pixel is the one under the centre of the target pixel.
    rows, columns = ((np.arange(16) + 0.5) * 34 / 16).astype(int), ((np.arange(16) + 0.5) * 50 / 16).astype(int)
    assert np.array_equal(sample["label"][0], ids[rows][:, columns])
    assert np.array_equal(sample["instance"][0], instances[rows][:, columns])
    assert sample["label"].dtype == torch.uint8 and sample["instance"].dtype == torch.int32


@pytest.mark.parametrize("mode", ["ade20k", "cityscapes", "celeba", "coco"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_benchmark_modes(tmp_path, mode, split):
    write_benchmark(tmp_path, mode)
    dataset = open_dataset(data_dir=tmp_path, dataset_mode=mode, split=split, image_size=16)
    size = (16, 32) if mode == "cityscapes" else (16, 16)
    assert (
        dataset.shape == size
        and dataset.num_classes == {"ade20k": 151, "cityscapes": 35, "celeba": 19, "coco": 183}[mode]
    )
    sample = dataset[0]
    assert sample["image"].shape == (3, *size) and sample["label"].shape == (1, *size)
    _, ids, instances = draw(0 if split == "train" else 2, (64, 32), 5)
    expected = {"ade20k": {i - 1 if i else 150 for i in ids.flat}, "coco": {182 if i == 4 else i for i in ids.flat}}
    assert set(sample["label"].flatten().tolist()) <= expected.get(mode, set(ids.flat))
    assert dataset.has_instances == (mode != "ade20k") == ("instance" in sample)
    if mode == "celeba":
        assert torch.equal(sample["instance"], sample["label"].int())
    if mode == "cityscapes":  # the whole scene, at most mirrored, with numbers that 8 bits could not hold
        assert set(sample["instance"].flatten().tolist()) == set(instances.flat) and instances.max() > 26000
    without = open_dataset(data_dir=tmp_path, dataset_mode=mode, split=split, image_size=16, use_instances=False)
    assert "instance" not in without[0] and not without.has_instances


def test_the_position_alone_decides_the_augmentation(tmp_path):
    write_custom(tmp_path, {"train": 2})
    first, again, other = open_custom(tmp_path), open_custom(tmp_path), open_custom(tmp_path, seed=1)
    np.random.seed(0)
    torch.manual_seed(0)
    one = first[1, 1000]["image"]
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(one, again[1, 1000]["image"])
    assert any(not torch.equal(one, again[1, position]["image"]) for position in range(4))
    assert any(not torch.equal(first[1, p]["image"], other[1, p]["image"]) for p in range(4))
    assert torch.equal(first[1]["image"], first[1, 1]["image"])


def test_scale_jitter_enlarges_jointly(tmp_path):
    """With jitter 1 the scene is up to twice as large: fewer blocks are seen, image and labels still agree."""
    write_custom(tmp_path, {"train": 1}, size=(64, 64), classes=20)
    plain = open_custom(tmp_path, num_classes=20, image_size=32, random_crop=False)
    jittered = open_custom(tmp_path, num_classes=20, image_size=32, random_crop=False, scale_jitter=1.0)
    whole = set(plain[0]["label"].flatten().tolist())
    fewest = len(whole)
    for position in range(30):
        sample = jittered[0, position]
        assert sample["label"].shape == (1, 32, 32)
        inner = sample["label"][0].numpy()
        same = np.ones_like(inner, dtype=bool)  # pixels whose neighbourhood is one class, where resizing mixes nothing
        for axis in (0, 1):
            for step in range(-3, 4):
                same &= np.roll(inner, step, axis) == inner
        same[:4] = same[-4:] = same[:, :4] = same[:, -4:] = False
        # The red channel is 10 * id + noise in 0..2 over such a pixel; bicubic overshoot of noise stays within 1.
        error = sample["image"][0].numpy()[same].astype(int) - 10 * inner[same]
        assert error.min() >= -1 and error.max() <= 3
        fewest = min(fewest, len(set(inner.flatten().tolist())))
    assert fewest < len(whole)


def test_keep_aspect(tmp_path):
    write_custom(tmp_path, size=(48, 24), settings={"crop": "keep_aspect"})
    for jitter in (0.0, 0.5):
        dataset = open_custom(tmp_path, image_size=12, scale_jitter=jitter)
        assert dataset.shape == (12, 24)
        assert all(dataset[0, p]["image"].shape == (3, 12, 24) for p in range(20))
    photograph, *_ = draw(0, (48, 24), 4)
    expected = np.asarray(shrink(Image.fromarray(photograph), (24, 12)))
    seen = [open_custom(tmp_path, image_size=12)[0, p]["image"].permute(1, 2, 0).numpy() for p in range(8)]
    assert all(np.array_equal(s, expected) or np.array_equal(s, expected[:, ::-1]) for s in seen)


def test_more_than_256_classes(tmp_path):
    ids = np.arange(64 * 16, dtype=np.uint16).reshape(32, 32) % 300
    save(tmp_path / "val/images/a.png", np.zeros((32, 32, 3), np.uint8))
    save(tmp_path / "val/labels/a.png", ids)
    sample = open_custom(tmp_path, "val", 32, num_classes=300)[0]
    assert sample["label"].dtype == torch.int16 and np.array_equal(sample["label"][0], ids)


def test_label_encodings(tmp_path):
    """The same ids stored as grey, palette, 16-bit and coloured pictures."""
    _, ids, _ = draw(0, (16, 16), 4)
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 254]], dtype=np.uint8)
    indexed = Image.fromarray(ids, mode="L").convert("P")
    indexed.putpalette(palette.tobytes())
    pictures = {
        "grey": Image.fromarray(ids),
        "palette": indexed,
        "sixteen": Image.fromarray(ids.astype(np.uint16)),
        "colors": Image.fromarray(palette[ids]),
    }
    for name, picture in pictures.items():
        root = tmp_path / name
        save(root / "val/images/a.png", np.zeros((16, 16, 3), np.uint8))
        (root / "val/labels").mkdir()
        picture.save(root / "val/labels/a.png")
    classes = [{"name": f"class {i}", "color": color} for i, color in enumerate(palette.tolist())]
    settings = {"label_encoding": "colors", "classes": classes}
    (tmp_path / "colors/dataset.json").write_text(json.dumps(settings))
    for name in pictures:
        assert np.array_equal(open_custom(tmp_path / name, "val")[0]["label"][0], ids), name


def test_grey_photographs(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save(tmp_path / "val/images/a.png", grey)
    save(tmp_path / "val/labels/a.png", np.zeros((16, 16), np.uint8))
    assert np.array_equal(open_custom(tmp_path, "val")[0]["image"], np.stack([grey] * 3))
    save(tmp_path / "val/images/a.png", np.stack([grey, grey // 2, grey // 4], axis=-1))
    (tmp_path / "dataset.json").write_text('{"grey": true}')
    image = open_custom(tmp_path, "val")[0]["image"].numpy().astype(int)
    luminance = 0.299 * grey + 0.587 * (grey // 2) + 0.114 * (grey // 4)  # ITU-R BT.601
    assert (image[0] == image[1]).all() and np.abs(image[0] - luminance).max() <= 1


def test_labels_alone(tmp_path):
    write_custom(tmp_path, {"val": 2}, instances=True)
    whole = open_custom(tmp_path, "val")
    alone = open_custom(None, "val", labels_dir=tmp_path / "val/labels")
    assert not alone.has_images and alone.has_instances and alone.names == whole.names
    assert "image" not in alone[0] and torch.equal(alone[0]["label"], whole[0]["label"])
    assert torch.equal(alone[1]["instance"], whole[1]["instance"])
