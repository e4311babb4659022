"""The FID command: options, statistics files, weights, damaged photographs, and what it says to bad input."""

from __future__ import annotations

import io
import json
import shutil
import sys
import urllib.error

import numpy as np
import pytest
import torch
from evaluation_helpers import (
    blurred,
    call,
    fails,
    last_number,
    load_script,
    needs_camvid,
    run_script,
    seeded_state,
    truncate,
    write_photographs,
    write_pictures,
)
from PIL import Image

fid = load_script("test_with_FID")
inception = load_script("inception")
result_folders = load_script("result_folders")


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Seeded weights in a file such as pytorch-fid publishes."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(seeded_state(inception.build_network()), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of random pictures of different sharpness."""
    base = tmp_path_factory.mktemp("pictures")
    first = write_pictures(base / "first", 5)
    second = base / "second"
    second.mkdir()
    for path in sorted(first.iterdir()):
        blurred(3)(Image.open(path)).save(second / path.name)
    return first, second


@needs_camvid
@pytest.mark.parametrize("damage", ["blur", "noise", "jpeg"])
def test_fid_grows_with_damage(tmp_path, damage, capsys):
    def noise(deviation):
        def add(image):
            grain = np.random.default_rng(image.size[0]).normal(0, deviation, (image.size[1], image.size[0], 3))
            return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))

        return add

    def jpeg(quality):
        def save(image):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            return Image.open(buffer)

        return save

    levels = {"blur": map(blurred, (1, 2, 4)), "noise": map(noise, (10, 30, 60)), "jpeg": map(jpeg, (60, 20, 5))}
    clean = write_photographs(tmp_path / "clean", "val", 8)
    scores = []
    for level, change in enumerate(levels[damage]):
        worse = write_photographs(tmp_path / str(level), "val", 8, change)
        call("test_with_FID", clean, worse, "--weights", "random", "--dims", 192)
        scores.append(last_number(capsys.readouterr().out))
    assert 0 < scores[0] < scores[1] < scores[2]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_script_runs_by_itself_and_its_last_line_is_the_score(folders, tmp_path):
    done = run_script("test_with_FID", *folders, "--weights", "random", "--dims", 192, "--json", tmp_path / "fid.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("FID: ")
    assert "not comparable" in done.stdout.splitlines()[-1]  # random weights
    record = json.loads((tmp_path / "fid.json").read_text())
    assert record["score"] == pytest.approx(last_number(done.stdout), abs=1e-4)  # printed with four decimals
    assert record["comparable"] is False
    assert record["sources"][0]["images"]["count"] == 5
    assert record["names"] == {"matched": 5, "only in 1": [], "only in 2": []}
    assert "bicubic" in record["preprocessing"]
    assert {"torch", "numpy", "Pillow", "scipy"} <= record["versions"].keys()


def test_left_out_paths_are_the_constants_at_the_top(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "PATH1", str(folders[0]))
    monkeypatch.setattr(fid, "PATH2", str(folders[1]))
    call("test_with_FID", "--weights", "random", "--dims", 64)
    constants = last_number(capsys.readouterr().out)
    call("test_with_FID", *folders, "--weights", "random", "--dims", 64)
    assert constants == last_number(capsys.readouterr().out) > 0


def test_batches_workers_and_order_do_not_change_the_score(folders, capsys):
    scores = []
    for flags in (["--batch_size", 1], ["--batch_size", 3, "--num_workers", 2], ["--batch_size", 64]):
        call("test_with_FID", *folders, "--weights", "random", "--dims", 192, *flags)
        scores.append(last_number(capsys.readouterr().out))
    call("test_with_FID", *reversed(folders), "--weights", "random", "--dims", 192)
    scores.append(last_number(capsys.readouterr().out))
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-5)  # convolutions of other batch sizes round otherwise


