"""Objectives: denoising is the paper's, and neither the loop nor the validation knows which one it is given."""

import hashlib
import json

import pytest
import torch
from training_helpers import make_data, make_loop

from guided_diffusion.objectives.denoising import Denoising
from guided_diffusion.objectives.objective import Batch, Draws
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.settings import DiffusionConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


class Drawing:
    """Not a diffusion: the network shall draw the photograph from noise in one step. One timestep in 7."""

    num_timesteps, measured, measured_in_words = 7, "distance", "distance to the photograph"

    def __init__(self):
        self.timesteps = []

    def losses(self, network, batch, draws):
        self.timesteps += draws.timesteps.tolist()
        drawn = network(draws.noise, draws.timesteps, y=batch.layout)[:, :3]
        distance = (drawn - batch.image).abs().flatten(1).mean(dim=1)
        return {"loss": 2 * distance, "distance": distance}


def test_denoising_is_the_square_of_what_is_left_of_the_noise():
    """Against the definition, with a network that answers a constant, and is asked at the noisy image."""
    diffusion = create_gaussian_diffusion(DiffusionConfig(diffusion_steps=10, noise_schedule="cosine"))
    image, noise = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    t, layout, asked = torch.tensor([0, 7]), torch.ones(2, 5, 4, 4), []

    def network(x, timesteps, y):
        asked.append((x, timesteps, y))
        return torch.full_like(x, 0.5)

    losses = Denoising(diffusion).losses(network, Batch(image, layout), Draws(t, noise))
    torch.testing.assert_close(losses["loss"], torch.stack([((0.5 - n) ** 2).mean() for n in noise]))
    assert torch.equal(losses["mse"], losses["loss"])
    ((x, timesteps, y),) = asked
    for i in range(2):
        alpha_bar = float(torch.tensor(1 - diffusion.betas[: t[i] + 1], dtype=torch.float64).prod())
        torch.testing.assert_close(x[i], alpha_bar**0.5 * image[i] + (1 - alpha_bar) ** 0.5 * noise[i])
    assert torch.equal(timesteps, t) and y is layout


@pytest.mark.parametrize("use_kl,ending", [(False, ""), (True, ", variational bound")])
def test_what_is_measured_has_the_words_of_earlier_runs(data, tmp_path, use_kl, ending):
    """best.json of a run that goes on holds them: with other words its best would be forgotten."""
    loop = make_loop(data, tmp_path, diffusion=dict(use_kl=use_kl))
    names = hashlib.sha256("\n".join(loop.validation.dataset.names).encode()).hexdigest()[:12]
    assert loop.validation.measure == f"2 images of 16x16, names {names}{ending}"


def test_another_objective_trains_measures_and_is_saved(data, tmp_path):
    objective = Drawing()
    loop = make_loop(data, tmp_path, objective=objective, max_steps=4, save_interval=2)
    loop.run()
    assert set(objective.timesteps) <= set(range(7)) and len(set(objective.timesteps)) > 2
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    for row in rows:
        if "loss" in row:
            assert row["loss"] == pytest.approx(2 * row["distance"])
    best = json.loads((tmp_path / "best.json").read_text())["0.9"]
    assert best["measure"].endswith(", distance to the photograph")
    # The network starts at zero: what it is away from the photographs then is their own mean absolute value.
    fresh = make_loop(data, tmp_path / "fresh", objective=Drawing())
    weights = dict(fresh.model.named_parameters())
    photographs = [fresh.validation.dataset[i]["image"].float() / 127.5 - 1 for i in range(2)]
    expected = float(torch.stack(photographs).abs().mean())
    assert fresh.validation.loss(fresh.model, weights) == pytest.approx(expected, rel=1e-5)
