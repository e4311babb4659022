"""The SPADE-conditioned U-Net of SDM (arXiv 2207.00050, figure 2 and section 3.1).

The noisy image enters the encoder, the layout only the middle block and the decoder, through SPADE: a parameter-free
group norm whose per-pixel scale and shift are convolved from the layout. Because the encoder never sees the layout,
the conditional and the null pass of classifier-free guidance share it; because scale and shift do not depend on the
step, they can be kept for a whole sampling loop (`UNetModel.encode_layout`). `denoise` is what samplers call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .layouts.spade import Layout, LayoutPair, Modulation, SPADEGroupNorm
from .nn import NORM_GROUPS, Conv2d, Linear, PointwiseConv1d, normalization, timestep_embedding, zero_module


class Upsample(nn.Module):
    """Doubles height and width by nearest neighbour; with `use_conv`, a 3x3 convolution follows."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halves height and width: by a strided 3x3 convolution with `use_conv`, else by averaging."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """A residual block: norm, SiLU, convolution, twice, with the timestep's embedding between.

    In the encoder (`layout_channels` None) both norms are plain group norms; in the middle block and the decoder they
    are SPADE. The embedding scales and shifts the second norm (`use_scale_shift_norm`) or is added before it.
    `resample`: None, Upsample or Downsample, applied to both branches inside the block.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
        use_scale_shift_norm: bool = True,
        layout_channels: int | None = None,
        downsampling: int = 1,
        resample: type[Upsample] | type[Downsample] | None = None,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.dropout = dropout
        self.spade = layout_channels is not None
        convolution = Conv2d(channels, out_channels, 3, padding=1)
        last = zero_module(Conv2d(out_channels, out_channels, 3, padding=1))
        embedding_channels = 2 * out_channels if use_scale_shift_norm else out_channels
        # The order of these assignments is the order of published state dicts.
        if self.spade:
            self.in_norm = SPADEGroupNorm(channels, layout_channels, downsampling)
            self.in_layers = nn.Sequential(nn.SiLU(), convolution)
        else:
            self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), convolution)
        self.resample = None if resample is None else resample(channels, use_conv=False)
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_channels, embedding_channels))
        if self.spade:
            after = {None: downsampling, Upsample: downsampling // 2, Downsample: downsampling * 2}[resample]
            self.out_norm = SPADEGroupNorm(out_channels, layout_channels, after)
            self.out_layers = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), last)
        else:
            self.out_layers = nn.Sequential(normalization(out_channels), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if out_channels == channels else Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, layout: Modulation | None = None) -> torch.Tensor:
        """x [N, C, h, w], emb [N, E] -> [N, C', h', w']."""
        if self.use_checkpoint and torch.is_grad_enabled():
            rng = self.dropout > 0  # what is recomputed must drop the same again
            return checkpoint(self._forward, x, emb, layout, use_reentrant=False, preserve_rng_state=rng)
        return self._forward(x, emb, layout)

    def _forward(self, x: torch.Tensor, emb: torch.Tensor, layout: Modulation | None) -> torch.Tensor:
        if self.spade:
            h = self.in_norm(x, layout)
            in_rest, out_norm, out_rest = self.in_layers, None, self.out_layers
        else:
            h = self.in_layers[0](x)
            in_rest, out_norm, out_rest = self.in_layers[1:], self.out_layers[0], self.out_layers[1:]
        silu, convolution = in_rest
        h = silu(h)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = convolution(h)
        emb = self.emb_layers(emb)[:, :, None, None]  # [N, C' or 2C', 1, 1]
        if not self.use_scale_shift_norm:
            h = h + emb
        h = self.out_norm(h, layout) if self.spade else out_norm(h)
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        return self.skip_connection(x) + out_rest(h)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, with a residual connection, through PyTorch's fused kernel.

    `new_order` says how the 3C channels of `qkv` are laid out: (q, k, v) x heads x d, else heads x (q, k, v) x d.
    """

    def __init__(self, channels: int, num_heads: int, *, use_checkpoint: bool = False, new_order: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.new_order = new_order
        self.norm = normalization(channels)
        self.qkv = PointwiseConv1d(channels, 3 * channels)
        self.proj_out = zero_module(PointwiseConv1d(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> the same."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, T, C]; no copy where x is channels-last
        qkv = self.qkv(tokens)  # [N, T, 3C]
        if self.new_order:
            qkv = qkv.view(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        else:
            qkv = qkv.view(batch, height * width, self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        # Each of q, k, v is [N, heads, T, d] with stride 1 along d: the fused kernels refuse any other.
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))
        attended = self.proj_out(attended.transpose(1, 2).reshape(batch, height * width, channels))
        return x + attended.transpose(1, 2).reshape(batch, channels, height, width)


class Stage(nn.Sequential):
    """One entry of the encoder or decoder: blocks in a row, each given what it reads."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor, layout: Modulation | None = None) -> torch.Tensor:
        for block in self:
            x = block(x, emb, layout) if isinstance(block, ResBlock) else block(x)
        return x


def level_width(multiplier: float, num_channels: int, channel_mult: Sequence[float]) -> int:
    """Channels of a level. :raises ValueError: the groups of its norms do not divide them."""
    width = int(multiplier * num_channels)
    if width % NORM_GROUPS == 0:
        return width
    larger = range(num_channels, num_channels + 64 * NORM_GROUPS)
    fit = next((n for n in larger if not any(int(m * n) % NORM_GROUPS for m in channel_mult)), None)
    multipliers = ",".join(f"{m:g}" for m in channel_mult)
    raise ValueError(
        f"the multiplier {multiplier:g} (of channel_mult {multipliers}) times num_channels {num_channels} makes a width"
        f" of {width}, which the {NORM_GROUPS} groups of a norm do not divide"
        + (f"; num_channels {fit} would do" if fit else "")
    )


class UNetModel(nn.Module):
    """The denoising network: x_t and t into the encoder, the layout into the middle block and the decoder.

    :param in_channels: image channels. :param out_channels: twice that where the variance is learned.
    :param layout_channels: channels of `y`: the class count, plus one where the instance edge is given.
    :param attention_downsamplings: the downsampling factors at which attention is placed.
    :param channel_mult: width of each resolution in units of `model_channels`.
    :param num_heads_upsample: heads in the decoder; -1: as in the encoder.
    :param num_head_channels: if not -1, channels per head, overriding the head counts.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        model_channels: int,
        out_channels: int,
        layout_channels: int,
        num_res_blocks: int,
        attention_downsamplings: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float],
        use_checkpoint: bool = False,
        num_heads: int = 4,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.layout_channels = layout_channels
        self.total_downsampling = 2 ** (len(channel_mult) - 1)
        self.dtype = torch.float32
        if num_res_blocks < 1 or min(channel_mult) <= 0:
            raise ValueError(f"num_res_blocks ({num_res_blocks}) and channel_mult {channel_mult} must be positive")
        emb_channels = 4 * model_channels
        widths = [level_width(mult, model_channels, channel_mult) for mult in channel_mult]

        def res_block(channels: int, out: int, **kwargs) -> ResBlock:
            return ResBlock(
                channels,
                emb_channels,
                out,
                dropout=dropout,
                use_checkpoint=use_checkpoint,
                use_scale_shift_norm=use_scale_shift_norm,
                **kwargs,
            )

        def attention(channels: int, heads: int) -> AttentionBlock:
            if num_head_channels != -1:
                if num_head_channels < 1 or channels % num_head_channels:
                    raise ValueError(f"num_head_channels={num_head_channels} does not divide the width {channels}")
                heads = channels // num_head_channels
            elif heads < 1 or channels % heads:
                raise ValueError(f"{heads} attention heads do not divide the width {channels}")
            return AttentionBlock(channels, heads, use_checkpoint=use_checkpoint, new_order=use_new_attention_order)

        self.time_embed = nn.Sequential(
            Linear(model_channels, emb_channels), nn.SiLU(), Linear(emb_channels, emb_channels)
        )

        channels = widths[0]
        self.input_blocks = nn.ModuleList([Stage(Conv2d(in_channels, channels, 3, padding=1))])
        skip_channels = [channels]
        downsampling = 1
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                blocks: list[nn.Module] = [res_block(channels, width)]
                channels = width
                if downsampling in attention_downsamplings:
                    blocks.append(attention(channels, num_heads))
                self.input_blocks.append(Stage(*blocks))
                skip_channels.append(channels)
            if level < len(widths) - 1:
                down = (
                    res_block(channels, channels, resample=Downsample)
                    if resblock_updown
                    else Downsample(channels, use_conv=True)
                )
                self.input_blocks.append(Stage(down))
                skip_channels.append(channels)
                downsampling *= 2

        spade = dict(layout_channels=layout_channels)
        self.middle_block = Stage(
            res_block(channels, channels, downsampling=downsampling, **spade),
            attention(channels, num_heads),
            res_block(channels, channels, downsampling=downsampling, **spade),
        )

        decoder_heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                blocks = [res_block(channels + skip_channels.pop(), width, downsampling=downsampling, **spade)]
                channels = width
                if downsampling in attention_downsamplings:
                    blocks.append(attention(channels, decoder_heads))
                if level and i == num_res_blocks:
                    blocks.append(
                        res_block(channels, channels, downsampling=downsampling, resample=Upsample, **spade)
                        if resblock_updown
                        else Upsample(channels, use_conv=True)
                    )
                    downsampling //= 2
                self.output_blocks.append(Stage(*blocks))

        self.out = nn.Sequential(
            normalization(channels), nn.SiLU(), zero_module(Conv2d(channels, out_channels, 3, padding=1))
        )
        for index, norm in enumerate(self.spade_norms()):
            norm.index = index
        self.layout_downsamplings = sorted({norm.downsampling for norm in self.spade_norms()})

    def spade_norms(self) -> Iterator[SPADEGroupNorm]:
        """Every SPADE norm, in the order of the network."""
        return (module for module in self.modules() if isinstance(module, SPADEGroupNorm))

    def convert_to(self, dtype: torch.dtype) -> UNetModel:
        """Stores the weights in `dtype` and computes in it: for inference. Training keeps float32 weights instead and
        sets `dtype` alone (see `fp16_util`). Returns the network."""
        self.dtype = dtype
        return self.to(dtype)

    def convert_to_fp16(self) -> None:
        """`convert_to(torch.float16)`, under its traditional name."""
        self.convert_to(torch.float16)

    def convert_to_fp32(self) -> None:
        """`convert_to(torch.float32)`, under its traditional name."""
        self.convert_to(torch.float32)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError where the network cannot take images of height x width; says which sizes would do."""
        step = self.total_downsampling
        if height % step or width % step:
            near = [f"{max(step, side // step * step)} or {(side // step + 1) * step}" for side in (height, width)]
            raise ValueError(
                f"this network halves its input {step.bit_length() - 1} times, so height and width must be multiples "
                f"of {step}; got {height}x{width} (nearest: height {near[0]}, width {near[1]})"
            )

    def encode_layout(self, y: torch.Tensor, keep: bool = False, buffers: Layout | None = None) -> Layout:
        """The layout [N, L, H, W] (all zeros: the null layout) as `denoise` reads it. N may be 1, for any batch.

        :param keep: compute every norm's scale and shift now, for reuse over many steps; that takes `modulation_bytes`
            of memory per image. Call under `torch.inference_mode()`. :param buffers: see `Layout.keep`.
        :raises ValueError: another number of channels.
        """
        if y.ndim != 4 or y.shape[1] != self.layout_channels:
            raise ValueError(
                f"the layout must be [N, {self.layout_channels}, H, W] (classes, plus one for the instance edge unless "
                f"the network was built with no_instance); got {list(y.shape)}"
            )
        layout = Layout(y.to(self.dtype, memory_format=torch.channels_last))
        return layout.keep(self.spade_norms(), buffers) if keep else layout

    def modulation_bytes(self, height: int, width: int) -> int:
        """Bytes that `encode_layout` keeps per image of height x width."""
        elements = sum(
            2 * n.channels * (height // n.downsampling) * (width // n.downsampling) for n in self.spade_norms()
        )
        return elements * self.dtype.itemsize

    def denoise(
        self, x: torch.Tensor, timesteps: torch.Tensor, layout: Modulation, other: Modulation | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predicts from x [N, C, H, W] at timesteps [N] under an encoded layout and, where given, under another one.

        The encoder runs once for both, the middle block and the decoder on a batch of 2N.
        :return: float32 [N, out_channels, H, W] each; None without `other`.
        :raises ValueError: a size that the network cannot halve often enough.
        """
        self.check_size(*x.shape[2:])
        if other is None:
            return self._predict(x, timesteps, layout), None
        return self._predict(x, timesteps, LayoutPair(layout, other), passes=2).chunk(2)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | Modulation) -> torch.Tensor:
        """`denoise` in its traditional form: y is the layout [N, L, H, W], or encoded (as in training).

        :raises ValueError: see `denoise` and `encode_layout`; or x and y differ in size.
        """
        self.check_size(*x.shape[2:])
        if isinstance(y, torch.Tensor):
            layout = self.encode_layout(y)
            if y.shape[2:] != x.shape[2:]:
                raise ValueError(f"layout {list(y.shape)} and image {list(x.shape)} differ in size")
            y = layout
        return self._predict(x, timesteps, y)

    def compile_prediction(self, **options: Any) -> None:
        """Has `torch.compile` make what `denoise` and `forward` run."""
        self._predict = torch.compile(self._predict, **options)

    def _predict(self, x: torch.Tensor, timesteps: torch.Tensor, layout: Modulation, passes: int = 1) -> torch.Tensor:
        """float32 [passes * N, out_channels, H, W]; `layout` is for as large a batch."""
        layout.prepare([(x.shape[2] // factor, x.shape[3] // factor) for factor in self.layout_downsamplings])
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))
        h = x.to(self.dtype, memory_format=torch.channels_last)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        # The encoder has not seen the layout: all passes go on from the same features.
        h, emb = _repeat(h, passes), emb.repeat(passes, 1)
        h = self.middle_block(h, emb, layout)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, _repeat(skips.pop(), passes)], dim=1), emb, layout)
        return self.out(h).float().contiguous()


def _repeat(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 1 else torch.cat([x] * times)
