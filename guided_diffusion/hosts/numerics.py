"""The arithmetic of the machine's libraries: set once, when a program starts."""

from __future__ import annotations

import torch


def set_numerics() -> None:
    """float32 is computed in float32, and cuDNN times its algorithms for each size of input and keeps the fastest.

    By default PyTorch lets a GPU round the inputs of float32 convolutions to 10 bits (TF32). There is no setting for
    that: who wants speed chooses --precision bf16 or fp16, which is faster still and takes half the memory. A program's
    entry calls this, not the library: it holds for the whole process. It changes nothing on a CPU.
    """
    torch.backends.cudnn.benchmark = True
    # The names of PyTorch up to 2.8; later versions raise an error where they are read and contradict the newer one.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "ieee"
