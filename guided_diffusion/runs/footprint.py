"""What a pass of the network takes, counted on pretended tensors: operations, and bytes at every moment.

The pass itself runs, forward and backward, on tensors that have shapes and no content, so that the largest network is
counted in seconds and in no memory. Tensors that autograd, the layout or a local name still holds count, each storage
once; what a kernel allocates for itself is not seen.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..layouts.encode import encode_label_map, to_network
from ..layouts.spade import LayoutPair
from ..unet import AttentionBlock, ResBlock, UNetModel

# -- counting ---------------------------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Counts, while it is entered, floating-point operations and the bytes of the tensors that are alive.

    A multiplication and an addition are two operations; counted are convolutions, matrix products and attention, which
    are nearly all. `timeline` holds the bytes that were alive after each call of a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.alive = 0
        self.timeline: list[int] = []
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a question about a tensor
            return result
        self.hold(result)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and "attention" not in str(func):  # which of its kernels are known there varies
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        self.timeline.append(self.alive)
        return result

    def hold(self, tree: Any) -> int:
        """Counts the tensors in `tree` (lists, tuples, dicts) from now on until nothing holds them; their bytes, as far
        as they were not counted yet."""
        before = self.alive
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    size = storage.nbytes()
                    self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._release(key, size))
                    self.alive += size
        return self.alive - before

    def _release(self, key: int, size: int) -> None:
        del self._known[key]
        self.alive -= size


class _FusedAttention(torch.autograd.Function):
    """What PyTorch's fused attention kernels of a GPU keep: queries, keys, values, result, and one number a row."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, width = query.shape
        out = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextlib.contextmanager
def _fused_attention(meter: Meter) -> Iterator[None]:
    """Attention's operations go to `meter`: two products of [T, d] and [T, T] a head forward, five backward
    (Dao et al., arXiv 2205.14135, algorithms 1 and 4).

    On the meta device PyTorch would write attention out, with its [T, T] maps: the fused kernel stands in for it.
    """
    attention = F.scaled_dot_product_attention

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, width = query.shape
        product = 2 * batch * heads * tokens * tokens * width
        out = (_FusedAttention.apply if query.is_meta else attention)(query, key, value)
        meter.operations += 2 * product
        if out.grad_fn is not None:

            def count(_: Any) -> None:
                meter.operations += 5 * product

            out.grad_fn.register_prehook(count)
        return out

    # In place of the function, as a mode of PyTorch's does not reach what is recomputed in the backward pass.
    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


# -- pretending -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pretence:
    """Tensors without content: `empty` makes them, `like` turns real ones into them, on the pretended `device`.

    A CPU is pretended to be one. A GPU is stood for by PyTorch's meta device, where backward passes run too (on a
    pretended GPU they do not): the code takes the way of every device that is not a CPU.
    """

    device: torch.device
    mode: FakeTensorMode | None

    @classmethod
    def of(cls, device_type: str) -> Pretence:
        if device_type == "cpu":
            return cls(torch.device("cpu"), FakeTensorMode())
        return cls(torch.device("meta"), None)

    @contextlib.contextmanager
    def metered(self) -> Iterator[Meter]:
        """Within it, everything is pretended and counted."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.mode or contextlib.nullcontext())
            meter = stack.enter_context(Meter())
            stack.enter_context(_fused_attention(meter))
            yield meter

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with self.mode or contextlib.nullcontext():
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def like(self, value: Any) -> Any:
        """A copy of `value` whose tensors are pretended, as deep as there are containers and objects of ours."""
        return _replace_tensors(value, lambda tensor: self.empty(tensor.shape, tensor.dtype))

    def network(self, model: UNetModel, training: bool) -> UNetModel:
        """`model`, made on the meta device, as a network of the pretended one.

        For sampling its weights are channels-last, as everywhere. Those that are trained are not, on a CPU; on a GPU
        they are, but gradients come so there, and pretended ones do not: they would be copied, which no GPU does.
        """
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    twin = self.empty(parameter.shape, parameter.dtype)
                    if not training and twin.dim() == 4:
                        twin = twin.contiguous(memory_format=torch.channels_last)
                    module._parameters[name] = torch.nn.Parameter(twin, requires_grad=training)
        return model


def _replace_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of `value`, as deep as there are containers and objects of this package, with other tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _replace_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_replace_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value).__module__.split(".")[0] == __name__.split(".")[0] and hasattr(value, "__dict__"):
        twin = copy.copy(value)
        for name, item in vars(value).items():
            object.__setattr__(twin, name, _replace_tensors(item, function))  # the dataclass may be frozen
        return twin
    return value


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors that `value` holds, as deep as there are containers and objects of this package."""
    found: list[torch.Tensor] = []
    _replace_tensors(value, lambda tensor: found.append(tensor) or tensor)
    return found


