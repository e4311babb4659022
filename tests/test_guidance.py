"""Guidance methods: against diffusers' guiders, and on mixtures of Gaussians, whose guided densities are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from golden_helpers import normal
from test_diffusion import PREDICTIONS, STEPS, linear

from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.respace import trailing_timesteps
from guided_diffusion.sampling.denoiser import FunctionDenoiser
from guided_diffusion.sampling.guidance import (
    GUIDANCE,
    AutoGuidance,
    ClassifierFree,
    Guide,
    Predictor,
    make_guidance,
    method_options,
)
from guided_diffusion.sampling.loop import descent, run_moves
from guided_diffusion.sampling.solvers import SAMPLERS, Move
from guided_diffusion.settings import ConfigError, SampleConfig, Sampling

SHAPE = (4, 3, 8, 8)
APG = dict(apg_momentum=-0.5, apg_radius=15.0, apg_parallel=0.0)  # of pictures with a norm of 14 in the mean
PLAIN = dict(apg_momentum=0.0, apg_radius=0.0, apg_parallel=1.0)
OPTIONS = {"cfg": {}, "apg": APG, "rescale": dict(rescale_phi=0.7), "autoguidance": {}}


def levels(count: int = 5, **settings):
    """(level, conditional, other), random, at levels of a run from noise to image."""
    diffusion = linear(**(settings or {"predict_xstart": True}))
    for step, t in enumerate(np.linspace(950, 50, count).astype(int)):
        x, conditional, other = (normal(f"{name} {step}", SHAPE) for name in ("x", "conditional", "other"))
        yield diffusion.level(x, torch.full((SHAPE[0],), int(t))), conditional, conditional + 0.7 * other


# -- diffusers --------------------------------------------------------------------------------------------------------


def their_guider(method: str, scale: float, options: dict):
    """diffusers' guider of the same meaning, as a function of the conditional and the other prediction.

    Its projection starts from the conditional prediction, as the paper's, only in the original formulation, where the
    scale counts from 0.
    """
    guiders = pytest.importorskip("diffusers.guiders")
    if method == "apg":
        from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

        guider = guiders.AdaptiveProjectedGuidance(
            guidance_scale=scale - 1,
            adaptive_projected_guidance_rescale=options["apg_radius"],
            eta=options["apg_parallel"],
            use_original_formulation=True,
        )
        guider.momentum_buffer = MomentumBuffer(options["apg_momentum"])
    elif method == "autoguidance":
        guider = guiders.AutoGuidance(guidance_scale=scale, auto_guidance_layers=[0], dropout=1.0)
    else:
        guider = guiders.ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=options.get("rescale_phi", 0.0))
    return lambda conditional, other: guider.forward(conditional, other).pred


@pytest.mark.parametrize("scale", [1.5, 4.0])
@pytest.mark.parametrize(
    "method,options",
    [
        ("cfg", {}),
        ("autoguidance", {}),
        *[("rescale", dict(rescale_phi=phi)) for phi in (0.0, 0.7, 1.0)],
        ("apg", APG),
        ("apg", PLAIN),
        ("apg", dict(apg_momentum=0.3, apg_radius=2.5, apg_parallel=0.25)),
    ],
)
def test_over_a_run_as_diffusers(method, options, scale):
    """On equal inputs, step after step: float32 on both sides, but for their projection, which is in float64."""
    theirs, guidance = their_guider(method, scale, options), make_guidance(scale, method=method, **options)
    for level, conditional, other in levels():
        expected = theirs(conditional, other)
        torch.testing.assert_close(guidance.combine(conditional, other, level), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["apg", "rescale"])
@pytest.mark.parametrize("settings", PREDICTIONS.values(), ids=PREDICTIONS)
def test_methods_work_on_images_whatever_is_predicted(settings, method):
    theirs, guidance = (
        their_guider(method, 3.0, OPTIONS[method]),
        make_guidance(3.0, method=method, **OPTIONS[method]),
    )
    for level, conditional, other in levels(3, **settings):
        expected = theirs(level.image(conditional), level.image(other))
        ours = level.image(guidance.combine(conditional, other, level))
        # images of noise at these levels reach 300, and are turned to outputs and back
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-3)


# -- mixtures of Gaussians --------------------------------------------------------------------------------------------

SIDE = 4
ALPHA_BAR = torch.from_numpy(np.cumprod(1 - get_named_beta_schedule("linear", STEPS)))


class Mixture:
    """The ideal network, predicting the image, of an equal mixture of Gaussians around `means` [K, D], with the same
    variance in every direction; a layout is the number of a component, none is the whole mixture. In float64."""

    def __init__(self, means: torch.Tensor, variance: float):
        self.means, self.variance = means.double(), variance

    def log_density(self, x: torch.Tensor, alpha_bar: float, component: int | None) -> torch.Tensor:
        """Of noisy x [N, D], but for a constant of all components: [N]."""
        variance = alpha_bar * self.variance + 1 - alpha_bar
        logs = -(x[:, None] - math.sqrt(alpha_bar) * self.means).square().sum(2) / (2 * variance)  # [N, K]
        return logs[:, component] if component is not None else logs.logsumexp(1) - math.log(len(self.means))

    def image(self, x: torch.Tensor, alpha_bar: float, component: int | None) -> torch.Tensor:
        """The expected image of noisy x [N, D]."""
        root, variance = math.sqrt(alpha_bar), alpha_bar * self.variance + 1 - alpha_bar
        each = self.means + self.variance * root / variance * (x[:, None] - root * self.means)  # [N, K, D]
        if component is not None:
            return each[:, component]
        logs = -(x[:, None] - root * self.means).square().sum(2) / (2 * variance)
        return (logs.softmax(1)[:, :, None] * each).sum(1)

    def denoiser(self, component: int | None = None) -> FunctionDenoiser:
        """`component`, else what the layout says, where it is not below 0."""

        def network(x, t, y=None):
            chosen = [int(c) for c in y.flatten(1)[:, 0]] if y is not None else [-1] * len(x)
            rows = []
            for row, level, c in zip(x.flatten(1).double(), t, chosen, strict=True):
                c = component if component is not None else (c if c >= 0 else None)
                rows.append(self.image(row[None], float(ALPHA_BAR[int(level)]), c))
            return torch.cat(rows).view_as(x).to(x.dtype)

        return FunctionDenoiser(network, {})


def direction(*numbers: float) -> torch.Tensor:
    """A picture [D] with these in its first places."""
    return torch.tensor([*numbers, *[0.0] * (3 * SIDE * SIDE - len(numbers))], dtype=torch.float64)


def level_of(x: torch.Tensor, t: int):
    """x [N, D] as pictures at a level of a network that predicts the image."""
    return linear(predict_xstart=True).level(x.view(-1, 3, SIDE, SIDE), torch.full((len(x),), t))


def combined(guidance, mixture: Mixture, x: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(guided, conditional, unconditional) images [N, D] of noisy x, for the first component."""
    images = [mixture.image(x, float(ALPHA_BAR[t]), component) for component in (0, None)]
    level = level_of(x, t)
    return guidance.combine(*(image.view_as(level.x) for image in images), level).flatten(1), *images


