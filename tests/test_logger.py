"""Where figures go."""

import csv
import importlib.util
import io
import json
import os
import sys
import time

import numpy as np
import pytest
import torch

from guided_diffusion.logger import BATCH_JOBS, Averages, Logger, progress_bar


def opened(folder, step=0, **options) -> Logger:
    logger = Logger(str(folder), **options)
    logger.open(step)
    return logger


def read_csv(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(folder):
    return [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]


def test_nothing_is_created_before_it_is_opened(tmp_path):
    folder = tmp_path / "run"
    logger = Logger(str(folder))
    logger.log("said before")
    assert not folder.exists()
    logger.open(0)
    logger.log("said after")
    lines = (folder / "log.txt").read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["said before", "said after"]


def test_an_inactive_logger_does_nothing(tmp_path):
    logger = opened(tmp_path / "run", active=False)
    logger.log("x")
    logger.row({"step": 1})
    logger.close()
    assert not (tmp_path / "run").exists()


def test_a_new_figure_becomes_a_column(tmp_path):
    logger = opened(tmp_path)
    logger.row({"step": 1, "loss": 0.5})
    logger.row({"step": 2, "lr": 0.1, "loss": 0.25})
    logger.row({"step": 3})
    assert read_csv(tmp_path) == [
        {"step": "1", "loss": "0.5", "lr": ""},
        {"step": "2", "loss": "0.25", "lr": "0.1"},
        {"step": "3", "loss": "", "lr": ""},
    ]
    assert read_jsonl(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "lr": 0.1, "loss": 0.25}, {"step": 3}]


def test_a_continued_run_drops_the_rows_after_its_checkpoint(tmp_path):
    logger = opened(tmp_path)
    for step in (2, 4, 6, 8):
        logger.row({"step": step, "loss": 1 / step})
    logger.close()
    with open(tmp_path / "progress.csv", "a") as file:
        file.write("1")  # killed while it wrote
    with open(tmp_path / "progress.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    logger = opened(tmp_path, step=5)
    for step in (6, 8):
        logger.row({"step": step, "loss": 1 / step})
    assert [row["step"] for row in read_csv(tmp_path)] == ["2", "4", "6", "8"]
    assert [row["step"] for row in read_jsonl(tmp_path)] == [2, 4, 6, 8]


def by_a_spreadsheet(text):
    return "\ufeff" + text.replace(",", ";")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("progress.csv", lambda path: path.write_text(by_a_spreadsheet(path.read_text()))),
        ("progress.csv", lambda path: path.write_text("\ufeff" + path.read_text())),
        ("progress.csv", lambda path: path.write_bytes("Schritt,Größe\n1,2\n".encode("latin-1"))),
        ("progress.csv", lambda path: path.write_text(path.read_text().replace("step", "Step"))),
        ("progress.csv", lambda path: path.write_text("step,step\n1,1\n")),
        ("progress.csv", lambda path: path.write_text("")),
        ("progress.csv", lambda path: (path.unlink(), path.mkdir())),
        ("progress.csv", lambda path: path.write_text(path.read_text() + '8,"' + "x" * 200_000)),
        ("progress.jsonl", lambda path: path.write_bytes(b'[1]\n"\xe9"\n{"step": "x"}\n' + path.read_bytes())),
        ("progress.jsonl", lambda path: (path.unlink(), path.mkdir())),
        ("log.txt", lambda path: (path.unlink(), path.mkdir())),
    ],
)
def test_a_log_that_cannot_be_read_is_set_aside_and_the_run_goes_on(tmp_path, name, harm, capsys):
    logger = opened(tmp_path)
    for step in (2, 4, 6):
        logger.row({"step": step, "loss": 0.5})
    logger.close()
    harm(tmp_path / name)
    spoilt = (tmp_path / name).read_bytes() if (tmp_path / name).is_file() else None
    logger = opened(tmp_path, step=4)
    logger.row({"step": 6, "lr": 0.25})
    kept = tmp_path / f"{name}.unreadable-1"
    assert kept.is_dir() if spoilt is None else kept.read_bytes() == spoilt
    assert f"note: {tmp_path / name} cannot be read" in capsys.readouterr().err
    rows_left = not (name == "progress.jsonl" and spoilt is None)
    assert [row["step"] for row in read_jsonl(tmp_path)] == ([2, 4, 6] if rows_left else [6])
    assert [(row["step"], row.get("loss")) for row in read_csv(tmp_path)] == [("2", "0.5"), ("4", "0.5"), ("6", "")]


