"""A pretended GPU: the code that a GPU would run, walked through on a machine without one.

PyTorch's `FakeTensorMode` carries out every operation on tensors that have a shape, a dtype, a device and strides, but
no numbers. What it cannot know without CUDA has a stand-in here:

- a convolution answers as cuDNN does, channels-last where its input or its weight is. Without cuDNN it would answer in
  the default layout, whatever it was given, and a copy from one layout to another would never show.
- attention takes a fused kernel, as on a GPU, and not the written-out matrix products of a machine without one. It
  refuses what the fused kernels refuse: another stride than 1 along the channels of a head.
- a value that the program reads from the device (`float(x)`, `if x:`) is 1, and the reading is counted: the host waits.
- a size that follows from data (`nonzero`, a mask as an index) is a quarter of what it could be at most.
- pinned memory, a device's random numbers and its free memory.

`FakeTensorMode` is more lenient than CUDA in two ways, which are mended: a table on the CPU may not be indexed from the
device, and matrix products, norms and sums of rows take one dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from operation_counts import EveryOperation
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

try:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
except ImportError as error:  # private names, which another version may not have
    MISSING = str(error)
    FakeTensor, FakeTensorMode = (type(name, (), {}) for name in ("FakeTensor", "FakeTensorMode"))
else:
    unknown = [name for name in ("_conv_determine_backend_memory_format",) if not hasattr(torch._C, name)]
    MISSING = f"torch._C has no {', '.join(unknown)}" if unknown else ""

needs_a_pretended_gpu = pytest.mark.skipif(
    bool(MISSING), reason=f"torch {torch.__version__} cannot pretend a GPU: {MISSING}"
)

CUDA = torch.device("cuda", 0)
FREE_BYTES = 8 * 2**30
aten = torch.ops.aten

SAME_DTYPE = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (0, 1, 2),
    aten.baddbmm.default: (0, 1, 2),
    aten.convolution.default: (0, 1, 2),
    aten.native_group_norm.default: (0, 1, 2),
    aten.native_layer_norm.default: (0, 2, 3),
    aten.native_batch_norm.default: (0, 1, 2),
}
READS = {aten._local_scalar_dense.default, aten.equal.default}


class PretendedGPU(EveryOperation):
    """What a GPU would answer or refuse; it counts what it is asked for.

    `reads`: how often the program waited for a value or a size. `downloads`, `uploads`: tensors copied from and to the
    device. `convolutions`: shape, dtype and memory layout ("channels-last" or "default") of what each convolved.
    """

    def __init__(self, fake_mode: FakeTensorMode):
        super().__init__()
        self.fake_mode = fake_mode
        self.device = CUDA
        self.reads = self.downloads = self.uploads = 0
        self.convolutions: list[tuple[tuple[int, ...], torch.dtype, str]] = []

    def put(self, value: Any, device: torch.device | str = "cpu") -> Any:
        """A network, tensor, or dict, list or tuple of tensors, as one without numbers, on `device`."""
        if isinstance(value, nn.Module):
            return value._apply(lambda tensor: self.put(tensor, device))
        pretended = tree_map_only(torch.Tensor, self.fake_mode.from_tensor, value)
        return tree_map_only(torch.Tensor, lambda t: t.to(device), pretended)

    def operation(self, func, args, kwargs):
        if func in SAME_DTYPE:
            dtypes = {args[i].dtype for i in SAME_DTYPE[func] if i < len(args) and args[i] is not None}
            if len(dtypes) > 1:
                raise RuntimeError(f"{func} of {dtypes}: a GPU's kernels take one dtype")
        if func is aten.index.Tensor:
            if args[0].device.type == "cpu" and any(i is not None and i.device.type == "cuda" for i in args[1]):
                raise RuntimeError("indices should be on the CPU, as the indexed tensor is; these are on the device")
            if any(i is not None and i.dtype == torch.bool for i in args[1]):
                return self._masked(*args)
        if func in READS:
            self.reads += args[0].device.type == "cuda"
            dtype = args[0].dtype
            return True if func is aten.equal.default or dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func in GUESSED_SIZES:
            self.reads += args[0].device.type == "cuda"
            return GUESSED_SIZES[func](*args, **kwargs)
        if func is aten.convolution.default and args[0].dim() == 4 and args[0].device.type == "cuda":
            last = args[0].is_contiguous(memory_format=torch.channels_last)
            self.convolutions.append((tuple(args[0].shape), args[0].dtype, "channels-last" if last else "default"))
        result = func(*args, **kwargs)
        if func is aten._to_copy.default or func is aten.copy_.default:
            source = args[1] if func is aten.copy_.default else args[0]
            self.downloads += source.device.type == "cuda" != result.device.type
            self.uploads += source.device.type == "cpu" != result.device.type
        return result

    def _masked(self, x: torch.Tensor, indices: list[torch.Tensor]) -> torch.Tensor:
        """x[mask]: a size that follows from data."""
        if len(indices) > 1:
            raise NotImplementedError("one mask, and nothing beside it, is what is pretended here")
        self.reads += indices[0].device.type == "cuda"
        return x.new_empty(guess(indices[0].numel()), *x.shape[indices[0].dim() :])


def guess(largest: int) -> int:
    """A size that follows from data, of which only the largest possible is known."""
    return max(1, largest // 4)


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(guess(x.numel()), x.dim(), dtype=torch.int64)


def _bincount(x: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor:
    return x.new_empty(max(1, minlength), dtype=torch.int64)


def _repeat_interleave(repeats: torch.Tensor, output_size: int | None = None) -> torch.Tensor:
    return repeats.new_empty(len(repeats) if output_size is None else output_size)


def _unique(x: torch.Tensor, *options: Any, **more: Any) -> tuple[torch.Tensor, ...]:
    return x.new_empty(1), x.new_empty(x.shape, dtype=torch.int64), x.new_empty(1, dtype=torch.int64)


GUESSED_SIZES: dict[Any, Callable] = {
    aten.nonzero.default: _nonzero,
    aten.bincount.default: _bincount,
    aten.repeat_interleave.Tensor: _repeat_interleave,
    aten._unique2.default: _unique,
}


class _Generator(torch.Generator):
    """Says that it belongs to a device that is not there."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.pretended = torch.device(device)
        return generator