@pytest.mark.parametrize("t", [100, 400, 800])
def test_plain_guidance_follows_the_score_of_the_guided_density(t):
    """p(x|c)^s p(x)^(1-s), by automatic differentiation (Tweedie: image = (x + (1 - a) score) / sqrt(a))."""
    mixture = Mixture(torch.stack([direction(1.0, 0.5), direction(-0.5, 1.0, 0.3)]), 0.1)
    alpha_bar, s = float(ALPHA_BAR[t]), 2.5
    x = normal("x", (4, 3 * SIDE * SIDE)).double().requires_grad_()
    density = s * mixture.log_density(x, alpha_bar, 0) + (1 - s) * mixture.log_density(x, alpha_bar, None)
    (score,) = torch.autograd.grad(density.sum(), x)
    expected = (x + (1 - alpha_bar) * score) / math.sqrt(alpha_bar)
    guided, *_ = combined(make_guidance(s), mixture, x.detach(), t)
    torch.testing.assert_close(guided, expected.detach())


def test_projected_guidance_leaves_out_what_only_makes_the_image_stronger():
    """Between the components m and -m, all of guidance is along the image: none is left. Where the other component
    lies across, all of guidance is: all is left."""
    x = 0.6 * direction(1.0)[None]
    free = dict(apg_momentum=0.0, apg_radius=0.0)
    projected, only_parallel = (make_guidance(4.0, method="apg", apg_parallel=share, **free) for share in (0.0, 1.0))
    opposite = Mixture(torch.stack([direction(1.0), direction(-1.0)]), 0.1)
    plain, conditional, _ = combined(make_guidance(4.0), opposite, x, 700)
    assert float((plain - conditional).norm()) > 0.5
    torch.testing.assert_close(combined(projected, opposite, x, 700)[0], conditional)
    torch.testing.assert_close(combined(only_parallel, opposite, x, 700)[0], plain)
    across = Mixture(torch.stack([direction(1.0), direction(1.0, 1.0)]), 0.1)
    plain, conditional, _ = combined(make_guidance(4.0), across, x, 700)
    assert float((plain - conditional).norm()) > 0.5
    torch.testing.assert_close(combined(projected, across, x, 700)[0], plain)


