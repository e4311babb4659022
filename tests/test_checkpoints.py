"""Checkpoint sets: complete or nothing, on disks that fail and under hands that damage."""

import errno
import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch

from guided_diffusion.runs.log_directory import LogDirectory
from guided_diffusion.runs.resume import find_start
from guided_diffusion.weights import publishing, store
from guided_diffusion.weights.store import CheckpointError

RATES = ["0.9"]


def save(folder, step, size=100, losses=None, measure=None, good=True):
    """A set whose tensors hold the number of the step; published, as the training loop does it."""
    contents = {
        store.model_name(step): lambda: {"w": torch.full((size,), float(step))},
        store.ema_name("0.9", step): lambda: {"w": torch.full((size,), -float(step))},
        store.optimizer_name(step): lambda: {"state": {}},
    }
    best = publishing.read_best(str(folder), RATES, print)
    manifest = {"samples_seen": 4 * step, "world_size": 1, "validation_loss": losses or {}, "measure": measure}
    store.save_set(str(folder), step, contents, manifest | {"best": best, "good": good})
    return publishing.publish_set(str(folder), step, RATES, print)


def newest(folder) -> tuple[int | None, list[str]]:
    warnings: list[str] = []
    manifest = store.newest_complete(str(folder), warnings.append)
    return manifest and manifest["step"], warnings


def value(path) -> float:
    return float(store.load_weights(str(path))["w"][0])


@pytest.mark.parametrize("step,name", [(10, "model000010.pt"), (1234567, "model1234567.pt")])
def test_names(step, name):
    assert store.model_name(step) == name
    assert store.step_of(f"some/where/{name}") == step
    assert store.step_of("some/where/model.pt") is None


def test_the_newest_set_is_found(tmp_path):
    assert newest(tmp_path / "nowhere") == (None, [])
    for step in (5, 10, 1_000_000):  # seven digits sort after six
        save(tmp_path, step)
    assert newest(tmp_path) == (1_000_000, [])
    assert value(tmp_path / "model.pt") == 1_000_000
    assert not [name for name in os.listdir(tmp_path) if ".tmp" in name]


def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def scramble(path):
    path.write_text("{")


@pytest.mark.parametrize(
    "name,harm,said",
    [
        ("model000010.pt", truncate, "model000010.pt has .* bytes"),
        ("ema_0.9_000010.pt", change_a_byte, "content of ema_0.9_000010.pt has changed"),
        ("opt000010.pt", os.remove, "opt000010.pt is missing"),
        ("checkpoint000010.json", scramble, "checkpoint000010.json cannot be read"),
    ],
)
def test_a_damaged_set_is_passed_over_by_name(tmp_path, name, harm, said):
    save(tmp_path, 5)
    save(tmp_path, 10)
    harm(tmp_path / name)
    step, warnings = newest(tmp_path)
    assert step == 5
    assert len(warnings) == 1
    assert re.search(said, warnings[0])


def test_a_set_without_its_manifest_does_not_count(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10)
    os.remove(tmp_path / "checkpoint000010.json")
    assert newest(tmp_path) == (5, [])


