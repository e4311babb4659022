"""Fixtures that several files use."""

import pytest
import torch

ON_A_GPU = {"test_cuda", "test_label_layout"}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(request):
    """Hides a GPU from all but its own tests: two ranks cannot share one, and its results are not bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in ON_A_GPU:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def exact_float32():
    """TF32, which convolutions take by default on a GPU, has 10 bits: no measure of whether a result is right."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    yield
    products.allow_tf32, convolutions.allow_tf32 = before