def test_the_modes_and_resizing_do_what_they_name(folders, tmp_path, capsys):
    """--resize with a filter equals images resized by Pillow beforehand; published resizes, pytorch-fid does not."""
    resized = []
    for index, folder in enumerate(folders):
        target = tmp_path / str(index)
        target.mkdir()
        for path in sorted(folder.iterdir()):
            Image.open(path).resize((48, 48), Image.Resampling.LANCZOS).save(target / path.name)
        resized.append(target)

    def score(*arguments):
        call("test_with_FID", *arguments, "--weights", "random", "--dims", 64)
        return last_number(capsys.readouterr().out)

    beforehand = score(*resized, "--mode", "pytorch-fid")
    assert score(*folders, "--resize", 48, "--filter", "lanczos") == beforehand
    assert score(*folders, "--mode", "pytorch-fid", "--resize", 48, "--filter", "lanczos") == beforehand
    assert score(*folders, "--resize", 48, "--filter", "bilinear") != beforehand
    assert score(*folders, "--mode", "published") != score(*folders, "--mode", "pytorch-fid")
    assert score(*folders) == score(*folders, "--resize", 256, "--filter", "bicubic")


def test_saved_statistics_stand_for_their_folder(folders, tmp_path, capsys, weights_file):
    from pytorch_fid.fid_score import compute_statistics_of_path

    flags = ["--weights", weights_file, "--dims", 192]
    for name, folder in zip("ab", folders, strict=True):
        call("test_with_FID", folder, "--save_stats", tmp_path / f"{name}.npz", *flags)
    call("test_with_FID", *folders, *flags)
    expected = last_number(capsys.readouterr().out)
    for pair in (
        [tmp_path / "a.npz", folders[1]],
        [folders[0], tmp_path / "b.npz"],
        [tmp_path / "b.npz", tmp_path / "a.npz"],
    ):
        call("test_with_FID", *pair, *flags)
        assert last_number(capsys.readouterr().out) == pytest.approx(expected, rel=1e-9)  # the same features in float64
    mean, covariance = compute_statistics_of_path(str(tmp_path / "a.npz"), None, 1, 192, "cpu")
    assert (mean.shape, covariance.shape) == ((192,), (192, 192))
    with fails("made with preprocessing"):
        call("test_with_FID", tmp_path / "a.npz", folders[1], *flags, "--mode", "pytorch-fid")
    with fails("made with weights"):
        call("test_with_FID", tmp_path / "a.npz", folders[1], "--weights", "random", "--dims", 192)
    call("test_with_FID", folders[1], "--save_stats", tmp_path / "c.npz", *flags, "--mode", "pytorch-fid")
    with fails("a.npz was made with preprocessing"):
        call("test_with_FID", tmp_path / "a.npz", tmp_path / "c.npz", "--dims", 192)


def test_kid_is_printed_and_recorded(folders, tmp_path, capsys):
    flags = ["--weights", "random", "--dims", 64, "--kid", "True"]
    call("test_with_FID", *folders, *flags, "--json", tmp_path / "r.json")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("KID: ")]
    assert float(printed[0].split()[1]) == pytest.approx(json.loads((tmp_path / "r.json").read_text())["kid"], abs=1e-6)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """A hub folder without weights on a machine without a network."""

    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_missing_weights_are_an_error_before_any_image_is_read(folders, empty_hub, monkeypatch):
    monkeypatch.setattr(fid, "check_images", lambda *_: pytest.fail("images were looked at first"))
    with fails(f"(?s){fid.INCEPTION_WEIGHTS.url}.*{empty_hub}"):
        call("test_with_FID", *folders)


def test_damaged_weights_in_the_hub_are_refused(folders, empty_hub):
    empty_hub.mkdir(parents=True)
    (empty_hub / fid.INCEPTION_WEIGHTS.file_name).write_bytes(b"half a download")
    with fails("should begin 6726825d; delete"):
        call("test_with_FID", *folders)


