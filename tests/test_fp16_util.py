"""Mixed precision: loss scale, skipped steps, clipping, float32 master weights."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from guided_diffusion.fp16_util import INITIAL_LOG_LOSS_SCALE, BadSteps, MixedPrecisionTrainer, global_norm
from guided_diffusion.nn import Linear, update_ema


def make(precision="fp32", lr=0.1, **options):
    """Two parameters in two groups, of different sizes, and their trainer."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=lr)
    return parameters, MixedPrecisionTrainer(parameters, optimizer, precision=precision, **options)


def backward(trainer, parameters, factor=1.0):
    trainer.zero_grad()
    trainer.scale(factor * sum((p**2).sum() for p in parameters)).backward()


def test_global_norm_is_that_of_torch():
    tensors = [torch.randn(7, 3), torch.randn(100), torch.randn(1)]
    torch.testing.assert_close(global_norm(tensors), torch.cat([x.flatten() for x in tensors]).norm())


def test_every_parameter_group_is_unscaled():
    plain, scaled = make("fp32"), make("fp16")
    for parameters, trainer in (plain, scaled):
        backward(trainer, parameters)
        result = trainer.step()
        assert result.applied
    for a, b in zip(plain[0], scaled[0], strict=True):
        assert torch.equal(a, b)  # a scale that is a power of two only moves the exponent


@pytest.mark.parametrize("precision,scaled", [("fp32", False), ("bf16", False), ("fp16", True)])
def test_only_float16_has_a_loss_scale(precision, scaled):
    _, trainer = make(precision)
    assert float(trainer.scale(torch.tensor(1.0))) == (2.0**INITIAL_LOG_LOSS_SCALE if scaled else 1.0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_skips_the_step_and_halves_the_scale(bad):
    parameters, trainer = make("fp16")
    before = [p.detach().clone() for p in parameters]
    backward(trainer, parameters)
    parameters[1].grad[2] = bad  # in the second group
    assert not trainer.step().applied
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert trainer.log_loss_scale == INITIAL_LOG_LOSS_SCALE - 1


def test_the_scale_does_not_fall_below_one():
    """A loss that is not a number is not the scale's fault: gradients must not vanish for its sake."""
    parameters, trainer = make("fp16")
    for _ in range(30):
        backward(trainer, parameters)
        parameters[0].grad[0] = float("nan")
        trainer.step()
    assert trainer.log_loss_scale == 0


def test_the_scale_grows_slowly_and_survives_a_restart():
    parameters, trainer = make("fp16", lr=1e-4, scale_growth=0.25)
    for _ in range(4):
        backward(trainer, parameters)
        trainer.step()
    assert trainer.log_loss_scale == INITIAL_LOG_LOSS_SCALE + 1
    _, again = make("fp16")
    again.load_state_dict(trainer.state_dict())
    assert again.log_loss_scale == trainer.log_loss_scale


def test_a_run_that_changes_to_float16_begins_with_the_initial_scale():
    _, before = make("fp32")
    _, after = make("fp16")
    after.load_state_dict(before.state_dict())
    assert after.log_loss_scale == INITIAL_LOG_LOSS_SCALE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_is_that_of_torch(precision):
    parameters, trainer = make(precision, lr=1.0, max_grad_norm=0.5)
    reference, _ = make()
    sum((p**2).sum() for p in reference).backward()
    norm = clip_grad_norm_(reference, 0.5)
    backward(trainer, parameters)
    result = trainer.step()
    torch.testing.assert_close(result.grad_norm, norm)  # what is reported is the norm before clipping
    for p, r in zip(parameters, reference, strict=True):
        torch.testing.assert_close(p.detach(), (r - r.grad).detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_move_by_less_than_the_precision_can_tell(dtype):
    layer = Linear(4, 4)
    torch.nn.init.ones_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)
    trainer = MixedPrecisionTrainer(list(layer.parameters()), optimizer, precision="bf16")
    for _ in range(100):
        trainer.zero_grad()
        output = layer(torch.ones(1, 4, dtype=dtype))
        assert output.dtype == dtype
        output.float().sum().backward()
        trainer.step()
    # 100 steps of 1e-6; at 1 the spacing of float16 is 5e-4 and larger, so no single step would show in it
    torch.testing.assert_close(layer.weight.detach(), torch.full((4, 4), 1 - 1e-4), rtol=0, atol=1e-5)


def fused(**options):
    """As `make`, with the optimizer that skips steps on the device."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True)
    return parameters, MixedPrecisionTrainer(parameters, optimizer, **options)


def test_the_fused_optimizer_skips_bad_steps_as_if_they_had_not_been():
    """Bad steps before, between and after good ones: weights, averages and step counts are those of the good alone."""
    results = []
    for bad in ([], [0, 2, 3, 6]):
        parameters, trainer = fused(max_grad_norm=0.5)
        optimizer_steps = 0
        for number in range(7 if bad else 3):
            backward(trainer, parameters)
            if number in bad:
                parameters[number % 2].grad[1] = (float("nan"), float("inf"))[number // 3 % 2]
            assert bool(trainer.step().applied) == (number not in bad)
            optimizer_steps += number not in bad
        assert optimizer_steps == 3
        states = [value for p in parameters for value in trainer.optimizer.state[p].values()]
        results.append([p.detach() for p in parameters] + states)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_fused_optimizer_without_bad_steps_is_that_of_torch():
    parameters, trainer = fused()
    reference, _ = fused()
    optimizer = torch.optim.AdamW(reference, lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(3):
        backward(trainer, parameters)
        trainer.step()
        optimizer.zero_grad()
        sum((p**2).sum() for p in reference).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, reference, strict=True))


def test_bad_steps_are_counted_in_all_in_a_row_and_the_longest_row():
    count = BadSteps(torch.device("cpu"), total=5, in_a_row=1)
    seen = []
    for skipped in (True, True, False, True, False):
        count.add(torch.tensor(skipped))
        seen.append(count.read())
    assert seen == [(6, 2, 2), (7, 3, 3), (7, 0, 3), (8, 1, 3), (8, 0, 3)]


@pytest.mark.parametrize("rate", [0.9999, 0.9, 0.5, 0.0])
def test_an_average_that_can_skip_is_the_same_average(rate):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (1003,), (8, 4, 3, 3), ())]
    parameters.append(torch.nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)))
    before = [torch.randn_like(p, requires_grad=False) for p in parameters]
    plain, taken, skipped = ([tensor.clone() for tensor in before] for _ in range(3))
    held = [p.detach().clone() for p in parameters]
    update_ema(plain, parameters, rate)
    update_ema(taken, parameters, rate, found_inf=torch.tensor(0.0))
    update_ema(skipped, parameters, rate, found_inf=torch.tensor(1.0))
    for a, b, c, d in zip(plain, taken, skipped, before, strict=True):
        assert torch.equal(a, b) and torch.equal(c, d)
    assert all(torch.equal(p, h) for p, h in zip(parameters, held, strict=True))
