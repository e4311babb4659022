"""What only a GPU runs, walked through on a pretended one: shapes, dtypes, devices and memory layouts, no numbers.

Backward passes are out of its reach. A training step is walked up to there, sampling, validation, previews and the
scorers to their end.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_helpers import write_custom
from denoiser_helpers import CLASSES, DIFFUSION, HEIGHT, KINDS, NETWORK, WIDTH, layout_of, network, predictions
from evaluation_helpers import load_script
from fake_device import CUDA, PretendedGPU, needs_a_pretended_gpu, pretended_gpu

from guided_diffusion import gaussian_diffusion, nn, unet
from guided_diffusion.dist_util import World
from guided_diffusion.fp16_util import PRECISIONS
from guided_diffusion.image_datasets import open_dataset, sampling_batches
from guided_diffusion.layouts import encode
from guided_diffusion.layouts.encode import encode_label_map, to_network
from guided_diffusion.layouts.spade import SPADEGroupNorm
from guided_diffusion.objectives.denoising import Denoising
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.runs import previews, validation
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.seeding import normals
from guided_diffusion.settings import Sampling

pytestmark = needs_a_pretended_gpu
BATCH = 2


@pytest.fixture
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = write_custom(tmp_path_factory.mktemp("walk"), {"val": 3}, size=(WIDTH, HEIGHT), classes=CLASSES)
    return open_dataset(data_dir=root, dataset_mode="custom", split="val", image_size=HEIGHT, num_classes=CLASSES)


def maps(gpu: PretendedGPU, batch: int = BATCH, instances: bool = False) -> dict[str, torch.Tensor]:
    """A loader's batch, on the CPU."""
    batch = {
        "image": torch.zeros(batch, 3, HEIGHT, WIDTH, dtype=torch.uint8),
        "label": torch.zeros(batch, 1, HEIGHT, WIDTH, dtype=torch.uint8),
        **({"instance": torch.zeros(batch, 1, HEIGHT, WIDTH, dtype=torch.int32)} if instances else {}),
    }
    return gpu.put(batch)


def trained(gpu: PretendedGPU, precision: str, **changed) -> unet.UNetModel:
    """A network in training: float32 weights on the device, computing in `precision`."""
    model = gpu.put(network(**changed), CUDA)
    model.dtype = PRECISIONS[precision]
    return model


def check_convolutions(gpu: PretendedGPU, dtype: torch.dtype) -> None:
    """Every convolution since the last call had a channels-last input in the network's precision."""
    assert len(gpu.convolutions) > 20
    assert {(seen, layout) for _, seen, layout in gpu.convolutions} == {(dtype, "channels-last")}
    gpu.convolutions.clear()


# -- the network ------------------------------------------------------------------------------------------------------


OTHER_BLOCKS = dict(resblock_updown=False, use_scale_shift_norm=False, no_instance=False)


@pytest.mark.parametrize("precision,blocks", [("fp32", {}), ("fp16", {}), ("bf16", {}), ("fp16", OTHER_BLOCKS)])
def test_the_network_on_every_kind_of_layout(gpu, precision, blocks):
    model = gpu.put(network(**blocks), CUDA).convert_to(PRECISIONS[precision])
    batch = maps(gpu, instances=not blocks.get("no_instance", True))
    _, y = to_network(batch, CUDA, CLASSES, model.dtype)
    x, t = torch.randn(BATCH, 3, HEIGHT, WIDTH, device=CUDA), torch.zeros(BATCH, dtype=torch.int64, device=CUDA)
    with torch.inference_mode():
        for kind in KINDS:
            outputs = predictions(model, x, t, layout_of(model, y, kind), kind)
            assert len(outputs) == 1 + kind.startswith("guided")
            for output in outputs:
                assert output.shape == (BATCH, 6, HEIGHT, WIDTH)
                assert output.dtype == torch.float32 and output.device == CUDA
    check_convolutions(gpu, PRECISIONS[precision])
    assert gpu.reads == 0


