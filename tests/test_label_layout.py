"""Layouts of integers, looked up, against the one-hot maps that they stand for, convolved."""

import numpy as np
import pytest
import torch

from guided_diffusion.layouts import lookup
from guided_diffusion.layouts.encode import drop_layouts, encode_label_map, instance_edges
from guided_diffusion.layouts.lookup import LabelLayout
from guided_diffusion.layouts.spade import Layout, SPADEGroupNorm

CLASSES = 5


pytestmark = pytest.mark.usefixtures("exact_float32")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def draw(regions: bool, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and instances [3, 1, H, W]: noise, in which every neighbourhood differs, or two regions each."""
    if not regions:
        return torch.randint(0, CLASSES, (3, 1, height, width)), torch.randint(0, 3, (3, 1, height, width))
    label = torch.randint(0, CLASSES, (3, 1, 1, 1)).repeat(1, 1, height, width)
    label[:, :, height // 3 :, width // 2 :] = (label[:, :, :1, :1] + 1) % CLASSES
    return label, label * 7


def modulated(norm: SPADEGroupNorm, layout: Layout, x: torch.Tensor) -> list[torch.Tensor]:
    """x modulated, and the gradients of x and of every weight, for a loss that weighs each number differently."""
    norm.zero_grad()
    x = x.clone().requires_grad_()
    out = layout.modulate(norm, x)
    assert out.dtype == x.dtype and out.shape == x.shape
    (out.float() * torch.sin(torch.arange(out.numel(), device=x.device)).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in norm.parameters())]


def both_ways(regions, edges, drop, size, map_size=(24, 32), dtype=torch.float32, device="cpu"):
    """The results of `modulated` by convolution and by look-up, and the looked-up map."""
    torch.manual_seed(0)
    label, instance = draw(regions, *map_size)
    label, instance, drop = label.to(device), instance.to(device), torch.tensor(drop, device=device)
    y = drop_layouts(encode_label_map(label, instance if edges else None, CLASSES), drop)
    looked_up = LabelLayout(label, instance_edges(instance) if edges else None, CLASSES, drop, dtype)
    norm = SPADEGroupNorm(32, CLASSES + edges, 1).to(device)
    x = torch.randn(3, 32, *size).to(device, dtype, memory_format=torch.channels_last)
    return modulated(norm, Layout(y.to(dtype)), x), modulated(norm, looked_up, x), looked_up.at(size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("drop", [[False, True, False], [False] * 3, [True] * 3])
@pytest.mark.parametrize("regions", [False, True])
def test_looked_up_layouts_equal_convolved_ones(edges, drop, regions, device):
    """Results and gradients, with some, no or all samples dropped, at three sizes, of noise and of regions."""
    for size in ((24, 32), (12, 16), (6, 8)):
        convolved, looked_up, here = both_ways(regions, edges, drop, size, device=device)
        assert (here.products is not None) == (regions or all(drop))
        for expected, found in zip(convolved, looked_up, strict=True):
            # float32 sums in another order, of up to 3 * 24 * 32 terms
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("size,looks_up", [((1, 24), False), ((24, 1), False), ((2, 2), True), ((2, 7), True)])
def test_maps_of_a_few_pixels(size, looks_up, monkeypatch):
    """Even where all are worth it: in a map one pixel high or wide, corners do not tell a neighbourhood."""
    monkeypatch.setattr(lookup, "MOST_DISTINCT", 1.0)
    convolved, looked_up, here = both_ways(True, True, [False, True, False], size, map_size=size)
    assert (here.products is not None) == looks_up
    for expected, found in zip(convolved, looked_up, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_any_layout_of_any_shape(monkeypatch):
    """A hundred random cases in float64: shapes, classes, edges, drops, blocks of 1 to 4 pixels, maps to be resized."""
    monkeypatch.setattr(lookup, "MOST_DISTINCT", 1.0)
    monkeypatch.setattr(lookup, "LONGEST_SUM", 5)
    rng = np.random.default_rng(0)
    for _ in range(100):
        torch.manual_seed(int(rng.integers(1 << 30)))
        number, classes, edges = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 200])), bool(rng.integers(2))
        size = [int(side) for side in rng.integers(1, 12, 2)]
        block, times = int(rng.integers(1, 5)), int(rng.choice([1, 2, 4]))
        label = torch.randint(0, classes, (number, 1, *(-(-side * times // block) for side in size)))
        label = label.repeat_interleave(block, 2).repeat_interleave(block, 3)
        label = label[..., : size[0] * times, : size[1] * times].contiguous()
        edge = instance_edges(label) if edges else None
        drop = torch.rand(number) < 0.3
        y = drop_layouts(encode_label_map(label, label if edges else None, classes, torch.float64), drop)
        norm = SPADEGroupNorm(32, classes + edges, 1).double()
        x = torch.randn(number, 32, *size, dtype=torch.float64)
        looked_up = LabelLayout(label.to(torch.uint8), edge, classes, drop, torch.float64)
        for expected, found in zip(modulated(norm, Layout(y), x), modulated(norm, looked_up, x), strict=True):
            # the bias is rounded to float32 on the way, in both
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_the_convolution_is(dtype, device):
    """Against float32. The two ways round at different places; the look-up may lose at most twice as much."""
    exact, _, _ = both_ways(True, True, [False] * 3, (24, 32), device=device)
    convolved, looked_up, here = both_ways(True, True, [False] * 3, (24, 32), dtype=dtype, device=device)
    assert here.products is not None
    for expected, by_convolution, by_look_up in zip(exact, convolved, looked_up, strict=True):
        lost, allowed = ((found.float() - expected).norm() / expected.norm() for found in (by_look_up, by_convolution))
        assert lost < 2 * allowed + 1e-5


def test_long_sums_are_split_without_a_difference(monkeypatch):
    _, whole, here = both_ways(True, True, [False] * 3, (24, 32))
    monkeypatch.setattr(lookup, "LONGEST_SUM", 7)
    _, split, split_here = both_ways(True, True, [False] * 3, (24, 32))
    assert here.pixels.joints is not None and len(here.pixels.starts) < len(split_here.pixels.starts)
    assert torch.diff(split_here.pixels.starts).max() <= 7
    for expected, found in zip(whole, split, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("edges", [False, True])
def test_every_distinct_neighbourhood_is_found_once(edges):
    """The numbers of 5x5 neighbourhoods against the neighbourhoods themselves, cut out pixel by pixel."""
    torch.manual_seed(1)
    # 3 pixels to a block: most, but not all, neighbourhoods differ; and borders of the map count as such
    label = torch.randint(0, 3, (2, 1, 4, 5)).repeat_interleave(3, 2).repeat_interleave(3, 3)
    label[1] = 0
    edge = instance_edges(label) if edges else None
    layout = LabelLayout(label, edge, 3, torch.tensor([False, False]), torch.float32)
    here = layout.at((12, 15))
    assert here.ids is not None
    padded = torch.nn.functional.pad(layout.ones, (2, 2, 2, 2), value=-2).unfold(2, 5, 1).unfold(3, 5, 1)
    cut = padded.permute(0, 2, 3, 1, 4, 5).reshape(2 * 12 * 15, -1).tolist()
    number_of = {}
    for neighbourhood, number in zip(map(tuple, cut), here.ids.tolist(), strict=True):
        assert number_of.setdefault(neighbourhood, number) == number
    assert sorted(number_of.values()) == list(range(len(number_of)))