# -- the passes -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass over `batch` images takes beside the weights.

    `kept`: bytes that one part leaves for the next: the forward pass for the backward pass, or the encoding of the
    layouts for the steps. `timeline`: bytes alive after each kernel. `first` and `operations`: floating-point
    operations of that first part, and of all.
    """

    batch: int
    kept: int
    timeline: list[int]
    first: int
    operations: int

    @property
    def peak(self) -> int:
        return max(self.timeline)


@dataclasses.dataclass(frozen=True)
class Passes:
    """Two passes over different numbers of images, and what follows from them for any other number.

    A kernel's tensors grow with the batch by a constant step, so that the bytes of every moment lie on a line through
    those of the two passes. Passes that went different ways (layouts that are looked up) are compared by their peaks.
    """

    one: Pass
    other: Pass

    def peak(self, batch: int) -> int:
        """Bytes at the pass's worst moment, beside the weights."""
        if len(self.one.timeline) != len(self.other.timeline):
            return self._line(batch, self.one.peak, self.other.peak)
        return max(self._line(batch, *ends) for ends in zip(self.one.timeline, self.other.timeline, strict=True))

    def kept(self, batch: int) -> int:
        return self._line(batch, self.one.kept, self.other.kept)

    def first(self, batch: int) -> int:
        return self._line(batch, self.one.first, self.other.first)

    def operations(self, batch: int) -> int:
        return self._line(batch, self.one.operations, self.other.operations)

    def _line(self, batch: int, at_one: int, at_other: int) -> int:
        return at_one + (at_other - at_one) * (batch - self.one.batch) // (self.other.batch - self.one.batch)


