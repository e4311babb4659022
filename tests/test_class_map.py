"""Which old class a new one starts from, and class maps that people write."""

import re

import pytest

from guided_diffusion.data.specs import read_classes
from guided_diffusion.settings import ConfigError
from guided_diffusion.weights.class_map import BY_MAP, BY_NAME, MEAN, NONE, match_classes, read_class_map

OLD = ("sky", "street", "grass", "field", "Traffic Light", "class 5", "ego-vehicle")


def sources(new, class_map=None, old=OLD):
    return [(row.sources, row.how) for row in match_classes(old, new, class_map, "map.json")]


def test_the_map_goes_before_the_name_and_the_name_before_the_mean():
    new = ("road", "lawn", "tumour", "SKY", "traffic_light", "lake", "street")
    class_map = {"road": ["street"], "lawn": ["grass", "field"], "tumour": None, "street": ["sky"]}
    assert sources(new, class_map) == [
        ((1,), BY_MAP), ((2, 3), BY_MAP), ((), NONE), ((0,), BY_NAME), ((4,), BY_NAME), (tuple(range(7)), MEAN),
        ((0,), BY_MAP),
    ]  # fmt: skip


def test_ids_stand_for_names_and_names_that_mean_nothing_match_nothing():
    new = ("road", "Ego Vehicle", "class 2", "class 5")
    assert sources(new, {"road": ["5"], "2": ["EGOVEHICLE", "0"]}) == [
        ((5,), BY_MAP), ((6,), BY_NAME), ((6, 0), BY_MAP), (tuple(range(7)), MEAN),
    ]  # fmt: skip
    assert sources(("a",), {"a": ["2"]}, old=("x", "2", "y")) == [((1,), BY_MAP)]  # a name goes before an id


def test_a_name_as_written_goes_before_one_that_is_like_it():
    assert sources(("car", "CAR"), old=("Car", "car")) == [((1,), BY_NAME), ((0, 1), BY_NAME)]


@pytest.mark.parametrize("mode", ["ade20k", "cityscapes", "celeba", "coco"])
def test_a_list_of_classes_matches_itself(mode):
    """ADE20K has two classes named screen."""
    names, _ = read_classes(mode)
    assert sources(names, old=names) == [((i,), BY_NAME) for i in range(len(names))]
    if mode == "ade20k":
        assert sources(["Screen"], old=names) == [((58, 130), BY_NAME)]


@pytest.mark.parametrize(
    ("class_map", "said"),
    [
        ({"rode": ["street"]}, r"the new data has no class 'rode' \(is 'road' meant\?\)"),
        ({"grass": ["field"]}, r"no class 'grass'.*the checkpoint has: new classes stand on the left"),
        ({"road": ["stret"]}, r"'road' is given 'stret', which is no class of the checkpoint \(is 'street' meant\?\)"),
        ({"road": ["qqq"]}, r"no class of the checkpoint \(it has 'sky', 'street',"),
        ({"road": ["lawn"]}, r"'lawn', which is no class of the checkpoint.*it is one of the new data"),
        ({"road": ["7"]}, r"'7', which is no class of the checkpoint"),
        ({"road": ["01"]}, r"'01', which is no class"),
        ({"road": ["sky"], "Road": ["grass"]}, r"the class 'road' stands in it twice"),
        ({"road": ["sky"], "0": ["grass"]}, r"the class 'road' stands in it twice"),
        ({"road": ["sky", "0"]}, r"'road' is given 'sky' twice"),
        ({"road": None, "lawn": None}, r"every class null"),
    ],
)
def test_names_that_nobody_knows(class_map, said):
    with pytest.raises(ConfigError, match=rf"the class map map\.json.*{said}"):
        match_classes(OLD, ("road", "lawn"), class_map, "map.json")


def test_a_class_map_file(tmp_path):
    (tmp_path / "map.json").write_text('{"road": "street", "lawn": ["grass", "field"], "tumour": null}')
    expected = {"road": ["street"], "lawn": ["grass", "field"], "tumour": None}
    assert read_class_map(str(tmp_path / "map.json")) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"road": "sky", "road": "grass"}', "'road' stands twice"),
        ('{"road": "sky"', "not valid"),
        ("", "not valid"),
        ("[1]", "one JSON object"),
        ("{}", "one JSON object"),
        ('{"road": 7}', "'road' is given 7; it must be the name"),
        ('{"road": ["sky", null]}', r"'road' is given \['sky', None\]"),
        ('{"road": {"sky": 1}}', "'road' is given {'sky': 1}"),
        ('{"road": true}', "'road' is given True"),
        ('{"road": []}', "empty list; write null"),
    ],
)
def test_files_that_are_no_class_map(tmp_path, text, said):
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}.*{said}"):
        read_class_map(str(path))


def test_a_class_map_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read the class map {re.escape(str(path))} "):
            read_class_map(str(path))