@pytest.mark.parametrize("step", ["²", "٣", "-1", "", "1e3"])
def test_a_row_whose_step_is_no_number_is_left_out(tmp_path, step):
    (tmp_path / "progress.csv").write_text(f"step,loss\n1,0.5\n{step},0.5\n2,0.5,7\n")
    logger = opened(tmp_path, step=9)
    logger.row({"step": 10, "loss": 0.5})
    assert [row["step"] for row in read_csv(tmp_path)] == ["1", "10"]


def test_a_full_disk_is_named(tmp_path):
    logger = opened(tmp_path)
    logger._rows = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left.*/dev/full"):
        logger.row({"step": 1})


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the package tensorboard is not installed")
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = opened(tmp_path, tensorboard=True)
    logger.row({"step": 10, "loss": 0.5})
    logger.row({"step": 20, "loss": 0.4})
    logger.image("preview", np.zeros((4, 6, 3), np.uint8), 20)
    logger.close()
    logger = opened(tmp_path, step=15, tensorboard=True)  # killed at 20, continued at 15
    logger.row({"step": 20, "loss": 0.3})
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    points = [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]
    assert points == [(10, 0.5), (20, 0.3)]


def test_a_missing_tensorboard_is_said_before_anything_is_created(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        Logger(str(tmp_path / "run"), tensorboard=True)


def test_averages_are_means_by_quarter_without_what_is_not_finite():
    averages = Averages(torch.device("cpu"), 100)
    t = np.array([0, 24, 25, 60, 99, 99])
    losses = np.array([1.0, 2.0, 3.0, np.nan, 5.0, 6.0], dtype=np.float32)
    averages.add(torch.tensor(t[:4]), {"loss": torch.tensor(losses[:4])})
    averages.add(torch.tensor(t[4:]), {"loss": torch.tensor(losses[4:])})
    averages.add_scalar("grad_norm", torch.tensor(2.0))
    averages.add_scalar("grad_norm", torch.tensor(4.0))
    means = averages.read(lambda tensor: 2 * tensor)  # as two ranks with the same figures: means stay
    assert means == {
        "loss": pytest.approx(np.nanmean(losses)),
        "loss_q0": 1.5,
        "loss_q1": 3.0,
        "loss_q3": 5.5,
        "grad_norm": 3.0,
    }
    assert averages.read(lambda tensor: tensor) == {}


def drawn(stream, seconds=0.5) -> int:
    """Runs a bar for so long; returns how often it was drawn."""
    with progress_bar(total=1000, desc="denoising") as bar:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            bar.update()
            time.sleep(0.005)
    stream.flush()
    stream.seek(0)
    return stream.read().count("denoising")


def test_a_bar_does_not_fill_the_log_of_a_job(tmp_path, monkeypatch):
    with open(tmp_path / "job.log", "w+") as log:
        monkeypatch.setattr(sys, "stderr", log)
        assert drawn(log) == 2  # its begin and its end


def test_a_terminal_sees_a_bar_move(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert drawn(terminal) > 3


@pytest.mark.parametrize(("job", "interval"), [(None, 2), ("SLURM_JOB_ID", 30), ("PBS_JOBID", 30), ("LSB_JOBID", 30)])
def test_a_pipe_is_drawn_to_seldom_and_that_of_a_batch_job_more_so(monkeypatch, job, interval):
    for name in BATCH_JOBS:
        monkeypatch.delenv(name, raising=False)
    if job:
        monkeypatch.setenv(job, "7")
    read, write = os.pipe()
    with os.fdopen(read), os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        with progress_bar(total=10) as bar:
            assert bar.mininterval == interval


def test_a_bar_needs_no_descriptor(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert drawn(stream) == 2
