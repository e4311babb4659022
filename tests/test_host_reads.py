"""What makes the host wait for the device: nothing in a training step between two rows of figures.

On a GPU, the host runs ahead of the device until it asks for a number. Here the CPU stands for the device: every way in
which Python asks a tensor for its content is counted, and every upload that would wait.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import make_data, make_loop

READING_METHODS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "allclose", "__bool__", "__float__", "__int__",
    "__index__", "__array__", "__contains__", "__format__", "__repr__", "masked_select", "unique",
}  # fmt: skip
UPLOADS = {"tensor", "as_tensor", "new_tensor"}  # of Python's numbers, from memory that is not pinned
# Reads within the functions of PyTorch, and sizes that depend on the content.
READING_OPERATORS = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero",
    "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave",
}  # fmt: skip


class HostReads(TorchFunctionMode):
    """Notes what waits, in `seen`."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.on_the_host = ()  # tensors that the loader made

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        there = bool(args) and any(args[0] is tensor for tensor in self.on_the_host)
        if (name in READING_METHODS or name in UPLOADS) and not there:
            self.seen.append(name)
        moves = any(isinstance(a, (torch.device, str)) for a in args[1:]) or "device" in kwargs
        if name == "to" and moves and not kwargs.get("non_blocking"):
            self.seen.append("a blocking copy")
        return function(*args, **kwargs)


class Operators(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        masks = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else []
        if name in READING_OPERATORS or any(m is not None and m.dtype == torch.bool for m in masks):
            self.reads.seen.append(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting(*on_the_host):
    reads = HostReads()
    reads.on_the_host = on_the_host
    with reads, Operators(reads):
        yield reads.seen


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def as_on_a_gpu(data, logdir, **options):
    """A loop that takes the GPU's path: layouts as one-hot maps, and no look at the bad steps but when it is due."""
    options = dict(layout_lookup="false", val_images=0, log_interval=4, max_bad_steps=50, max_steps=8) | options
    loop = make_loop(data, logdir, **options)
    loop.look_interval = min(loop.config.log_interval, loop.config.max_bad_steps)
    return loop


def reads_of_steps(loop):
    """Runs the loop. What was read in and after each step, until the next batch is asked for, by step."""
    by_step, take_step = {}, loop.train_step
    stack = contextlib.ExitStack()

    def counted(batch):
        seen = stack.enter_context(counting(batch["position"]))
        take_step(batch)
        by_step[loop.state.step] = seen

    open_batches = loop._open_batches

    @contextlib.contextmanager
    def batches():
        with open_batches() as opened:

            class Between:
                skipped = opened.skipped

                def __next__(self):
                    stack.close()
                    return next(opened)

            yield Between()
            stack.close()

    loop.train_step, loop._open_batches = counted, batches
    loop.run()
    return by_step


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(precision="fp16", max_grad_norm=1.0, microbatch=2, model=dict(dropout=0.1)),
        dict(precision="bf16", weight_decay=0.1, ema_rate="0.3,0.99", diffusion=dict(predict_v=True)),
        dict(model=dict(use_checkpoint=True), diffusion=dict(use_kl=True)),
    ],
)
def test_a_training_step_reads_nothing_between_the_rows(data, tmp_path, options):
    seen = reads_of_steps(as_on_a_gpu(data, tmp_path, **options))
    assert seen.keys() == set(range(1, 9))
    first = seen.pop(1)  # the diffusion uploads its tables, and the optimizer makes its state
    assert set(first) <= {"a blocking copy", "tensor"}
    assert seen.pop(4) and seen.pop(8)  # the counter counts
    assert all(reads == [] for reads in seen.values()), seen


def test_a_step_that_is_not_finite_reads_nothing_either(data, tmp_path):
    loop = as_on_a_gpu(data, tmp_path, precision="fp16")
    loop.trainer.log_loss_scale = 200.0  # overflows
    seen = reads_of_steps(loop)
    assert all(reads == [] for step, reads in seen.items() if step not in (1, 4, 8)), seen
    assert loop.trainer.bad_steps.read() == (8, 8, 8)


def test_the_counter_sees_what_is_planted(data, tmp_path):
    """Every way that the loop has used, or could."""
    mask, values = torch.tensor([True, False]), torch.tensor([1.0, 2.0])
    ways = [
        lambda: bool(mask[0]), lambda: float(values[0]), lambda: int(values[1]), lambda: values.cpu(),
        lambda: values.tolist(), lambda: values.numpy(), lambda: values[mask], lambda: mask.nonzero(),
        lambda: values[0].item(), lambda: values.to("cpu"), lambda: torch.tensor([1.0]), lambda: 1 if mask[0] else 0,
        lambda: torch.repeat_interleave(values, torch.tensor([1, 2])), lambda: torch.full((2,), values[0]),
    ]  # fmt: skip
    for number, way in enumerate(ways):
        with counting() as seen:
            way()
        assert seen, f"way {number} was not seen"
    loop = as_on_a_gpu(data, tmp_path, max_steps=3)
    loop.look_interval = 1
    assert all(reads for reads in reads_of_steps(loop).values())


def test_a_sampler_of_timesteps_that_needs_the_losses_reads_them(data, tmp_path):
    loop = as_on_a_gpu(data, tmp_path, schedule_sampler="loss-second-moment", max_steps=3)
    assert all(reads for reads in reads_of_steps(loop).values())