def test_the_change_of_projected_guidance():
    """It is orthogonal to the conditional image, and as long as what the radius leaves of the difference."""
    mixture = Mixture(torch.stack([direction(1.0, 0.5), direction(-0.5, 1.0)]), 0.1)
    x = normal("x", (4, 3 * SIDE * SIDE)).double()
    method = dict(method="apg", apg_momentum=0.0, apg_parallel=0.0)
    guided, conditional, other = combined(make_guidance(3.0, apg_radius=0.0, **method), mixture, x, 600)
    change = guided - conditional
    torch.testing.assert_close((change * conditional).sum(1), torch.zeros(4).double(), atol=1e-12, rtol=0)
    difference = conditional - other
    sine = (1 - torch.cosine_similarity(difference, conditional).square()).sqrt()
    torch.testing.assert_close(change.norm(dim=1), 2 * difference.norm(dim=1) * sine)
    radius = 0.3 * float(difference.norm(dim=1).min())
    guided, *_ = combined(make_guidance(3.0, apg_radius=radius, **method), mixture, x, 600)
    torch.testing.assert_close((guided - conditional).norm(dim=1), 2 * radius * sine)


@pytest.mark.parametrize("momentum", [-0.5, 0.4])
def test_momentum_is_a_geometric_sum(momentum):
    """Of equal differences d, n steps have gathered d (1 - b^n) / (1 - b); a reset begins again."""
    guidance = make_guidance(2.0, method="apg", apg_momentum=momentum, apg_radius=0.0, apg_parallel=1.0)
    level, conditional, other = next(levels(1))
    for _ in range(2):
        for n in range(1, 6):
            change = guidance.combine(conditional, other, level) - conditional
            gathered = (1 - momentum**n) / (1 - momentum)
            torch.testing.assert_close(change, gathered * (conditional - other), rtol=1e-5, atol=1e-5)
        guidance.reset()


