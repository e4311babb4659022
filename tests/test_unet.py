"""The network beside its numbers: kernels, memory layout, checks at its door."""

import dataclasses

import pytest
import torch
from golden_helpers import golden_case, normal
from torch.nn.attention import SDPBackend, sdpa_kernel

from guided_diffusion.layouts.encode import drop_layouts, encode_label_map
from guided_diffusion.layouts.spade import Layout, LayoutPair
from guided_diffusion.script_util import create_model_and_diffusion, network_settings
from guided_diffusion.settings import ConfigError, ModelConfig
from guided_diffusion.unet import AttentionBlock

T = torch.tensor([17, 801])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_attention_takes_the_flash_kernel(dtype, new_order, channels_last):
    """With every other kernel forbidden it still runs: a wrong stride would raise here (and be slow elsewhere)."""
    block = AttentionBlock(64, 2, new_order=new_order).to(dtype).requires_grad_(False)
    x = torch.randn(2, 64, 8, 8, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert block(x).shape == x.shape


def test_lists_of_numbers_are_strings_or_tuples():
    shared = dict(image_size=32, num_classes=4, num_channels=32, num_res_blocks=1)
    models = [
        create_model_and_diffusion(**shared, channel_mult=mult, attention_resolutions=resolutions)[0]
        for mult, resolutions in (("1,2", "16,8"), ((1, 2), [16, 8]))
    ]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_an_attention_height_that_no_layer_has_is_refused():
    with pytest.raises(ConfigError, match="12 does not divide image_size 32"):
        create_model_and_diffusion(image_size=32, num_classes=4, channel_mult="1,2", attention_resolutions="12")
    with pytest.raises(ConfigError, match="halve from image_size 96 on, so that no layer has the height 32"):
        create_model_and_diffusion(image_size=96, num_classes=4, channel_mult="1,2", attention_resolutions="48,32")


def test_attention_that_no_level_reaches_is_refused_in_new_trainings():
    """With the heights there are; not where the published settings say it, nor in what a checkpoint recorded."""
    for settings, heights in (
        (dict(image_size=64, channel_mult="1,2,2", attention_resolutions="8"), "64, 32, 16"),
        (dict(image_size=32, channel_mult="1,2", attention_resolutions="16,64"), "32, 16"),
    ):
        for recorded in (None, {}):
            with pytest.raises(
                ConfigError, match=f"no level of the network has the height .*; the heights are {heights} "
            ):
                network_settings(settings, recorded, training=True)
        network_settings(settings, None)
        record = {"model": dataclasses.asdict(ModelConfig(**settings)), "diffusion": {}}
        network_settings(settings, record, training=True)
        create_model_and_diffusion(**settings, num_channels=32, num_classes=4, num_res_blocks=1)
    network_settings(dict(image_size=256, attention_resolutions="32,16,8"), None, training=True)
    network_settings(dict(image_size=32, channel_mult="1,2"), None, training=True)  # not asked for


def test_a_width_that_the_groups_do_not_divide_is_explained():
    expected = (
        r"multiplier 0\.5 \(of channel_mult 0\.5,1,1,2,2,4,4\) times num_channels 32 makes a width of 16, .*64 would"
    )
    with pytest.raises(ConfigError, match=expected):
        create_model_and_diffusion(num_channels=32, image_size=512)
    with pytest.raises(ConfigError, match=r"multiplier 1\.5 .* width of 48, .*; num_channels 64 would do"):
        create_model_and_diffusion(num_channels=32, image_size=16, channel_mult="1,1.5")
    create_model_and_diffusion(num_channels=64, image_size=16, channel_mult="1,1.5", num_classes=4, num_res_blocks=1)


def test_features_stay_channels_last():
    model, _, _, y = golden_case("wide_rect")
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("in_layers.1", "in_layers.2")) and isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda m, inputs, out: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    with torch.inference_mode():
        model(normal("x", (2, 3, *y.shape[2:])), T, y=y)
        layout, null = (model.encode_layout(part, keep=True) for part in (y, torch.zeros_like(y[:1])))
        model.denoise(normal("x", (2, 3, *y.shape[2:])), T, layout, null)
    assert len(seen) > 20 and all(seen)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for use_checkpoint in (False, True):
        model, _, _, y = golden_case("wide_rect", use_checkpoint=use_checkpoint)
        model(normal("x", (2, 3, *y.shape[2:])), T, y=y).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_guidance_refuses_layouts_that_it_would_misread():
    """An encoded layout alone has no null half, and one of another size would be resized in silence."""
    model, diffusion, _, y = golden_case("wide_rect")
    x = normal("x", (2, 3, *y.shape[2:]))
    with torch.no_grad():
        encoded = model.encode_layout(y, keep=True)
        with pytest.raises(ValueError, match="guidance needs the null layout"):
            diffusion.p_mean_variance(model, x, T, model_kwargs={"y": encoded, "s": 1.5})
        pair = LayoutPair(encoded, model.encode_layout(torch.zeros_like(y[:1]), keep=True))
        for s in (1.0, 1.5):
            p = diffusion.p_mean_variance(model, x, T, model_kwargs={"y": pair, "s": s})
            q = diffusion.p_mean_variance(model, x, T, model_kwargs={"y": y, "s": s})
            torch.testing.assert_close(p["mean"], q["mean"], rtol=0, atol=1e-4)
            with pytest.raises(ValueError, match="differ in size"):
                diffusion.p_mean_variance(model, x, T, model_kwargs={"y": y[:, :, ::2, ::2], "s": s})
            with pytest.raises(ValueError, match="the layout must be"):
                diffusion.p_mean_variance(model, x, T, model_kwargs={"y": y[:, 1:], "s": s})


