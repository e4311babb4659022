"""What a piece of code asks of the device, counted: copies of feature maps, and waiting for values."""

from __future__ import annotations

import functools
import pathlib
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = str(pathlib.Path(__file__).resolve().parents[1] / "guided_diffusion")
aten = torch.ops.aten


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


class EveryOperation(TorchDispatchMode):
    """Sees every basic operation; those that consist of others are taken apart first, in inference mode as well."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "aten":  # the device of a tensor is asked for in this way, too
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:  # as C++ does it: some have another decomposition, in Python, for the compiler
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        return self.operation(func, args, kwargs)

    def operation(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of a basic operation."""
        return func(*args, **kwargs)


class Copies(EveryOperation):
    """Counts what is copied of whole feature maps: results [N, C, h, w] or [N, h * w, C] at one of `sizes`.

    `bytes` by operation; `places` says where, for the message of a test that fails. A GPU's group norm is taken to work
    in the default layout alone, and to copy what it is given in another. Some versions of PyTorch do so before the
    kernel (a `clone`), others within it, where no mode sees it: that counts as `native_group_norm`.
    """

    OPERATIONS = (aten.clone.default, aten.copy_.default, aten._to_copy.default, aten.cat.default)

    def __init__(self, sizes: list[tuple[int, int]], channels: int):
        """`channels`: those with fewer are pictures, not feature maps."""
        super().__init__()
        self.sizes, self.channels = set(sizes), channels
        self.bytes: Counter[str] = Counter()
        self.places: Counter[tuple] = Counter()

    def operation(self, func, args, kwargs):
        result = super().operation(func, args, kwargs)
        if func in self.OPERATIONS and self._is_feature_map(result):
            self._add(func, result)
        if func is aten.native_group_norm.default and args[0].device.type == "cuda" and not args[0].is_contiguous():
            self._add(func, args[0])
        return result

    def _add(self, func: Any, copied: torch.Tensor) -> None:
        name = func.overloadpacket.__name__
        self.bytes[name] += copied.numel() * copied.element_size()
        self.places[name, tuple(copied.shape), str(copied.dtype), _place()] += 1

    def _is_feature_map(self, x: torch.Tensor) -> bool:
        if x.dim() == 4 and tuple(x.shape[2:]) in self.sizes:
            return x.shape[1] >= self.channels
        tokens = {height * width for height, width in self.sizes}
        if x.dim() == 4:  # attention's [N, T, heads, d] or [N, heads, T, d], but no weights of a 3x3 convolution
            return x.shape[3] > 3 and not tokens.isdisjoint(x.shape[1:3])
        return x.dim() == 3 and x.shape[1] in tokens

    def __str__(self) -> str:
        return "\n".join([str(dict(self.bytes)), *(f"{count} x {place}" for place, count in self.places.items())])


def _place() -> str:
    """The innermost line of the package that is being carried out."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{pathlib.Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Waits(EveryOperation):
    """Counts operations for which a device's host would wait: a value is read, or a size follows from data."""

    OPERATIONS = (
        aten._local_scalar_dense.default,
        aten.equal.default,
        aten.nonzero.default,
        aten.masked_select.default,
        aten._unique2.default,
        aten.bincount.default,
        aten.repeat_interleave.Tensor,
    )

    def __init__(self):
        super().__init__()
        self.count = 0
        self.places: Counter[tuple[str, str]] = Counter()

    def operation(self, func, args, kwargs):
        masks = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in self.OPERATIONS or masks:
            self.count += 1
            self.places[func.overloadpacket.__name__, _place()] += 1
        return super().operation(func, args, kwargs)
