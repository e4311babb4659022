"""diffusers' schedulers in place of our solvers: against ours, against diffusers' own way of running them, refusals."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from sampling_helpers import save_checkpoint
from test_diffusion import COVARIANCE, MEAN, PREDICTIONS, STEPS, ideal_network, last, linear

from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.respace import space_timesteps, trailing_timesteps
from guided_diffusion.sampling.external import ExternalSolver
from guided_diffusion.sampling.guidance import Predictor
from guided_diffusion.sampling.loop import Move, run_moves, sample_loop
from guided_diffusion.sampling.solvers import DPMSolverPP
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.settings import ConfigError, DiffusionConfig, Sampling

schedulers = pytest.importorskip("diffusers.schedulers")

COMMON = dict(num_train_timesteps=STEPS, beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
# As a model on a hub may have it: other betas, other levels, clipping, another prediction.
FOREIGN = dict(
    num_train_timesteps=500, beta_schedule="scaled_linear", beta_start=0.01, beta_end=0.1, timestep_spacing="leading",
    steps_offset=1, prediction_type="v_prediction",
)  # fmt: skip
NOISE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(4))


def network(x, t, y=None):
    """Neither linear nor right."""
    weights = 0.5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
    mixed = torch.tanh(torch.einsum("oc,nchw->nohw", weights, x))
    return mixed + 0.1 * torch.sin(t.float() / 100).view(-1, 1, 1, 1)


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(NOISE.shape, generator=generator)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "steps", [*(trailing_timesteps(STEPS, n) for n in (1, 7, 20)), space_timesteps(STEPS, "5,9,2")]
)
@pytest.mark.parametrize(
    "sampler,eta,kind,options",
    [
        ("ddim", 0.0, "DDIMScheduler", {"clip_sample": True, "set_alpha_to_one": False}),
        ("ddim", 0.7, "DDIMScheduler", {}),
        ("dpmsolver++", 0.0, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("ddim", 0.0, "EulerDiscreteScheduler", {}),  # Euler steps of x / sqrt(alpha_bar) in sigma are DDIM
    ],
)
def test_the_same_steps_as_our_own_solver(sampler, eta, kind, options, steps, prediction):
    scheduler = getattr(schedulers, kind)(**FOREIGN, **options)
    diffusion = linear(steps, **PREDICTIONS[prediction])
    runs = [
        sample_loop(diffusion, network, NOISE.clone(), sampler=s, eta=eta, draw_noise=draws(5))
        for s in (sampler, scheduler)
    ]
    for ours, theirs in zip(*runs, strict=True):
        # float32, in another order of operations; images are of order 1, and clipped
        torch.testing.assert_close(ours.x, theirs.x, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize(
    "sampler,kind,error",
    # Euler holds x divided by sqrt(alpha_bar): 20,000 times as large, in float32
    [("ddim", "DDIM", 1e-4), ("dpmsolver++", "DPMSolverMultistep", 1e-4), ("ddim", "EulerDiscrete", 4e-3)],
)
def test_a_cosine_schedule_in_few_steps(sampler, kind, error):
    """Two steps of it take a beta to 1 - 5e-9, which is 1 in float32: its product must not be theirs."""
    scheduler = getattr(schedulers, f"{kind}Scheduler")()
    diffusion = create_gaussian_diffusion(DiffusionConfig(noise_schedule="cosine"), 2)
    ends = [last(sample_loop(diffusion, network, NOISE.clone(), sampler=s)) for s in (sampler, scheduler)]
    torch.testing.assert_close(*ends, rtol=0, atol=error)


@pytest.mark.parametrize(
    "kind,options",
    [
        ("UniPCMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DEISMultistepScheduler", {}),
        ("LMSDiscreteScheduler", {}),
        ("DPMSolverSinglestepScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
    ],
)
def test_a_scheduler_goes_the_way_it_goes_in_its_own_library(kind, options):
    """The plain loop of diffusers: 1000 trained steps, 20 of them taken, the network's noise as it is."""
    timesteps = trailing_timesteps(STEPS, 20)
    if kind == "DPMSolverSinglestepScheduler":  # has no spacing, but takes a list
        scheduler = getattr(schedulers, kind)()
        scheduler.set_timesteps(timesteps=timesteps[::-1])
    else:
        scheduler = getattr(schedulers, kind)(**COMMON, **options)
        scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == timesteps[::-1]
    diffusion = linear(timesteps)
    adapted = ExternalSolver(getattr(schedulers, kind)(**options), diffusion, 0.0)
    moves = run_moves(diffusion, predictor(), NOISE.clone(), adapted, clip_denoised=False, draw_noise=draws(7))
    signal = np.sqrt(diffusion.alphas_cumprod) if adapted.scaled else np.ones(20)
    x, noise, random = NOISE / signal[-1], draws(7), {}
    for timestep, level, moment in zip(scheduler.timesteps[:-1], range(18, -1, -1), moves, strict=False):
        if adapted.random and "variance_noise" in adapted.accepts:
            random = {"variance_noise": noise()}
        elif adapted.random and not random:  # the same generators, from their beginning
            random = {"generator": [torch.Generator().manual_seed(g.initial_seed()) for g in adapted.generators]}
        output = network(scheduler.scale_model_input(x, timestep), timestep[None].expand(2))
        x = scheduler.step(output, timestep, x, return_dict=False, **random)[0]
        # float32; the images that the noise means are of order 100 where there is most of it
        torch.testing.assert_close(moment.x, (x * signal[level]).float(), rtol=1e-3, atol=1e-3)
    assert level == 0


