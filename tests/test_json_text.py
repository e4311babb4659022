"""JSON that people wrote or edited: one error for all that is wrong with it, in every file that is read."""

import json

import numpy as np
import pytest
from data_helpers import REPOSITORY, load_script, write_custom
from evaluation_helpers import fails
from evaluation_helpers import load_script as load_evaluation

from guided_diffusion.data.json_text import MAX_DEPTH, parse_json
from guided_diffusion.data.listing import read_cache_note, read_cache_settings
from guided_diffusion.data.specs import DataError, get_spec
from guided_diffusion.logger import Logger
from guided_diffusion.weights import store

DEEP = {"arrays": "[" * 100_000 + "]" * 100_000, "objects": '{"a":' * 100_000 + "1" + "}" * 100_000}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "text", ["3", '"text"', "null", "[]", '{"a": [1, {"b": 2.5}], "c": {"a": "b"}}', nested(MAX_DEPTH)]
)
def test_what_is_right_is_read_as_python_reads_it(text):
    for content in (text, text.encode(), text.encode("utf-8-sig"), text.encode("utf-16")):
        assert parse_json(content) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice in one object; keep one"),
        ('[{"b": {"c": [{"x": 1, "x": 1}]}}]', "the key 'x' stands twice"),  # at any depth
        (nested(MAX_DEPTH + 1), "nests more than 64 deep"),
        (nested(900), "nests more than 64 deep"),  # read by Python's reader, and too deep for what comes after it
        (DEEP["arrays"], "nests more than 64 deep"),
        (DEEP["objects"], "nests more than 64 deep"),
        (b"\xff\xfe\xff", "decode"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{\n  "grey": true,  // as X-ray is\n  "crop": "square"\n}', 2, "no comments"),
        ('{\n  "grey": true, # as X-ray is\n  "crop": "square"\n}', 2, "no comments"),
        ('// ours\n{"grey": true}', 1, "no comments"),
        ('{"grey": true}\n/* the end */', 2, "no comments"),
        ('{"grey": /* ? */ true}', 1, "no comments"),
        ('{\n  "classes": ["a", "b",\n]}', 2, "no comma may stand after the last entry"),
        ('{\n\n  "grey": true,\n}\n', 3, "no comma may stand after the last entry"),
        ("{\n'grey': true}", 2, "double quotes"),
        ('{\n"grey": True}', 2, "writes true, false and null"),
        ('{"classes": [\n  "a"\n  "b"]}', 3, "Expecting ',' delimiter"),
    ],
)
def test_the_mistakes_people_make_are_named_with_their_line(tmp_path, text, line, reason):
    for mark in ("", "\ufeff"):
        (tmp_path / "dataset.json").write_text(mark + text.replace("\n", "\r\n"), encoding="utf-8")
        with pytest.raises(DataError, match=rf"dataset\.json is not valid JSON: line {line}: .*{reason}"):
            get_spec("custom", tmp_path, 2)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):  # as Windows' editors and PowerShell write
        (tmp_path / "dataset.json").write_text('{"classes": ["häuser", "wald"]}', encoding=encoding)
        assert get_spec("custom", tmp_path).class_names == ("häuser", "wald")
    assert parse_json("\ufeff[1]") == [1]


@pytest.mark.parametrize("deep", DEEP.values(), ids=DEEP)
def test_files_that_nest_beyond_reason_are_named(tmp_path, deep):
    for name in ("dataset.json", "cache.json", "config.json", "checkpoint000001.json"):
        (tmp_path / name).write_text(deep)
    with pytest.raises(DataError, match=r"dataset\.json is not valid JSON: it nests more than 64 deep"):
        get_spec("custom", tmp_path)
    with pytest.raises(DataError, match=r"cache\.json is not the note of a cache .*nests.*cache_dataset\.py again"):
        read_cache_settings(tmp_path)
    with pytest.raises(store.CheckpointError, match=r"config\.json is not the config of a training run .*nests"):
        store.read_config(str(tmp_path / "model.pt"))
    assert store.newest_complete(str(tmp_path), said := [].append) is None and said
    assert store.read_manifest(str(tmp_path), 1) == {}


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"complete": true}', '{"complete": 1}', '{"complete": true, "complete": false}']
)
def test_a_note_that_is_none_of_a_cache_is_named(tmp_path, content):
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(DataError, match=r"cache\.json is not the note of a cache"):
        read_cache_note(str(tmp_path / "cache.json"))


def test_a_cache_is_not_continued_from_a_note_that_is_none(tmp_path, capsys):
    data = write_custom(tmp_path / "data")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text(DEEP["arrays"])
    flags = ["--data_dir", data, "--dataset_mode", "custom", "--num_classes", 4, "--image_size", 8]
    main = load_script("scripts/data/cache_dataset.py").main
    assert main([str(part) for part in (*flags, "--cache_dir", tmp_path / "cache")]) == 1
    assert "cache.json is not the note of a cache" in capsys.readouterr().err
    assert (tmp_path / "cache" / "cache.json").read_text() == DEEP["arrays"]


def test_a_record_of_a_caches_sources_that_is_damaged_costs_its_line(tmp_path):
    script = load_script("scripts/data/cache_dataset.py")
    good = script.record_line("train", "a", script.Record({"a.png": [1, 2]}, ["a.png"]))
    (tmp_path / script.SOURCES_FILE).write_text(DEEP["arrays"] + "\n5\n[[], 1, 2, 3]\n" + good)
    assert list(script.read_records(str(tmp_path))) == [("train", "a")]


def test_a_damaged_line_of_figures_is_dropped_on_resume(tmp_path):
    good = '{"step": 1, "loss": 0.5}\n'
    (tmp_path / "progress.jsonl").write_text(good + DEEP["arrays"] + '\n[]\n7\n{"step": null}\n')
    logger = Logger(str(tmp_path))
    logger.open(1)
    logger.close()
    assert (tmp_path / "progress.jsonl").read_text() == good


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP["arrays"], "nest|recursion"),
        ('{"7": 0, "7": 1}', "an id stands twice"),
        ('{"7": 0, "07": 1}', "an id stands twice"),
        ("[[7, 0], [8, 1]]", "it is no object"),
        ('{"7": {"8": 1}}', "expected JSON such as"),
    ],
)
def test_a_scorers_mapping_of_ids_means_one_thing(tmp_path, content, message):
    read_remap = load_evaluation("label_maps").read_remap
    (tmp_path / "map.json").write_text(content)
    with fails(f"--remap .*map.json: .*({message})"):
        read_remap(str(tmp_path / "map.json"))
    (tmp_path / "map.json").write_text('{"7": 0, "8": 1}')
    assert read_remap(str(tmp_path / "map.json")) == {7: 0, 8: 1}


def test_statistics_whose_protocol_nests_beyond_reason_are_named(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(64), sigma=np.eye(64), protocol=DEEP["arrays"])
    with fails(r"s\.npz: its protocol is no JSON record"):
        load_evaluation("test_with_FID").read_statistics(tmp_path / "s.npz", 64, {}, None)


def test_annotations_that_nest_beyond_reason_are_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "data")
    import prepare_cocostuff

    (tmp_path / "instances.json").write_text(DEEP["objects"])
    with pytest.raises(prepare_cocostuff.PreparationError, match=r"instances\.json has not the structure"):
        prepare_cocostuff.read_annotations(tmp_path / "instances.json", set())
