"""The arithmetic in 16 bits and on a GPU, as far as a CPU can tell: norms, padded layouts, what libraries are told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_helpers import golden_case, normal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.layouts import spade
from guided_diffusion.nn import GroupNorm, group_norm

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import norms  # noqa: E402

T = torch.tensor([17, 801])
# Half the distance of two neighbouring numbers, relative to the power of two below: what rounding a result costs.
HALF_STEP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = {"maps": (2, 64, 9, 7), "tokens": (2, 64, 33), "one pixel": (2, 256, 1, 1)}


def norm_case(shape, dtype, affine=True, mean=6.0):
    """Inputs whose groups' means are far from 0, where rounding them shows; weights in float32."""
    x = mean + 1.5 * normal("x", shape)
    x = x.to(dtype, memory_format=torch.channels_last if len(shape) == 4 else torch.preserve_format)
    inputs = [x, *((1 + 0.3 * normal("w", shape[1:2]), normal("b", shape[1:2])) if affine else ())]
    return [value.requires_grad_() for value in inputs], normal("grad", shape).to(dtype)


def in_float64(inputs, grad):
    """PyTorch's group norm and its gradients."""
    wide = [value.detach().double().requires_grad_() for value in inputs]
    y = F.group_norm(wide[0], 32, *wide[1:])
    return y.detach(), torch.autograd.grad(y, wide, grad.double())


def assert_rounded(value, exact, dtype, slack):
    """`value` is `exact`, computed with a relative error of `slack` at most and rounded to dtype."""
    assert value.dtype == dtype
    error = (value.detach().double() - exact).abs()
    assert bool((error <= (1.01 * HALF_STEP[dtype] + slack) * exact.abs() + slack).all()), float(error.max())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", HALF_STEP)
def test_only_the_result_of_a_norm_is_rounded(shape, affine, dtype):
    """Against float64. The slack is float32's 6e-8 times what sums and the mean of 6 make of it."""
    inputs, grad = norm_case(shape, dtype, affine)
    y = group_norm(inputs[0], 32, *(inputs[1:] or (None, None)))
    gradients = torch.autograd.grad(y, inputs, grad)
    exact, exact_gradients = in_float64(inputs, grad)
    assert y.stride() == inputs[0].stride() and gradients[0].stride() == inputs[0].stride()
    assert_rounded(y, exact, dtype, 1e-5)
    assert_rounded(gradients[0], exact_gradients[0], dtype, 1e-5)
    for gradient, true in zip(gradients[1:], exact_gradients[1:], strict=True):
        torch.testing.assert_close(gradient.double(), true, rtol=1e-4, atol=1e-4)  # sums over 126 values of order 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_emulated_rounding_is_seen(dtype):
    """The check above can fail: by mean and deviation in 16 bits."""
    inputs, grad = norm_case(SHAPES["maps"], dtype)
    norm = norms.rounding_norm(dtype)(32, 64)
    norm.load_state_dict({"weight": inputs[1], "bias": inputs[2]})
    exact, _ = in_float64(inputs, grad)
    with pytest.raises(AssertionError):
        assert_rounded(norm(inputs[0]), exact, dtype, 3e-6)
    close = norms.rounding_norm(torch.float32)(32, 64)  # but for the rounding, it is a group norm
    close.load_state_dict(norm.state_dict())
    assert_rounded(close(inputs[0]), exact, dtype, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [10.0, 100.0])
def test_sums_of_squares_lose_less_than_16_bits_have(dtype, mean):
    """Where the mean is far from 0: a tenth of what rounding the input costs, a fifth of what PyTorch's kernel does."""

    def rms(error):
        return float(error.square().mean().sqrt())

    x = (mean + normal("x", (2, 64, 32, 32))).double()
    exact, of_rounded = (F.group_norm(value, 32) for value in (x, x.to(dtype).double()))
    error = rms(group_norm(x.to(dtype), 32, None, None).double() - of_rounded)
    assert error < 0.1 * rms(of_rounded - exact)
    assert error < 0.2 * rms(norms.rounding_norm(dtype)(32, 64, affine=False)(x.to(dtype)).double() - of_rounded)


