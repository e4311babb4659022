"""Does the image obey the layout: mean IoU between the layouts and a segmentation of the samples, in percent.

    python evaluations/miou.py RESULTS --segmenter MODEL --remap cityscapes

Compares RESULTS/labels with what a segmentation network sees in RESULTS/samples (or with a folder of predicted label
maps). Prints pixel accuracy, frequency-weighted IoU and every class's IoU, and `mIoU: ` last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
    run,
)
from id_orders import LOW, order_advice
from label_maps import (
    REMAPS,
    Classes,
    check_ids,
    confusion_matrix,
    default_ignored,
    load_label_map,
    make_classes,
    scores_of,
)
from result_folders import FILTERS, by_name, check_images, list_images, load_rgb, read_images, shown
from segmenters import Segmenter, load_segmenter
from torch.nn import functional
from tqdm import tqdm

LARGEST_RECORDED = 1024  # classes whose confusion matrix goes into the report


@dataclass(frozen=True)
class Pair:
    """A label map and the image, or the predicted label map, that goes with it."""

    name: str
    labels: Path
    other: Path


def size(text: str) -> tuple[int, int] | None:
    """`native`, `N` or `HxW` as a flag's value: None, or height and width."""
    if text == "native":
        return None
    height, _, width = text.partition("x")
    return at_least(1)(height), at_least(1)(width or height)


def three_numbers(text: str) -> tuple[float, ...]:
    """`R,G,B` as a flag's value."""
    numbers = tuple(float(part) for part in text.split(","))
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"expected three numbers with commas, not {text!r}")
    return numbers


def id_list(text: str) -> tuple[int, ...]:
    """`0,255` as a flag's value; empty for none."""
    return tuple(int(part) for part in text.split(",") if part)


def boolean_or_name(text: str) -> bool | str:
    """`True`, `False` or a name as a flag's value."""
    try:
        return boolean(text)
    except argparse.ArgumentTypeError:
        return text


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__.splitlines()[0], batch_size=4)
    parser.add_argument("path", type=Path, metavar="RESULTS_DIR", help="folder with labels/ and samples/")
    parser.add_argument("--samples", default="samples", metavar="NAME", help="the sub-folder of images to segment")
    parser.add_argument("--labels", default="labels", metavar="NAME", help="the sub-folder of label maps")
    parser.add_argument(
        "--segmenter",
        required=True,
        metavar="WHAT",
        help="a folder of predicted label maps, a TorchScript file, or a Hugging Face semantic-segmentation model",
    )
    parser.add_argument("--num_classes", type=at_least(1), help="classes scored (19 and 150 with the named remaps)")
    parser.add_argument(
        "--remap",
        default="none",
        metavar="NAME|FILE",
        help=f"label ids to classes: none, {', '.join(REMAPS)}, or a JSON file {{id: class}}; other ids are ignored",
    )
    parser.add_argument(
        "--remap_predictions",
        type=boolean_or_name,
        default=False,
        metavar="BOOL|NAME|FILE",
        help="True: apply --remap to predictions too; or a mapping of their own, named as those of --remap",
    )
    parser.add_argument(
        "--ignore_ids", type=id_list, metavar="A,B", help="stored ids not scored (255 of up to 255 classes)"
    )
    parser.add_argument("--input_size", type=size, metavar="native|N|HxW", help="size of the network's input")
    parser.add_argument("--input_filter", choices=list(FILTERS), default="bilinear", help="filter of that resizing")
    parser.add_argument(
        "--interpolation",
        choices=["bilinear", "nearest"],
        help="how predictions reach the label map's size: class scores bilinearly (a network's) or ids by nearest",
    )
    parser.add_argument("--mean", type=three_numbers, metavar="R,G,B", help="of the network's input in [0, 1]")
    parser.add_argument("--std", type=three_numbers, metavar="R,G,B", help="of the network's input in [0, 1]")
    return parser.parse_args()


def find_pairs(labels: Path, others: Path, skip_bad: bool, report: Report) -> tuple[list[Pair], dict[str, Any]]:
    """Label maps and images paired by name, and the record of the names.

    Raises EvaluationError if a name is on one side only, unless `skip_bad`, or if none is on both.
    """
    first, second = by_name(list_images(labels)), by_name(list_images(others))
    names = {
        "matched": len(first.keys() & second.keys()),
        "only in labels": sorted(first.keys() - second.keys()),
        "only in predictions": sorted(second.keys() - first.keys()),
    }
    single = names["only in labels"] + names["only in predictions"]
    if single:
        message = f"{len(single)} names are in one of {labels} and {others} only: {shown(single)}"
        if not skip_bad:
            raise EvaluationError(f"{message}; complete them, or go on without: --skip_bad True")
        report.warn(message)
    if not names["matched"]:
        raise EvaluationError(f"{labels} and {others} have no name in common")
    pairs = [Pair(name, first[name], second[name]) for name in sorted(first.keys() & second.keys())]
    return pairs, names


