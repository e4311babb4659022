"""Frechet Inception Distance between two sets of images; the lower, the closer.

    python evaluations/test_with_FID.py RESULTS/images RESULTS/samples

Each set is a folder of images or an .npz file of statistics (--save_stats). Prints `FID: ` and the distance last.
evaluations/README.md tells which protocol the published tables use.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import (
    EvaluationError,
    Report,
    argument_parser,
    at_least,
    boolean,
    check_output,
    choose_device,
    inference,
    remark,
    run,
    written_whole,
)
from frechet import FeatureStatistics, frechet_distance, is_semidefinite, kernel_distance
from inception import INPUT_SIZE, STAGES, InceptionFeatures, build_network
from network_weights import RANDOM, PublishedWeights, Weights, fill_network, find_weights
from result_folders import FILTERS, CheckedImages, by_name, check_images, list_images, load_rgb, read_images, shown
from torch.nn import functional
from tqdm import tqdm

# The two sets compared when the command names none.
PATH1 = "RESULTS/images"
PATH2 = "RESULTS/samples"

INCEPTION_WEIGHTS = PublishedWeights(
    file_name="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
)
SAMPLING_RECORD = "sampling.json"  # image_sample.py writes it into its results folder
LARGEST = 1e100  # of a statistic: sums of its squares stay within float64
FEW_IMAGES = 2048  # with fewer images than dimensions the covariance is singular, and the distance well above its limit


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network: both modes end with the FID code's own step to 299 x 299."""

    mode: str
    resize: int | None
    filter: str | None
    last_step: str = f"bilinear to {INPUT_SIZE}x{INPUT_SIZE} without antialiasing, [-1, 1]"

    def __str__(self) -> str:
        first = f"{self.filter} with antialiasing to {self.resize}x{self.resize}, then " if self.resize else ""
        return f"{self.mode}: {first}{self.last_step}"


# --mode: the size and filter of the first resizing. Images that have the size already are the same under both.
MODES = {"published": (256, "bicubic"), "pytorch-fid": (None, None)}


@dataclass
class Source:
    """One of the two sets: its statistics, and its images and features where it is a folder."""

    path: Path
    checked: CheckedImages | None = None
    mean: np.ndarray | None = None
    covariance: np.ndarray | None = None
    features: list[np.ndarray] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__.splitlines()[0], batch_size=32)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="two folders of images or .npz statistics")
    parser.add_argument("--dims", type=int, choices=list(STAGES), default=2048, help="which Inception features")
    parser.add_argument("--mode", choices=list(MODES), default="published", help="named preprocessing")
    parser.add_argument(
        "--resize", type=at_least(1), metavar="N", help="resize images to N x N (else as the mode says)"
    )
    parser.add_argument("--filter", choices=list(FILTERS), help="filter of that resizing, with antialiasing")
    parser.add_argument("--kid", type=boolean, default=False, help="print the kernel distance too")
    parser.add_argument("--weights", metavar="FILE", help="Inception weights; `random` to try the command without")
    parser.add_argument("--save_stats", type=Path, metavar="FILE.npz", help="save the statistics of one folder here")
    return parser.parse_args()


def choose_preprocessing(arguments: argparse.Namespace) -> Preprocessing:
    size, resample = MODES[arguments.mode]
    size = arguments.resize or size
    if arguments.filter and size is None:
        raise EvaluationError(f"--filter {arguments.filter} has nothing to act on: give --resize N too")
    return Preprocessing(arguments.mode, size, (arguments.filter or resample or "bicubic") if size else None)


def choose_paths(arguments: argparse.Namespace) -> list[Path]:
    wanted = 1 if arguments.save_stats else 2
    paths = [Path(path) for path in arguments.paths or (PATH1, PATH2)[:wanted]]
    if len(paths) != wanted:
        what = "--save_stats takes one folder" if arguments.save_stats else "compare two folders or .npz files"
        raise EvaluationError(f"{what}; the command names {len(paths)}")
    if arguments.save_stats:
        if paths[0].suffix == ".npz":
            raise EvaluationError(f"{paths[0]}: --save_stats takes a folder of images; these are statistics already")
        if arguments.save_stats.suffix != ".npz":
            raise EvaluationError(f"--save_stats {arguments.save_stats}: the name must end in .npz")
    return paths


