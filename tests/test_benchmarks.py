"""What the benchmarks compare with computes the same as the engine, in every precision they measure."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import sampling  # noqa: E402

from guided_diffusion.conditioning import encode_label_map  # noqa: E402
from guided_diffusion.script_util import ModelConfig  # noqa: E402

CONFIG = ModelConfig(
    image_size=32, num_classes=5, num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions="16",
    num_head_channels=16, no_instance=True, resblock_updown=True,
)  # fmt: skip


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_the_plain_way_computes_the_same_in_its_precision(dtype, tolerance):
    """Every layer of it works in that precision: one float32 input would make all after it float32."""
    plain, ours = (sampling.make_network(CONFIG, torch.device("cpu"), dtype, plain=plain) for plain in (True, False))
    seen = set()
    for module in plain.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    label = torch.randint(0, 5, (2, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    y = encode_label_map(label, None, 5, dtype)
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    with torch.inference_mode():
        a, b = plain(x.to(dtype), t, y).float(), ours(x, t, y=y)
    assert seen == {(dtype, dtype)}
    assert float((a - b).abs().max() / b.abs().max()) < tolerance
