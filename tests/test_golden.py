"""Agreement with the original implementation, number by number."""

import gzip
import json
import zlib

import numpy as np
import pytest
import torch
from golden_helpers import CASES, GOLDEN, golden_case, load_formula_weights, normal

from guided_diffusion.fp16_util import MixedPrecisionTrainer, global_norm
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from guided_diffusion.layouts.encode import encode_label_map, instance_edges
from guided_diffusion.layouts.spade import LayoutPair
from guided_diffusion.nn import update_ema
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.script_util import create_model_and_diffusion

# float32 rounding through some hundred layers; the values are of order 1
CLOSE = dict(rtol=1e-4, atol=1e-4)
T = torch.tensor([17, 801])
# At t = 801 the predicted image is the noise times sqrt(1 / alpha_bar - 1) = 26: so much larger is its rounding.
CLOSE_XSTART = dict(rtol=1e-4, atol=26 * 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_network(case):
    model, _, golden, y = golden_case(case)
    assert sum(p.numel() for p in model.parameters()) == CASES[case]["parameters"]
    x = normal(f"{case}/x", (2, 3, CASES[case]["height"], CASES[case]["width"]))
    with torch.no_grad():
        np.testing.assert_allclose(model(x, T, y=y), golden["output"], **CLOSE)
        np.testing.assert_allclose(model(x, T, y=torch.zeros_like(y)), golden["output_unconditional"], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_encoded_layouts_give_the_same_numbers(case):
    model, diffusion, golden, y = golden_case(case)
    x = normal(f"{case}/x", (2, 3, CASES[case]["height"], CASES[case]["width"]))
    with torch.inference_mode():
        layout, null = (model.encode_layout(part, keep=True) for part in (y, torch.zeros_like(y[:1])))
        output, other = model.denoise(x, T, layout, null)
        np.testing.assert_allclose(output, golden["output"], **CLOSE)
        np.testing.assert_allclose(other, golden["output_unconditional"], **CLOSE)
        p = diffusion.p_mean_variance(model, x, T, model_kwargs={"y": LayoutPair(layout, null), "s": 1.5})
    np.testing.assert_allclose(p["mean"], golden["guided_mean"], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_p_mean_variance(case):
    model, diffusion, golden, y = golden_case(case)
    x = normal(f"{case}/x", (2, 3, CASES[case]["height"], CASES[case]["width"]))
    with torch.no_grad():
        p = diffusion.p_mean_variance(model, x, T, model_kwargs={"y": y})
        guided = diffusion.p_mean_variance(model, x, T, model_kwargs={"y": y, "s": 1.5})
    np.testing.assert_allclose(p["mean"], golden["mean"], **CLOSE)
    np.testing.assert_allclose(p["pred_xstart"], golden["pred_xstart"], **CLOSE_XSTART)
    np.testing.assert_allclose(guided["mean"], golden["guided_mean"], **CLOSE)
    np.testing.assert_allclose(guided["pred_xstart"], golden["guided_pred_xstart"], **CLOSE_XSTART)
    np.testing.assert_allclose(guided["log_variance"], golden["guided_log_variance"], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_training_losses_of_the_network(case):
    model, diffusion, golden, y = golden_case(case)
    shape = (2, 3, CASES[case]["height"], CASES[case]["width"])
    x_start, noise = normal(f"{case}/x0", shape).clamp(-1, 1), normal(f"{case}/noise", shape)
    with torch.no_grad():
        terms = diffusion.training_losses(model, x_start, T, model_kwargs={"y": y}, noise=noise)
    expected = {name.removeprefix("loss_"): golden[name] for name in golden.files if name.startswith("loss_")}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_guided_ddim_loop(case):
    model, diffusion, golden, y = golden_case(case, timestep_respacing="ddim8")
    assert diffusion.timestep_map == golden["ddim8_timesteps"].tolist()
    noise = normal(f"{case}/xT", (2, 3, CASES[case]["height"], CASES[case]["width"]))
    sample = diffusion.ddim_sample_loop(model, noise.shape, noise=noise, model_kwargs={"y": y, "s": 1.5})
    # eight steps amplify the rounding of the first ones; the values lie in [-1, 1]
    np.testing.assert_allclose(sample, golden["ddim8_guided"], atol=2e-3, rtol=0)


def test_instance_edges():
    golden = np.load(GOLDEN / "model_base.npz")
    edges = instance_edges(torch.from_numpy(golden["instance"].astype(np.int32)))
    assert np.array_equal(edges.numpy(), golden["edge"].astype(bool))


@pytest.mark.parametrize("name", ["ade20k", "celeba", "cityscapes", "coco"])
def test_state_dicts_of_the_published_networks(name):
    with gzip.open(GOLDEN / "state_dict_layouts.json.gz", "rt") as file:
        published = json.load(file)[name]
    with torch.device("meta"):
        model, _ = create_model_and_diffusion(**published["config"])
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == published["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == published["parameters"]


TABLES = np.load(GOLDEN / "diffusion_tables.npz")


@pytest.mark.parametrize("schedule,steps", [("linear", 1000), ("linear", 100), ("cosine", 1000), ("cosine", 100)])
def test_schedule_tables(schedule, steps):
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule(schedule, steps))
    names = [key.split("/")[1] for key in TABLES.files if key.startswith(f"{schedule}{steps}/")]
    assert len(names) == 6
    for name in names:  # float64 on both sides: the order of operations alone may differ
        np.testing.assert_allclose(getattr(diffusion, name), TABLES[f"{schedule}{steps}/{name}"], rtol=1e-10)


@pytest.mark.parametrize("respacing", sorted({k.split("/")[1] for k in TABLES.files if k.startswith("respaced/")}))
def test_respaced_tables(respacing):
    timesteps = space_timesteps(1000, respacing)
    assert timesteps == TABLES[f"respaced/{respacing}/timesteps"].tolist()
    diffusion = SpacedDiffusion(timesteps, betas=get_named_beta_schedule("linear", 1000))
    np.testing.assert_allclose(diffusion.betas, TABLES[f"respaced/{respacing}/betas"], rtol=1e-9)


LOSSES = np.load(GOLDEN / "losses.npz")


@pytest.mark.parametrize("settings", sorted({key.rsplit("/", 1)[0] for key in LOSSES.files}))
def test_loss_types(settings):
    options = {name: value == "True" for name, value in (pair.split("=") for pair in settings.split(","))}
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("linear", 1000), **options)
    weights = 0.3 * normal("loss/W", (6, 3))

    def network(x, t):
        output = torch.einsum("oc,bchw->bohw", weights, x) + 0.0001 * t.view(-1, 1, 1, 1)
        return output if options["learn_sigma"] else output[:, :3]

    terms = diffusion.training_losses(
        network,
        normal("loss/x0", (4, 3, 8, 8)).clamp(-1, 1),
        torch.tensor([0, 10, 500, 999]),
        noise=normal("loss/noise", (4, 3, 8, 8)),
    )
    expected = {key.rsplit("/", 1)[1]: LOSSES[key] for key in LOSSES.files if key.startswith(settings + "/")}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4, atol=1e-6)


def repeated(tag: str, high: int, side: int, times: int) -> torch.Tensor:
    small = np.random.default_rng(zlib.crc32(tag.encode())).integers(0, high, [2, 1, side, side])
    return torch.from_numpy(small.repeat(times, axis=2).repeat(times, axis=3))


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_three_training_steps(use_checkpoint):
    recipe = json.loads((GOLDEN / "training.json").read_text())
    golden = np.load(GOLDEN / "training.npz")
    model, diffusion = create_model_and_diffusion(**recipe["config"], use_checkpoint=use_checkpoint)
    load_formula_weights(model)
    parameters = dict(model.named_parameters())
    ema = [p.detach().clone() for p in parameters.values()]
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.05, fused=True)
    trainer = MixedPrecisionTrainer(list(parameters.values()), optimizer)
    for i, expected in enumerate(recipe["steps"]):
        y = encode_label_map(repeated(f"train/{i}/label", 7, 8, 8), repeated(f"train/{i}/instance", 5, 16, 4), 7)
        if i == 2:
            y[1] = 0
        x_start, noise = (normal(f"train/{i}/{name}", (2, 3, 64, 64)) for name in ("x0", "noise"))
        terms = diffusion.training_losses(
            model, x_start.clamp(-1, 1), torch.tensor(expected["t"]), model_kwargs={"y": y}, noise=noise
        )
        assert float(global_norm([p.detach() for p in ema])) > 0
        trainer.zero_grad()
        trainer.scale(terms["loss"].mean()).backward()
        param_norm = float(global_norm([p.detach() for p in parameters.values()]))
        result = trainer.step()
        update_ema(ema, [p.detach() for p in parameters.values()], 0.99)
        for name in ("loss", "mse", "vb"):
            assert float(terms[name].mean()) == pytest.approx(expected[name], rel=1e-4)
        assert float(result.grad_norm) == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert param_norm == pytest.approx(expected["param_norm"], rel=1e-5)
    averages = dict(zip(parameters, ema, strict=True))
    for key in golden.files:
        kind, name = key.split("/", 1)
        value = parameters[name].detach() if kind == "param" else averages[name]
        # Adam divides by the gradient's own size, so the rounding of near-zero gradients shows in single weights
        np.testing.assert_allclose(value, golden[key], rtol=1e-3, atol=2e-4)