def open_source(
    path: Path,
    listed: dict[Path, list[Path]],
    protocol: dict[str, str],
    arguments: argparse.Namespace,
    report: Report,
) -> Source:
    """A set with its statistics read or its images checked."""
    if path not in listed:
        return read_statistics(path, arguments.dims, protocol, report)
    checked = check_images(listed[path], arguments.skip_bad, report)
    if len(checked.good) < 2:
        raise EvaluationError(f"{path}: one image has no covariance; the distance needs two at least, better thousands")
    return Source(path, checked, record={"images": checked.describe()})


def read_statistics(path: Path, dims: int, protocol: dict[str, str], report: Report) -> Source:
    """Statistics from an .npz file with `mu` and `sigma`, as --save_stats and pytorch-fid write them.

    Raises EvaluationError if they are missing, of another size, no mean and covariance, or made by another protocol.
    """
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file of statistics")
    try:
        with zipfile.ZipFile(path), np.load(path) as archive:  # of a renamed .npy, numpy would make an array
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy and zipfile raise OSError, ValueError, EOFError, zlib.error and more
        raise EvaluationError(f"{path}: not a readable .npz file ({error})") from error
    if not {"mu", "sigma"} <= arrays.keys():
        raise EvaluationError(f"{path}: needs the arrays mu and sigma, holds {shown(sorted(arrays)) or 'none'}")
    mean, covariance = arrays["mu"], arrays["sigma"]
    if not all(array.dtype.kind in "iuf" for array in (mean, covariance)):
        raise EvaluationError(f"{path}: mu and sigma should be numbers, are {mean.dtype} and {covariance.dtype}")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise EvaluationError(f"{path}: mu is {mean.shape} and sigma {covariance.shape}; expected (D,) and (D, D)")
    if len(mean) != dims:
        remedy = f"--dims {len(mean)}" if len(mean) in STAGES else "statistics of FID Inception features"
        raise EvaluationError(f"{path}: statistics of {len(mean)} dimensions, but --dims is {dims}; use {remedy}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise EvaluationError(f"{path}: the statistics hold values that are not finite; make them again")
    scale = np.abs(covariance).max()
    if max(np.abs(mean).max(), scale) > LARGEST:
        raise EvaluationError(f"{path}: the statistics hold values beyond {LARGEST:g}, which no features have")
    if not np.allclose(covariance, covariance.T, rtol=0, atol=1e-6 * scale) or not is_semidefinite(covariance):
        raise EvaluationError(f"{path}: sigma is no covariance: not symmetric, or with negative eigenvalues")
    if "protocol" not in arrays:
        report.warn(f"{path} does not say how it was made; see that preprocessing and weights were the same")
        return Source(path, mean=mean, covariance=covariance)
    try:
        record = json.loads(str(arrays["protocol"]))
        missing = {name for name in ("preprocessing", "weights") if not isinstance(record.get(name), str)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"{path}: its protocol is no JSON record ({error}); make the file again") from error
    if missing:
        raise EvaluationError(f"{path}: its protocol lacks {shown(sorted(missing))}; make the file again")
    for name, here in protocol.items():
        if record[name] != here:
            raise EvaluationError(f"{path}: made with {name} {record[name]!r}, this run has {here!r}; make them alike")
    return Source(path, mean=mean, covariance=covariance, record=record)


def check_protocols(sources: list[Source]) -> None:
    """Raises EvaluationError if two files of statistics say that they were made differently."""
    first, *others = [source for source in sources if source.mean is not None and source.record] or [None]
    for other in others:
        for name in ("preprocessing", "weights"):
            if first.record[name] != other.record[name]:
                raise EvaluationError(
                    f"{first.path} was made with {name} {first.record[name]!r}, "
                    f"{other.path} with {other.record[name]!r}; make them alike"
                )


def warn_about_images(sources: list[Source], preprocessing: Preprocessing, report: Report) -> None:
    """Says what about the images makes a number differ from what one expects of it."""
    folders = [source for source in sources if source.checked]
    for source in folders:
        checked = source.checked
        if len(checked.sizes) > 1:
            sizes = shown([f"{width}x{height}" for width, height in sorted(checked.sizes)])
            report.warn(f"{source.path}: images of {len(checked.sizes)} sizes ({sizes}); each is resized on its own")
        if len(checked.good) < FEW_IMAGES:
            report.warn(f"{source.path}: {len(checked.good)} images; compare only with distances of as many images")
    sizes = [set(source.checked.sizes) for source in folders]
    if len(sizes) == 2 and sizes[0] != sizes[1] and preprocessing.resize is None:
        report.warn("the two folders hold images of different sizes: their resampling adds to the distance")


def compute_statistics(
    source: Source,
    network: InceptionFeatures,
    preprocessing: Preprocessing,
    device: torch.device,
    arguments: argparse.Namespace,
    report: Report,
) -> None:
    """Fills in the mean and covariance of a folder's features, and the features themselves for the kernel distance."""
    images = list(source.checked.good)
    sizes = [(preprocessing.resize, preprocessing.resize)] if preprocessing.resize else []
    load = partial(load_rgb, sizes=sizes, filter_name=preprocessing.filter)
    batches = read_images(images, load, arguments.batch_size, arguments.num_workers)
    statistics = FeatureStatistics(arguments.dims)
    with inference(), tqdm(total=len(images), desc="/".join(source.path.parts[-2:]), unit="image") as bar:
        for batch in batches:
            pixels = []
            for index, item in batch:
                if isinstance(item, str):
                    source.checked.set_aside(images[index], item, arguments.skip_bad, report)
                else:
                    pixels.append(item)
            if pixels:
                features = network(to_network_size(pixels, device)).cpu().numpy()
                statistics.update(features)
                if arguments.kid:
                    source.features.append(features)
            bar.update(len(batch))
    if statistics.count < 2:
        raise EvaluationError(f"{source.path}: fewer than two images could be read")
    source.mean, source.covariance = statistics.result()
    source.record = {"images": source.checked.describe()}


def to_network_size(images: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Images [H, W, 3] of bytes, of any sizes, as one batch [N, 3, 299, 299] in [0, 1]."""
    same_size = len({image.shape for image in images}) == 1
    resized = []
    for group in [torch.stack(images)] if same_size else [image[None] for image in images]:
        x = group.to(device).permute(0, 3, 1, 2).float() / 255  # [N, 3, H, W], channels last
        resized.append(functional.interpolate(x, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False))
    return torch.cat(resized)


def save_statistics(source: Source, path: Path, protocol: dict[str, str]) -> None:
    """Writes mean, covariance and how they were made to an .npz file, which pytorch-fid reads too."""
    with written_whole(path) as temporary:
        record = json.dumps({**protocol, **source.record})
        np.savez_compressed(temporary, mu=source.mean, sigma=source.covariance, protocol=np.array(record))
    print(f"statistics of {len(source.checked.good)} images: {path}")


def check_names(listed: dict[Path, list[Path]], report: Report) -> None:
    """Warns of names in one of two folders alone. Raises EvaluationError where both belong to one results folder:
    each photograph has its sample there, unless sampling was not finished."""
    if len(listed) != 2:
        return
    names = {folder: {path.stem for path in images} for folder, images in listed.items()}
    first, second = names
    alone = [
        f"{folder} alone holds {len(rest)} of its {len(names[folder])} names ({shown(sorted(rest))})"
        for folder, other in ((first, second), (second, first))
        if (rest := names[folder] - names[other])
    ]
    if not alone:
        return
    results = first.resolve().parent
    if results == second.resolve().parent and (results / SAMPLING_RECORD).is_file():
        raise EvaluationError(
            f"{'; '.join(alone)}: {results} holds a sampling that is not finished, or two of different lengths. Finish "
            "it with the command that began it (image_sample.py makes what is missing), or sample to a new folder"
        )
    report.warn(f"{'; '.join(alone)}: is it the same set of layouts?")


def compare_names(sources: list[Source]) -> dict[str, Any]:
    """Names in one folder alone; the distance needs no pairs, but samples of other layouts measure something else."""
    if not all(source.checked for source in sources):
        return {}
    first, second = ({path.stem for path in source.checked.good} for source in sources)
    return {"matched": len(first & second), "only in 1": sorted(first - second), "only in 2": sorted(second - first)}


def is_comparable(sources: list[Source], preprocessing: Preprocessing, weights: Weights | None, dims: int) -> bool:
    """Whether nothing known speaks against comparing the number with published ones of equally many images."""
    hashes = [source.record["weights"] for source in sources if "weights" in source.record]
    used = {source.record["preprocessing"] for source in sources if "preprocessing" in source.record}
    if weights is not None:  # some images were read
        used.add(str(preprocessing))
    return (
        dims == max(STAGES)
        and used <= {str(Preprocessing(mode, *first)) for mode, first in MODES.items()}
        and (weights is None or weights.published)
        and all(name.startswith(INCEPTION_WEIGHTS.sha256) for name in hashes)
    )


def main() -> None:
    arguments = parse_arguments()
    report = Report("FID", arguments, packages=("scipy",))
    preprocessing = choose_preprocessing(arguments)
    paths = choose_paths(arguments)
    check_output("--json", arguments.json)
    check_output("--save_stats", arguments.save_stats)
    device = choose_device(arguments.device)
    listed = {path: list_images(path) for path in paths if path.suffix != ".npz" or path.is_dir()}
    for images in listed.values():
        by_name(images)  # p0.png and p0.bmp would count one picture twice
    check_names(listed, report)
    if arguments.kid and len(listed) != len(paths):
        raise EvaluationError("--kid True needs folders of images: statistics do not hold the single features")
    weights = find_weights(arguments.weights, INCEPTION_WEIGHTS, report) if listed else None
    protocol = {"preprocessing": str(preprocessing), "weights": weights.sha256 or RANDOM} if weights else {}
    sources = [open_source(path, listed, protocol, arguments, report) for path in paths]
    check_protocols(sources)
    warn_about_images(sources, preprocessing, report)

    if weights:
        print(f"preprocessing: {preprocessing}")
        network = build_network()
        fill_network(network, weights)
        features = InceptionFeatures(network, arguments.dims).to(device)
        for source in sources:
            if source.checked:
                compute_statistics(source, features, preprocessing, device, arguments, report)

    comparable = is_comparable(sources, preprocessing, weights, arguments.dims)
    fields = {
        "sources": [{"path": str(source.path), **source.record} for source in sources],
        "names": compare_names(sources) if len(sources) == 2 else {},
        "preprocessing": protocol.get("preprocessing", "as in the statistics"),
        "weights": weights.describe() if weights else None,
        "dims": arguments.dims,
        "device": str(device),
    }
    if arguments.save_stats:
        save_statistics(sources[0], arguments.save_stats, protocol)
        report.finish(None, comparable, **fields)
        return
    if arguments.kid:
        fields["kid"] = kernel_distance(*(np.concatenate(source.features) for source in sources))
        print(f"KID: {fields['kid']:.6f}" + remark(comparable))
    first, second = sources
    score = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    report.finish(score, comparable, **fields)
    print(f"FID: {score:.4f}" + remark(comparable))


if __name__ == "__main__":
    run(main)
