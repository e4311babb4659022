"""Segmentation networks from a TorchScript file or from Hugging Face, behind one call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import EvaluationError, Report
from network_weights import file_sha256
from torch import nn

# Ends of file names that no model on a hub has: such a name is a file's, and mistyped where there is none.
FILE_SUFFIXES = (
    ".pt",
    ".pth",
    ".ts",
    ".jit",
    ".torchscript",
    ".onnx",
    ".bin",
    ".safetensors",
    ".ckpt",
    ".zip",
    ".json",
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass
class Segmenter:
    """A network, the normalisation of its input (RGB in [0, 1]) and the record of where it came from."""

    network: nn.Module
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    record: dict[str, Any]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores [N, C, h, w], or class ids [N, h, w] of an integer type, of bytes [N, H, W, 3]."""
        x = images.permute(0, 3, 1, 2).float() / 255
        mean, deviation = (x.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.deviation))
        output = self.network((x - mean) / deviation)
        if isinstance(output, dict):  # torchvision's networks call the scores `out`, Hugging Face's `logits`
            output = output["logits"] if "logits" in output else output["out"]
        if isinstance(output, (tuple, list)):  # the scores come first, then features or auxiliary scores
            output = output[0]
        return output

    def describe(self) -> dict[str, Any]:
        """The record of this segmenter for a report."""
        return {**self.record, "mean": list(self.mean), "deviation": list(self.deviation)}


def load_segmenter(
    name: str,
    device: torch.device,
    mean: tuple[float, ...] | None,
    deviation: tuple[float, ...] | None,
    report: Report,
) -> Segmenter:
    """The network in a TorchScript file, or a Hugging Face semantic-segmentation model (a folder or a hub's name).

    Mean and deviation of the input, if not given, are the model's own where it states them, else ImageNet's. Raises
    EvaluationError if there is no such network.
    """
    path_like = name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name
    if not Path(name).exists() and (path_like or Path(name).suffix.lower() in FILE_SUFFIXES):
        raise EvaluationError(
            f"--segmenter {name}: no such file or folder, and no name of a model on a hub, which is like owner/model"
        )
    if Path(name).is_file():
        network, stated, record = _load_torchscript(Path(name), device)
    else:
        network, stated, record = _load_hugging_face(name, report)
    network.to(device).eval()
    return Segmenter(network, mean or stated[0], deviation or stated[1], {"source": name, **record})


def _load_torchscript(path: Path, device: torch.device) -> tuple[nn.Module, tuple, dict[str, Any]]:
    try:
        network = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EvaluationError(f"--segmenter {path}: not a TorchScript file ({reason}); see torch.jit.save") from error
    return network, (IMAGENET_MEAN, IMAGENET_DEVIATION), {"kind": "TorchScript", "sha256": file_sha256(path)}


def _load_hugging_face(name: str, report: Report) -> tuple[nn.Module, tuple, dict[str, Any]]:
    try:
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
    except ImportError as error:
        raise EvaluationError(
            f"--segmenter {name}: not a file, and a Hugging Face model needs the package transformers: "
            "pip install 'semantic-diffusion-model[segmenters]'"
        ) from error
    try:
        network = AutoModelForSemanticSegmentation.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"--segmenter {name}: neither a folder of label maps, nor a TorchScript file, nor a Hugging Face "
            f"semantic-segmentation model ({str(error).splitlines()[0]})"
        ) from error
    stated = (IMAGENET_MEAN, IMAGENET_DEVIATION)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        report.warn(f"{name} does not state its preprocessing; ImageNet's mean and deviation unless --mean, --std say")
    else:
        stated = (tuple(processor.image_mean), tuple(processor.image_std))
        if processor.do_resize:
            report.warn(f"{name} was made for images resized to {dict(processor.size)}; --input_size says what it gets")
    weights = sorted(path for path in Path(name).glob("*") if path.suffix in (".safetensors", ".bin"))
    record = {
        "kind": "Hugging Face",
        "revision": getattr(network.config, "_commit_hash", None),
        "sha256": {path.name: file_sha256(path) for path in weights},
    }
    return network, stated, record