def predictor():
    return Predictor.from_kwargs(network, None, NOISE)


def test_unipc_reproduces_a_gaussian():
    """Mean and covariance of 20,000 samples, as `test_samplers_reproduce_a_gaussian` asks of our own solvers."""
    diffusion = linear(trailing_timesteps(STEPS, 20))
    exact = ideal_network(np.cumprod(1 - get_named_beta_schedule("linear", STEPS)))
    noise = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    samples = {
        sampler: last(sample_loop(diffusion, exact, noise, sampler=sampler, clip_denoised=False))
        for sampler in ("dpmsolver++", schedulers.UniPCMultistepScheduler(**FOREIGN))
    }
    values = {sampler: x.permute(1, 0, 2, 3).reshape(3, -1).double().numpy() for sampler, x in samples.items()}
    ours, theirs = values.values()
    assert np.isfinite(theirs).all()
    assert np.abs(theirs.mean(axis=1) - MEAN).max() < 0.03  # 5 standard errors and the bias of 20 steps
    assert np.abs(np.cov(theirs) - COVARIANCE).max() < 0.04
    assert np.abs(theirs - ours).max() < 0.05  # one and the same flow, solved twice


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("external")
    return SDMPipeline.from_checkpoint(save_checkpoint(folder, folder))


LABEL = np.arange(256).reshape(16, 16) // 64


@pytest.mark.parametrize(
    "sampler,kind,options",
    [
        ("ddim", "DDIMScheduler", {}),
        ("ddim", "DDIMScheduler", {"eta": 0.5}),
        ("dpmsolver++", "DPMSolverMultistepScheduler", {}),
    ],
)
def test_the_same_picture(pipeline, sampler, kind, options):
    """Guided, with seeds; at most one of 255 levels apart."""
    scheduler = getattr(schedulers, kind)(**FOREIGN)
    before = copy.deepcopy(dict(scheduler.config)), scheduler.timesteps.clone()
    common = dict(s=2.0, num_steps=6, samples=2, seed=7, **options)
    ours, theirs = (
        np.stack([np.asarray(image).astype(int) for image in pipeline(LABEL, sampler=s, **common)])
        for s in (sampler, scheduler)
    )
    assert np.abs(ours - theirs).max() <= 1
    assert dict(scheduler.config) == before[0] and torch.equal(scheduler.timesteps, before[1])  # the user's own
    unguided = np.asarray(pipeline(LABEL, sampler=scheduler, **common | {"s": 1.0})[0]).astype(int)
    assert np.abs(theirs[0] - unguided).max() > 1