class _SameDeviceGenerators(TorchFunctionMode):
    """Random numbers are drawn by a generator of the device that they are drawn on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        generator = (kwargs or {}).get("generator")
        if isinstance(generator, _Generator) and generator.pretended.type != result.device.type:
            raise RuntimeError(f"expected a generator of {result.device}, found one of {generator.pretended}")
        return result


def _pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cpu":
        raise RuntimeError(f"only tensors on the CPU can be pinned; this one is on {tensor.device}")
    return tensor


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert a tensor on {tensor.device} to numpy; copy it to the CPU first")
    return np.zeros(tensor.shape, dtype=str(tensor.dtype).removeprefix("torch."))


def _convolution_layout(x: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
    """cuDNN's rule; it has none for float64."""
    either = any(t.dim() == 4 and _suggests_channels_last(t) for t in (x, weight))
    return torch.channels_last if either and x.dtype != torch.float64 else torch.contiguous_format


def _suggests_channels_last(t: torch.Tensor) -> bool:
    """By strides alone, so that a 1x1 weight counts as what it was made."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    if any(t.stride(-1) != 1 for t in (query, key, value)):
        raise RuntimeError("the fused kernels need stride 1 along the channels of a head")
    if len({(t.dtype, t.device) for t in (query, key, value)}) > 1:
        raise RuntimeError("query, key and value have one dtype and one device")
    if query.dtype == torch.float32:
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, query.requires_grad)[0]
    return aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _apply(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which cannot exchange the contents of tensors that have none: parameters are made anew."""
    for child in module.children():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter).detach(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Within it tensors have no numbers, and `cuda` is a device."""
    fake_mode = FakeTensorMode()
    gpu = PretendedGPU(fake_mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_conv_determine_backend_memory_format", _convolution_layout)
        patch.setattr(F, "scaled_dot_product_attention", _attention)
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.Tensor, "pin_memory", _pin_memory)
        patch.setattr(FakeTensor, "numpy", _numpy, raising=False)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE_BYTES, 2 * FREE_BYTES))
        for name in ("memory_reserved", "memory_allocated"):
            patch.setattr(torch.cuda, name, lambda device: 0)
        with fake_mode, gpu, _SameDeviceGenerators():
            yield gpu
