"""The seams of sampling: what may stand in for the network, guide it, or look in after a step."""

import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch
from data_helpers import write_custom
from golden_helpers import golden_case, normal
from sampling_helpers import save_checkpoint
from test_diffusion import COVARIANCE, MEAN, PREDICTIONS, STEPS, ideal_network, linear

from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.pipeline import MEMORY_SHARE, Keeping, SDMPipeline
from guided_diffusion.respace import trailing_timesteps
from guided_diffusion.sampling.denoiser import FunctionDenoiser, as_denoiser
from guided_diffusion.sampling.guidance import (
    GUIDANCE,
    ClassifierFree,
    Guide,
    Predictor,
    Unguided,
    Within,
    make_guidance,
)
from guided_diffusion.sampling.loop import descent, run_moves, sample_loop
from guided_diffusion.sampling.solvers import SAMPLERS, Move
from guided_diffusion.settings import ConfigError, SampleConfig, Sampling

LABEL = np.arange(256).reshape(16, 16) // 64
FAST = dict(s=1.5, sampler="dpmsolver++", num_steps=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("seams")
    write_custom(root / "data", classes=4)
    save_checkpoint(root / "run", root / "data")
    return str(root / "run" / "ema_0.9_best.pt")


# -- guidance ---------------------------------------------------------------------------------------------------------


class InImageSpace(ClassifierFree):
    """Classifier-free guidance by way of the predicted images."""

    def combine(self, conditional, other, level):
        image, null = level.image(conditional), level.image(other)
        return level.output(null + self.scale * (image - null))


@pytest.mark.parametrize("settings", PREDICTIONS.values(), ids=PREDICTIONS)
def test_guidance_in_image_space_is_guidance_in_output_space(settings):
    """Predictions are linear in each other: extrapolating either is the same, and the way there and back is exact."""
    diffusion = linear(**settings)
    generator = torch.Generator().manual_seed(0)
    x, conditional, other = torch.randn(3, 2, 3, 4, 4, generator=generator)
    for step in (10, 300, 700):
        level = diffusion.level(x, torch.full((2,), step))
        torch.testing.assert_close(level.output(level.image(conditional)), conditional, rtol=1e-3, atol=1e-3)
        plain = ClassifierFree(3.0).combine(conditional, other, level)
        torch.testing.assert_close(InImageSpace(3.0).combine(conditional, other, level), plain, rtol=1e-3, atol=5e-3)


class Weaker(Unguided):
    """Away from what another network says, with a memory of the run."""

    other = "guide"

    def __init__(self):
        self.calls = -1

    def reset(self):
        self.calls = 0

    def active(self, progress):
        return True

    def combine(self, conditional, other, level):
        self.calls += 1
        return 2 * conditional - other


def test_a_second_network_may_guide():
    diffusion = linear(trailing_timesteps(STEPS, 5))
    strong, weak = (FunctionDenoiser(lambda x, t, y, a=a: a * x + y, {}) for a in (0.5, 0.3))
    y, x = torch.ones(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    guidance = Weaker()
    predictor = Predictor(strong, y, guidance, guide=Guide(weak, 2 * y))
    t = torch.tensor([3, 3])
    torch.testing.assert_close(predictor(t, diffusion.level(x, t)), 2 * (0.5 * x + y) - (0.3 * x + 2 * y))
    for _ in range(2):  # its state is one run's
        for _ in run_moves(diffusion, predictor, x, SAMPLERS["ddim"](diffusion, 0.0)):
            pass
        assert guidance.calls == 5
    with pytest.raises(ValueError, match="second network"):
        Predictor(strong, y, guidance)
    with pytest.raises(ValueError, match="null layout"):
        Predictor(strong, y, ClassifierFree(2.0))


def test_guidance_by_name():
    assert set(GUIDANCE) == {"cfg", "apg", "rescale", "autoguidance"}
    assert isinstance(make_guidance(1.5, (0.2, 0.8)), Within) and isinstance(make_guidance(1.0), Unguided)
    with pytest.raises(ValueError, match="unknown guidance 'cfq': choose one of cfg"):
        make_guidance(1.5, method="cfq")
    with pytest.raises(ValueError, match="guidance_interval"):
        make_guidance(1.0, (0.8, 0.2))


# -- denoisers --------------------------------------------------------------------------------------------------------


class Counting:
    """Stands in for the network, as a window or a teacher would: all it knows is the protocol."""

    def __init__(self, model):
        self.model, self.encoded, self.passes = model, 0, []

    def encode_layout(self, y, keep=False):
        self.encoded += 1
        return {"wrapped": self.model.encode_layout(y, keep)}

    def denoise(self, x, timesteps, layout, other=None):
        self.passes.append(1 if other is None else 2)
        return self.model.denoise(x, timesteps, layout["wrapped"], None if other is None else other["wrapped"])


@pytest.mark.parametrize("s", [1.0, 1.5])
def test_a_wrapper_stands_in_for_the_network(s):
    model, diffusion, _, y = golden_case("wide_rect")
    x = normal("x", (2, 3, *y.shape[2:]))
    wrapper = Counting(model)
    options = dict(model_kwargs={"y": y, "s": s}, guidance_interval=(0.0, 0.5))
    diffusion = linear(trailing_timesteps(STEPS, 4), learn_sigma=diffusion.learn_sigma)
    *_, ours = sample_loop(diffusion, model, x, sampler="ddim", **options)
    *_, wrapped = sample_loop(diffusion, wrapper, x, sampler="ddim", **options)
    assert torch.equal(ours.x, wrapped.x)
    assert wrapper.encoded == (2 if s > 1 else 1), "once for the run, not once for every step"
    assert wrapper.passes == ([2, 2, 1, 1] if s > 1 else [1] * 4)


def test_a_plain_function_sees_the_traditional_batch():
    """And agrees with the network's own way, which shares the encoder."""
    model, diffusion, _, y = golden_case("wide_rect")
    x, t = normal("x", (2, 3, *y.shape[2:])), torch.tensor([17, 801])
    with torch.no_grad():
        ours = diffusion.model_output(model, x, t, {"y": y, "s": 1.5})
        plain = diffusion.model_output(lambda x, t, y: model(x, t, y), x, t, {"y": y, "s": 1.5})
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="model_kwargs may hold y and s; got z as well"):
        as_denoiser(model, {"z": 1})


def test_a_compiled_network_is_called_itself():
    """`torch.compile` hands the network's attributes on: taking its `denoise` would run what is not compiled."""
    model, _, _, _ = golden_case("wide_rect")
    compiled = torch.compile(model, backend="eager")
    assert isinstance(as_denoiser(compiled, {}), FunctionDenoiser) and as_denoiser(model, {}) is model


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_moves_up_keep_a_gaussian():
    """Noised up again and again on its way (arXiv 2201.09865), a sample has the mean and covariance of the data."""
    diffusion = linear(trailing_timesteps(STEPS, 200))
    network = ideal_network(np.cumprod(1 - get_named_beta_schedule("linear", STEPS)))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(10, 3, 32, 32, generator=generator)
    moves = []
    for move in descent(200):
        moves.append(move)
        if move.end % 40 == 39 and 0 < move.end < 180:  # ten levels up, and down again
            moves.append(Move(move.end, move.end + 10))
            moves += [Move(level, level - 1) for level in range(move.end + 10, move.end, -1)]
    solver = SAMPLERS["ddpm"](diffusion, 0.0)
    predictor = Predictor.from_kwargs(network, None, noise)
    levels = []
    for moment in run_moves(
        diffusion,
        predictor,
        noise,
        solver,
        moves=moves,
        clip_denoised=False,
        draw_noise=lambda: torch.randn(noise.shape, generator=generator),
    ):
        levels.append(moment.level)
    assert levels[-1] == -1 and moment.done == moment.total == len(moves) == 200 + 4 * 11
    values = moment.x.permute(1, 0, 2, 3).reshape(3, -1).double().numpy()
    # 10,240 pixels: 5 standard errors, plus 0.02 for the finite number of steps
    assert (np.abs(values.mean(axis=1) - MEAN) < 5 * np.sqrt(np.diag(COVARIANCE) / 10240) + 0.02).all()
    assert np.abs(np.cov(values) - COVARIANCE).max() < 0.05


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_solver_forgets_at_reset(sampler):
    """Two runs of one solver are equal: nothing of the first is left in the second."""
    diffusion = linear(trailing_timesteps(STEPS, 6))
    solver = SAMPLERS[sampler](diffusion, 0.0)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    predictor = Predictor.from_kwargs(lambda x, t: torch.tanh(x), None, x)
    runs = []
    for _ in range(2):
        draw = torch.Generator().manual_seed(1)
        *_, moment = run_moves(
            diffusion, predictor, x, solver, draw_noise=lambda draw=draw: torch.randn(x.shape, generator=draw)
        )
        runs.append(moment.x)
    assert torch.equal(*runs)


def test_ancestral_sampling_moves_one_level_at_a_time():
    diffusion = linear(trailing_timesteps(STEPS, 6))
    x = torch.zeros(1, 3, 4, 4)
    predictor = Predictor.from_kwargs(lambda x, t: x, None, x)
    with pytest.raises(ValueError, match="ddpm moves one level at a time; got 5 to 2"):
        list(run_moves(diffusion, predictor, x, SAMPLERS["ddpm"](diffusion, 0.0), moves=[Move(5, 2), Move(2, -1)]))


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_other_solvers_may_skip_levels(sampler):
    """Skipping levels of a fine process is walking all levels of a coarse one."""
    network = ideal_network(np.cumprod(1 - get_named_beta_schedule("linear", STEPS)))
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    coarse, fine = linear(trailing_timesteps(STEPS, 10)), linear()
    *_, expected = sample_loop(coarse, network, x, sampler=sampler, clip_denoised=False)
    levels = [*reversed(trailing_timesteps(STEPS, 10)), -1]
    moves = [Move(start, end) for start, end in itertools.pairwise(levels)]
    predictor = Predictor.from_kwargs(network, None, x)
    *_, moment = run_moves(fine, predictor, x, SAMPLERS[sampler](fine, 0.0), moves=moves, clip_denoised=False)
    torch.testing.assert_close(moment.x, expected.x, rtol=1e-5, atol=1e-5)


def test_a_hook_sees_every_move_and_may_put_pixels_back():
    diffusion = linear(trailing_timesteps(STEPS, 5))
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    predictor = Predictor.from_kwargs(lambda x, t: 0.5 * x, None, x)
    seen = []

    def put_back(moment):
        seen.append((moment.level, moment.done, moment.pred_xstart.shape))
        moment.x = moment.x.clone()
        moment.x[..., :2] = 0.25

    *_, moment = run_moves(diffusion, predictor, x, SAMPLERS["ddim"](diffusion, 0.0), after=put_back)
    assert seen == [(level, 4 - level, x.shape) for level in (3, 2, 1, 0, -1)]
    assert (moment.x[..., :2] == 0.25).all() and (moment.x[..., 2:] != 0.25).all()
    *_, other = run_moves(diffusion, predictor, x, SAMPLERS["ddim"](diffusion, 0.0))
    assert torch.equal(moment.x[..., 2:], other.x[..., 2:]), "the network here looks at one pixel at a time"


# -- the pipeline -----------------------------------------------------------------------------------------------------


def test_one_pipeline_from_several_threads(checkpoint):
    """Layouts of different sizes at once: each call has the null layout of its own size, and its own buffers."""
    pipeline = SDMPipeline.from_checkpoint(checkpoint, keep_modulations="true")
    pipeline.layouts.reuse = True
    maps = [np.tile(LABEL, (1, times)) for times in (1, 2, 3, 1)]
    alone = [np.asarray(pipeline(label, seed=i, **FAST)[0]) for i, label in enumerate(maps)]
    wrong = []

    def work(i):
        try:
            for _ in range(3):
                if not np.array_equal(np.asarray(pipeline(maps[i], seed=i, **FAST)[0]), alone[i]):
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(maps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_kept_maps_stay_where_they_are(checkpoint):
    """As a graph's replay needs it; and nothing of the layout before is left in them."""
    pipeline = SDMPipeline.from_checkpoint(checkpoint, keep_modulations="true")
    expected = [pipeline(label, **FAST)[0] for label in (LABEL, LABEL.T)]
    pipeline.layouts.reuse = True
    places = []
    for label, image in zip((LABEL, LABEL.T), expected, strict=True):
        assert np.array_equal(pipeline(label, **FAST)[0], image)
        kept = pipeline.layouts.buffers[1]._modulations
        places.append([part.data_ptr() for modulation in kept.values() for part in modulation])
        for part in (part for modulation in kept.values() for part in modulation):
            assert part.is_contiguous(memory_format=torch.channels_last)
    assert places[0] == places[1]


def test_a_batch_that_does_not_fit_is_split(checkpoint, monkeypatch):
    pipeline = SDMPipeline.from_checkpoint(checkpoint)
    each = pipeline.model.modulation_bytes(16, 16)
    for fit, expected in ((0, Keeping(False, 5, "")), (2, Keeping(True, 2, "")), (9, Keeping(True, 5, ""))):
        free = int((fit + 1.5) * each / MEMORY_SHARE)
        monkeypatch.setattr("guided_diffusion.pipeline.free_memory", lambda device, free=free: free)
        keeping = pipeline.keeping(5, 16, 16)
        assert dataclasses.replace(keeping, reason="") == expected
        assert ("5 at once would not fit" in keeping.reason) == (fit == 2)
    labels = torch.from_numpy(np.stack([LABEL, LABEL.T, LABEL[::-1].copy()]))[:, None]
    whole, parts = (
        pipeline.generate(
            labels, None, seeds=[1, 2, 3], sampling=Sampling(num_steps=3), keeping=Keeping(True, layouts, "")
        )
        for layouts in (3, 2)
    )
    assert parts.shape == whole.shape and np.abs(parts.astype(int) - whole).max() <= 1


def test_unknown_options_name_the_known_ones(checkpoint):
    pipeline = SDMPipeline.from_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match=r"unknown settings: colour; there are .*num_steps.*sampler"):
        pipeline(LABEL, colour=3)
    with pytest.raises(ConfigError, match=r"unknown settings: num_step \(is num_steps meant\?\)"):
        pipeline(LABEL, num_step=3)
    with pytest.raises(ConfigError, match=r"unknown settings: num_clases \(is num_classes meant\?\); there are"):
        SDMPipeline.from_checkpoint(checkpoint, num_clases=4)


def test_sampling_is_declared_once():
    """The command's settings derive from Python's; only defaults differ, and the published ones are the command's."""
    ours, command = ({f.name: f for f in dataclasses.fields(cls)} for cls in (Sampling, SampleConfig))
    assert ours.keys() <= command.keys()
    differing = {name for name in ours if command[name].default != ours[name].default}
    assert differing == {"s", "sampler", "num_steps"}
    assert (SampleConfig().s, SampleConfig().num_steps, SampleConfig().sampling().sampler) == (1.0, 0, "ddpm")
    for name in ours.keys() - {"sampler"}:
        assert command[name].metadata["help"] == ours[name].metadata["help"]
    assert SampleConfig(use_ddim=True, guidance_interval="0.1,0.5").sampling() == Sampling(
        s=1.0, sampler="ddim", num_steps=0, guidance_interval=(0.1, 0.5)
    )