def test_rescaled_guidance_has_the_contrast_of_the_conditional_image():
    for share in (1.0, 0.25):
        guidance = make_guidance(3.0, method="rescale", rescale_phi=share)
        for level, conditional, other in levels():
            plain = other + 3 * (conditional - other)
            spread, before = (image.flatten(1).std(dim=1) for image in (conditional, plain))
            after = guidance.combine(conditional, other, level)
            torch.testing.assert_close(after.flatten(1).std(dim=1), share * spread + (1 - share) * before)
            torch.testing.assert_close(torch.cosine_similarity(after.flatten(1), plain.flatten(1)), torch.ones(4))
    flat = torch.full(SHAPE, 0.3)
    guided = guidance.combine(flat, flat, level)
    assert torch.isfinite(guided).all()  # no contrast to be had


def sample(mixture: Mixture, guidance, count: int, guide: Mixture | None = None, component: int | None = 0):
    """`count` samples [N, D] by 20 steps of dpmsolver++, of a component, or of the whole mixture."""
    diffusion = linear(trailing_timesteps(STEPS, 20), predict_xstart=True)
    x = normal("noise", (count, 3, SIDE, SIDE)).double()
    labels = torch.full((count, 1, 1, 1), -1 if component is None else component)
    predictor = Predictor(
        mixture.denoiser(),
        labels,
        guidance,
        null=torch.full((1, 1, 1, 1), -1),
        guide=guide and Guide(guide.denoiser(), labels),
    )
    *_, moment = run_moves(diffusion, predictor, x, SAMPLERS["dpmsolver++"](diffusion, 0.0), clip_denoised=False)
    return moment.x.flatten(1)


def test_samples_of_projected_guidance_are_not_stronger():
    """Of components of opposite colours plain guidance makes stronger pictures, projected guidance does not."""
    strong = direction(2.0, -1.0, 1.0)
    mixture = Mixture(torch.stack([strong, -strong]), 0.02)
    along = {}
    for name, guidance in {
        "none": make_guidance(1.0),
        "plain": make_guidance(6.0),
        "projected": make_guidance(6.0, method="apg", **APG | {"apg_momentum": 0.0}),
        "rescaled": make_guidance(6.0, method="rescale", rescale_phi=1.0),
    }.items():
        along[name] = float((sample(mixture, guidance, 32) @ strong).mean() / strong.square().sum())
    assert along["none"] == pytest.approx(1, abs=0.02)
    assert along["plain"] > 1.05
    assert along["projected"] == pytest.approx(along["none"], abs=0.02)
    assert along["rescaled"] < along["plain"]


def test_autoguidance_goes_to_the_heart_of_every_component():
    """Away from a network that has learned the same components with too large a variance (arXiv 2406.02507, section 3):
    samples lie closer to the centres, and none of the components is left out."""
    means = torch.stack([direction(2.0), direction(-2.0)])
    network, worse = Mixture(means, 0.05), Mixture(means, 0.15)
    runs = {}
    for name, guidance in (("none", make_guidance(1.0)), ("auto", make_guidance(2.0, method="autoguidance"))):
        samples = sample(network, guidance, 128, guide=worse, component=None)
        distances = torch.cdist(samples, means)
        runs[name] = distances.min(dim=1).values.square().mean() / means.shape[1], distances.argmin(dim=1)
    assert 0.02 < runs["none"][0] < 0.06  # 20 steps, the last of them long, lose variance
    assert runs["auto"][0] < 0.6 * runs["none"][0]
    assert torch.equal(runs["auto"][1], runs["none"][1]) and 0.35 < runs["auto"][1].double().mean() < 0.65


def test_autoguidance_of_gaussians_is_gaussian():
    """s log p - (s - 1) log q of Gaussians with precisions P and Q has the precision s P - (s - 1) Q at each level."""
    s, centre = 3.0, direction(0.4, -0.2)
    network, worse = Mixture(centre[None], 0.1), Mixture(centre[None], 0.5)
    for t in (100, 500, 900):
        alpha_bar = float(ALPHA_BAR[t])
        x = normal("x", (4, 3 * SIDE * SIDE)).double()
        level = level_of(x, t)
        images = [m.image(x, alpha_bar, 0).view_as(level.x) for m in (network, worse)]
        guided = make_guidance(s, method="autoguidance").combine(*images, level).flatten(1)
        precisions = [1 / (alpha_bar * m.variance + 1 - alpha_bar) for m in (network, worse)]
        score = -(s * precisions[0] + (1 - s) * precisions[1]) * (x - math.sqrt(alpha_bar) * centre)
        torch.testing.assert_close(guided, (x + (1 - alpha_bar) * score) / math.sqrt(alpha_bar))


