"""The diffusion and the samplers against a case that is known in closed form, and against diffusers' schedulers.

For Gaussian data the ideal denoiser is E[x_0 | x_t] = m + a S (a^2 S + b^2 I)^-1 (x_t - a m), where
x_t = a x_0 + b noise. The pixels are independent, their three channels correlated.
"""

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from guided_diffusion.respace import SpacedDiffusion, space_timesteps, trailing_timesteps
from guided_diffusion.sampling.loop import sample_loop
from guided_diffusion.sampling.solvers import SAMPLERS, dynamic_thresholding
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.seeding import ImageNoise
from guided_diffusion.settings import ConfigError, DiffusionConfig

STEPS = 1000
MEAN = np.array([0.3, -0.5, 0.1])
COVARIANCE = np.array([[0.5, 0.2, -0.1], [0.2, 0.3, 0.05], [-0.1, 0.05, 0.1]])


def ideal_network(alpha_bar: np.ndarray, covariance: np.ndarray = COVARIANCE, mean: np.ndarray = MEAN):
    """A network that predicts the noise of Gaussian data exactly, [N, 3, H, W] at the given (original) timesteps."""

    def network(x, t, y=None):
        level = alpha_bar[int(t[0])]
        a, b2 = np.sqrt(level), 1 - level
        gain = torch.from_numpy(a * covariance @ np.linalg.inv(a**2 * covariance + b2 * np.eye(3))).to(x)
        m = torch.from_numpy(mean).to(x).view(1, 3, 1, 1)
        x_start = m + torch.einsum("oc,nchw->nohw", gain, x - a * m)
        return (x - a * x_start) / np.sqrt(b2)

    return network


def linear(timesteps=None, **kwargs) -> SpacedDiffusion:
    return SpacedDiffusion(timesteps or range(STEPS), betas=get_named_beta_schedule("linear", STEPS), **kwargs)


def last(steps):
    *_, step = steps
    return step.x


@pytest.mark.parametrize(
    "sampler,steps,eta,bias",
    [
        ("ddpm", 1000, 0.0, 0.01),
        ("ddim", 100, 0.0, 0.02),
        ("ddim", 500, 1.0, 0.02),
        ("dpmsolver++", 40, 0.0, 0.02),
    ],
)
def test_samplers_reproduce_a_gaussian(sampler, steps, eta, bias):
    """Mean and covariance of 20,000 samples: 5 standard errors, plus `bias` for the finite number of steps.

    The last step returns E[x_0 | x_t] at the lowest level t, whose covariance is a^2 S (a^2 S + b^2 I)^-1 S.
    """
    diffusion = linear(trailing_timesteps(STEPS, steps))
    network = ideal_network(np.cumprod(1 - get_named_beta_schedule("linear", STEPS)))
    level = diffusion.alphas_cumprod[0]
    expected = level * COVARIANCE @ np.linalg.inv(level * COVARIANCE + (1 - level) * np.eye(3)) @ COVARIANCE
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20, 3, 32, 32, generator=generator)

    def draw():
        return torch.randn(noise.shape, generator=generator)

    sample = last(
        sample_loop(diffusion, network, noise, sampler=sampler, eta=eta, clip_denoised=False, draw_noise=draw)
    )
    values = sample.permute(1, 0, 2, 3).reshape(3, -1).double().numpy()
    count = values.shape[1]
    mean_error = 5 * np.sqrt(np.diag(COVARIANCE) / count) + bias
    assert (np.abs(values.mean(axis=1) - MEAN) < mean_error).all()
    variances = np.diag(COVARIANCE)
    # the standard error of a sample covariance of Gaussians
    error = np.sqrt((np.outer(variances, variances) + COVARIANCE**2) / count)
    assert (np.abs(np.cov(values) - expected) < 5 * error + bias * np.sqrt(np.outer(variances, variances))).all()


