"""Evaluating a network with other weights in the midst of a training, and the preview page."""

import pytest
import torch
import torch.distributed as dist
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from training_helpers import MODEL, make_data, make_loop

from guided_diffusion.runs.validation import evaluating
from guided_diffusion.script_util import create_model
from guided_diffusion.settings import ModelConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def make_model(**changes):
    torch.manual_seed(0)
    model = create_model(ModelConfig(**MODEL | changes), learn_sigma=True)
    torch.nn.init.normal_(model.out[2].weight, std=0.01)  # it starts at zero
    return model


def other_weights(model):
    return {name: torch.randn_like(p, requires_grad=False) * 0.05 for name, p in model.named_parameters()}


def inputs(batch=2):
    torch.manual_seed(1)
    label = torch.randint(MODEL["num_classes"], (batch, 16, 16))
    y = torch.nn.functional.one_hot(label, MODEL["num_classes"]).permute(0, 3, 1, 2).float()
    return torch.randn(batch, 3, 16, 16), torch.tensor([3] * batch), y


def test_it_is_the_network_itself_with_the_other_weights():
    model = make_model(dropout=0.5)
    weights, (x, t, y) = other_weights(model), inputs()
    reference = make_model(dropout=0.5).eval()
    expected = functional_call(reference, weights, (x, t), {"y": y}).detach()
    own = dict(model.named_parameters())
    with evaluating(model, weights) as network:
        assert network is model and not model.training
        output = network(x, t, y=y)
        assert not output.requires_grad
        assert all(p is weights[name] for name, p in model.named_parameters())  # no copies
    assert torch.equal(output, expected)
    assert model.training and torch.is_grad_enabled()
    assert all(p is own[name] for name, p in model.named_parameters())


def test_an_error_within_leaves_everything_as_it_was():
    model = make_model()
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="no memory"), evaluating(model, other_weights(model)):
        raise RuntimeError("no memory")
    model.eval()
    with evaluating(model, other_weights(model)):
        pass
    assert not model.training and torch.is_grad_enabled()
    for name, p in model.named_parameters():
        parameter, address, value = before[name]
        assert p is parameter and p.data_ptr() == address and torch.equal(p, value)


def test_weights_that_do_not_fit_are_refused():
    model = make_model()
    weights = other_weights(model)
    first = next(iter(weights))
    for wrong in ({**weights, first: torch.zeros(3)}, {n: w for n, w in weights.items() if n != first}):
        with pytest.raises(ValueError, match="names or shapes"), evaluating(model, wrong):
            pass
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_training_goes_on_as_if_nothing_had_been_evaluated(group):
    """Through DistributedDataParallel, whose buckets the gradients are views of, and the fused optimizer; evaluated
    between the steps, and between the backward pass and the step, with an error now and then."""
    results = []
    for disturbed in (False, True):
        model = make_model()
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        weights, (x, t, y) = other_weights(model), inputs()

        def evaluate(error=None, disturbed=disturbed, model=model, weights=weights, x=x, t=t, y=y):
            if not disturbed:
                return
            try:
                with evaluating(model, weights) as evaluated:
                    evaluated(x, t, y=y)
                    raise error or KeyError
            except (KeyError, RuntimeError):
                pass

        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            evaluate()
            network(x, t, y=y).square().mean().backward()
            evaluate(RuntimeError("in the midst"))
            optimizer.step()
            evaluate()
        state = {name: p.detach() for name, p in model.named_parameters()}
        averages = [value for values in optimizer.state.values() for value in values.values()]
        results.append((list(state.values()) + averages, [p.grad for p in model.parameters()]))
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert float(results[0][1][0].abs().max()) > 0


def test_the_preview_goes_through_the_network_itself(data, tmp_path):
    """Its encoder sees each picture once per step, although two predictions are made: the doubled batch of a plain
    function would go through it twice. And the page is the one of the weights that are evaluated."""
    loop = make_loop(data, tmp_path)
    seen = []
    loop.model.input_blocks[0].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    state, previews = loop.state, loop.previews
    page = previews.page(state.model, state.ema("0.9"), "title")
    assert previews.s > 1 and seen == [2] * previews.diffusion.num_timesteps
    other = {name: weight + 0.05 for name, weight in state.ema("0.9").items()}
    changed = previews.page(state.model, other, "title")
    assert page.shape == changed.shape and (page != changed).any()

    def function(x, t, **kwargs):
        return functional_call(loop.model, other, (x, t), kwargs)

    _, _, y = inputs()
    noise = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        doubled = previews._sample(function, y, noise)
    with evaluating(loop.model, other) as network:
        torch.testing.assert_close(previews._sample(network, y, noise), doubled, rtol=1e-3, atol=1e-3)
