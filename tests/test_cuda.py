"""The golden numbers, sampling, training and resume on a GPU; skipped without one."""

import os

import numpy as np
import pytest
import torch
from data_helpers import write_custom
from golden_helpers import CASES, golden_case, normal
from sampling_helpers import MODEL, run, save_checkpoint
from training_helpers import make_data, make_loop

from guided_diffusion import dist_util
from guided_diffusion.nn import GroupNorm
from guided_diffusion.pipeline import SDMPipeline

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("exact_float32"),
]

T = torch.tensor([17, 801])
LABEL = np.arange(256).reshape(16, 16) // 64
GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "dtype,tolerance",
    # float32 without TF32: rounding. 16 bits: 11 and 8 bits of precision through some hundred layers, values up to 3.
    [(torch.float32, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.3)],
)
def test_golden_numbers(case, dtype, tolerance):
    model, _, golden, y = golden_case(case)
    model.to("cuda", memory_format=torch.channels_last).convert_to(dtype)
    x = normal(f"{case}/x", (2, 3, CASES[case]["height"], CASES[case]["width"])).cuda()
    with torch.inference_mode():
        output = model(x, T.cuda(), y=y.cuda())
        layout, null = (model.encode_layout(part.cuda(), keep=True) for part in (y, torch.zeros_like(y[:1])))
        both = torch.cat(model.denoise(x, T.cuda(), layout, null))
    assert np.abs(output.cpu().numpy() - golden["output"]).max() < tolerance
    assert np.abs(both[2:].cpu().numpy() - golden["output_unconditional"]).max() < tolerance


@pytest.mark.parametrize("dtype,half_step", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float32, 2**-24)])
def test_a_norm_rounds_and_makes_nothing_but_its_result(dtype, half_step):
    """Against float64; the memory that it takes at most, by what the allocator has seen; gradients likewise."""
    x = 6 + 1.5 * normal("x", (2, 256, 64, 64)).cuda()
    x = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
    norm, grad = GroupNorm(32, 256).cuda(), normal("grad", (2, 256, 64, 64)).to("cuda", dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = norm(x)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * x.nbytes
    wide = x.detach().double().requires_grad_()
    exact = torch.nn.functional.group_norm(wide, 32)
    pairs = [
        (y, exact),
        *zip(torch.autograd.grad(y, x, grad), torch.autograd.grad(exact, wide, grad.double()), strict=True),
    ]
    for value, true in pairs:
        assert value.dtype == dtype and value.is_contiguous(memory_format=torch.channels_last)
        assert bool(((value - true).abs() <= (1.01 * half_step + 5e-5) * true.abs() + 5e-5).all())  # sums of 32768


@pytest.mark.parametrize("sampler,steps", [("ddpm", 20), ("ddim", 10), ("dpmsolver++", 10)])
@pytest.mark.parametrize("precision,levels", [("fp32", 0.5), ("fp16", 2.0), ("bf16", 6.0)])
def test_the_same_picture_as_on_the_cpu(tmp_path, sampler, steps, precision, levels):
    """Noise is drawn on the CPU, so devices differ by rounding alone: so many levels of 255 on average."""
    path = save_checkpoint(tmp_path, tmp_path)
    settings = dict(s=1.5, sampler=sampler, num_steps=steps, seed=3)
    there = SDMPipeline.from_checkpoint(path, device="cuda", precision=precision)(LABEL, **settings)[0]
    here = SDMPipeline.from_checkpoint(path, device="cpu")(LABEL, **settings)[0]
    assert np.abs(np.asarray(there).astype(float) - np.asarray(here)).mean() < levels


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout_lookup", ["auto", "true"])
def test_training_and_resume(tmp_path, precision, layout_lookup):
    write_custom(tmp_path / "data", classes=MODEL.num_classes)
    settings = dict(
        data_dir=tmp_path / "data",
        dataset_mode="custom",
        num_classes=MODEL.num_classes,
        no_instance=True,
        image_size=16,
        num_channels=32,
        channel_mult="1,2",
        num_res_blocks=1,
        attention_resolutions=8,
        learn_sigma=True,
        batch_size=2,
        num_workers=0,
        precision=precision,
        layout_lookup=layout_lookup,
        logdir=tmp_path / "run",
    )
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    for steps in (3, 6):
        result = run("image_train.py", *flags, "--max_steps", str(steps), **GPU)
        assert result.returncode == 0, result.stdout
    assert "continuing this log directory's run at step 3" in result.stdout
    weights = torch.load(tmp_path / "run" / "model000006.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_host_does_not_wait_in_a_training_step(tmp_path, precision):
    """PyTorch raises an error at whatever makes the host wait; `test_host_reads.py` counts the same without a GPU."""
    data = make_data(tmp_path / "data")
    loop = make_loop(data, tmp_path / "run", world=dist_util.setup(), precision=precision, microbatch=2)
    loop.model.train()
    with loop._open_batches() as batches:
        for number in range(6):
            batch = next(batches)
            torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")  # tables are uploaded once
            try:
                loop.train_step(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