def test_guidance_may_be_differentiated():
    """The two halves are written in place only where no gradient is wanted."""
    model, diffusion, _, y = golden_case("wide_rect")
    x = normal("x", (2, 3, *y.shape[2:])).requires_grad_(True)
    p = diffusion.p_mean_variance(model, x, T, model_kwargs={"y": y, "s": 1.5})
    with torch.no_grad():
        q = diffusion.p_mean_variance(model, x, T, model_kwargs={"y": y, "s": 1.5})
    torch.testing.assert_close(p["mean"].detach(), q["mean"])
    p["mean"].sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_layout_resizes_its_map_once_per_resolution():
    layout = Layout(torch.rand(1, 3, 16, 16))
    assert layout.resized((8, 8)) is layout.resized((8, 8))
    assert layout.resized((16, 16)) is layout.y


def test_what_the_network_refuses():
    model, _, _, y = golden_case("wide_rect")
    x = normal("x", (2, 3, 32, 64))
    with pytest.raises(ValueError, match=r"multiples of 4; got 30x64 .*height 28 or 32, width 64 or 68"):
        model(x[:, :, :30], T, y=y[:, :, :30])
    with pytest.raises(ValueError, match=r"the layout must be \[N, 8, H, W\]"):
        model(x, T, y=y[:, :7])
    with pytest.raises(ValueError, match="differ in size"):
        model(x, T, y=y[:, :, :16])


def test_one_hot_and_edges():
    label = torch.tensor([[0, 0, 1], [2, 2, 1]]).view(1, 1, 2, 3)
    y = encode_label_map(label, label, 3)
    assert y.shape == (1, 4, 2, 3) and torch.equal(y[:, :3].argmax(1, keepdim=True), label)
    assert torch.equal(y[:, :3].sum(1), torch.ones(1, 2, 3))
    assert y[0, 3].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert encode_label_map(torch.zeros_like(label), torch.zeros_like(label), 3)[0, 3].sum() == 0


def test_dropped_layouts_are_all_zero():
    y = torch.ones(3, 4, 2, 2)
    dropped = drop_layouts(y, torch.tensor([False, True, False]))
    assert dropped.flatten(1).sum(1).tolist() == [16, 0, 16]