# -- training, up to backward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("look_up", [False, True])
def test_a_training_step_up_to_its_loss(gpu, precision, look_up):
    """The integers of the loader, dropped layouts, noise drawn on the device, timesteps and weights from the host.

    With `look_up` sizes follow from the map; a quarter of the neighbourhoods is said to be distinct.
    """
    model = trained(gpu, precision, dropout=0.1, no_instance=False, use_checkpoint=not look_up)
    diffusion = create_gaussian_diffusion(DIFFUSION)
    dropped = torch.from_numpy(np.array([True, False]))
    batch = maps(gpu, instances=True)
    x_start, y = to_network(batch, CUDA, CLASSES, model.dtype, dropped=dropped, look_up=look_up)
    assert x_start.dtype == torch.float32 and x_start.device == CUDA
    if not look_up:
        assert y.shape == (BATCH, CLASSES + 1, HEIGHT, WIDTH) and y.dtype == PRECISIONS[precision]
    t = torch.from_numpy(np.array([3, 700])).to(CUDA, non_blocking=True)
    weights = torch.from_numpy(np.ones(BATCH, dtype=np.float32)).to(CUDA, non_blocking=True)
    noise = normals([1, 2], x_start.shape[1:], CUDA)
    terms = diffusion.training_losses(model, x_start, t, {"y": y}, noise)
    assert all(term.shape == (BATCH,) and term.dtype == torch.float32 for term in terms.values())
    loss = (terms["loss"] * weights).sum()
    assert loss.requires_grad and loss.device == CUDA
    check_convolutions(gpu, PRECISIONS[precision])
    assert (gpu.reads > 0) == look_up  # the sizes of the look-up's tables are read from the device


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("predicts", [{}, {"predict_v": True}, {"predict_xstart": True}, {"use_kl": True}])
def test_every_loss(gpu, predicts, learn_sigma):
    model = trained(gpu, "bf16", learn_sigma=learn_sigma)
    x_start, y = to_network(maps(gpu), CUDA, CLASSES, model.dtype)
    t = torch.zeros(BATCH, dtype=torch.int64, device=CUDA)
    config = dataclasses.replace(DIFFUSION, learn_sigma=learn_sigma, loss_weighting="min_snr", **predicts)
    terms = create_gaussian_diffusion(config).training_losses(model, x_start, t, {"y": y})
    assert terms["loss"].shape == (BATCH,) and terms["loss"].device == CUDA
    assert ("vb" in terms) == (learn_sigma and not config.use_kl)
    assert gpu.reads == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_validation_and_preview(gpu, dataset, precision, monkeypatch):
    def batches(dataset, indices, batch_size):  # read outside: files hold numbers
        with torch.utils._python_dispatch._disable_current_modes():
            found = list(sampling_batches(dataset, indices, batch_size))
        return (gpu.put(batch) for batch in found)

    for module in (validation, previews):
        monkeypatch.setattr(module, "sampling_batches", batches)
    world = World()
    world.device = CUDA
    model = trained(gpu, precision)
    weights = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    diffusion = create_gaussian_diffusion(DIFFUSION)
    measured = validation.Validation(dataset, Denoising(diffusion), world, images=3, batch_size=2)
    assert measured._sum(model, weights) == 2.0  # one for each batch: a value that is read is 1
    assert gpu.reads == 2
    few = dataclasses.replace(DIFFUSION, diffusion_steps=2, noise_schedule="cosine")
    drawn = previews.Previews(few, dataset, "", guided=True, world=world, logger=None)
    page = drawn.page(model, weights, "walk")
    assert page.dtype == np.uint8 and page.ndim == 3
    assert gpu.reads == 2  # none but its pixels
    check_convolutions(gpu, PRECISIONS[precision])


# -- sampling ---------------------------------------------------------------------------------------------------------


