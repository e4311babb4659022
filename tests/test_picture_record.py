"""`sampling.json` after any edit: it is a record with whole parts, or one sentence says that it is none."""

import json
import random

import pytest

from guided_diffusion.runs.picture_record import Look, read_record, settings_differences
from guided_diffusion.settings import ConfigError

RECORD = {
    "images": {"seed": 0, "s": 1.5, "data_dir": "/data", "remap": {"0": 1}, "classes": ["a", "b"], "learn_sigma": True},
    "run": {"settings": {"s": 1.5}, "made": {"images": 3, "seconds": 1.5, "ranks": 1}},
    "pictures": {"scene0": {"label": "ab12", "photograph": "cd34"}, "scene1": {}},
}
ODD = [
    None,
    True,
    0,
    -1,
    1e300,
    "",
    "x",
    "two\nlines",
    "\0",
    "\ud800",
    "../x",
    "..",
    "/",
    [],
    [[]],
    [1, "a"],
    {},
    {"": None},
    {"..": {}},
]


def edited(rng: random.Random, value):
    """The value, with one odd thing in a place somewhere below."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        content, key = dict(value), rng.choice(sorted(value))
        change = rng.random()
        if change < 0.15:
            del content[key]
        elif change < 0.3:
            content[str(rng.choice(ODD))] = rng.choice(ODD)
        else:
            content[key] = edited(rng, content[key])
        return content
    return rng.choice(ODD)


def test_any_edit_of_a_record_is_a_record_or_one_sentence(tmp_path):
    rng, path, refused = random.Random(0), tmp_path / "sampling.json", 0
    look = Look({"label": "ab12", "photograph": "cd34"}, {"labels": True}, {"samples": "ab"})
    for number in range(3000):
        content = json.dumps(edited(rng, edited(rng, RECORD) if number % 2 else RECORD)).encode()
        if number % 10 == 0:
            content = content[: rng.randrange(len(content) + 1)]  # cut
        path.write_bytes(content)
        try:
            record = read_record(str(path))
        except ConfigError as error:
            assert "sampling.json is damaged" in str(error) and "\n" not in str(error)
            refused += 1
            continue
        for one, other in ((record, RECORD), (RECORD, record)):
            for text in settings_differences(one["images"], other["images"]):
                assert "\n" not in text and text.encode()  # a line that any terminal takes
        made = record["run"].get("made", {"images": 0, "seconds": 0.0})
        assert made["images"] + 1 > 0 and made["seconds"] + 0.5 > 0
        for name, entry in record.get("pictures", {}).items():
            assert "/" not in name and name not in ("", ".", "..") and look.differs(entry) in (True, False)
    assert 100 < refused < 2900


def test_a_record_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "sampling.json"
    assert read_record(str(path)) is None
    path.write_text(json.dumps(RECORD))
    assert read_record(str(path)) == RECORD and settings_differences(RECORD["images"], RECORD["images"]) == []


@pytest.mark.parametrize("change", [{"label": "00"}, {"instances": "00"}])
def test_a_look_differs_from_an_entry_of_another_layout(change):
    entry = {"label": "ab12", "instances": "ef56", "photograph": "cd34"}
    look = Look(entry | change, {"labels": True}, {"samples": "ab"})
    assert look.differs(entry) and not look.differs(entry | change | {"photograph": "another"})