@pytest.mark.parametrize("variance", [0.04, 0.25, 1.0])
@pytest.mark.parametrize("sampler,order", [("ddim", 1), ("dpmsolver++", 2)])
def test_error_falls_at_the_solvers_order(sampler, order, variance):
    """Down to a fixed noise level, doubling the steps divides the error by 2^order.

    For Gaussian data of variance s^2 the probability flow keeps (x - a m) / sqrt(a^2 s^2 + b^2) constant.
    """
    # a finer process than the trained ones, so that rounding to whole timesteps does not show
    fine = 64000
    betas = get_named_beta_schedule("linear", fine)
    alpha_bar = np.cumprod(1 - betas)
    mean = 0.4
    network = ideal_network(alpha_bar, variance * np.eye(3), np.full(3, mean))
    noise = torch.tensor([1.3, -0.7, 0.2], dtype=torch.float64).view(1, 3, 1, 1)
    first, end = fine - 1, fine // 4

    def spread(level):
        return np.sqrt(level * variance + 1 - level)

    start, stop = alpha_bar[first], alpha_bar[end]
    expected = np.sqrt(stop) * mean + spread(stop) / spread(start) * (noise - np.sqrt(start) * mean)
    errors = []
    for steps in (20, 40, 80):
        diffusion = SpacedDiffusion(np.linspace(end, first, steps + 1).round().astype(int).tolist(), betas=betas)
        loop = sample_loop(diffusion, network, noise, sampler=sampler, clip_denoised=False)
        for _ in range(steps):  # not the last step, which goes on from `end` to the image
            sample = next(loop).x
        errors.append(float((sample - expected).abs().max()))
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert rates == pytest.approx(order, abs=0.15)  # asymptotic only


SCHEDULERS = [("ddim", 0.0), ("ddim", 0.7), ("dpmsolver++", 0.0), ("ddpm", 0.0)]