SAMPLERS = [("ddpm", 1.5), ("ddim", 1.0), ("ddim", 1.5), ("dpmsolver++", 1.0), ("dpmsolver++", 1.5)]
RUNS = [(keep, sampler, s) for keep in ("true", "false") for sampler, s in SAMPLERS]


@pytest.mark.parametrize(
    "precision,instances,runs",  # every second one: each sampler, kept and guided, and not kept and not guided
    [("fp16", False, RUNS), ("fp16", True, RUNS[::2]), ("fp32", False, RUNS[::2]), ("bf16", False, RUNS[::2])],
)
def test_images_from_layouts(gpu, precision, instances, runs):
    config = dataclasses.replace(NETWORK, no_instance=not instances)
    pipeline = SDMPipeline(
        gpu.put(network(no_instance=not instances)), config, DIFFUSION, precision=precision, device="cuda"
    )
    found = maps(gpu, instances=instances)
    for keep, sampler, s in runs:
        pipeline.keep_modulations = keep
        sampling = Sampling(
            s=s,
            sampler=sampler,
            num_steps=2,
            eta=0.5 if sampler == "ddim" else 0.0,
            guidance_interval=(0.0, 0.5) if sampler == "ddpm" else (0.0, 1.0),
            dynamic_threshold=0.99 if sampler == "dpmsolver++" else 0.0,
        )
        gpu.reads = gpu.downloads = 0
        images = pipeline.generate(found["label"], found.get("instance"), seeds=[1, 2], sampling=sampling)
        assert images.shape == (BATCH, HEIGHT, WIDTH, 3) and images.dtype == np.uint8
        assert gpu.reads == 1  # the last check: whether all numbers are finite
        assert gpu.downloads == 1  # the pictures
        check_convolutions(gpu, PRECISIONS[precision])


def test_several_samples_of_one_layout_where_memory_decides(gpu):
    pipeline = SDMPipeline(
        gpu.put(network()), NETWORK, DIFFUSION, precision="fp16", device="cuda", keep_modulations="auto", grey=True
    )
    assert pipeline.keeping(1, HEIGHT, WIDTH).keep and not pipeline.keeping(1, 1000 * HEIGHT, 1000 * WIDTH).keep
    sampling = Sampling(num_steps=2)
    images = pipeline.generate(maps(gpu, batch=1)["label"], None, seeds=[1, 2, 3], sampling=sampling)
    assert images.shape == (3, HEIGHT, WIDTH, 3)


# -- what it catches --------------------------------------------------------------------------------------------------


def walk_sampling(gpu):
    model = gpu.put(network())
    pipeline = SDMPipeline(model, NETWORK, DIFFUSION, precision="fp16", device="cuda", keep_modulations="true")
    pipeline.generate(maps(gpu)["label"], None, seeds=[1, 2], sampling=Sampling(num_steps=2))


def walk_training(gpu):
    model = trained(gpu, "fp16")
    dropped = gpu.put(torch.zeros(BATCH, dtype=torch.bool))
    x_start, y = to_network(maps(gpu), CUDA, CLASSES, model.dtype, dropped=dropped)
    t = torch.zeros(BATCH, dtype=torch.int64, device=CUDA)
    create_gaussian_diffusion(DIFFUSION).training_losses(model, x_start, t, {"y": y})
    check_convolutions(gpu, torch.float16)


@pytest.mark.parametrize("walk", [walk_sampling, walk_training])
def test_a_table_left_on_the_cpu_is_caught(gpu, walk, monkeypatch):
    def table(diffusion, name, t):
        return torch.from_numpy(getattr(diffusion, name)).float()[t].view(-1, 1, 1, 1)

    monkeypatch.setattr(gaussian_diffusion.GaussianDiffusion, "_at", table)
    with pytest.raises(RuntimeError, match="indices should be on the CPU"):
        walk(gpu)


def test_a_mask_on_the_wrong_device_is_caught(gpu, monkeypatch):
    drop_layouts = encode.drop_layouts
    monkeypatch.setattr(encode, "drop_layouts", lambda y, drop: drop_layouts(y, drop.cpu()))
    with pytest.raises(RuntimeError, match=r"two (different )?devices"):
        walk_training(gpu)