def largest_batch(total: Callable[[int], int], limit: float, most: int = 1 << 16) -> int:
    """The largest batch, up to `most`, for which `total(batch)`, which grows with it, is at most `limit`; 0: none."""
    low, high = 0, 1
    while high <= most and total(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= limit else (low, middle)
    return min(low, most)


Batch = dict[str, torch.Tensor]


def blank_batch(count: int, size: Sequence[int], num_classes: int, instances: bool) -> Batch:
    """A loader's batch without content, on the meta device: photographs and maps of (height, width) `size`."""
    ids = torch.uint8 if num_classes <= 256 else torch.int32
    batch = {"image": torch.empty(count, 3, *size, dtype=torch.uint8, device="meta")}
    batch["label"] = torch.empty(count, 1, *size, dtype=ids, device="meta")
    if instances:
        batch["instance"] = torch.empty(count, 1, *size, dtype=torch.int32, device="meta")
    return batch


def training_pass(
    pretence: Pretence,
    model: UNetModel,
    losses: Callable[..., dict[str, torch.Tensor]],
    batch: Batch,
    num_classes: int,
    *,
    gradients_stay: bool,
    look_up: bool = False,
) -> Pass:
    """Forward and backward over one microbatch, as the training loop goes through them.

    :param model: of `Pretence.network`, its `dtype` set. :param losses: the diffusion's `training_losses`.
    :param batch: a loader's. Its content matters only to `look_up`, layouts that are looked up.
    :param gradients_stay: they are there during the forward pass (several ranks or microbatches), else they come as
        the backward pass goes on.
    """
    dropped = torch.zeros(len(batch["label"]), dtype=torch.bool)
    if look_up:  # which neighbourhoods occur is found in the real maps
        real = to_network(batch, torch.device("cpu"), num_classes, model.dtype, dropped=dropped, look_up=True)
        height, width = batch["label"].shape[2:]
        for downsampling in {norm.downsampling for norm in model.spade_norms()}:
            real[1].at((height // downsampling, width // downsampling))
    model.train()
    for parameter in model.parameters():
        parameter.grad = pretence.empty(parameter.shape) if gradients_stay else None
    with pretence.metered() as meter:
        weights = meter.hold(list(model.parameters()))
        gradients = meter.hold([parameter.grad for parameter in model.parameters()])
        if look_up:
            x_start, layout = pretence.like(real)
        else:
            maps, dropped = pretence.like(batch), pretence.like(dropped)
            x_start, layout = to_network(maps, pretence.device, num_classes, model.dtype, dropped=dropped)
        meter.hold([x_start, *tensors_of(layout)])
        t = torch.zeros(len(x_start), dtype=torch.int64, device=pretence.device)
        terms = losses(model, x_start, t, {"y": layout}, torch.empty_like(x_start))
        loss = terms["loss"].sum()
        kept, forward = meter.alive - weights - gradients, meter.operations
        loss.backward()
        timeline = [alive - weights for alive in meter.timeline]
    for parameter in model.parameters():
        parameter.grad = None
    return Pass(len(x_start), kept, timeline, forward, meter.operations)


@torch.no_grad()
def sampling_pass(
    pretence: Pretence,
    model: UNetModel,
    p_mean_variance: Callable[..., dict[str, torch.Tensor]],
    batch: Batch,
    num_classes: int,
    *,
    images: int,
    scale: float,
    keep: bool,
    guide: UNetModel | None = None,
) -> Pass:
    """The encoding of the layouts of `batch`, and one step of `images` images of them.

    :param model: of `Pretence.network`, converted. :param p_mean_variance: the diffusion's.
    :param scale: of guidance; above 1 the null layout is encoded as well. :param keep: SPADE's scale and shift.
    :param guide: a network that guides, of `Pretence.network`; it is asked after the other, on the same layouts.
    """
    model.eval()
    with pretence.metered() as meter:
        weights = meter.hold([list(network.parameters()) for network in (model, guide) if network is not None])
        maps = pretence.like({name: value for name, value in batch.items() if name in ("label", "instance")})
        y = encode_label_map(maps["label"], maps.get("instance"), num_classes, model.dtype)
        layout: Any = y
        begin = meter.operations
        if keep:
            null = model.encode_layout(torch.zeros_like(y[:1]), keep=True) if scale > 1 else None
            begin = meter.operations  # the null layout is encoded once a run
            layout = model.encode_layout(y, keep=True)
            layout = layout if null is None else LayoutPair(layout, null)
            del null
        worse = None if guide is None else guide.encode_layout(y, keep=keep)
        del y
        kept, encoding = meter.alive - weights, meter.operations - begin
        x = torch.empty(images, 3, *maps["label"].shape[2:], device=pretence.device)
        t = torch.zeros(images, dtype=torch.int64, device=pretence.device)
        # What a solver and the loop still hold of the step before: mean, variance, its logarithm, predicted image.
        before = [torch.empty_like(x) for _ in range(4)]
        output = p_mean_variance(model, x, t, model_kwargs={"y": layout, "s": scale})
        if guide is not None:
            guide.denoise(x, t, worse)
        del output
        timeline = [alive - weights for alive in meter.timeline]
        del before
    return Pass(images, kept, timeline, encoding, meter.operations - begin)


# -- the network ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """The blocks of one part of the network at one size; `operations` of a forward pass over one image."""

    part: str
    size: tuple[int, int]
    width: int = 0
    blocks: int = 0
    attention: list[str] = dataclasses.field(default_factory=list)
    parameters: int = 0
    operations: int = 0


@torch.no_grad()
def network_rows(pretence: Pretence, model: UNetModel, size: Sequence[int]) -> tuple[list[Row], int]:
    """The network, a row for each part and size in the order of its pass, and the operations of the whole pass over
    one image of (height, width) `size`.

    Blocks that halve or double count where they arrive.
    """
    rows: dict[tuple[str, int, int], Row] = {}
    parts = {"input_blocks": "encoder", "middle_block": "middle", "output_blocks": "decoder"}
    handles = []

    def watch(part: str, block: ResBlock | AttentionBlock, meter: Meter) -> None:
        begun = []

        def after(_: Any, inputs: Any, output: torch.Tensor) -> None:
            _, channels, height, width = output.shape
            row = rows.setdefault((part, height, width), Row(part, (height, width)))
            row.parameters += sum(parameter.numel() for parameter in block.parameters())
            row.operations += meter.operations - begun.pop()
            if isinstance(block, AttentionBlock):
                row.attention.append(f"{block.num_heads} heads of {channels // block.num_heads}")
            else:
                row.width, row.blocks = channels, row.blocks + 1

        handles.append(block.register_forward_pre_hook(lambda *_: begun.append(meter.operations)))
        handles.append(block.register_forward_hook(after))

    with pretence.metered() as meter:
        for name, module in model.named_modules():
            if isinstance(module, (ResBlock, AttentionBlock)):
                watch(parts[name.split(".")[0]], module, meter)
        x, t = torch.empty(1, 3, *size, device=pretence.device), torch.zeros(1, device=pretence.device)
        model(x, t, y=torch.empty(1, model.layout_channels, *size, device=pretence.device))
    for handle in handles:
        handle.remove()
    return list(rows.values()), meter.operations