def test_weights_in_the_hub_with_the_right_hash_are_used(
    folders, empty_hub, weights_file, monkeypatch, capsys, tmp_path
):
    digest = load_script("network_weights").file_sha256(weights_file)
    monkeypatch.setattr(fid, "INCEPTION_WEIGHTS", fid.PublishedWeights(weights_file.name, "https://none", digest[:8]))
    empty_hub.mkdir(parents=True)
    shutil.copy(weights_file, empty_hub)
    call("test_with_FID", *folders, "--dims", 2048, "--json", tmp_path / "r.json")
    assert "not comparable" not in capsys.readouterr().out
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["comparable"] is True
    assert record["weights"]["sha256"] == digest
    for flags in (["--dims", 64], ["--resize", 64]):  # neither is the FID that papers print
        call("test_with_FID", *folders, *flags)
        assert "not comparable" in capsys.readouterr().out.splitlines()[-1]
    for flags, comparable in ((["--resize", 64], False), (["--mode", "pytorch-fid"], True)):
        files = [tmp_path / f"{i}.npz" for i in range(2)]
        for folder, file in zip(folders, files, strict=True):
            call("test_with_FID", folder, "--save_stats", file, *flags)
        call("test_with_FID", *files, "--json", tmp_path / "r.json")  # the files know what this command does not say
        assert json.loads((tmp_path / "r.json").read_text())["comparable"] is comparable


def test_a_file_of_other_weights_is_refused_or_marked(folders, tmp_path, weights_file, capsys):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with fails("other.pth does not hold the weights"):
        call("test_with_FID", *folders, "--weights", tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with fails(r"text.pth does not hold the weights"):
        call("test_with_FID", *folders, "--weights", tmp_path / "text.pth")
    with fails("none.pth: no such file"):
        call("test_with_FID", *folders, "--weights", tmp_path / "none.pth")
    call("test_with_FID", *folders, "--weights", weights_file, "--dims", 64)
    assert "not comparable" in capsys.readouterr().out.splitlines()[-1]


# --- bad input --------------------------------------------------------------------------------------------------------

RANDOM = ("--weights", "random", "--dims", 64)


def test_folders_that_are_missing_empty_or_of_one_image(folders, tmp_path):
    with fails("nowhere: no such folder"):
        call("test_with_FID", folders[0], tmp_path / "nowhere", *RANDOM)
    (tmp_path / "empty").mkdir()
    with fails("empty: no images"):
        call("test_with_FID", folders[0], tmp_path / "empty", *RANDOM)
    with fails("it holds the folders first, second: name one of them"):
        call("test_with_FID", folders[0], folders[0].parent, *RANDOM)
    with fails("one: one image has no covariance"):
        call("test_with_FID", folders[0], write_pictures(tmp_path / "one", 1), *RANDOM)
    with fails("compare two folders"):
        call("test_with_FID", folders[0], *RANDOM)


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    done = run_script("test_with_FID", tmp_path / "a", tmp_path / "b", *RANDOM)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'a'}: no such folder\n"


@pytest.mark.parametrize("kind", ["truncated.png", "truncated.jpg", "text.png"])
def test_unreadable_images_are_named_or_skipped(folders, tmp_path, capsys, kind):
    folder = shutil.copytree(folders[0], tmp_path / "images")
    bad = folder / kind
    Image.open(folder / "000.png").save(bad)
    if kind == "text.png":
        bad.write_text("no picture")
    else:
        truncate(bad, 0.6)
    with fails(f"{bad}.*--skip_bad True"):
        call("test_with_FID", folder, folders[1], *RANDOM)
    call("test_with_FID", folder, folders[1], *RANDOM, "--skip_bad", "True", "--json", tmp_path / "r.json")
    with_bad = last_number(capsys.readouterr().out)
    assert str(bad) in json.loads((tmp_path / "r.json").read_text())["sources"][0]["images"]["skipped"]
    call("test_with_FID", *folders, *RANDOM)
    assert with_bad == last_number(capsys.readouterr().out)


