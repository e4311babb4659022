"""benchmarks/guidance.py: its rows, its figures of colour, and the whole of it on a network of no training."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_custom
from PIL import Image
from sampling_helpers import MODEL, run_here, save_checkpoint

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts" / "data"), str(ROOT / "benchmarks")]

import camvid  # noqa: E402
import guidance as benchmark  # noqa: E402
import segmenter  # noqa: E402

from guided_diffusion.sampling.guidance import GUIDANCE  # noqa: E402
from guided_diffusion.settings import Sampling  # noqa: E402


def test_the_rows_of_the_comparison():
    rows = benchmark.compared("0.99", 1200)
    scales = {}
    for row in rows:
        scales.setdefault(row.group, []).append(row.s)
        method = dict(row.options).get("guidance", "cfg")
        Sampling(s=row.s, guide_path=row.guide, **dict(row.options))  # settings that there are
        assert (row.guide == "train/ema_0.99_000300.pt") == (method == "autoguidance")
    assert all(scales[group] == [1.5, 2.0, 3.0, 4.0] for group in ("cfg", "rescale", "apg"))
    assert scales["autoguidance"] == scales["autoguidance, not fine-tuned"] == [1.5, 2.0, 3.0]
    assert {dict(row.options).get("guidance", "cfg") for row in rows} == set(GUIDANCE)
    assert len({row.folder for row in rows}) == len(rows)
    known = {row.folder for row in camvid.compared("0.99", 1200)}  # samples of that comparison are taken over
    assert {row.folder for row in rows if row.group in ("none", "cfg") and row.s < 4} <= known


def test_a_row_by_hand():
    row = benchmark.further_row("apg s=3 apg_radius=5 guidance_interval=0.1,0.8", "0.99", 1200)
    assert (row.s, row.group) == (3.0, "apg, apg_radius 5, guidance_interval 0.1,0.8")
    assert Sampling(s=row.s, **dict(row.options)).apg_radius == 5
    assert benchmark.further_row("autoguidance s=2 guide=train/x.pt", "0.99", 1200).guide == "train/x.pt"
    for text in ("", "s=3", "apg 3"):
        with pytest.raises(ValueError, match="must be METHOD s=S"):
            benchmark.further_row(text, "0.99", 1200)


def test_saturation_and_contrast(tmp_path):
    """Of red, grey and black; half of each of two pictures is white."""
    for name, colour in {"red": (200, 100, 100), "black": (0, 0, 0)}.items():
        picture = np.full((4, 4, 3), 255, np.uint8)
        picture[:2] = colour
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    found = benchmark.colours(tmp_path)
    assert found["saturation"] == pytest.approx((0.5 * 0.5 + 0) / 2)
    red = 0.299 * 200 + 0.701 * 100
    assert found["contrast"] == pytest.approx(((255 - red) / 2 + 255 / 2) / 2)


@pytest.fixture
def in_this_process(monkeypatch):
    """The commands of the comparison without the seconds that each start takes; which there were."""
    commands = []

    def run(command, **_):
        script, *flags = map(str, command[command.index(sys.executable) + 1 :])
        commands.append(script)
        if script == "image_sample.py":
            done = run_here(script, *flags)
            assert done.returncode == 0, done.stdout
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *flags])
            patch.syspath_prepend(str(ROOT / Path(script).parent))
            runpy.run_path(str(ROOT / script), run_name="__main__")

    monkeypatch.setattr(camvid, "run", run)
    return commands


def test_the_whole_comparison(tmp_path, in_this_process, monkeypatch, capsys):
    """Two steps of an untrained network; again, it scores only what was added."""
    torch.manual_seed(0)
    names = {"classes": [f"class {i}" for i in range(camvid.UNLABELLED + 1)]}
    data = write_custom(tmp_path / "data", {"train": 1, "val": 3}, size=(16, 16), settings=names)
    model = dict(model=dataclasses.replace(MODEL, num_classes=camvid.UNLABELLED + 1), training={"seed": 7})
    best = Path(save_checkpoint(tmp_path / "finetune", data, **model))
    early = Path(save_checkpoint(tmp_path / "train", data, **model))
    state = torch.load(early)
    torch.save({name: 0.9 * value for name, value in state.items()}, early.with_name("ema_0.9_000006.pt"))
    torch.jit.script(segmenter.SegmentationUNet(camvid.UNLABELLED + 1).eval()).save(str(tmp_path / "segmenter.pt"))
    rows = [
        dataclasses.replace(row, steps=2)
        for row in benchmark.compared("0.9", 24)
        if row.s in (1.0, 3.0) and row.group in ("none", "cfg", "apg", "autoguidance")
    ]
    monkeypatch.setattr(benchmark, "compared", lambda ema, steps: rows)
    arguments = ["guidance.py", "--out", tmp_path, "--ema", "0.9", "--steps", "24", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    benchmark.main()
    assert best.is_file() and in_this_process.count("evaluations/miou.py") == len(rows) == 4
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--row", "rescale s=3 rescale_phi=1 num_steps=2"])
    benchmark.main()
    assert in_this_process.count("evaluations/miou.py") == 5
    figures = json.loads((tmp_path / "guidance.json").read_text())
    further = "rescale, rescale_phi 1, num_steps 2"
    assert [row["group"] for row in figures["rows"]] == ["none", "cfg", "apg", "autoguidance", further]
    assert figures["seed"] == 7 and figures["command"].startswith("python benchmarks/guidance.py --out")
    distances = [row["feature_distance"] for row in figures["rows"]]
    assert len(set(distances)) == 5 and all(row["layouts"] == 3 for row in figures["rows"])
    text = (tmp_path / "guidance.md").read_text()
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + 5
    assert Image.open(tmp_path / "guidance.png").size[0] > 500
    (tmp_path / "train" / "ema_0.9_000006.pt").unlink()
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "ema_0.9_000006.pt is not there: run scripts/camvid.sh first" in capsys.readouterr().err


def test_a_star_for_what_is_looked_for():
    good = {"miou": 55.0, "feature_distance": 5.0, "detail": 1.0}
    assert benchmark.wanted(good)
    for name, value in (("miou", 54.9), ("feature_distance", 5.1), ("detail", 1.2), ("detail", 0.8)):
        assert not benchmark.wanted(good | {name: value})