@pytest.mark.parametrize(
    "kind,options",
    [("EulerAncestralDiscreteScheduler", {}), ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})],
)
def test_randomness_follows_from_each_images_seed(pipeline, kind, options):
    scheduler = getattr(schedulers, kind)(**options)
    common = dict(s=1.0, num_steps=3, sampler=scheduler)
    together, apart, others = (
        np.stack([np.asarray(image).astype(int) for image in images])
        for images in (
            pipeline(LABEL, samples=3, seed=7, **common),
            pipeline(LABEL, samples=3, batch_size=1, seed=7, **common),
            pipeline(LABEL, samples=3, seed=8, **common),
        )
    )
    assert np.abs(together - apart).max() <= 1
    assert np.abs(together[0] - together[1]).mean() > 1 and np.abs(together - others).mean() > 1


def test_it_goes_on_after_a_move_up():
    """x goes up again (as repainting does); the scheduler forgets its history and takes the level that it is at."""
    diffusion = linear(trailing_timesteps(STEPS, 6))
    moves = [Move(5, 4), Move(4, 3), Move(3, 4), Move(4, 3), *(Move(level, level - 1) for level in (3, 2, 1, 0))]
    solvers = [DPMSolverPP(diffusion, 0.0), ExternalSolver(schedulers.DPMSolverMultistepScheduler(), diffusion, 0.0)]
    ends = [
        last(run_moves(diffusion, predictor(), NOISE.clone(), solver, moves=moves, draw_noise=draws(3)))
        for solver in solvers
    ]
    torch.testing.assert_close(*ends, rtol=2e-5, atol=5e-5)
    with pytest.raises(ValueError, match="moves one level at a time; got 5 to 3"):
        next(run_moves(diffusion, predictor(), NOISE, solvers[1], moves=[Move(5, 3)]))


def test_in_a_record_it_has_a_name():
    scheduler = schedulers.UniPCMultistepScheduler(solver_order=3, **FOREIGN)
    sampling = Sampling(sampler=scheduler)
    record = json.loads(json.dumps(dataclasses.asdict(sampling)))
    assert record["sampler"] == "UniPCMultistepScheduler(solver_order=3)"
    assert dataclasses.replace(sampling, s=2.0).sampler.scheduler is scheduler
    assert Sampling(sampler=schedulers.DDIMScheduler()).sampler == "DDIMScheduler()"


@pytest.mark.parametrize(
    "kind,options,message",
    [
        ("FlowMatchEulerDiscreteScheduler", {}, r"FlowMatchEulerDiscreteScheduler takes no betas \(it is made for"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas=True is made for flow matching"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "'flow_prediction' is made for flow"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, 'variance, which sampler="ddpm" here knows of'),
        ("SASolverScheduler", {}, "SASolverScheduler is random at certain numbers of timesteps"),
        ("LCMScheduler", {}, "LCMScheduler is made for networks that were distilled for it"),
        ("HeunDiscreteScheduler", {}, "HeunDiscreteScheduler cannot take 20 steps here: it asks the network more"),
        ("DDIMInverseScheduler", {}, "it chooses noise levels of its own"),
        ("RePaintScheduler", {}, "RePaintScheduler cannot take 20 steps here"),
        ("EDMEulerScheduler", {}, "takes no betas"),
    ],
)  # fmt: skip
def test_what_cannot_run_here_is_refused_by_name(pipeline, kind, options, message, monkeypatch):
    monkeypatch.setattr(pipeline.model, "encode_layout", None)  # the network is not asked
    with pytest.raises(ValueError, match=message):
        pipeline(LABEL, sampler=getattr(schedulers, kind)(**options), num_steps=20)


@pytest.mark.parametrize("sampler", [3.5j, None, schedulers.DDIMScheduler, object()])
def test_what_is_no_scheduler(pipeline, sampler):
    with pytest.raises(ConfigError, match="sampler must be text"):
        pipeline(LABEL, sampler=sampler)