# -- what all methods keep to -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method,options", [("apg", PLAIN), ("rescale", dict(rescale_phi=0.0)), ("autoguidance", {})])
def test_where_they_are_plain_guidance(method, options):
    guidance = make_guidance(2.5, method=method, **options)
    for level, conditional, other in levels():
        expected = ClassifierFree(2.5).combine(conditional, other, level)
        torch.testing.assert_close(guidance.combine(conditional, other, level), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", GUIDANCE)
def test_without_a_difference_there_is_no_guidance(method):
    guidance = make_guidance(7.0, method=method, **OPTIONS[method])
    for level, conditional, _ in levels():
        torch.testing.assert_close(guidance.combine(conditional, conditional, level), conditional)


@pytest.mark.parametrize("method", GUIDANCE)
def test_every_image_is_guided_by_itself(method):
    """What else is in the batch makes no difference, in what is remembered either."""
    whole, first = (make_guidance(3.0, method=method, **OPTIONS[method]) for _ in range(2))
    diffusion = linear()
    for step, t in enumerate((900, 500, 100)):
        tensors = [normal(f"{name} {step}", SHAPE) for name in ("x", "conditional", "other")]
        parts = []
        for guidance, count in ((whole, 4), (first, 1)):
            x, conditional, other = (tensor[:count] for tensor in tensors)
            parts.append(guidance.combine(conditional, other, diffusion.level(x, torch.full((count,), t))))
        torch.testing.assert_close(parts[0][:1], parts[1], rtol=1e-5, atol=1e-4)


def network(a: float, b: float):
    return FunctionDenoiser(lambda x, t, y: torch.tanh(a * x + b * y) + 0.1 * y, {})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("method", GUIDANCE)
def test_two_runs_are_equal(method, sampler):
    """With every solver; and a move up, where x goes on from somewhere else, begins anew."""
    diffusion = linear(trailing_timesteps(STEPS, 6))
    x, y = normal("x", SHAPE), normal("y", SHAPE)
    guidance, resets = make_guidance(3.0, (0.1, 0.9), method, **OPTIONS[method]), []
    predictor = Predictor(network(0.5, 0.3), y, guidance, torch.zeros_like(y), Guide(network(0.4, 0.2), y))
    original = guidance.guidance.reset
    guidance.guidance.reset = lambda: (resets.append(len(levels_seen)), original())
    runs = []
    for moves in (None, None, [Move(5, 4), Move(4, 3), Move(3, 5), *descent(6)]):
        levels_seen, draw = [], torch.Generator().manual_seed(1)
        for moment in run_moves(
            diffusion,
            predictor,
            x,
            SAMPLERS[sampler](diffusion, 0.0),
            moves=moves,
            draw_noise=lambda draw=draw: torch.randn(SHAPE, generator=draw),
        ):
            levels_seen.append(moment.level)
        runs.append(moment.x)
    assert torch.equal(runs[0], runs[1]) and torch.isfinite(runs[2]).all()
    assert resets == [0, 0, 0, 2]


def test_momentum_changes_a_run():
    """Else the test above would say nothing of it."""
    diffusion, y = linear(trailing_timesteps(STEPS, 6)), normal("y", SHAPE)
    ends = []
    for momentum in (0.0, -0.5):
        guidance = make_guidance(3.0, method="apg", **APG | {"apg_momentum": momentum})
        predictor = Predictor(network(0.5, 0.3), y, guidance, torch.zeros_like(y))
        *_, moment = run_moves(diffusion, predictor, normal("x", SHAPE), SAMPLERS["ddim"](diffusion, 0.0))
        ends.append(moment.x)
    assert (ends[0] - ends[1]).abs().max() > 0.01


@pytest.mark.parametrize("ours,theirs", itertools.product(PREDICTIONS, PREDICTIONS))
def test_a_guide_may_predict_something_else(ours, theirs):
    """Two ideal networks of one Gaussian agree, whatever each of them predicts: nothing to be guided by."""
    diffusion, other = linear(**PREDICTIONS[ours]), linear(**PREDICTIONS[theirs])
    x_start, noise = normal("image", SHAPE), normal("noise", SHAPE)
    for step in (50, 500, 900):
        t = torch.full((SHAPE[0],), step)
        x = diffusion.q_sample(x_start, t, noise)
        right = [
            FunctionDenoiser(lambda x, t, y, d=d: d.prediction.target(x_start, noise, lambda n: d._at(n, t)), {})
            for d in (diffusion, other)
        ]
        guide = Guide(right[1], x_start, other.prediction)
        level = diffusion.level(x, t)
        guided = Predictor(right[0], x_start, AutoGuidance(3.0), guide=guide)(t, level)
        torch.testing.assert_close(level.image(guided), x_start, rtol=0, atol=2e-3)  # float32, 150 times noise


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given,message",
    [
        (dict(guidance="cfq"), "unknown guidance 'cfq': choose one of cfg, apg, rescale, autoguidance"),
        (dict(apg_radius=3), "apg_radius is an option of guidance apg, and guidance is cfg: leave out apg_radius"),
        (dict(guidance="apg", rescale_phi=0.5), "rescale_phi is an option of guidance rescale, and guidance is apg"),
        (dict(guidance="rescale", guide_path="x.pt"), "guide_path is an option of guidance autoguidance"),
        (dict(guidance="autoguidance"), "needs a worse network: name its checkpoint as guide_path"),
        (dict(guidance="autoguidance", guide_path="ftp://x"), "guide_path must be a local path or an address"),
        (dict(guidance="apg", apg_momentum=-1), "apg_momentum must lie between -1 and 1, both excluded; got -1"),
        (dict(guidance="apg", apg_momentum="nan"), "apg_momentum must lie between -1 and 1"),
        (dict(guidance="apg", apg_radius=-1), "apg_radius must be at least 0 .*; got -1"),
        (dict(guidance="apg", apg_radius=math.inf), "apg_radius must be .* finite; got inf"),
        (dict(guidance="apg", apg_parallel=1.5), "apg_parallel is a share, between 0 and 1; got 1.5"),
        (dict(guidance="rescale", rescale_phi=-0.1), "rescale_phi is a share, between 0 and 1; got -0.1"),
        (dict(guidance="rescale", rescale_phi="much"), "rescale_phi must be a number; got 'much'"),
    ],
)
def test_settings_that_no_method_takes(given, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(s=2.0, **given)
    with pytest.raises(ConfigError, match=message):
        SampleConfig(s=2.0, **given).sampling()


def test_every_option_is_a_setting_of_one_method():
    fields = Sampling.__dataclass_fields__
    names = [name for method in GUIDANCE for name in method_options(method)]
    assert len(names) == len(set(names)) and set(names) <= fields.keys()
    assert method_options("apg") == list(APG) and method_options("cfg") == []
    assert all(method in fields["guidance"].metadata["help"] for method in GUIDANCE)
    guidance = Sampling(s=3.0, guidance="apg", apg_momentum=0.25, apg_radius=2, apg_parallel=0.5).make_guidance()
    assert (guidance.guidance.momentum, guidance.guidance.radius, guidance.guidance.parallel) == (0.25, 2, 0.5)
