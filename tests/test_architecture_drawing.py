"""The drawing of the rooms: it follows from the table of imports, and its words can be read."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_import_rules import ALLOWED, DOOR, PURE

ROOT = Path(__file__).parents[1]
pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
sys.path.insert(0, str(ROOT / "assets"))

import make_architecture  # noqa: E402

COMMAND = "python assets/make_architecture.py draws it again"


def test_layers_follow_from_the_table():
    assert make_architecture.read_table() == (ALLOWED, DOOR, PURE)
    rows = make_architecture.layers(ALLOWED)
    assert sorted(name for row in rows for name in row) == sorted(ALLOWED)
    height = {name: i for i, row in enumerate(rows) for name in row}
    for name, below in ALLOWED.items():
        assert all(height[other] < height[name] for other in below)
        assert height[name] == 0 or any(height[other] == height[name] - 1 for other in below)
    assert make_architecture.ROOMS.keys() == ALLOWED.keys() - DOOR


@pytest.mark.parametrize("way", [make_architecture.TRAINING, make_architecture.SAMPLING])
def test_the_stations_are_places_of_the_package(way):
    assert {name for name, _ in way} <= ALLOWED.keys()


def test_no_text_covers_another_or_leaves_its_box():
    figure = make_architecture.draw_architecture().figure
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) > 50
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        # Extents include the space above and below the letters, so that lines set close may share a little of it.
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 0 or down <= 0.02 * figure.dpi, (first, second)
    frames = [patch.get_window_extent() for patch in figure.axes[0].patches]
    for text, box in boxes:
        middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        around = min((f for f in frames if f.contains(*middle)), key=lambda f: f.width * f.height)
        assert box.x0 > around.x0 and box.x1 < around.x1, text


def test_command_writes_the_committed_picture(tmp_path):
    command = [sys.executable, ROOT / "assets" / "make_architecture.py", "--out", tmp_path / "architecture.png"]
    subprocess.run(command, check=True, capture_output=True)
    assert [p.name for p in tmp_path.iterdir()] == ["architecture.png"]
    drawn, committed = (Image.open(f) for f in (tmp_path / "architecture.png", ROOT / "assets/architecture.png"))
    assert json.loads(drawn.text["Description"])["layers"] == make_architecture.layers(ALLOWED)
    assert drawn.text["Description"] == committed.text["Description"], f"the table has changed: {COMMAND}"
    # Fonts and libraries differ a little between machines: compared at a tenth of the size, in grey levels of 255.
    small = [
        np.asarray(image.convert("RGB").resize((234, 176), Image.Resampling.BOX), float) for image in (drawn, committed)
    ]
    assert drawn.size == committed.size and np.abs(small[0] - small[1]).mean() < 2, COMMAND
