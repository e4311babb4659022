import json

import numpy as np
import pytest

from guided_diffusion.data.specs import DataError, distinct_colors, get_spec, read_classes


@pytest.mark.parametrize(
    ("mode", "count", "known"),
    [
        ("ade20k", 151, {0: "wall", 12: "person", 149: "flag", 150: "unlabelled"}),
        ("cityscapes", 35, {7: "road", 26: "car", 33: "bicycle", 34: "license plate"}),
        ("celeba", 19, {0: "background", 1: "skin", 13: "hair", 18: "cloth"}),
        ("coco", 183, {0: "person", 181: "wood", 182: "unlabelled"}),
    ],
)
def test_class_lists(mode, count, known):
    spec = get_spec(mode)
    assert spec.num_classes == count == len(spec.class_names) == len(spec.palette)
    assert spec.palette.dtype == np.uint8
    for i, name in known.items():
        assert spec.class_names[i].split(",")[0].split(";")[0] == name


def test_customary_colors():
    # The published colours of three classes each, as every viewer of these data sets draws them.
    assert get_spec("cityscapes").palette[[7, 11, 26]].tolist() == [[128, 64, 128], [70, 70, 70], [0, 0, 142]]
    assert get_spec("ade20k").palette[[0, 1, 2]].tolist() == [[120, 120, 120], [180, 120, 120], [6, 230, 230]]
    assert get_spec("celeba").palette[[1, 2, 13]].tolist() == [[204, 0, 0], [76, 153, 0], [0, 0, 204]]


def test_coco_colors_follow_the_formula_and_differ():
    _, palette = read_classes("coco")
    assert np.array_equal(palette[:182], distinct_colors(182))
    distance = np.abs(palette[:, None].astype(int) - palette[None]).sum(-1)
    assert distance[~np.eye(183, dtype=bool)].min() >= 18  # one step of the grid of candidates is 19 or 20


def test_ids_of_each_mode():
    ade = get_spec("ade20k").lookup_table(256)
    assert ade[0] == 150 and ade[1] == 0 and ade[150] == 149 and (ade[151:] == -1).all()
    coco = get_spec("coco").lookup_table(256)
    assert coco[0] == 0 and coco[181] == 181 and coco[255] == 182 and (coco[183:255] == -1).all()
    cityscapes = get_spec("cityscapes").lookup_table(256)
    assert np.array_equal(cityscapes[:35], np.arange(35)) and (cityscapes[35:] == -1).all()


def test_more_classes_are_legal_and_fewer_only_where_ids_fit():
    more = get_spec("celeba", num_classes=25)
    assert more.num_classes == 25 and more.class_names[18:20] == ("cloth", "class 19") and more.palette.shape == (25, 3)
    assert len({tuple(color) for color in more.palette.tolist()}) == 25
    fewer = get_spec("coco", num_classes=182).lookup_table(256)
    assert fewer[181] == 181 and fewer[255] == -1  # unlabelled has no class left


def test_custom_without_names_gets_generic_ones():
    spec = get_spec("custom", num_classes=300)
    assert spec.class_names[:2] == ("class 0", "class 1") and len({tuple(c) for c in spec.palette.tolist()}) == 300
    with pytest.raises(DataError, match="needs num_classes"):
        get_spec("custom")


def test_generated_colors_are_far_apart():
    colors = distinct_colors(12).astype(int)
    distance = np.abs(colors[:, None] - colors[None]).sum(-1)
    # 12 colours drawn at random have a closest pair of about 55 in this metric.
    assert distance[~np.eye(12, dtype=bool)].min() > 80
    avoided = distinct_colors(3, avoid=colors[:5])
    assert np.abs(avoided[:, None].astype(int) - colors[None, :5]).sum(-1).min() > 80


def custom(tmp_path, settings, num_classes=None):
    (tmp_path / "dataset.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return get_spec("custom", tmp_path, num_classes)


def test_dataset_json(tmp_path):
    spec = custom(
        tmp_path,
        {
            "classes": ["background", {"name": "liver", "color": [200, 30, 40]}],
            "ignore_id": 255,
            "remap": {"7": 1},
            "instances": True,
            "crop": "keep_aspect",
            "grey": True,
            "exif": "apply",
            "label_scale": True,
        },
    )
    assert spec.class_names == ("background", "liver", "unlabelled") and spec.num_classes == 3
    assert spec.palette[1].tolist() == [200, 30, 40] and spec.ignore_class == 2
    table = spec.lookup_table(256)
    # 2 is the id of the class that ignore_id adds, which no file knows: out of range there
    assert table[[0, 1, 2, 7, 255, 8]].tolist() == [0, 1, -1, 1, 2, -1]
    assert (spec.instances, spec.crop, spec.grey, spec.exif, spec.label_scale) == (
        "files",
        "keep_aspect",
        True,
        "apply",
        True,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "one JSON object"),
        ('{"grey": true, "grey": false}', "dataset.json is not valid JSON: the key 'grey' stands twice"),
        ('{"classes": [{"name": "a", "name": "b"}]}', "the key 'name' stands twice"),
        ({"classes": ["a", "b", {"name": "a"}]}, "the classes 0 and 2 are both named 'a'; rename one"),
        (
            {"classes": ["a", "unlabelled"], "ignore_id": 255},
            """ignore_id adds a class 'unlabelled', and class 1 has that name; .* "remap": {"255": 1}""",
        ),
        ({"classes": ["a"], "colour": 1}, "'colour' is unknown; known keys are classes"),
        ({"classes": "a"}, "must be a JSON array"),
        ({"classes": [3]}, "class 0 is 3"),
        ({"classes": [{"name": "a", "color": [1, 2]}]}, "color of class 0"),
        ({"classes": [{"name": "a", "color": [1, 2, 300]}]}, "0 to 255"),
        ({"classes": ["a"], "crop": "round"}, "one of square, keep_aspect"),
        ({"classes": ["a"], "grey": 1}, "true or false"),
        ({"classes": ["a"], "ignore_id": True}, "whole number"),
        ({"ignore_id": 255}, "needs classes"),
        ({"classes": ["a"], "remap": {"x": 1}}, "maps ids to ids"),
        ({"classes": ["a"], "remap": {"3": 9}}, "remap sends 3 to 9"),
        ({"classes": ["a", "b"], "label_encoding": "colors"}, "a color of its own"),
        (
            {"classes": [{"name": "a", "color": [1, 2, 3]}], "label_encoding": "colors", "remap": {"1": 0}},
            "are for label maps of ids",
        ),
    ],
)
def test_wrong_dataset_json(tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        custom(tmp_path, settings)


def test_what_an_older_training_recorded_is_checked_but_for_its_names():
    twice = get_spec("custom", None, None, {"classes": ["a", "b", "a"]})
    assert twice.class_names == ("a", "b", "a")
    for wrong, message in (([], "one JSON object"), ({"classes": 5}, "must be a JSON array"), ({"x": 1}, "unknown")):
        with pytest.raises(DataError, match=f"dataset_json in config.json.*{message}"):
            get_spec("custom", None, 3, wrong)


def test_wrong_arguments():
    with pytest.raises(DataError, match="the modes are ade20k, cityscapes"):
        get_spec("ade")
    with pytest.raises(DataError, match="between 1 and"):
        get_spec("coco", num_classes=0)