@pytest.mark.parametrize("maker", ["arange", "full", "zeros"])
def test_a_tensor_made_without_its_device_is_caught(gpu, maker, monkeypatch):
    """In the timestep's embedding, the loop's timesteps, the one-hot map."""
    make = getattr(torch, maker)
    monkeypatch.setattr(torch, maker, lambda *args, device=None, **options: make(*args, **options))
    with pytest.raises(RuntimeError, match=r"two (different )?devices|same device"):
        walk_sampling(gpu)


def test_weights_in_another_precision_are_caught(gpu, monkeypatch):
    monkeypatch.setattr(nn, "in_precision_of", lambda function, *tensors, **options: function(*tensors, **options))
    with pytest.raises(RuntimeError, match=r"one dtype|same dtype|should be the same"):
        walk_training(gpu)


def test_a_norm_that_answers_in_the_default_layout_is_caught(gpu, monkeypatch):
    """CUDA's does, of some versions; without the stand-in for cuDNN's layouts nobody would notice."""
    monkeypatch.setattr(nn.GroupNorm, "forward", torch.nn.GroupNorm.forward)
    monkeypatch.setattr(torch.nn.functional, "group_norm", lambda x, *rest: x.contiguous())
    with pytest.raises(AssertionError, match="default"):
        walk_training(gpu)


def test_scale_and_shift_in_float32_are_caught(gpu, monkeypatch):
    """They would silently lift everything that follows to float32."""
    modulation = SPADEGroupNorm.modulation
    monkeypatch.setattr(SPADEGroupNorm, "modulation", lambda norm, h: tuple(m.float() for m in modulation(norm, h)))
    with pytest.raises(AssertionError, match="float32"):
        walk_training(gpu)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_pretended_answers_as_the_cpu_does(precision):
    """Shape, dtype and memory layout of every module's output, beside those of a real pass on the CPU."""

    def answers(model, label, t, x):
        seen = []
        for name, module in model.named_modules():
            if name.endswith("mlp_shared.0"):  # passed by on a GPU in 16 bits, where maps and weights are padded
                continue
            module.register_forward_hook(
                lambda module, given, out, name=name: seen.append(
                    (name, out.shape, out.dtype, out.is_contiguous(memory_format=torch.channels_last))
                    if out.dim() == 4
                    else (name, out.shape, out.dtype)
                )
            )
        y = encode_label_map(label, None, CLASSES, model.dtype)
        with torch.inference_mode():
            predictions(model, x, t, layout_of(model, y, "guided"), "guided")
        return seen

    inputs = (
        torch.zeros(BATCH, 1, HEIGHT, WIDTH, dtype=torch.int64),
        torch.zeros(BATCH, dtype=torch.int64),
        torch.zeros(BATCH, 3, HEIGHT, WIDTH),
    )
    here = answers(network().convert_to(PRECISIONS[precision]), *inputs)
    with pretended_gpu() as gpu:
        there = answers(gpu.put(network(), CUDA).convert_to(PRECISIONS[precision]), *gpu.put(inputs, CUDA))
    assert len(here) > 100 and here == there


# -- the scorers ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scoring(monkeypatch, name: str, pixels: list):
    """The scorer NAME on a pretended GPU; whatever files it reads, it finds `pixels`, in one batch."""
    script = load_script(name)  # before anything is pretended: what a module makes when it is imported stays
    with pretended_gpu() as gpu:
        batch = list(enumerate(gpu.put(pixels)))
        monkeypatch.setattr(script, "read_images", lambda *arguments: [batch], raising=False)
        yield gpu, script


def pixels(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=torch.uint8) for shape in shapes]


