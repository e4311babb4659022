import os

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.data.pictures import colorize, contact_sheet, save_png
from guided_diffusion.runs.writer import PictureWriter
from guided_diffusion.weights.store import CheckpointError

RED, BLUE = np.full((20, 30, 3), (200, 0, 0), np.uint8), np.full((10, 10, 3), (0, 0, 200), np.uint8)


def count(page: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(page) == color).all(-1).sum())


def test_colorize_is_a_look_up():
    palette = np.array([[1, 2, 3], [40, 50, 60], [7, 8, 9]], dtype=np.uint8)
    label = np.array([[0, 2], [1, 1]], dtype=np.int16)
    assert colorize(label, palette).tolist() == [[[1, 2, 3], [7, 8, 9]], [[40, 50, 60], [40, 50, 60]]]
    with pytest.raises(ValueError, match="ids 0 to 3 do not fit a palette of 3"):
        colorize(label + (label == 2), palette)
    with pytest.raises(ValueError, match=r"\[H, W\], not \[1, 2, 2\]"):
        colorize(label[None], palette)


def test_every_cell_is_whole_at_the_cells_height():
    page = contact_sheet([[RED, BLUE], [None, RED]], cell_height=40)
    assert count(page, (200, 0, 0)) == 2 * 40 * 60 and count(page, (0, 0, 200)) == 40 * 40


def test_small_layouts_are_enlarged_without_new_colors():
    checks = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)
    page = np.asarray(contact_sheet([[np.stack([checks] * 3, -1)]], cell_height=64))
    rows, columns = np.where((page == 0).all(-1))
    inside = page[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert inside.shape == (64, 64, 3) and set(inside.flatten().tolist()) == {0, 255}


def test_titles_and_legend_fit_on_the_page():
    bare = contact_sheet([[RED, RED]], cell_height=48)
    full = contact_sheet(
        [[RED, RED]],
        cell_height=48,
        title="A title that is wider than the two pictures below it",
        column_titles=["layout", "a column title that is far too long for its column"],
        row_titles=["a file name with ünïcode"],
        legend=[(f"class {i}", (10 + i, 99, 10)) for i in range(30)],
    )
    assert full.height > bare.height and full.width >= bare.width
    assert all(count(full, (10 + i, 99, 10)) > 20 for i in range(30))
    pixels = np.asarray(full)
    assert (pixels[:, -3:] == 255).all() and (pixels[-3:] == 255).all()  # nothing runs over the margin


def test_a_page_needs_a_picture():
    for rows in ([], [[]], [[None]]):
        with pytest.raises(ValueError, match="at least one picture"):
            contact_sheet(rows)


def test_save_png_replaces_whole_files_only(tmp_path, monkeypatch):
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(RED, path)
    assert np.array_equal(Image.open(path), RED)
    if os.name == "posix":
        plain = tmp_path / "plain"
        plain.write_bytes(b"")
        assert path.stat().st_mode == plain.stat().st_mode

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_png(BLUE, path)
    assert np.array_equal(Image.open(path), RED) and os.listdir(path.parent) == ["a.png"]


def test_a_name_as_long_as_the_file_system_takes_and_a_link_of_that_name(tmp_path):
    save_png(RED, tmp_path / ("x" * 251 + ".png"))
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("my own words")
    (tmp_path / "a.png").symlink_to(theirs)
    save_png(RED, tmp_path / "a.png")
    assert theirs.read_text() == "my own words" and np.array_equal(Image.open(tmp_path / "a.png"), RED)
    assert len(os.listdir(tmp_path)) == 3


def test_a_writer_has_written_all_when_it_is_left(tmp_path):
    with PictureWriter() as writer:
        for i in range(300):  # more than may wait
            writer.save(np.full((4, 4), i % 256, np.uint8), str(tmp_path / f"{i}.png"))
        writer.save(BLUE, str(tmp_path / "0.png"))  # in the order in which they come
    assert len(os.listdir(tmp_path)) == 300
    assert (
        np.array_equal(Image.open(tmp_path / "0.png"), BLUE)
        and np.asarray(Image.open(tmp_path / "299.png"))[0, 0] == 43
    )


def test_a_writer_tells_what_it_could_not_write(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*file/a\.png: .*start again to go on"),
        PictureWriter() as writer,
    ):
        writer.save(RED, str(tmp_path / "file" / "a.png"))
    with pytest.raises(ZeroDivisionError), PictureWriter() as writer:  # another failure: what has come is written
        writer.save(RED, str(tmp_path / "b.png"))
        raise ZeroDivisionError
    assert np.array_equal(Image.open(tmp_path / "b.png"), RED)
