"""Diversity: the LPIPS distance (arXiv 1801.03924) between several samples of one layout; the higher, the more diverse.

    python evaluations/lpips.py RESULTS

RESULTS holds sub-folders whose names begin with `samples`, each with one sample of every layout under the layout's
name. Prints `LPIPS: ` and the mean over layouts of the mean over all pairs of a layout's samples last.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from command_line import (
    EvaluationError,
    Report,
    argument_parser,
    check_output,
    choose_device,
    inference,
    remark,
    run,
)
from network_weights import PublishedWeights, Weights, fill_network, find_weights
from result_folders import by_name, check_images, list_images, load_rgb, read_images, read_names, sample_folders, shown
from torch import nn
from tqdm import tqdm

ALEXNET_WEIGHTS = PublishedWeights(
    file_name="alexnet-owt-7be5be79.pth",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    sha256="7be5be79",
)
SMALLEST_SIDE = 31  # of an image that AlexNet's pooling does not reduce to nothing
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
# The sizes that images are resized to in turn, and what is said of the whole preprocessing.
PREPROCESSINGS = {
    "published": (
        ((256, 256), (299, 299)),
        "bilinear to 256x256, then to 299x299, ImageNet mean and deviation, LPIPS scaling",
    ),
    "standard": ((), "own size, [-1, 1], LPIPS scaling"),
}


def import_lpips_package() -> ModuleType:
    """The installed package `lpips`, which this script's own name hides.

    Python puts the folder of the script first on its search path, so a plain `import lpips` here would find this file.
    That folder is left out of the search for the time of the import. Raises EvaluationError if the package is missing.
    """
    here = Path(__file__).resolve().parent
    search_path = sys.path[:]
    sys.path[:] = [entry for entry in search_path if Path(entry).resolve() != here]
    try:
        return importlib.import_module("lpips")
    except ImportError as error:
        raise EvaluationError(f"the package lpips cannot be imported ({error}); pip install lpips") from error
    finally:
        sys.path[:] = search_path


@dataclass(frozen=True)
class Layout:
    """One layout's samples."""

    name: str
    samples: tuple[Path, ...]


class PairwiseDistance(nn.Module):
    """LPIPS v0.1 on AlexNet between all pairs of a few images, each image passing the network once.

    The network parts and the learned channel weights are the package's; `weights` are AlexNet's.
    """

    def __init__(self, weights: Weights, images_per_pass: int) -> None:
        super().__init__()
        package = import_lpips_package()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the package uses torchvision in a way that is deprecated
            # pnet_rand: no download of AlexNet behind our back, its weights come from a file whose hash is known
            metric = package.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        self.slices = nn.ModuleList(getattr(metric.net, f"slice{k + 1}") for k in range(metric.L))
        # the package keeps AlexNet's layers under the names they have among torchvision's `features`
        layers = OrderedDict(child for part in self.slices for child in part.named_children())
        fill_network(nn.Sequential(layers), weights, prefix="features.")
        self.scaling = metric.scaling_layer
        self.channel_weights = nn.ParameterList(
            linear.model[-1].weight.detach().clone().flatten() for linear in metric.lins
        )
        self.normalise = package.normalize_tensor
        self.images_per_pass = images_per_pass
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Distances [S * (S - 1) / 2] of images [S, 3, H, W] as LPIPS takes them, in the order (0, 1), (0, 2), ..."""
        passes = [self._features(part) for part in images.split(self.images_per_pass)]
        features = [torch.cat(layer) for layer in zip(*passes, strict=True)]
        return torch.cat([self._from_one(features, index) for index in range(len(images) - 1)])

    def _features(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Each layer's features with unit length along the channels, [S, H * W, C]."""
        x = self.scaling(images).contiguous(memory_format=torch.channels_last)
        for part in self.slices:
            x = part(x)
            yield self.normalise(x).permute(0, 2, 3, 1).flatten(1, 2)

    def _from_one(self, features: list[torch.Tensor], index: int) -> torch.Tensor:
        """Distances of the image `index` to those after it: per layer the weighted mean over positions, summed."""
        total = 0
        for layer, weight in zip(features, self.channel_weights, strict=True):
            # the mean first: positions before channels keeps the weighted sum a small one
            squares = (layer[index + 1 :] - layer[index]).square_().mean(dim=1)  # [later images, C]
            total = total + squares @ weight
        return total