def test_damage_that_shows_only_in_decoding_is_named_or_skipped(folders, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(folders[0], tmp_path / "images")
    bad = folder / "bad.png"
    Image.open(folder / "000.png").save(bad)
    truncate(bad, 0.6)
    look = result_folders._look_at  # as if the header and the checksums were in order
    monkeypatch.setattr(result_folders, "_look_at", lambda path: ((96, 64), "RGB") if path == bad else look(path))
    with fails(f"{bad}: unreadable.*--skip_bad True"):
        call("test_with_FID", folder, folders[1], *RANDOM)
    call("test_with_FID", folder, folders[1], *RANDOM, "--skip_bad", "True", "--json", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["sources"][0]["images"]["count"] == 5


def test_no_usable_image_left_is_an_error_even_if_bad_ones_are_skipped(folders, tmp_path):
    (tmp_path / "only.png").write_text("no picture")
    with fails("no usable image is left"):
        call("test_with_FID", folders[0], tmp_path, *RANDOM, "--skip_bad", "True")


def test_grey_transparent_and_mixed_sizes_are_scored_with_a_warning(folders, tmp_path, capsys):
    folder = shutil.copytree(folders[0], tmp_path / "images")
    Image.open(folder / "000.png").convert("L").save(folder / "000.png")
    Image.open(folder / "001.png").convert("RGBA").save(folder / "001.png")
    Image.open(folder / "002.png").resize((50, 40)).save(folder / "002.png")
    call("test_with_FID", folder, folders[1], *RANDOM)
    captured = capsys.readouterr()
    assert "1 grey images: their channel is repeated" in captured.err
    assert "1 transparent images: the transparency is dropped" in captured.err
    assert "images of 2 sizes (50x40, 96x64)" in captured.err
    assert last_number(captured.out) > 0


def test_folders_of_different_names_are_scored_with_a_warning(folders, tmp_path, capsys):
    fewer = shutil.copytree(folders[1], tmp_path / "fewer")
    (fewer / "003.png").rename(fewer / "other.png")
    (fewer / "004.png").unlink()
    call("test_with_FID", folders[0], fewer, *RANDOM, "--json", tmp_path / "r.json")
    captured = capsys.readouterr()
    assert f"warning: {folders[0]} alone holds 2 of its 5 names (003, 004)" in captured.err
    assert f"{fewer} alone holds 1 of its 4 names (other)" in captured.err
    assert any("alone holds" in warning for warning in json.loads((tmp_path / "r.json").read_text())["warnings"])
    call("test_with_FID", *folders, *RANDOM)
    assert "alone holds" not in capsys.readouterr().err


def test_a_sampling_that_is_not_finished_is_not_scored(folders, tmp_path, capsys, monkeypatch):
    images = shutil.copytree(folders[0], tmp_path / "images")
    samples = shutil.copytree(folders[1], tmp_path / "samples")
    (tmp_path / "sampling.json").write_text("{}")
    call("test_with_FID", images, samples, *RANDOM)
    assert last_number(capsys.readouterr().out) > 0
    (samples / "002.png").unlink()
    with fails(rf"(?s)images alone holds 1 of its 5 names \(002\).*{tmp_path} holds .* not finished.*Finish it with"):
        call("test_with_FID", images, samples, *RANDOM)
    monkeypatch.chdir(samples)  # other names of the same two folders
    with fails("not finished"):
        call("test_with_FID", "../images", ".", *RANDOM)
    call("test_with_FID", folders[0], samples, *RANDOM)  # photographs from elsewhere: a warning
    assert "alone holds" in capsys.readouterr().err


def test_images_of_16_bits_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "images")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder / "deep.png")
    with fails("deep.png.*more than 8 bits"):
        call("test_with_FID", folder, folders[1], *RANDOM)


