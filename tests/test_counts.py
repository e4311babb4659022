"""What costs time on a GPU and can be counted without one: graph breaks, copies of feature maps, waiting for values.

A limit is today's number: lower it with a change that copies less; a change that copies more has to say why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from denoiser_helpers import CLASSES, DIFFUSION, HEIGHT, KINDS, NETWORK, WIDTH, layout_of, network
from fake_device import CUDA, needs_a_pretended_gpu, pretended_gpu
from operation_counts import Copies, Waits

from guided_diffusion.sampling.guidance import GUIDANCE, Guide, Predictor
from guided_diffusion.sampling.loop import Moment, run_moves, sample_loop
from guided_diffusion.sampling.solvers import SAMPLERS
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.settings import Sampling
from guided_diffusion.unet import UNetModel

BATCH = 2
SIZES = [(HEIGHT, WIDTH), (HEIGHT // 2, WIDTH // 2)]
KIB = 1024


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t and y."""
    x, y = torch.zeros(BATCH, 3, HEIGHT, WIDTH), torch.zeros(BATCH, CLASSES, HEIGHT, WIDTH)
    return x, torch.tensor([3, 700]), y.to(memory_format=torch.channels_last)


# -- graph breaks -----------------------------------------------------------------------------------------------------


def graph_breaks(model: torch.nn.Module, kind: str, gradients: bool) -> list[str]:
    torch._dynamo.reset()
    x, t, y = inputs()
    with torch.set_grad_enabled(gradients):
        layout = layout_of(model, y, kind)
        if kind.startswith("guided"):
            explained = torch._dynamo.explain(model.denoise)(x, t, layout.first, layout.second)
        else:
            explained = torch._dynamo.explain(model)(x, t, y=layout)
    assert explained.graph_count == explained.graph_break_count + 1
    return [str(cause.reason) for cause in explained.break_reasons]


@pytest.mark.parametrize("kind", ["tensor", "kept", "guided"])
def test_no_graph_break_while_sampling(kind):
    model = network(resblock_updown=False).requires_grad_(False).eval()
    assert graph_breaks(model, kind, gradients=False) == []


@pytest.mark.parametrize("kind", ["tensor", "guided"])
def test_no_graph_break_in_recomputed_blocks(kind):
    """Three levels: the blocks of each must find the resized layout, and not make it."""
    model = network(channel_mult="1,1,1", attention_resolutions="4", resblock_updown=False, use_checkpoint=True)
    assert graph_breaks(model, kind, gradients=True) == []


# -- copies of feature maps -------------------------------------------------------------------------------------------

# Bytes by operation, of one step of the loop for a batch of 2.
# cat: the skip connections, concatenated in each of the decoder's four stages (864 KiB in float32); guided also the
#   encoder's features and skips, once for each half, and all of the decoder is twice as large.
# Norms copy none, on a GPU in 16 bits either (`nn.group_norm`).
SAMPLING = {
    "cpu": {
        "tensor": {"cat": 864 * KIB},
        "kept": {"cat": 864 * KIB},
        "guided": {"cat": 2560 * KIB},
        "guided and kept": {"cat": 2560 * KIB},
    },
    "cuda": {
        "tensor": {"cat": 432 * KIB},
        "kept": {"cat": 432 * KIB},
        "guided": {"cat": 1280 * KIB},
        "guided and kept": {"cat": 1280 * KIB},
    },
}
# Of one training forward; the same copies as in a step that is not guided.
TRAINING = {"cpu": SAMPLING["cpu"]["tensor"], "cuda": SAMPLING["cuda"]["tensor"]}


def check(copies: Copies, limits: dict[str, int]) -> None:
    too_many = {name: count for name, count in copies.bytes.items() if count > limits.get(name, 0)}
    assert not too_many, f"more than {limits}: {copies}"


@contextlib.contextmanager
def on(device: str):
    """`device`, and what puts a network or tensors on it: 32 bits on the CPU, a pretended GPU else."""
    if device == "cpu":
        yield torch.device("cpu"), lambda value: value
    else:
        with pretended_gpu() as gpu:
            yield CUDA, lambda value: gpu.put(value, CUDA)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_a_pretended_gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_feature_maps_in_a_sampling_step(device, kind):
    model, given = network().requires_grad_(False).eval(), inputs()
    with on(device) as (_, put), torch.inference_mode():
        model = put(model).convert_to(torch.float32 if device == "cpu" else torch.float16)
        x, _, y = put(given)
        arguments = {"y": layout_of(model, y, kind), "s": 1.5 if kind.startswith("guided") else 1.0}
        diffusion = create_gaussian_diffusion(DIFFUSION, num_steps=3)
        steps = sample_loop(diffusion, model, x, sampler="dpmsolver++", model_kwargs=arguments)
        next(steps)
        with Copies(SIZES, NETWORK.num_channels) as copies:
            next(steps)
        check(copies, SAMPLING[device][kind])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_a_pretended_gpu)])
