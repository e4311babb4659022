"""Fixtures that several files use."""

import pytest
import torch


@pytest.fixture
def exact_float32():
    """TF32, which convolutions take by default on a GPU, has 10 bits: no measure of whether a result is right."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    yield
    products.allow_tf32, convolutions.allow_tf32 = before
