"""The drawing of the architecture: it is drawn, and its words can be read."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
sys.path.insert(0, str(ROOT / "assets"))

from make_framework import draw_framework, example  # noqa: E402


def test_no_text_covers_another_or_leaves_the_page():
    figure = draw_framework().figure
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) > 50
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        # Extents include the space above and below the letters, so that lines set close may share a little of it.
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 0 or down <= 0.02 * figure.dpi, (first, second)
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 > 0 and box.y0 > 0 and box.x1 < width and box.y1 < height, text


def test_edges_of_the_example_lie_on_class_boundaries():
    pictures = example(48)
    on_edge = (pictures["edges"] == 255).all(-1)
    classes = pictures["labels"].astype(int).sum(-1)
    inner = ~on_edge[1:-1, 1:-1]
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):  # away from edges a pixel's four neighbours are of its class
        neighbours = np.roll(classes, (dy, dx), (0, 1))[1:-1, 1:-1]
        assert (neighbours == classes[1:-1, 1:-1])[inner].all()
    assert 0.02 < on_edge.mean() < 0.5


def test_command_writes_the_committed_picture(tmp_path):
    command = [sys.executable, ROOT / "assets" / "make_framework.py", "--out", tmp_path / "framework.png"]
    subprocess.run(command, check=True, capture_output=True)
    assert [p.name for p in tmp_path.iterdir()] == ["framework.png"]
    drawn, committed = (
        Image.open(f).convert("RGB") for f in (tmp_path / "framework.png", ROOT / "assets/framework.png")
    )
    # Fonts and libraries differ a little between machines: compared at a tenth of the size, in grey levels of 255.
    small = [np.asarray(image.resize((234, 176), Image.Resampling.BOX), float) for image in (drawn, committed)]
    assert drawn.size == committed.size and np.abs(small[0] - small[1]).mean() < 2