def check_label_maps(pairs: list[Pair], classes: Classes, arguments: argparse.Namespace, report: Report) -> list[Pair]:
    """The pairs whose label map can be read. Raises EvaluationError, naming the file, for an id that is no class."""
    good = []
    items = [pair.labels for pair in pairs]
    with tqdm(total=len(items), desc="checking label maps", unit="map", leave=False) as bar:
        for batch in read_images(items, load_label_map, 16, arguments.num_workers):
            for index, labels in batch:
                bar.update()
                if isinstance(labels, str):
                    if not arguments.skip_bad:
                        raise EvaluationError(f"{items[index]}: {labels}; replace it, or --skip_bad True")
                    report.warn(f"{items[index]} is left out: {labels}")
                    continue
                check_ids(labels, classes.of_labels, classes.count, items[index])
                good.append(pairs[index])
    if not good:
        raise EvaluationError(f"{items[0].parent}: no label map can be read")
    return good


def load_pair(pair: Pair, load_other: Callable[[Path], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [H, W] and what goes with them, an image [h, w, 3] or predicted ids [h, w], all bytes."""
    return load_label_map(pair.labels), load_other(pair.other)


def input_loader(arguments: argparse.Namespace) -> Callable[[Path], torch.Tensor]:
    """What reads a sample as the network gets it, bytes [h, w, 3]."""
    sizes = [arguments.input_size] if arguments.input_size else []
    return partial(load_rgb, sizes=sizes, filter_name=arguments.input_filter)


def at_label_size(
    prediction: torch.Tensor, height_width: tuple[int, int], interpolation: str | None, path: Path
) -> torch.Tensor:
    """Predicted ids [H, W] at the label map's size, from class scores [C, h, w] or ids [h, w].

    Scores are interpolated before the maximum (as segmentation code bases evaluate) unless `interpolation` is nearest.
    Raises EvaluationError for ids of another size unless it is.
    """
    if prediction.is_floating_point():
        if interpolation != "nearest":
            scores = functional.interpolate(prediction[None], height_width, mode="bilinear", align_corners=False)
            return scores[0].argmax(0)
        prediction = prediction.argmax(0)
    if prediction.shape == height_width:
        return prediction.long()  # bytes would index as a mask
    if interpolation != "nearest":
        raise EvaluationError(
            f"{path}: predicted ids of {prediction.shape[1]}x{prediction.shape[0]} for a label map of "
            f"{height_width[1]}x{height_width[0]}; predict at that size, or resize them: --interpolation nearest"
        )
    return functional.interpolate(prediction[None, None].float(), height_width, mode="nearest-exact")[0, 0].long()


def predict(
    images: Sequence[torch.Tensor], segmenter: Segmenter | None, device: torch.device
) -> Iterator[torch.Tensor]:
    """For each image [h, w, 3] its class scores [C, h, w] or ids [h, w]; predicted maps [h, w] pass as they are."""
    if segmenter is None:
        yield from (image.to(device).long() for image in images)
    elif len({image.shape for image in images}) == 1:
        yield from segmenter(torch.stack(list(images)).to(device))
    else:
        for image in images:
            yield from segmenter(image[None].to(device))


def try_segmenter(segmenter: Segmenter, image: torch.Tensor, device: torch.device, arguments, count: int) -> None:
    """Passes one image through the network. Raises EvaluationError if it fails or has another number of classes."""
    try:
        output = segmenter(image[None].to(device))
    except (RuntimeError, KeyError, AttributeError, IndexError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise EvaluationError(
            f"--segmenter {arguments.segmenter} fails on an image of {image.shape[1]}x{image.shape[0]} ({reason}); "
            "see --input_size and --device"
        ) from error
    if not isinstance(output, torch.Tensor):
        raise EvaluationError(
            f"--segmenter {arguments.segmenter} returns {type(output).__name__}; expected a tensor, a dict with "
            "`logits` or `out`, or a tuple that begins with a tensor"
        )
    if output.ndim != (4 if output.is_floating_point() else 3):
        raise EvaluationError(
            f"--segmenter {arguments.segmenter} returns {tuple(output.shape)} of {output.dtype}; expected class scores "
            "[N, C, h, w] or integer ids [N, h, w]"
        )
    if output.is_floating_point() and output.shape[1] != count and not arguments.remap_predictions:
        raise EvaluationError(
            f"--segmenter {arguments.segmenter} knows {output.shape[1]} classes, the score has {count}; "
            "see --num_classes, --remap and --remap_predictions"
        )


def count_pixels(
    pairs: list[Pair], segmenter: Segmenter | None, classes: Classes, device: torch.device, arguments, report: Report
) -> tuple[torch.Tensor, int]:
    """The confusion matrix over all pairs, and how many pairs it counts."""
    if segmenter is None:
        load_other = load_label_map
    else:
        load_other = input_loader(arguments)
    of_labels, of_predictions = classes.of_labels.to(device), classes.of_predictions.to(device)
    total = torch.zeros(classes.count, classes.count + 1, dtype=torch.long, device=device)
    used = 0
    load = partial(load_pair, load_other=load_other)
    with inference(), tqdm(total=len(pairs), desc="mIoU", unit="image") as bar:
        for batch in read_images(pairs, load, arguments.batch_size, arguments.num_workers):
            bar.update(len(batch))
            for index, item in batch:
                if isinstance(item, str):
                    if not arguments.skip_bad:
                        raise EvaluationError(f"{pairs[index].other}: {item}; replace it, or --skip_bad True")
                    report.warn(f"{pairs[index].other} is left out: {item}")
            read = [(pairs[index], *item) for index, item in batch if not isinstance(item, str)]
            predictions = predict([other for _, _, other in read], segmenter, device)
            for (pair, labels, _), prediction in zip(read, predictions, strict=True):
                ids = at_label_size(prediction, tuple(labels.shape), arguments.interpolation, pair.other)
                check_ids(ids, classes.of_predictions, classes.count, pair.other)
                total += confusion_matrix(of_labels[labels.to(device).long()], of_predictions[ids], classes.count)
                used += 1
    if not total.any():
        raise EvaluationError("no pixel has a label that is scored; see --ignore_ids and --remap")
    return total.cpu(), used


def main() -> None:
    arguments = parse_arguments()
    report = Report("mIoU", arguments)
    check_output("--json", arguments.json)
    classes = make_classes(arguments.remap, arguments.num_classes, arguments.ignore_ids, arguments.remap_predictions)
    if arguments.ignore_ids is None:
        arguments.ignore_ids = default_ignored(classes.count)
    device = choose_device(arguments.device)
    predicted = Path(arguments.segmenter)
    is_folder_of_maps = predicted.is_dir() and not (predicted / "config.json").exists()
    others = predicted if is_folder_of_maps else arguments.path / arguments.samples
    pairs, names = find_pairs(arguments.path / arguments.labels, others, arguments.skip_bad, report)
    checked = check_images([pair.other for pair in pairs], arguments.skip_bad, report, maps=is_folder_of_maps)
    pairs = check_label_maps([pair for pair in pairs if pair.other in checked.good], classes, arguments, report)
    segmenter = None
    if not is_folder_of_maps:
        segmenter = load_segmenter(arguments.segmenter, device, arguments.mean, arguments.std, report)
        image = input_loader(arguments)(pairs[0].other)
        with inference():
            try_segmenter(segmenter, image, device, arguments, classes.count)

    confusion, used = count_pixels(pairs, segmenter, classes, device, arguments, report)
    scores = scores_of(confusion)
    warn_of_order(scores["miou"], confusion, arguments, report)
    protocol = describe_protocol(arguments, segmenter)
    for key, value in protocol.items():
        print(f"{key}: {value}")
    for index, value in enumerate(scores["class_iou"]):
        print(f"class {index}: " + ("in neither labels nor predictions" if value is None else f"IoU {value:.2f}"))
    print(f"pixel accuracy: {scores['pixel_accuracy']:.2f}")
    print(f"frequency-weighted IoU: {scores['frequency_weighted_iou']:.2f}")
    report.finish(
        scores.pop("miou"),
        None,  # segmenters have no published hash here: the record names the one used
        unit="percent",
        **scores,
        images={**checked.describe(), "counted": used},
        names=names,
        preprocessing=protocol,
        segmenter=segmenter.describe() if segmenter else {"kind": "predicted label maps", "source": str(predicted)},
        num_classes=classes.count,
        confusion=confusion.tolist() if classes.count <= LARGEST_RECORDED else None,
        device=str(device),
    )
    print(f"mIoU: {scores_of(confusion)['miou']:.2f}")


def warn_of_order(score: float, confusion: torch.Tensor, arguments: argparse.Namespace, report: Report) -> None:
    """Says so where a low score may be one of ids that mean other classes than the labels'."""
    advice = order_advice(confusion)
    if advice:
        report.warn(f"the mIoU is {score:.1f}, but {advice}")
    elif score < LOW and arguments.samples == "images":
        report.warn(
            f"the mIoU of photographs is {score:.1f}, and no other order of the predicted ids scores much more: does"
            " this segmenter know these classes, and its input (--input_size, --mean, --std)?"
        )


def describe_protocol(arguments: argparse.Namespace, segmenter: Segmenter | None) -> dict[str, str]:
    """In words what published numbers differ in."""
    own = arguments.remap_predictions
    remapped = f"labels, {own} of predictions" if isinstance(own, str) else f"labels{' and predictions' if own else ''}"
    protocol = {
        "ids": f"remap {arguments.remap} of {remapped}, ignored {', '.join(map(str, arguments.ignore_ids)) or 'none'}",
        "compared at": "the label map's size",
        "predictions brought there": arguments.interpolation or ("bilinear" if segmenter else "not resized"),
    }
    if segmenter:
        height_width = arguments.input_size
        resized = f"{arguments.input_filter} to {height_width[1]}x{height_width[0]}" if height_width else "own size"
        protocol["network input"] = f"{resized}, mean {segmenter.mean}, deviation {segmenter.deviation}"
    return protocol


if __name__ == "__main__":
    run(main)
