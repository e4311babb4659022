"""Sampling guided by another network (`--guidance autoguidance --guide_path`), in the pipeline and by the command."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from data_helpers import write_custom
from sampling_helpers import DIFFUSION, MODEL, run_here, save_checkpoint

from guided_diffusion.pipeline import MEMORY_SHARE, Keeping, SDMPipeline, image_seed
from guided_diffusion.runs.plan_sampling import count_sampling, pretended_pipeline
from guided_diffusion.sampling.loop import descent
from guided_diffusion.sampling.solvers import SAMPLERS, Denoised
from guided_diffusion.script_util import create_model
from guided_diffusion.seeding import ImageNoise
from guided_diffusion.settings import ConfigError, Sampling
from guided_diffusion.weights import store

LABEL = np.arange(256).reshape(16, 16) // 64
FAST = dict(sampler="dpmsolver++", num_steps=4, s=3.0)
NAMES = [{"name": name, "color": [i, i, i]} for i, name in enumerate("abcd")]


def save_worse(folder, data, model=(), diffusion=(), seed=0, **recorded) -> str:
    """A checkpoint with other settings and other weights than `save_checkpoint` gives a network."""
    changed = dataclasses.replace(MODEL, **dict(model))
    process = dataclasses.replace(DIFFUSION, **dict(diffusion))
    path = save_checkpoint(folder, data, changed, **recorded | {"diffusion": dataclasses.asdict(process)})
    torch.manual_seed(seed)
    shapes = create_model(changed, process.learn_sigma).state_dict()
    torch.save({name: 0.1 * torch.randn(value.shape) for name, value in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A network in run/, and one in worse/ that has another depth and predicts something else."""
    root = tmp_path_factory.mktemp("guide")
    write_custom(root / "data", {"train": 2, "val": 3}, classes=4, size=(16, 16))
    save_checkpoint(root / "run", root / "data", MODEL, classes=NAMES)
    save_worse(root / "worse", root / "data", dict(num_res_blocks=2), dict(predict_v=True, learn_sigma=False))
    return root


@pytest.fixture(scope="module")
def checkpoint(root):
    return str(root / "run" / "ema_0.9_best.pt")


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return SDMPipeline.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def guided(root):
    """The settings of a guided run."""
    return dict(guidance="autoguidance", guide_path=str(root / "worse" / "ema_0.9_best.pt"), **FAST)


def labels(*maps: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(maps).copy())[:, None]