def test_statistics_files_that_do_not_fit(folders, tmp_path):
    def saved(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    good = {"mu": np.zeros(64), "sigma": np.eye(64)}
    cases = [
        (saved("keys.npz", mean=np.zeros(64), cov=np.eye(64)), "needs the arrays mu and sigma, holds cov, mean"),
        (
            saved("dims.npz", mu=np.zeros(2048), sigma=np.eye(2048)),
            "2048 dimensions, but --dims is 64; use --dims 2048",
        ),
        (saved("shape.npz", mu=np.zeros(64), sigma=np.eye(63)), r"expected \(D,\) and \(D, D\)"),
        (saved("words.npz", mu=np.array(["x"] * 64), sigma=np.eye(64)), "should be numbers"),
        (saved("negative.npz", mu=np.zeros(64), sigma=-np.eye(64)), "no covariance"),
        (saved("slanted.npz", mu=np.zeros(64), sigma=np.triu(np.ones((64, 64)))), "no covariance"),
        (saved("objects.npz", mu=np.array([None] * 64), sigma=np.eye(64)), "not a readable .npz file"),
        (saved("other.npz", **good, protocol="words"), "its protocol is no JSON record"),
        (saved("lacking.npz", **good, protocol="{}"), "its protocol lacks preprocessing, weights"),
        (saved("nan.npz", mu=good["mu"] * np.nan, sigma=good["sigma"]), "not finite"),
        (tmp_path / "none.npz", "no such file"),
        (saved("nothing.npz", mu=np.zeros(0), sigma=np.zeros((0, 0))), "statistics of 0 dimensions"),
        (saved("infinite.npz", mu=good["mu"], sigma=np.diag([np.inf] * 64)), "not finite"),
        (saved("huge.npz", mu=np.full(64, 1e200), sigma=np.eye(64)), "values beyond 1e.100"),
        (saved("complex.npz", mu=good["mu"] + 1j, sigma=np.eye(64)), "should be numbers"),
        # Each pair of features by itself could be: only the eigenvalue 1 - 0.5 * 63 shows that no features have this.
        (saved("indefinite.npz", mu=good["mu"], sigma=1.5 * np.eye(64) - 0.5), "negative eigenvalues"),
        (saved("listed.npz", **good, protocol='{"preprocessing": [], "weights": 3}'), "lacks preprocessing, weights"),
    ]
    np.save(tmp_path / "array.npy", np.eye(64))
    (tmp_path / "array.npy").rename(tmp_path / "renamed.npz")
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "bytes.npz").write_bytes(b"")
    content = bytearray(saved("damaged.npz", **good).read_bytes())
    content[200:4000] = bytes(3800)
    (tmp_path / "damaged.npz").write_bytes(content)
    cases += [
        (tmp_path / f"{name}.npz", "not a readable .npz file") for name in ("renamed", "text", "bytes", "damaged")
    ]
    for path, message in cases:
        with fails(f"{path.name}.*{message}"):
            call("test_with_FID", folders[0], path, *RANDOM)
    with fails("--kid True needs folders"):
        call("test_with_FID", folders[0], saved("good.npz", **good), *RANDOM, "--kid", "True")


def test_one_picture_in_two_formats_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "images")
    with Image.open(folder / "000.png") as image:
        image.save(folder / "000.bmp")
    with fails("000.png and 000.bmp have the same name"):
        call("test_with_FID", folders[0], folder, *RANDOM)


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_distance_that_is_no_number_is_no_distance_of_zero():
    frechet = load_script("frechet")
    with pytest.raises(ValueError, match="the distance is"):
        frechet.frechet_distance(np.full(2, 1e200), np.eye(2), np.zeros(2), np.eye(2))


@pytest.mark.parametrize("flag", ["--json", "--save_stats"])
def test_a_folder_where_a_file_is_to_be_named(folders, tmp_path, flag):
    (tmp_path / "here.npz").mkdir()
    sources = folders if flag == "--json" else folders[:1]
    with fails(f"{flag} .*here.npz: is a folder; name a file"):
        call("test_with_FID", *sources, *RANDOM, flag, tmp_path / "here.npz")


def test_a_report_of_a_long_name_and_one_that_cannot_be_written(tmp_path):
    command_line = load_script("command_line")
    with command_line.written_whole(tmp_path / ("r" * 250 + ".json")) as temporary:
        temporary.write_text("{}")
    with fails("cannot write .*r.json: .*no space"), command_line.written_whole(tmp_path / "r.json"):
        raise OSError("no space left on device")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_flags_that_do_not_fit(folders, tmp_path):
    with fails("--filter lanczos has nothing to act on"):
        call("test_with_FID", *folders, *RANDOM, "--mode", "pytorch-fid", "--filter", "lanczos")
    with fails("--save_stats takes one folder"):
        call("test_with_FID", *folders, *RANDOM, "--save_stats", tmp_path / "x.npz")
    with fails("must end in .npz"):
        call("test_with_FID", folders[0], *RANDOM, "--save_stats", tmp_path / "x")
    with fails("does not exist; make it first"):
        call("test_with_FID", *folders, *RANDOM, "--json", tmp_path / "none" / "x.json")
    with fails("--device nonsense cannot be used"):
        call("test_with_FID", *folders, *RANDOM, "--device", "nonsense")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permission")
def test_an_interrupted_report_leaves_nothing_half_written(tmp_path):
    command_line = load_script("command_line")
    target = tmp_path / "r.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), command_line.written_whole(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert target.read_text() == "old"
