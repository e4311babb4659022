"""Weights and inputs that follow from their names, and the golden numbers that belong to them.

The numbers in tests/golden were produced by the original SDM implementation (float32, CPU).
"""

from __future__ import annotations

import json
import pathlib
import zlib

import numpy as np
import torch

from guided_diffusion.layouts.encode import encode_label_map
from guided_diffusion.script_util import create_model_and_diffusion

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "models.json").read_text())


def normal(tag: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers that depend on `tag` alone."""
    numbers = np.random.default_rng(zlib.crc32(tag.encode())).standard_normal(shape)
    return torch.from_numpy(numbers.astype(np.float32))


def formula_weights(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """A state dict in which each entry follows from its name and shape."""
    weights = {}
    for name, shape in shapes.items():
        z = normal(name, tuple(shape)).double()
        if len(shape) > 1:
            z = z / np.sqrt(np.prod(shape[1:]))
        else:
            z = 1 + 0.1 * z if name.endswith(".weight") else 0.1 * z
        weights[name] = z.float()
    return weights


def load_formula_weights(model: torch.nn.Module) -> None:
    model.load_state_dict(formula_weights({name: p.shape for name, p in model.state_dict().items()}))


def golden_case(name: str, **overrides):
    """(model with formula weights, diffusion, numbers, condition y) of one golden case."""
    config = CASES[name]["config"]
    model, diffusion = create_model_and_diffusion(**{**config, **overrides})
    load_formula_weights(model)
    numbers = np.load(GOLDEN / f"model_{name}.npz")
    instance = None if config.get("no_instance") else torch.from_numpy(numbers["instance"].astype(np.int32))
    y = encode_label_map(torch.from_numpy(numbers["label"].astype(np.int64)), instance, config["num_classes"])
    return model.eval(), diffusion, numbers, y
