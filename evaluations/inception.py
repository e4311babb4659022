"""Inception-v3 as the Frechet Inception Distance uses it (Heusel et al., arXiv 1706.08500).

The published scores rest on TensorFlow's network of 2015-12-05, whose weights pytorch-fid ported to PyTorch. It differs
from torchvision's Inception-v3 in three ways: 1008 outputs, average pools that leave the padding out of the mean, and a
max pool in the last block's pooling branch. The weights are loaded into torchvision's network, whose convolutions are
then put together here, each with its batch norm folded in and channels last: equal features, less traffic to memory.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d, Inception3

INPUT_SIZE = 299
CLASSES = 1008

# Where the features of each size end: after the first and second max pool, before the auxiliary classifier, at the end.
STAGES = {
    64: ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"],
    192: ["Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"],
    768: ["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"],
    2048: ["Mixed_7a", "Mixed_7b", "Mixed_7c"],
}

# The branches of torchvision's blocks in the order of their concatenation, each by the names of its convolutions; the
# two in a tuple read the same input. A pooling branch comes last in every block.
BRANCHES = {
    "InceptionA": [
        ["branch1x1"],
        ["branch5x5_1", "branch5x5_2"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
    ],
    "InceptionB": [
        ["branch3x3"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
    ],
    "InceptionC": [
        ["branch1x1"],
        ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
        ["branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"],
    ],
    "InceptionD": [
        ["branch3x3_1", "branch3x3_2"],
        ["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"],
    ],
    "InceptionE": [
        ["branch1x1"],
        ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
        ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
    ],
}


def build_network() -> Inception3:
    """torchvision's network with the 1008 outputs of the FID weights, to load them into."""
    return Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)


class InceptionFeatures(nn.Module):
    """Features of the FID Inception-v3, averaged over the image.

    `network` (see `build_network`) holds the weights; `dims` chooses the features: 64, 192, 768 or 2048.
    """

    def __init__(self, network: Inception3, dims: int = 2048) -> None:
        super().__init__()
        names = [name for size, stage in STAGES.items() if size <= dims for name in stage]
        self.layers = nn.Sequential(*(_folded_layer(name, getattr(network, name)) for name in names))
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, dims] of images [N, 3, 299, 299] in [0, 1]."""
        x = 2 * images.contiguous(memory_format=torch.channels_last) - 1
        return self.layers(x).mean(dim=(2, 3))


class Concatenation(nn.Module):
    """Branches over one input, concatenated along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _folded_layer(name: str, layer: nn.Module) -> nn.Module:
    """The layer `name` of torchvision's network in the form that runs here."""
    if isinstance(layer, BasicConv2d):
        return _folded_convolution(layer)
    if isinstance(layer, nn.MaxPool2d):
        return layer
    branches = [nn.Sequential(*(_unit(layer, item) for item in names)) for names in BRANCHES[type(layer).__name__]]
    return Concatenation(*branches, _pooling_branch(name, layer))


def _folded_convolution(unit: BasicConv2d) -> nn.Module:
    return nn.Sequential(fuse_conv_bn_eval(unit.conv.eval(), unit.bn.eval()), nn.ReLU(inplace=True))


def _unit(block: nn.Module, item: str | tuple[str, ...]) -> nn.Module:
    if isinstance(item, tuple):
        return Concatenation(*(_folded_convolution(getattr(block, name)) for name in item))
    return _folded_convolution(getattr(block, item))


def _pooling_branch(name: str, block: nn.Module) -> nn.Module:
    if not hasattr(block, "branch_pool"):  # the two blocks that halve the resolution
        return nn.MaxPool2d(3, stride=2)
    if name == "Mixed_7c":
        pool = nn.MaxPool2d(3, stride=1, padding=1)
    else:
        pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return nn.Sequential(pool, _folded_convolution(block.branch_pool))