def test_a_constant_group_is_not_divided_by_zero():
    """E[x^2] - E[x]^2 may come out below 0."""
    x = torch.full((1, 32, 16, 16), 777.0).half()
    y = group_norm(x, 32, None, None)
    assert bool(torch.isfinite(y).all()) and float(y.abs().max()) < 0.1


@pytest.mark.parametrize("dtype", HALF_STEP)
def test_the_compiler_is_given_the_same_norm(dtype):
    inputs, grad = norm_case(SHAPES["maps"], dtype)
    compiled = torch.compile(lambda x, w, b: group_norm(x, 32, w, b), fullgraph=True, backend="aot_eager")
    y = compiled(*inputs)
    exact, exact_gradients = in_float64(inputs, grad)
    assert y.stride() == inputs[0].stride()
    assert_rounded(y, exact, dtype, 3e-6)
    assert_rounded(torch.autograd.grad(y, inputs, grad)[0], exact_gradients[0], dtype, 3e-6)


def test_on_a_cpu_the_norm_is_pytorchs():
    """To the bit in float32, which golden numbers and resumed runs rest on; and it is several times as fast."""
    inputs, _ = norm_case(SHAPES["maps"], torch.float32)
    norm = GroupNorm(32, 64)
    norm.load_state_dict({"weight": inputs[1], "bias": inputs[2]})
    assert torch.equal(norm(inputs[0]), F.group_norm(inputs[0], 32, inputs[1], inputs[2]))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad():
            y = norm(inputs[0].to(dtype))
        assert y.dtype == dtype and y.stride() == inputs[0].stride()


@pytest.fixture
def pretended_gpu():
    """A device "cuda" on which nothing is computed; older PyTorch (2.6) needs a driver even for that."""
    with FakeTensorMode():
        try:
            torch.empty(2, device="cuda")[0]
        except RuntimeError as error:
            pytest.skip(str(error).splitlines()[0])
        yield


class FeatureMaps(TorchDispatchMode):
    """Notes every tensor of at least `elements` that an operation makes, rather than views or writes into."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.made = elements, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {id(t) for t in [*args, *(kwargs or {}).values()]}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            new = isinstance(tensor, torch.Tensor) and not function.is_view and id(tensor) not in known
            if new and tensor.numel() >= self.elements:
                self.made.append(tensor)
        return result


@pytest.mark.parametrize("dtype", HALF_STEP)
@torch.no_grad()
def test_on_a_gpu_a_norm_makes_no_feature_map_but_its_result(pretended_gpu, dtype):
    x = torch.empty(2, 64, 9, 7, dtype=dtype, device="cuda").to(memory_format=torch.channels_last)
    with torch.device("cuda"):
        norm = GroupNorm(32, 64)
    with FeatureMaps(x.numel()) as maps:
        y = norm(x)
    assert [m.dtype for m in maps.made] == [dtype]
    assert y.device.type == "cuda" and y.is_contiguous(memory_format=torch.channels_last)


def test_the_feature_maps_of_training():
    """Forward its result; backward the products of x and the gradient, in float32, and the result. Counted on the CPU:
    PyTorch 2.6 aborts at gradients of a pretended device."""
    inputs, grad = norm_case(SHAPES["maps"], torch.bfloat16)
    with FeatureMaps(grad.numel()) as maps:
        y = group_norm(inputs[0], 32, *inputs[1:])
    assert [m.dtype for m in maps.made] == [torch.bfloat16]
    with FeatureMaps(y.numel()) as maps:
        torch.autograd.grad(y, inputs, grad)
    assert [m.dtype for m in maps.made] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_the_network_with_this_norm(dtype, tolerance, use_checkpoint):
    """Outputs against the golden ones, gradients against those with PyTorch's norm; relative to the largest."""
    outputs, gradients = [], []
    for norm in (norms.TorchNorm, norms.FloatSums):
        model, _, golden, y = golden_case("wide_rect", use_checkpoint=use_checkpoint)
        norms.use_norm(model, norm)
        model.dtype = dtype
        outputs.append(model(normal("wide_rect/x", (2, 3, *y.shape[2:])), T, y=y))
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    golden = torch.from_numpy(golden["output"])
    for values, exact in ((outputs[1], golden), (outputs[1], outputs[0]), (gradients[1], gradients[0])):
        assert float((values - exact).detach().abs().max() / exact.detach().abs().max()) < tolerance