def load_samples(layout: Layout, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """A layout's samples as bytes [S, H, W, 3]."""
    return torch.stack([load_rgb(path, sizes, "bilinear") for path in layout.samples])


def scale(images: torch.Tensor, preprocessing: str) -> torch.Tensor:
    """Bytes [S, H, W, 3] as LPIPS takes them before its own scaling, [S, 3, H, W]."""
    x = images.permute(0, 3, 1, 2).float()
    if preprocessing == "standard":
        return x / 127.5 - 1
    mean, deviation = (x.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (x / 255 - mean) / deviation


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__.splitlines()[0], batch_size=16)
    parser.add_argument("path", type=Path, metavar="GENERATED_IMAGES_DIR", help="folder with samples* sub-folders")
    parser.add_argument(
        "--preprocessing", choices=list(PREPROCESSINGS), default="published", help="what the images pass before LPIPS"
    )
    parser.add_argument("--test_list", type=Path, metavar="FILE", help="only the layouts named here, one a line")
    parser.add_argument("--weights", metavar="FILE", help="AlexNet weights; `random` to try the command without")
    return parser.parse_args()


def find_layouts(path: Path, test_list: Path | None, skip_bad: bool, report: Report) -> tuple[list[Layout], list[str]]:
    """The layouts that have a sample in every samples* folder, and the names of those left out.

    Raises EvaluationError for fewer than two such folders and, unless `skip_bad`, for a layout missing from one.
    """
    if not path.is_dir():
        raise EvaluationError(f"{path}: no such folder")
    folders = sample_folders(path, report.warn)
    if len(folders) < 2:
        found = f"only {folders[0].name}" if folders else "none"
        raise EvaluationError(
            f"{path}: needs at least two sub-folders named samples*, has {found}; draw several samples of each layout"
        )
    named = {folder: by_name(list_images(folder)) for folder in folders}
    names = sorted(set().union(*named.values()))
    if test_list:
        wanted = set(read_names(test_list))
        unknown = sorted(wanted - set(names))
        if unknown and not skip_bad:
            raise EvaluationError(f"{test_list} names layouts without samples: {shown(unknown)}; or --skip_bad True")
        if unknown:
            report.warn(f"{test_list} names {len(unknown)} layouts without samples: {shown(unknown)}")
        names = [name for name in names if name in wanted]
    lacking = {name: [folder.name for folder in folders if name not in named[folder]] for name in names}
    incomplete = {name: missing for name, missing in lacking.items() if missing}
    if incomplete:
        listed = shown([f"{name} (not in {shown(missing)})" for name, missing in incomplete.items()])
        if not skip_bad:
            raise EvaluationError(
                f"{len(incomplete)} of {len(names)} layouts lack samples: {listed}; finish sampling, choose "
                "layouts with --test_list, or leave these out: --skip_bad True"
            )
        report.warn(f"{len(incomplete)} of {len(names)} layouts lack samples and are left out: {listed}")
    layouts = [
        Layout(name, tuple(named[folder][name] for folder in folders)) for name in names if name not in incomplete
    ]
    if not layouts:
        raise EvaluationError(f"{path}: no layout has a sample in each of {shown([folder.name for folder in folders])}")
    return layouts, sorted(incomplete)


def check_samples(
    layouts: list[Layout], preprocessing: str, skip_bad: bool, report: Report
) -> tuple[list[Layout], dict[str, object]]:
    """The layouts whose samples can all be read and compared, and the record of the images."""
    checked = check_images([path for layout in layouts for path in layout.samples], skip_bad, report)
    usable = [layout for layout in layouts if not checked.bad.keys() & set(layout.samples)]
    for layout in usable if preprocessing == "standard" else []:
        sizes = {checked.good[path][0] for path in layout.samples}
        if len(sizes) > 1:
            raise EvaluationError(
                f"{layout.name}: samples of different sizes ({shown(sorted(sizes))}); LPIPS needs one size: "
                "--preprocessing published resizes them"
            )
    smallest = min((min(size), size) for size in checked.sizes)[1]
    if preprocessing == "standard" and min(smallest) < SMALLEST_SIDE:
        raise EvaluationError(
            f"images of {smallest[0]}x{smallest[1]} are too small for AlexNet, which needs {SMALLEST_SIDE} pixels a "
            "side: --preprocessing published enlarges them"
        )
    if len(checked.sizes) > 1 and preprocessing == "published":
        sizes = shown([f"{width}x{height}" for width, height in sorted(checked.sizes)])
        report.warn(f"images of {len(checked.sizes)} sizes ({sizes}); each is resized on its own")
    if not usable:
        raise EvaluationError("every layout has a sample that cannot be read")
    return usable, checked.describe()


def score_layouts(
    layouts: list[Layout],
    distance: PairwiseDistance,
    device: torch.device,
    arguments: argparse.Namespace,
    report: Report,
) -> dict[str, float]:
    """The mean distance over all pairs of each layout's samples, by the layout's name."""
    load = partial(load_samples, sizes=PREPROCESSINGS[arguments.preprocessing][0])
    scores: dict[str, float] = {}
    with inference(), tqdm(total=len(layouts), desc="LPIPS", unit="layout") as bar:
        for ((index, samples),) in read_images(layouts, load, 1, arguments.num_workers):
            bar.update()
            name = layouts[index].name
            if isinstance(samples, str):
                if not arguments.skip_bad:
                    raise EvaluationError(f"layout {name}: {samples}; replace it, or --skip_bad True")
                report.warn(f"layout {name} is left out: {samples}")
                continue
            images = scale(samples.to(device, non_blocking=True), arguments.preprocessing)
            scores[name] = distance(images).double().mean().item()
    if not scores:
        raise EvaluationError("no layout has samples that could all be read")
    return scores


def main() -> None:
    arguments = parse_arguments()
    report = Report("LPIPS", arguments, packages=("lpips",))
    check_output("--json", arguments.json)
    device = choose_device(arguments.device)
    layouts, incomplete = find_layouts(arguments.path, arguments.test_list, arguments.skip_bad, report)
    weights = find_weights(arguments.weights, ALEXNET_WEIGHTS, report)
    layouts, images = check_samples(layouts, arguments.preprocessing, arguments.skip_bad, report)
    distance = PairwiseDistance(weights, arguments.batch_size).to(device)
    how = f"{arguments.preprocessing}: {PREPROCESSINGS[arguments.preprocessing][1]}"
    print(f"preprocessing: {how}")

    scores = score_layouts(layouts, distance, device, arguments, report)
    score = math.fsum(scores.values()) / len(scores)
    samples = len(layouts[0].samples)
    folders = [path.parent.name for path in layouts[0].samples]
    pairs = samples * (samples - 1) // 2
    print(f"{len(scores)} layouts, {samples} samples each ({', '.join(folders)}), {pairs} pairs each")
    report.finish(
        score,
        weights.published,
        layouts=len(scores),
        samples_per_layout=samples,
        folders=folders,
        names={"matched": len(scores), "incomplete": incomplete},
        images=images,
        preprocessing=how,
        network="AlexNet, LPIPS v0.1 linear weights of the package lpips",
        weights=weights.describe(),
        device=str(device),
        scores=scores,
    )
    print(f"LPIPS: {score:.4f}{remark(weights.published)}")


if __name__ == "__main__":
    run(main)