def listing(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_disk_that_fills_up_harms_nothing(tmp_path):
    """The kernel refuses to let a file grow: what it does at the end of a full disk, too."""
    save(tmp_path, 5)
    before = listing(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*model000010\.pt.*disk full"):
            save(tmp_path, 10, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(tmp_path) == before
    assert newest(tmp_path) == (5, [])


def test_a_set_that_a_kill_cut_short_is_removed_and_others_files_are_not(tmp_path):
    save(tmp_path, 5)
    torch.save({"w": torch.zeros(1)}, tmp_path / "model000007.pt")  # another program's: it has no manifest either
    before = listing(tmp_path)

    code = """
import os, sys
from guided_diffusion.weights import publishing, store
contents = {"model000010.pt": dict, "opt000010.pt": lambda: os._exit(9)}
store.save_set(sys.argv[1], 10, contents, {})
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert (tmp_path / "model000010.pt").exists()
    store.remove_leftovers(str(tmp_path))
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_save_that_fails_in_any_way_leaves_nothing_of_its_set(tmp_path, error):
    save(tmp_path, 5)
    before = listing(tmp_path)

    def fail():
        raise error

    with pytest.raises(error):
        store.save_set(str(tmp_path), 10, {"model000010.pt": dict, "opt000010.pt": fail}, {})
    assert listing(tmp_path) == before


@pytest.mark.parametrize("failing_call", range(1, 9))
def test_a_sync_that_fails_at_any_point_leaves_a_complete_set(tmp_path, monkeypatch, failing_call):
    save(tmp_path, 5)
    calls = 0
    real = os.fsync

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointError, match="No space left"):
            save(tmp_path, 10)
    step, warnings = newest(tmp_path)
    assert step == 5
    assert not warnings
    assert value(tmp_path / "model.pt") == 5
    assert not [name for name in os.listdir(tmp_path) if ".tmp" in name]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")  # root may write to any folder, but not into a file
    with pytest.raises(CheckpointError, match=r"cannot write .*file/config\.json"):
        store.write_json(str(tmp_path / "file" / "config.json"), {})


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in ((5, 0.5), (10, 0.1), (15, 0.3), (20, 0.2)):
        save(tmp_path, step, losses={"0.9": loss})
        store.prune(str(tmp_path), 2, step)
    kept = sorted(name for name in os.listdir(tmp_path) if name.startswith("model"))
    assert kept == ["model.pt", "model000015.pt", "model000020.pt"]
    assert value(tmp_path / "ema_0.9_best.pt") == -10
    assert value(tmp_path / "model.pt") == 20
    assert json.loads((tmp_path / "best.json").read_text()) == {"0.9": {"step": 10, "loss": 0.1}}


def test_a_kill_while_pruning_leaves_nothing_for_long(tmp_path, monkeypatch):
    for step in (5, 10):
        save(tmp_path, step)
    monkeypatch.setattr(os, "remove", lambda path: (_ for _ in ()).throw(SystemExit("killed")))
    with pytest.raises(SystemExit):
        store.prune(str(tmp_path), 1, 10)
    monkeypatch.undo()
    assert (tmp_path / "model000005.pt").exists()
    store.remove_leftovers(str(tmp_path))
    assert not [name for name in os.listdir(tmp_path) if "000005" in name]
    assert newest(tmp_path) == (10, [])


def test_prune_never_trades_a_whole_set_for_a_damaged_one(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    truncate(tmp_path / "model000010.pt")
    save(tmp_path, 7)  # continued at 5, saved at 7
    store.prune(str(tmp_path), 1, 7)
    assert newest(tmp_path)[0] == 7


@pytest.mark.parametrize("links", [True, False])
def test_publishing_again_changes_nothing(tmp_path, monkeypatch, links):
    if not links:  # some file systems have none

        def link(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", link)
    assert save(tmp_path, 5, losses={"0.9": 1.0}) == ["0.9"]
    before = listing(tmp_path)
    assert publishing.publish_set(str(tmp_path), 5, RATES, print) == []
    assert listing(tmp_path) == before


def test_losses_of_another_validation_set_do_not_compare(tmp_path):
    """A lower loss on other images says nothing about the best so far: the newer set takes its place."""
    for step, loss, measure, best in ((5, 1.0, "32 images", 5), (10, 2.0, "32 images", 5), (15, 3.0, "64 images", 15)):
        save(tmp_path, step, losses={"0.9": loss}, measure=measure)
        assert json.loads((tmp_path / "best.json").read_text())["0.9"]["step"] == best


def test_without_a_loss_the_latest_is_the_best_and_nan_never_is(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10)
    assert value(tmp_path / "ema_0.9_best.pt") == -10
    save(tmp_path, 15, losses={"0.9": 1.0})
    save(tmp_path, 20, losses={"0.9": float("nan")})
    assert value(tmp_path / "ema_0.9_best.pt") == -15


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    save(tmp_path, 5)
    before = listing(tmp_path)
    (tmp_path / "model000010.pt.tmp4711").write_text("half")
    store.remove_leftovers(str(tmp_path))
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "content, said", [(b"", "is empty"), (b"not a checkpoint", "is no checkpoint"), ("half", "is truncated")]
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, said):
    path = tmp_path / "model.pt"
    if content == "half":
        torch.save({"w": torch.zeros(1000)}, path)
        truncate(path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.pt {said}"):
        store.load(str(path))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-here"),)

    torch.save({"w": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError):
        store.load(str(tmp_path / "model.pt"))
    assert not (tmp_path / "was-here").exists()


def test_an_optimizer_file_is_not_taken_for_weights(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"opt000005\.pt does not hold a network's state dict"):
        store.load_weights(str(tmp_path / "opt000005.pt"))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model": 1, "diffusion": {}}',
        '{"model": null, "diffusion": {}}',
        '{"model": {}, "diffusion": {}, "data": []}',
        '{"model": {}, "diffusion": {}, "training": "long"}',
        '{"model": {}, "diffusion": {}, "dataset_json": ["a"]}',
        '{"model": {}, "diffusion": {}, "start": 5}',
        '{"model": {"num_classes": "many"}, "diffusion": {}}',
        '{"model": {}, "diffusion": {}, "data": {"num_workers": null}}',
        '{"model": {}, "diffusion": {}, "diffusion": {}}',
    ],
)
def test_a_config_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not the config of a training run"):
        store.read_config(str(tmp_path / "model.pt"))


def test_parts_of_a_config_that_are_not_there(tmp_path):
    parts = {"model": {"num_classes": 4.0, "of a later version": 1}, "diffusion": {}, "training": None, "data": None}
    (tmp_path / "config.json").write_text(json.dumps(parts))
    config = store.read_config(str(tmp_path / "model.pt"))
    assert config == {"model": {"num_classes": 4, "of a later version": 1}, "diffusion": {}}


def start(logdir, resume="", **options):
    said: list[str] = []
    options = {"world_size": 1, "global_batch": 4, **options}
    return find_start(LogDirectory(str(logdir)), str(resume), RATES, log=said.append, **options), "\n".join(said)


def test_where_a_run_starts(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    other.mkdir()
    save(other, 10)
    found, _ = start(own)
    assert (found.step, found.model, found.optimizer) == (0, "", "")
    assert not own.exists()
    found, said = start(own, other / "model.pt")
    assert (found.step, found.model, found.optimizer) == (0, str(other / "model.pt"), "")
    assert "new run" in said
    found, _ = start(own, other / "model000010.pt")
    assert (found.step, found.samples_seen, found.continues) == (10, 40, False)
    assert found.emas == {"0.9": str(other / "ema_0.9_000010.pt")}
    own.mkdir()
    save(own, 15)
    found, said = start(own, other / "model000010.pt", world_size=2)
    assert (found.step, found.model, found.continues) == (15, str(own / "model000015.pt"), True)
    assert "is not used any more" in said
    assert "saved with 1 ranks" in said


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        (dict(world_size=None), 10),
        (dict(samples_seen=None), 10),
        (dict(samples_seen="many", validation_loss=[1], measure=3, best=7, step="x"), 10),
        (dict(validation_loss=None), 10),
        (dict(step=None), 10),
        (dict(files=["model000010.pt"]), 5),
        (dict(files={"model000010.pt": 3}), 5),
    ],
)
def test_a_manifest_without_a_part_is_no_hindrance(tmp_path, changes, step):
    """What tells nothing of the files' content is not needed; a manifest that does not name them counts as damaged."""
    save(tmp_path, 5)
    save(tmp_path, 10)
    path = tmp_path / "checkpoint000010.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))
    found, said = start(tmp_path)
    assert (found.step, found.samples_seen) == (step, 4 * step) and found.continues
    assert ("samples_seen" in said) == ("samples_seen" in changes)
    publishing.publish_set(str(tmp_path), step, RATES, print)


def test_a_published_checkpoint_without_ema_and_optimizer_lends_what_it_has(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "model000100.pt")
    found, said = start(tmp_path / "own", tmp_path / "model000100.pt")
    assert (found.step, found.samples_seen, found.emas, found.optimizer) == (100, 400, {}, "")
    assert "ema_0.9_000100.pt" in said and "opt000100.pt" in said


def test_a_damaged_checkpoint_to_start_from_is_refused(tmp_path):
    """Also where its size is right: a file with a flipped bit loads, and trains on."""
    save(tmp_path, 10)
    (tmp_path / "opt000010.pt").unlink()  # left behind on purpose: not damaged
    assert start(tmp_path / "own", tmp_path / "model000010.pt")[0].step == 10
    content = bytearray((tmp_path / "ema_0.9_000010.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "ema_0.9_000010.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step 10 in .* is damaged .*ema_0\.9_000010\.pt has changed"):
        start(tmp_path / "own", tmp_path / "model000010.pt")


def test_a_set_without_a_loss_is_not_the_best_of_measured_ones(tmp_path):
    for step in (3, 5):  # stopped twice before anything was measured: the latest
        assert save(tmp_path, step, measure="m") == ["0.9"]
    assert value(tmp_path / "ema_0.9_best.pt") == -5
    assert save(tmp_path, 10, losses={"0.9": 0.4}, measure="m") == ["0.9"]
    assert save(tmp_path, 15, measure="m") == []  # saved on a signal, whose sender did not wait for the measuring
    assert save(tmp_path, 20, losses={"0.9": 0.3}, measure="m") == ["0.9"]


def test_losses_may_be_measured_after_the_save(tmp_path):
    save(tmp_path, 10, losses={"0.9": 0.4})
    save(tmp_path, 15, losses={})
    publishing.add_losses(str(tmp_path), 15, RATES, {"0.9": 0.3}, print)
    assert newest(tmp_path) == (15, [])
    assert store.read_manifest(str(tmp_path), 15)["validation_loss"] == {"0.9": 0.3}
    assert value(tmp_path / "ema_0.9_best.pt") == -15


def test_a_colon_in_a_name_is_no_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr:1e-4").mkdir()
    save("lr:1e-4", 10)
    assert newest("lr:1e-4") == (10, [])


def test_a_folder_belongs_to_one_process(tmp_path):
    code = "import sys; from guided_diffusion.weights import store; store.lock(sys.argv[1])"
    held = store.lock(str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 1 and f"in use by another run (process {os.getpid()} on" in result.stderr
    held.close()
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


@pytest.mark.parametrize("kind", ["link", "second name", "text", "folder"])
def test_a_lock_that_is_somebody_s_file_is_not_replaced(tmp_path, kind):
    theirs, lock = tmp_path / "theirs.txt", tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    theirs.write_text("my own words")
    if kind == "link":
        lock.symlink_to(theirs)
    elif kind == "second name":
        theirs.write_text("process 7, as I described it to my colleagues")  # as a lock file begins
        os.link(theirs, lock)
    elif kind == "text":
        lock.write_text("a note")
    else:
        lock.mkdir()
    before = theirs.read_text()
    with pytest.raises(CheckpointError, match=r"\.lock is a link, or no lock file of ours.*another --logdir"):
        store.lock(str(lock.parent))
    assert theirs.read_text() == before and (kind != "text" or lock.read_text() == "a note")


def test_a_lock_that_leads_nowhere_makes_no_file(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"\.lock is a link"):
        store.lock(str(tmp_path))
    assert not (tmp_path / "elsewhere").exists()


def hostile_names(tmp_path) -> dict[str, dict]:
    """Names that a manifest of step 5 must not have removed, each of a file that is there."""
    (tmp_path / "other").mkdir()
    names = ["../other/model000005.pt", "notes.txt", "config.json", "best.json", "ema_0.9_best.pt", "model000010.pt"]
    names += ["model1000005.pt"]
    names += [str(tmp_path / "other" / "ema_0.9_000005.pt")]
    for name in names:
        if not (tmp_path / "run" / name).exists():
            (tmp_path / "run" / name).write_text("theirs")
    return {name: {} for name in [*names, "..", ".", "", "/"]}


def test_prune_removes_the_set_s_own_files_only(tmp_path):
    (tmp_path / "run").mkdir()
    for step in (5, 10):
        save(tmp_path / "run", step)
    manifest = tmp_path / "run" / "checkpoint000005.json"
    content = json.loads(manifest.read_text())
    content["files"] |= hostile_names(tmp_path)
    manifest.write_text(json.dumps(content))
    before = {str(path) for path in tmp_path.rglob("*")}
    store.prune(str(tmp_path / "run"), 1, 10)
    gone = sorted(os.path.basename(path) for path in before - {str(path) for path in tmp_path.rglob("*")})
    assert gone == ["checkpoint000005.json", "ema_0.9_000005.pt", "model000005.pt", "opt000005.pt"]
    assert (tmp_path / "other" / "ema_0.9_000005.pt").exists()


@pytest.mark.parametrize("files", [None, 5, "model.pt", [1, None, {}], {"../x": 1}, [["model000005.pt"]]])
def test_prune_and_leftovers_take_any_list_of_files(tmp_path, files):
    for step in (5, 10):
        save(tmp_path, step)
    for name in ("checkpoint000005.json", ".checkpoint000007.json.part"):
        (tmp_path / name).write_text(json.dumps({"step": 5, "files": files}))
    store.prune(str(tmp_path), 1, 10)
    store.remove_leftovers(str(tmp_path))
    assert (tmp_path / "model.pt").exists() and (tmp_path / "model000005.pt").exists()  # a stray file at worst
    assert newest(tmp_path) == (10, [])


def test_leftovers_of_a_save_are_the_set_s_own_files_only(tmp_path):
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", 10)
    note = tmp_path / "run" / ".checkpoint000005.json.part"
    note.write_text(json.dumps({"files": list(hostile_names(tmp_path))}))
    before = {str(path) for path in tmp_path.rglob("*")}
    store.remove_leftovers(str(tmp_path / "run"))
    assert before - {str(path) for path in tmp_path.rglob("*")} == {str(note)}


def test_leftovers_are_known_by_our_mark(tmp_path):
    theirs = [".download.part", "notes.tmp7", ".scene.png.part", "film.part", ".sdm-notes.part", ".sdm-0123456789ab"]
    ours = [
        ".sdm-0123456789ab.part",
        "model000005.pt.tmp4711",
        ".scene0.png.a_b1c2d3.part",
        "best.json.tmp1",
        "progress.csv.tmp12",
    ]
    for name in (*theirs, *ours):
        (tmp_path / name).write_text("x")
    store.remove_leftovers(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(theirs)


def test_names_as_long_as_the_file_system_takes(tmp_path):
    store.write_json(str(tmp_path / ("x" * 250 + ".json")), {"a": 1})
    (tmp_path / "source").write_text("x")
    store.publish(str(tmp_path / "source"), str(tmp_path / ("y" * 255)))
    assert sorted(len(name) for name in os.listdir(tmp_path)) == [6, 255, 255]


def test_best_with_losses_that_are_not_numbers_or_not_measured(tmp_path):
    assert save(tmp_path, 1, losses={"0.9": float("nan")}) == RATES  # better than no file at all
    assert save(tmp_path, 2, losses={"0.9": 0.5}) == RATES
    assert save(tmp_path, 3, losses={"0.9": float("nan")}) == []
    assert save(tmp_path, 4, losses={"0.9": 0.6}) == []
    assert save(tmp_path, 5) == []  # no validation any more: one that was measured stays
    assert json.loads((tmp_path / "best.json").read_text()) == {"0.9": {"step": 2, "loss": 0.5}}


def lose(path):
    path.unlink()


def make_a_list(path):
    path.write_text("[1, 2]")


def garble_an_entry(path):
    path.write_text('{"0.9": {"step": "five", "loss": [0.5]}}')


@pytest.mark.parametrize("harm", [lose, make_a_list, scramble, garble_an_entry])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_measured_best_is_replaced_by_a_better_measured_one_only(tmp_path, harm, pruned):
    """Also where best.json is lost: the manifests know the losses, of sets that are gone too."""
    save(tmp_path, 5, losses={"0.9": 0.5}, measure="m")
    save(tmp_path, 10, losses={"0.9": 0.6}, measure="m")
    if pruned:
        store.prune(str(tmp_path), 1, 10)
    harm(tmp_path / "best.json")
    assert publishing.publish_set(str(tmp_path), 10, RATES, print) == []  # as a run that goes on does
    assert save(tmp_path, 15) == []  # --val_images 0
    assert save(tmp_path, 20, losses={"0.9": 0.55}, measure="m") == []
    assert value(tmp_path / "ema_0.9_best.pt") == -5
    assert save(tmp_path, 25, losses={"0.9": 0.45}, measure="m") == RATES
    assert value(tmp_path / "ema_0.9_best.pt") == -25
    assert (tmp_path / "best.json.unreadable-1").exists() == (harm is not lose)


def test_a_best_that_nothing_is_known_of_is_kept_under_another_name(tmp_path):
    save(tmp_path, 5, losses={"0.9": 0.5}, measure="m")
    for name in ("best.json", "checkpoint000005.json"):
        (tmp_path / name).unlink()
    assert save(tmp_path, 10) == []
    assert save(tmp_path, 15, losses={"0.9": 0.6}, measure="m") == RATES
    assert value(tmp_path / "ema_0.9_best.pt") == -15
    assert value(tmp_path / "ema_0.9_best.pt.unmeasured-1") == -5


def test_a_set_that_is_not_good_takes_nothings_place(tmp_path):
    save(tmp_path, 1, good=False)  # but there it is better than nothing
    assert value(tmp_path / "model.pt") == 1 and value(tmp_path / "ema_0.9_best.pt") == -1
    save(tmp_path, 5, losses={"0.9": 0.5}, measure="m")
    assert save(tmp_path, 10, losses={"0.9": 0.1}, measure="m", good=False) == []
    assert value(tmp_path / "model.pt") == 5 and value(tmp_path / "ema_0.9_best.pt") == -5
    assert newest(tmp_path)[0] == 10  # stopped within a row of bad steps: it goes on there
    assert store.note_divergence(str(tmp_path)) == 5
    assert newest(tmp_path)[0] == 5


def test_sets_of_a_training_that_diverged_are_all_there_is(tmp_path):
    save(tmp_path, 5, good=False)
    assert store.note_divergence(str(tmp_path)) is None
    assert newest(tmp_path)[0] == 5
    assert start(tmp_path)[0].fresh_streak