# -- layouts padded to a multiple of 8 channels ----------------------------------------------------------------


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_padded_layout_gives_equal_numbers(monkeypatch, dtype, tolerance):
    """Channels of zeros add nothing; only the order of the sums may change, and what bfloat16 makes of it."""
    widths, results = set(), []
    hidden = spade.SPADEGroupNorm.hidden
    monkeypatch.setattr(spade.SPADEGroupNorm, "hidden", lambda norm, y: (widths.add(y.shape[1]), hidden(norm, y))[1])
    for padded in (False, True):
        monkeypatch.setattr(spade, "wants_padding", lambda y, padded=padded: padded)
        model, _, _, y = golden_case("no_instance")
        model.dtype, y = dtype, y[:, :, :16, :16]
        x = normal("x", (2, 3, 16, 16))
        output = model(x, T, y=y)
        output.square().mean().backward()
        with torch.inference_mode():
            layout, null = (model.encode_layout(part, keep=True) for part in (y, torch.zeros_like(y[:1])))
            kept = torch.cat(model.denoise(x, T, layout, null))
        results.append([output, kept, torch.cat([p.grad.flatten() for p in model.parameters()])])
        assert widths == ({8} if padded else {y.shape[1]}) and y.shape[1] < 8
        widths.clear()
    for plain, padded in zip(*results, strict=True):
        assert float((plain - padded).detach().abs().max() / plain.detach().abs().max()) < tolerance


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", HALF_STEP)
def test_layouts_are_padded_on_a_gpu_in_16_bits(pretended_gpu, device, dtype):
    y = torch.empty(2, 151, 8, 8, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    layout = spade.Layout(y)
    padded = device == "cuda" and dtype != torch.float32
    assert layout.resized((4, 4)).shape[1] == (152 if padded else 151)
    assert layout.y.is_contiguous(memory_format=torch.channels_last) and (padded or layout.y is y)
    assert spade.Layout(y[:, :144]).y.shape[1] == 144


# -- random numbers of what is recomputed ----------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_random_state_is_kept_only_for_dropout(monkeypatch, dropout):
    """With dropout, what is recomputed drops the same: gradients equal those of what was not recomputed."""
    reads = []
    read = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: (reads.append(1), read())[1])
    gradients = []
    for use_checkpoint in (False, True):
        model, _, _, y = golden_case("wide_rect", use_checkpoint=use_checkpoint, dropout=dropout)
        model.train()
        torch.manual_seed(0)
        model(normal("x", (2, 3, *y.shape[2:])), T, y=y).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert bool(reads) == (dropout > 0)


# -- what the libraries are told ----------------------------------------------------------------

SAY = """
import sys, torch
def say():
    backends = torch.backends
    print(backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(),
          getattr(backends.cudnn.conv if hasattr(backends.cudnn, "conv") else None, "fp32_precision", "ieee"),
          backends.cudnn.benchmark)
"""
BEGINS = ["False False highest ieee True"]


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:guided_diffusion", "-c", SAY + code],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_float32_is_float32():
    """Both of PyTorch's names for it are readable and say so, before and after a temporary change of one of them."""
    code = """
from guided_diffusion.hosts.numerics import set_numerics
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
set_numerics()
say()
with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
    pass
say()
"""
    assert run_python(code) == 2 * BEGINS


@pytest.mark.parametrize("script,flags", [("image_train", "--lr -1"), ("image_sample", "--model_path x --s nan")])
def test_both_entry_points_set_the_numerics(script, flags):
    """Before they look at anything: here they end at a flag that is refused."""
    code = f"""
import {script}
sys.argv = ["{script}.py", *"{flags}".split()]
try:
    {script}.main()
except SystemExit as error:
    assert "must be" in str(error), error
say()
"""
    assert run_python(code) == BEGINS