def test_the_features_of_the_frechet_distance(monkeypatch):
    script = load_script("test_with_FID")
    network = script.InceptionFeatures(script.build_network())
    arguments = SimpleNamespace(dims=2048, batch_size=2, num_workers=0, kid=True, mode="published", resize=256)
    arguments.filter = "bicubic"
    for found in (pixels((40, 30, 3), (40, 30, 3)), pixels((40, 30, 3), (50, 60, 3))):
        on_device = copy.deepcopy(network)
        with scoring(monkeypatch, "test_with_FID", found) as (gpu, script):
            gpu.put(on_device).to(CUDA)
            checked = SimpleNamespace(good=["a.png", "b.png"], describe=dict)
            source = script.Source(Path("photographs"), checked)
            script.compute_statistics(source, on_device, script.choose_preprocessing(arguments), CUDA, arguments, None)
            assert source.mean.shape == (2048,) and source.features[0].shape == (2, 2048)
            check_convolutions(gpu, torch.float32)
            assert gpu.reads == 0


@pytest.mark.parametrize("preprocessing", ["published", "standard"])
def test_the_distances_between_samples(monkeypatch, preprocessing):
    with scoring(monkeypatch, "lpips", pixels((3, 64, 48, 3))) as (gpu, script):
        weights = script.Weights(None, None, False)
        distance = script.PairwiseDistance(weights, 2).to(CUDA)
        layouts = [script.Layout("street", (Path("samples_00/street.png"),))]
        arguments = SimpleNamespace(preprocessing=preprocessing, num_workers=0, skip_bad=False)
        assert script.score_layouts(layouts, distance, CUDA, arguments, None) == {"street": 1.0}
        assert {layout for _, _, layout in gpu.convolutions} == {"channels-last"}
        assert gpu.reads == 1  # the score


@pytest.mark.parametrize("answers", ["scores", "ids"])
def test_the_confusion_of_a_segmentation(monkeypatch, answers):
    """The network is a small one of torchvision's (TorchScript takes no pretended tensors)."""
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    ids = [(size[:2], size) for size in [(40, 64, 3), (40, 64, 3)]]
    items = [tuple(pixels(*shapes)) for shapes in ids]
    with scoring(monkeypatch, "miou", items) as (gpu, script):
        # Which ids occur cannot be pretended; that they are asked for can.
        monkeypatch.setattr(script, "check_ids", lambda ids, table, count, path: (ids.unique(), table[0]))
        network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES).eval().to(CUDA)
        if answers == "ids":
            scores = network.forward
            network.forward = lambda x: scores(x)["out"].argmax(1)
        segmenter = script.Segmenter(network, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {})
        classes = script.make_classes("none", CLASSES, (255,), False)
        arguments = SimpleNamespace(
            input_size=None, input_filter="bilinear", batch_size=2, num_workers=0, interpolation=None, segmenter="small"
        )
        pairs = [script.Pair(name, Path(name), Path(name)) for name in ("a.png", "b.png")]
        with script.inference():
            script.try_segmenter(segmenter, gpu.put(items[0][1]), CUDA, arguments, CLASSES)
        confusion, used = script.count_pixels(pairs, segmenter, classes, CUDA, arguments, None)
        assert confusion.shape == (CLASSES, CLASSES + 1) and used == 2 and confusion.device.type == "cpu"


def test_a_segmenter_of_hugging_face(monkeypatch):
    transformers = pytest.importorskip("transformers")
    with scoring(monkeypatch, "segmenters", []) as (_, script):
        config = transformers.SegformerConfig(
            num_labels=CLASSES, hidden_sizes=[16, 16, 16, 16], depths=[1, 1, 1, 1], decoder_hidden_size=16
        )
        network = transformers.SegformerForSemanticSegmentation(config).eval().to(CUDA)
        segmenter = script.Segmenter(network, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {})
        with torch.inference_mode():
            scores = segmenter(torch.zeros(2, 64, 96, 3, dtype=torch.uint8, device=CUDA))
        assert scores.shape == (2, CLASSES, 16, 24) and scores.device == CUDA