def test_copies_of_feature_maps_in_a_training_forward(device):
    model, given = network(), inputs()
    with on(device) as (_, put):
        model = put(model)
        x, t, y = put(given)
        if device == "cuda":
            model.dtype = torch.bfloat16  # the weights stay in float32
        with Copies(SIZES, NETWORK.num_channels) as copies:
            create_gaussian_diffusion(DIFFUSION).training_losses(model, x, t, {"y": y})
        check(copies, TRAINING[device])


def test_a_copy_of_a_feature_map_is_counted():
    x = torch.zeros(BATCH, 32, HEIGHT, WIDTH)
    with Copies(SIZES, 32) as copies, torch.inference_mode():
        x.contiguous(memory_format=torch.channels_last)
        x.half()
        torch.cat([x, x], dim=1)
        x.flatten(2).transpose(1, 2).view(BATCH, -1, 2, 16).clone()
        x.contiguous(), x.float(), x[:, :3].clone(), torch.zeros(32, 32, 3, 3).clone()  # none of these is one
    whole = x.numel() * 4
    assert copies.bytes == {"clone": 2 * whole, "_to_copy": whole // 2, "cat": 2 * whole}


# -- waiting for values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_sampling_step_waits_for_the_device(sampler, kind):
    model = network().requires_grad_(False).eval()
    x, _, y = inputs()
    with torch.inference_mode():
        arguments = {"y": layout_of(model, y, kind), "s": 1.5 if kind.startswith("guided") else 1.0}
        diffusion = create_gaussian_diffusion(DIFFUSION, num_steps=3)
        steps = sample_loop(diffusion, model, x, sampler=sampler, eta=0.5, model_kwargs=arguments)
        with Waits() as waits:
            assert len(list(steps)) == 3
    assert waits.count == 0, waits.places


def guided_run(model: UNetModel, x: torch.Tensor, y: torch.Tensor, method: str) -> Iterator[Moment]:
    """Three steps by a guidance method, which may be that of the network by itself."""
    diffusion, layout = create_gaussian_diffusion(DIFFUSION, num_steps=3), layout_of(model, y, "guided and kept")
    guidance = Sampling(s=3.0, guidance=method, guide_path="x.pt" * (method == "autoguidance")).make_guidance()
    other = Guide(model, layout.second, diffusion.prediction)
    predictor = Predictor(model, layout.first, guidance, layout.second, other)
    return run_moves(diffusion, predictor, x, SAMPLERS["ddim"](diffusion, 0.0))


@pytest.mark.parametrize("method", GUIDANCE)
def test_no_guidance_waits_for_the_device(method):
    x, _, y = inputs()
    with torch.inference_mode():
        steps = guided_run(network().requires_grad_(False).eval(), x, y, method)
        with Waits() as waits:
            assert len(list(steps)) == 3
    assert waits.count == 0, waits.places


@needs_a_pretended_gpu
@pytest.mark.parametrize("method", GUIDANCE)
def test_nothing_travels_from_or_to_the_device_in_a_guided_step(method):
    model, given = network().requires_grad_(False).eval(), inputs()
    with pretended_gpu() as gpu, torch.inference_mode():
        model = gpu.put(model, CUDA).convert_to(torch.float16)
        x, _, y = gpu.put(given, CUDA)
        steps = guided_run(model, x, y, method)
        next(steps)
        gpu.uploads = gpu.downloads = gpu.reads = 0
        next(steps)
        assert (gpu.uploads, gpu.downloads, gpu.reads) == (0, 0, 0)


@needs_a_pretended_gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_travels_from_or_to_the_device_in_a_sampling_step(sampler):
    """After the first step, which brings the diffusion's tables to the device."""
    model, given = network().requires_grad_(False).eval(), inputs()
    with pretended_gpu() as gpu, torch.inference_mode():
        model = gpu.put(model, CUDA).convert_to(torch.float16)
        x, _, y = gpu.put(given, CUDA)
        arguments = {"y": layout_of(model, y, "guided and kept"), "s": 1.5}
        diffusion = create_gaussian_diffusion(DIFFUSION, num_steps=3)
        steps = sample_loop(diffusion, model, x, sampler=sampler, eta=0.5, model_kwargs=arguments)
        next(steps)
        assert gpu.uploads > 0
        gpu.uploads = gpu.downloads = gpu.reads = 0
        next(steps)
        assert (gpu.uploads, gpu.downloads, gpu.reads) == (0, 0, 0)


def test_waiting_is_counted():
    x = torch.arange(4.0)
    with Waits() as waits, torch.inference_mode():
        assert float(x.sum()) == 6.0 and bool((x >= 0).all())
        x[x > 1]
        x.nonzero()
        x.unique()
    assert waits.count == 5, waits.places
