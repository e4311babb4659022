"""What the benchmarks compare with computes the same as the engine; what they count; what they say when it fails."""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import numerics  # noqa: E402
import sampling  # noqa: E402
import training  # noqa: E402

from guided_diffusion.layouts.encode import encode_label_map  # noqa: E402
from guided_diffusion.script_util import ModelConfig  # noqa: E402

CONFIG = ModelConfig(
    image_size=32, num_classes=5, num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions="16",
    num_head_channels=16, no_instance=True, resblock_updown=True,
)  # fmt: skip


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_the_plain_way_computes_the_same_in_its_precision(dtype, tolerance):
    """Every layer of it works in that precision: one float32 input would make all after it float32."""
    plain, ours = (sampling.make_network(CONFIG, torch.device("cpu"), dtype, plain=plain) for plain in (True, False))
    seen = set()
    for module in plain.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    label = torch.randint(0, 5, (2, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    y = encode_label_map(label, None, 5, dtype)
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    with torch.inference_mode():
        a, b = plain(x.to(dtype), t, y).float(), ours(x, t, y=y)
    assert seen == {(dtype, dtype)}
    assert float((a - b).abs().max() / b.abs().max()) < tolerance


def test_distinct_neighbourhoods_are_counted(tmp_path):
    """A map of one class has 5 x 5 kinds: two beside each border, and the inside; only another class adds to them."""
    for name, label in (("a", 3), ("b", 3)):
        Image.fromarray(np.full((64, 64), label, np.uint8)).save(tmp_path / f"{name}.png")
    assert training.distinct_shares(tmp_path, 64) == [25 / (2 * side**2) for side in (64, 32, 16, 8)]
    Image.fromarray(np.full((64, 64), 4, np.uint8)).save(tmp_path / "b.png")
    assert training.distinct_shares(tmp_path, 64)[0] == 50 / (2 * 64**2)


def test_a_variant_that_fails_says_why(tmp_path):
    training.draw_data(tmp_path / "data", 64, count=1)
    args = argparse.Namespace(device="cpu", size="cpu", batch_size=1, threads=1)
    with pytest.raises(RuntimeError, match=r"^nonsense ended with status 1: (.|\n)*'nonsense'"):
        training.Variant("nonsense", args, tmp_path / "data")


def test_the_variants_of_a_step(monkeypatch, tmp_path, capsys):
    """All are measured, and compute the same; one that fails is left out. A GPU's graphs are stood in for."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    variants = sampling.step_variants

    def also_as_graphs(config, device, *rest):
        for norm, way, make in variants(config, device, *rest):
            yield norm, way, make
            yield norm, f"{way}, CUDA graph", make

        def fail():
            raise RuntimeError("cannot be captured")

        yield "another norm", "eager", fail

    monkeypatch.setattr(sampling, "step_variants", also_as_graphs)
    monkeypatch.setattr(sampling, "COMMON", {})
    monkeypatch.setattr(sampling, "SIZES", {"cpu": dataclasses.asdict(CONFIG)})
    monkeypatch.setattr(sampling, "set_numerics", lambda: None)  # it would hold for the tests that follow
    monkeypatch.setattr(sys, "argv", ["sampling.py", "--variants", "1,2", "--rounds", "2", "--out", str(tmp_path)])
    sampling.main()
    rows = json.loads((tmp_path / "sampling_variants_cpu.json").read_text())["rows"]
    ways = [f"{way}{graph}" for way in ("eager", "compiled") for graph in ("", ", CUDA graph")]
    assert [(row["batch"], row["norm"], row["way"]) for row in rows] == [
        (batch, norm, way) for batch in (1, 2) for norm in ("our group norm", "PyTorch's group norm") for way in ways
    ]
    assert all(len(row["all_seconds"]) == 2 and row["relative_difference"] < 0.05 for row in rows)  # bfloat16
    assert any(row["relative_difference"] > 0 for row in rows), "the two norms round differently"
    said = capsys.readouterr().out
    assert "| 2 | our group norm | eager | **1.00** |" in said
    assert said.count("another norm, eager: failed: RuntimeError: cannot be captured") == 2


def test_the_published_networks_norms_are_counted():
    """Where SPADE normalizes, and after it, guidance has two feature maps in place of one."""
    published = numerics.ModelConfig(**sampling.COMMON, **sampling.SIZES["published"])
    with torch.device("meta"):
        model = sampling.create_model(published, learn_sigma=True)
    spade = sum(isinstance(module, numerics.SPADEGroupNorm) for module in model.modules())
    twice, once = numerics.norm_inputs(guided=True), numerics.norm_inputs(guided=False)
    assert len(twice) == len(once) == 101
    doubled = [b for (_, a), (_, b) in zip(twice, once, strict=True) if a == 2 * b]
    same = [b for (_, a), (_, b) in zip(twice, once, strict=True) if a == b]
    assert len(doubled) + len(same) == 101 and len(doubled) >= spade
    assert once[0] == (torch.Size([1, 256, 256, 256]), 2 * 256**3), "the first is at full size, in 16 bits"