# -- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["true", "false"])
def test_both_networks_are_asked_as_by_hand(checkpoint, guided, keep, monkeypatch):
    """Guided images are extrapolated, whatever each network predicts; no null layout is encoded."""
    pipeline = SDMPipeline.from_checkpoint(checkpoint, keep_modulations=keep)
    monkeypatch.setattr(pipeline.layouts, "null", None)
    image = np.asarray(pipeline(LABEL, seed=3, name="a", **guided)[0]).astype(int)
    worse = SDMPipeline.from_checkpoint(guided["guide_path"])
    ours, theirs = pipeline.diffusion("", 4), worse.diffusion("", 4)
    y = torch.nn.functional.one_hot(torch.from_numpy(LABEL)).permute(2, 0, 1)[None].float()
    x, solver = ImageNoise([image_seed(3, "a", 0)], (3, 16, 16))(), SAMPLERS["dpmsolver++"](ours, 0.0)
    with torch.no_grad():
        for move in descent(4):
            t = torch.tensor([move.start])
            p = ours.p_mean_variance(pipeline.model, x, t, clip_denoised=False, model_kwargs={"y": y})
            q = theirs.p_mean_variance(worse.model, x, t, clip_denoised=False, model_kwargs={"y": y})
            image_there = (q["pred_xstart"] + 3 * (p["pred_xstart"] - q["pred_xstart"])).clamp(-1, 1)
            x = solver.step(x, Denoised(None, None, None, image_there), move, None)
    expected = ((x[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).round().numpy()
    assert np.abs(image - expected).max() <= 1 and image.std() > 5
    plain = np.asarray(pipeline(LABEL, seed=3, name="a", **FAST | {"s": 1.0})[0]).astype(int)
    assert np.abs(image - plain).max() > 5


@pytest.mark.parametrize(
    "method,sampler", [("autoguidance", "ddim"), ("autoguidance", "ddpm"), ("apg", "ddpm"), ("apg", "dpmsolver++")]
)
def test_an_image_is_the_same_in_any_batch(pipeline, guided, method, sampler):
    chosen = guided if method == "autoguidance" else FAST | {"guidance": method}
    sampling = Sampling(**chosen | {"sampler": sampler, "num_steps": 3})
    maps, seeds = labels(LABEL, LABEL.T, LABEL[::-1]), [1, 2, 3]
    whole = pipeline.generate(maps, None, seeds=seeds, sampling=sampling).astype(int)
    parts = pipeline.generate(maps, None, seeds=seeds, sampling=sampling, keeping=Keeping(True, 2, "")).astype(int)
    alone = np.concatenate(
        [pipeline.generate(maps[i : i + 1], None, seeds=[seeds[i]], sampling=sampling).astype(int) for i in range(3)]
    )
    # another batch may choose another convolution kernel: rounding, at most one level of 255
    assert np.abs(whole - parts).max() <= 1 and np.abs(whole - alone).max() <= 1


def test_memory_is_that_of_both_networks(pipeline, guided):
    """Each layout's modulations in both, and no null layout's."""
    sampling = Sampling(**guided)
    networks = [network.model for network in pipeline.networks(sampling)]
    each = sum(model.modulation_bytes(16, 16) for model in networks)
    assert len(networks) == 2 and each == pipeline.modulation_bytes(16, 16, sampling)
    assert networks[1].modulation_bytes(16, 16) > networks[0].modulation_bytes(16, 16)  # which is deeper
    for fit, expected in ((0, Keeping(False, 5, "")), (1, Keeping(True, 1, "")), (2, Keeping(True, 2, ""))):
        keeping = pipeline.keeping(5, 16, 16, free=int((fit + 0.5) * each / MEMORY_SHARE), sampling=sampling)
        assert dataclasses.replace(keeping, reason="") == expected
        assert "in both networks" in keeping.reason
    assert pipeline.networks(Sampling(**guided | {"s": 1.0})) == [pipeline]


def test_the_guide_is_read_once(checkpoint, guided, monkeypatch):
    pipeline, read = SDMPipeline.from_checkpoint(checkpoint), []
    original = store.load_weights
    monkeypatch.setattr(store, "load_weights", lambda path, *more: read.append(path) or original(path, *more))
    for _ in range(2):
        pipeline(LABEL, **guided)
    assert read == [guided["guide_path"]]


def test_a_guide_without_a_config_is_of_the_networks_own_kind(root, pipeline, guided, tmp_path):
    path = shutil.copy(save_worse(tmp_path / "worse", root / "data", seed=1), tmp_path / "published.pt")
    images = [
        np.asarray(pipeline(LABEL, **guided | {"guide_path": str(p)})[0])
        for p in (path, tmp_path / "worse" / "ema_0.9_best.pt")
    ]
    assert np.array_equal(*images)


def test_a_guide_among_several_is_made_a_file_of_its_own(checkpoint, pipeline, guided, tmp_path):
    """`--weights_key` is about the network that is guided, so that the refusal must not send one there."""
    weights = store.load_weights(checkpoint)
    torch.save({"model": weights, "ema": weights}, tmp_path / "both.pt")
    with pytest.raises(store.CheckpointError, match=r"weights \(model, ema\): .*convert_checkpoint.py .*both.pt"):
        pipeline(LABEL, **guided | {"guide_path": str(tmp_path / "both.pt")})


@pytest.mark.parametrize(
    "model,diffusion,recorded,message",
    [
        (dict(num_classes=5), {}, {}, "num_classes 5, here 4"),
        (dict(no_instance=False), {}, {}, "no_instance False, here True"),
        (dict(image_size=32), {}, {}, "image_size 32, here 16"),
        ({}, dict(noise_schedule="cosine"), {}, "noise_schedule cosine, here linear"),
        ({}, dict(diffusion_steps=500), {}, "diffusion_steps 500, here 1000"),
        ({}, dict(rescale_timesteps=True), {}, "rescale_timesteps True, here False"),
        ({}, {}, dict(classes=[NAMES[i] for i in (1, 0, 2, 3)]), "classes: 'a' was class 0, now 1; classes: 'b'"),
        ({}, {}, dict(dataset_json={"classes": list("abcd"), "grey": True}), "trained on grey pictures"),
    ],
)
def test_networks_that_cannot_guide(root, pipeline, guided, tmp_path, model, diffusion, recorded, message):
    path = save_worse(tmp_path / "theirs", root / "data", model, diffusion, **recorded)
    with pytest.raises(ConfigError, match=message) as error:
        pipeline(LABEL, **guided | {"guide_path": path})
    assert path in str(error.value)


def test_options_of_another_method_are_refused_even_at_their_defaults(pipeline):
    with pytest.raises(ConfigError, match="apg_radius is an option of guidance apg, and guidance is cfg"):
        pipeline(LABEL, apg_radius=Sampling.apg_radius)


# -- the command ------------------------------------------------------------------------------------------------------


def sample(root, results, *flags):
    fast = ("--sampler", "dpmsolver++", "--num_steps", "2", "--s", "2")
    model = ("--model_path", str(root / "run" / "ema_0.9_best.pt"), "--results_path", str(root / results))
    return run_here("image_sample.py", *model, *fast, *flags)


def test_a_record_tells_the_guide_by_its_content(root, guided, tmp_path):
    """A copy elsewhere goes on; another guide, or another method, is refused."""
    guide = ("--guidance", "autoguidance", "--guide_path")
    done = sample(root, "results", *guide, guided["guide_path"], "--num_samples", "2")
    assert done.returncode == 0 and "in both networks" in done.stdout, done.stdout
    images = json.loads((root / "results" / "sampling.json").read_text())["images"]
    assert images["guidance"] == "autoguidance" and images["guide_sha256"] == store.file_hash(guided["guide_path"])
    assert "guide_path" not in images
    shutil.copytree(root / "worse", tmp_path / "copy")
    done = sample(root, "results", *guide, str(tmp_path / "copy" / "ema_0.9_best.pt"))
    assert done.returncode == 0 and "1 images to make" in done.stdout, done.stdout
    other = save_worse(tmp_path / "other", root / "data", seed=2)
    for flags in ((*guide, other), ("--guidance", "cfg"), ("--guidance", "apg")):
        done = sample(root, "results", *flags)
        assert done.returncode == 1 and "made with other settings" in done.stdout and "guid" in done.stdout
    done = sample(root, "projected", "--guidance", "apg", "--apg_radius", "4", "--num_samples", "1")
    assert done.returncode == 0, done.stdout
    done = sample(root, "projected", "--guidance", "apg", "--num_samples", "1")
    assert done.returncode == 1 and "apg_radius: 4.0 there, 15.0 now" in done.stdout


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--guidance", "cfq"), "unknown guidance 'cfq': choose one of cfg, apg, rescale, autoguidance"),
        (("--apg_radius", "15"), "apg_radius is an option of guidance apg, and guidance is cfg"),  # its default
        (("--guidance", "apg", "--rescale_phi", "0.5"), "rescale_phi is an option of guidance rescale"),
        (("--guidance", "autoguidance"), "name its checkpoint as guide_path"),
        (("--guidance", "autoguidance", "--guide_path", "nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (("--guidance", "autoguidance", "--guide_path", "SELF"), "guide_path is the checkpoint itself"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(root, checkpoint, flags, message):
    done = sample(root, "refused", *[checkpoint if flag == "SELF" else flag for flag in flags])
    assert done.returncode == 1 and message in done.stdout, done.stdout
    assert not (root / "refused").exists()


def test_a_method_that_has_nothing_to_do_is_remarked_on(root):
    done = sample(root, "unguided", "--guidance", "apg", "--s", "1", "--num_samples", "1")
    assert done.returncode == 0 and "guidance apg does nothing at s 1" in done.stdout, done.stdout


def test_no_null_layout_needs_no_fine_tuning(root, guided, tmp_path):
    """The remark on trainings without label drop is for guidance by the null layout."""
    shutil.copytree(root / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"training": {"drop_rate": 0.0}}))
    guide = ("--guidance", "autoguidance", "--guide_path", guided["guide_path"])
    for flags, told in ((guide, False), (("--guidance", "apg"), True)):
        done = sample(tmp_path, f"told{told}", "--num_samples", "1", *flags)
        assert done.returncode == 0 and ("guides by noise" in done.stdout) == told, done.stdout


def test_a_plan_counts_both_networks(root, guided):
    plan = ("--dry_run", "True", "--plan_device", "gpu", "--memory_gib", "1")
    guide = ("--guidance", "autoguidance", "--guide_path", guided["guide_path"])
    done = sample(root, "planned", *guide, *plan)
    assert done.returncode == 0 and not (root / "planned").exists(), done.stdout
    assert "guided by" in done.stdout and "with the guide's" in done.stdout


def test_operations_are_those_of_both_networks(checkpoint, guided):
    strong, weak = (
        pretended_pipeline(p, precision="", device="cpu", keep_modulations="auto", compile=False)
        for p in (checkpoint, guided["guide_path"])
    )
    together, *apart = (
        count_sampling(one, "cuda", (16, 16), scale=scale, keep=True, guide=other)
        for one, scale, other in ((strong, 3.0, weak), (strong, 1.0, None), (weak, 1.0, None))
    )
    assert together.operations(4) == sum(one.operations(4) for one in apart)
    assert together.first(4) == sum(one.first(4) for one in apart)
    kept = sum(one.model.modulation_bytes(16, 16) for one in (strong, weak))
    assert together.kept(4) - together.kept(3) == pytest.approx(kept, rel=0.01)