PREDICTIONS = {"epsilon": {}, "sample": {"predict_xstart": True}, "v_prediction": {"predict_v": True}}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 8, 20])  # divisors of 1000: diffusers' DDIM rounds its strides otherwise
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sampler,eta", SCHEDULERS)
def test_same_trajectory_as_diffusers(sampler, eta, clip, steps, prediction):
    """Step by step, with the same noise, on a denoiser that is neither linear nor right."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    common = dict(num_train_timesteps=STEPS, beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    common["prediction_type"] = prediction
    if sampler == "ddim":
        scheduler = schedulers.DDIMScheduler(clip_sample=clip, set_alpha_to_one=True, **common)
    elif sampler == "ddpm":
        # it adds noise in the last step unless that is timestep 0, as it is in "leading" spacing
        common["timestep_spacing"] = "leading"
        scheduler = schedulers.DDPMScheduler(clip_sample=clip, variance_type="fixed_large", **common)
    else:
        # its only clipping is thresholding, which at ratio 1 divides by the largest value: compare without
        if clip:
            pytest.skip("diffusers' DPM-Solver has no plain clipping")
        scheduler = schedulers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", final_sigmas_type="zero", **common
        )
    scheduler.set_timesteps(steps)
    weights = 0.5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(3))

    def network(x, t, y=None):
        return torch.tanh(torch.einsum("oc,nchw->nohw", weights, x)) + 0.1 * torch.sin(t.float() / 100).view(
            -1, 1, 1, 1
        )

    timesteps = scheduler.timesteps.tolist()[::-1]
    if sampler != "ddpm":
        assert timesteps == trailing_timesteps(STEPS, steps)
    diffusion = linear(timesteps, **PREDICTIONS[prediction])
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(4))
    # one stream of noise for both: theirs is drawn inside step()
    theirs, ours = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    loop = sample_loop(
        diffusion,
        network,
        x.clone(),
        sampler=sampler,
        eta=eta,
        clip_denoised=clip,
        draw_noise=lambda: torch.randn(x.shape, generator=ours),
    )
    for timestep, step in zip(scheduler.timesteps, loop, strict=True):
        arguments = {"generator": theirs}
        if sampler == "ddim":
            arguments |= {"eta": eta, "use_clipped_model_output": True}
        x = scheduler.step(network(x, timestep[None].expand(2)), timestep, x, **arguments).prev_sample
        # float32 on both sides, in another order of operations; single-step jumps reach values of order 100
        torch.testing.assert_close(step.x, x, rtol=2e-4, atol=2e-4)


def test_learned_variance_lies_between_its_bounds():
    diffusion = linear(learn_sigma=True)
    t = torch.tensor([0, 1, 500, 999])
    x = torch.zeros(4, 3, 2, 2)
    for v, bound in ((-1.0, "posterior_log_variance_clipped"), (1.0, "log_betas")):
        output = torch.full((4, 6, 2, 2), v)
        p = diffusion.p_mean_variance(lambda x, t, y=None, output=output: output, x, t)
        expected = torch.from_numpy(getattr(diffusion, bound))[t].float()
        torch.testing.assert_close(p["log_variance"][:, 0, 0, 0], expected)


def test_guidance_is_one_batch_and_only_inside_its_interval():
    """eps = eps(null) + s (eps(y) - eps(null)); outside the interval the null half is not computed."""
    diffusion = linear(trailing_timesteps(STEPS, 10))
    batches = []

    def network(x, t, y):
        batches.append(len(x))
        return 0.1 * y[:, :3] + 0.02

    y = torch.ones(2, 4, 8, 8)
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([3, 3])
    output = diffusion.model_output(network, x, t, {"y": y, "s": 2.0})
    torch.testing.assert_close(output, torch.full_like(x, 0.02 + 2 * 0.1))
    assert batches == [4]
    batches.clear()
    last(sample_loop(diffusion, network, x, model_kwargs={"y": y, "s": 2.0}, guidance_interval=(0.2, 0.5)))
    assert batches == [2, 2, 4, 4, 4, 2, 2, 2, 2, 2]
    batches.clear()
    last(sample_loop(diffusion, network, x, model_kwargs={"y": y, "s": 1.0}))
    assert set(batches) == {2}


def test_dynamic_thresholding():
    x = torch.linspace(-3, 3, 601).view(1, 1, 1, -1).repeat(2, 1, 1, 1)
    x[1] *= 0.2
    out = dynamic_thresholding(0.9)(x)
    limit = torch.quantile(x[0].abs(), 0.9)
    torch.testing.assert_close(out[0], x[0].clamp(-limit, limit) / limit)
    torch.testing.assert_close(out[1], x[1])  # its 0.9 quantile is below 1: untouched
    with pytest.raises(ValueError, match="dynamic_threshold"):
        dynamic_thresholding(1.5)


@pytest.mark.parametrize("settings", PREDICTIONS.values(), ids=PREDICTIONS)
def test_each_prediction_is_of_one_image(settings):
    """What each kind of network is trained towards, seen as an image, is x_0; guidance means the same for each."""
    diffusion = linear(**settings)
    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 4, 3, 8, 8, generator=generator)
    t = torch.tensor([0, 100, 500, 999])
    terms = diffusion.training_losses(lambda x, t: torch.zeros_like(x), x_start, t, noise=noise)
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod)[t].float().view(-1, 1, 1, 1)
    target = {
        "epsilon": noise,
        "sample": x_start,
        "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_start,
    }[next(name for name, value in PREDICTIONS.items() if value == settings)]
    torch.testing.assert_close(terms["mse"], (target**2).mean(dim=(1, 2, 3)))
    exact = diffusion.training_losses(lambda x, t: target, x_start, t, noise=noise)
    torch.testing.assert_close(exact["loss"], torch.zeros(4), atol=1e-10, rtol=0)
    x_t = diffusion.q_sample(x_start, t, noise)
    p = diffusion.p_mean_variance(lambda x, t: target, x_t, t, clip_denoised=False)
    # at the last step the noise is 157 times the image, and float32 has 7 digits
    torch.testing.assert_close(p["pred_xstart"], x_start, rtol=0, atol=5e-4)


def test_a_network_predicts_one_thing():
    with pytest.raises(ConfigError, match="predict_xstart and predict_v exclude each other"):
        create_gaussian_diffusion(DiffusionConfig(predict_xstart=True, predict_v=True))


@pytest.mark.parametrize("settings", PREDICTIONS.values(), ids=PREDICTIONS)
def test_min_snr_weights(settings):
    """Whatever is predicted, the squared error of x_0 weighs min(SNR, 5) (arXiv 2303.09556, section 3.4)."""
    diffusion = linear(loss_weighting="min_snr", **settings)
    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 3, 3, 8, 8, generator=generator)
    t = torch.tensor([100, 300, 600])
    snr = torch.from_numpy(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod))[t].float()
    output = torch.randn(x_start.shape, generator=generator)
    terms = diffusion.training_losses(lambda x, t: output, x_start, t, noise=noise)
    x_t = diffusion.q_sample(x_start, t, noise)
    p = diffusion.p_mean_variance(lambda x, t: output, x_t, t, clip_denoised=False)
    error = ((p["pred_xstart"] - x_start) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms["loss"], snr.clamp(max=5) * error, rtol=1e-3, atol=0)


def test_image_noise_does_not_depend_on_the_batch():
    together = ImageNoise([3, 4, 5], (3, 8, 8))
    alone = ImageNoise([4], (3, 8, 8))
    ahead = ImageNoise([5], (3, 8, 8), ahead=True)  # drawn by a thread, before it is asked for
    for _ in range(4):
        noise = together()
        assert torch.equal(noise[1], alone()[0]) and torch.equal(noise[2], ahead()[0])
    assert ahead._next is not None and alone._next is None


@pytest.mark.parametrize("spacing", ["0", "ddim333", "ddimx", "1001", "10,2000", "-3", "a,b"])
def test_impossible_respacings(spacing):
    with pytest.raises(ValueError, match="timestep_respacing"):
        space_timesteps(STEPS, spacing)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(ValueError, match="num_steps"):
        trailing_timesteps(STEPS, steps)


def test_trailing_timesteps_begin_at_the_noisiest():
    for steps in (1, 3, 7, 20, 999, 1000):
        timesteps = trailing_timesteps(STEPS, steps)
        assert timesteps[-1] == STEPS - 1 and len(set(timesteps)) == steps and timesteps[0] >= 0


@pytest.mark.parametrize("steps", [1, 10, 19, 20])
def test_a_linear_schedule_needs_more_than_twenty_steps(steps):
    """The traditional scaling takes the last beta to 20 / steps; at 1 nothing of the image is left to sample from."""
    message = f"diffusion_steps {steps} with noise_schedule 'linear': the last beta would be {20 / steps:g}"
    with pytest.raises(ConfigError, match=message):
        create_gaussian_diffusion(DiffusionConfig(diffusion_steps=steps))


@pytest.mark.parametrize("schedule,steps", [("linear", 21), ("cosine", 1), ("cosine", 20), ("cosine", 1000)])
def test_every_table_of_a_schedule_is_finite(schedule, steps):
    for num_steps in {1, steps}:
        diffusion = create_gaussian_diffusion(
            DiffusionConfig(diffusion_steps=steps, noise_schedule=schedule), num_steps
        )
        for name, table in vars(diffusion).items():
            assert not isinstance(table, np.ndarray) or np.isfinite(table).all(), name


@pytest.mark.parametrize("betas", [[], [0.1, 1.0], [0.0, 0.1], [0.1, np.nan], [[0.1]]])
def test_betas_that_make_no_diffusion(betas):
    with pytest.raises(ValueError, match="betas must be one row of numbers above 0 and below 1; got"):
        GaussianDiffusion(betas=np.array(betas))


def test_a_schedule_of_no_steps():
    with pytest.raises(ConfigError, match="diffusion_steps must lie between 1 and 100000; got 0"):
        create_gaussian_diffusion(DiffusionConfig(diffusion_steps=0))


def test_bad_samplers_and_intervals():
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="euler"):
        sample_loop(linear(), None, x, sampler="euler")
    with pytest.raises(ValueError, match="guidance_interval"):
        sample_loop(linear(), None, x, guidance_interval=(0.8, 0.2))
    assert set(SAMPLERS) == {"ddpm", "ddim", "dpmsolver++"}
