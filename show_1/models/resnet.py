"""diffusers' ResNet block and upsampler: norms, time embedding and activations in one pass over the memory each, and an
enlargement in one with the convolution after it.
"""

import itertools

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from show_1.models.convolution import add, without_bias

LEAST = 2**11  # pixels: for fewer the sums of weights take longer than they save (measured with mini's shapes)


class ResnetBlock(ResnetBlock2D):
    """diffusers' block, the same numbers, whose norms are our `GroupNorm`: `channels_last` makes one of the other."""

    activation: str | None = None  # what `nonlinearity` is to `GroupNorm`; None where that does not know it
    wide: bool = False  # then what it adds up is kept in float32 where the weights are bfloat16

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Return (batch, out_channels, height, width), twice or half the size where it resamples.

        `hidden_states` is (batch, in_channels, height, width), `temb` (batch, temb_channels).
        """
        shortcut = hidden_states
        hidden_states = self._act(self.norm1(hidden_states, self.activation))
        resample = self.downsample if self.upsample is None else self.upsample
        if isinstance(resample, Upsample2D):
            shortcut = _upsample(shortcut)
            hidden_states, bias = upsampled_conv(hidden_states, self.conv1)
        else:
            if resample is not None:
                shortcut, hidden_states = resample(shortcut), resample(hidden_states)
            hidden_states, bias = without_bias(self.conv1, hidden_states)

        scale = shift = None
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                scale, shift = temb.chunk(2, dim=1)
            elif bias is None:
                hidden_states = hidden_states + temb[:, :, None, None]
            else:
                bias = bias + temb
        hidden_states = self._act(self.norm2(hidden_states, self.activation, scale, shift, bias))
        hidden_states, bias = without_bias(self.conv2, self.dropout(hidden_states))

        if self.wide and shortcut.dtype == torch.bfloat16:
            shortcut = shortcut.float()
        if self.conv_shortcut is not None:
            weight, more = (each.to(shortcut.dtype) for each in (self.conv_shortcut.weight, self.conv_shortcut.bias))
            if bias is not None:
                bias, more = bias + more, None
            shortcut = F.conv2d(shortcut, weight, more)
        hidden_states = add(shortcut, hidden_states, bias)
        return hidden_states if self.output_scale_factor == 1 else hidden_states / self.output_scale_factor

    def _act(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.activation else self.nonlinearity(hidden_states)


class UpsampleConv(Upsample2D):
    """diffusers' upsampler of nearest neighbours and a convolution, the same numbers from less work on a CPU."""

    def forward(self, hidden_states: torch.Tensor, output_size: torch.Size | None = None) -> torch.Tensor:
        """Return (batch, out_channels, height, width) at twice the size, or at `output_size`, (height, width)."""
        doubled = tuple(2 * side for side in hidden_states.shape[2:])
        if output_size is not None and tuple(output_size) != doubled:
            return super().forward(hidden_states, output_size)
        made, bias = upsampled_conv(hidden_states, self.conv)
        return made if bias is None else made + bias[:, None, None]


def upsampled_conv(x: torch.Tensor, conv: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what a convolution of 3×3 makes of `x`, (batch, channels, height, width), at twice the size.

    With it comes the bias that is still to be added, as in `without_bias`.

    Of three neighbours at twice the size, two are the same pixel of `x`. So on a CPU each of the four pixels that come
    of one is a convolution of 2×2, whose weights are sums of the given ones: four ninths of the work, in half the time
    (measured with mini's shapes). In half precision the sums are rounded once more.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or x[:, 0].numel() < LEAST:
        return without_bias(conv, _upsample(x))
    dtype, (rows, out, height, width) = conv.weight.dtype, (len(x), conv.out_channels, *x.shape[2:])
    weight = conv.weight.to(torch.promote_types(dtype, torch.float32))
    weight = torch.cat([phase for half in _halves(weight, 2) for phase in _halves(half, 3)]).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if conv.bias is None else conv.bias.repeat(4)
    made = torch.empty(rows, height, 2, width, 2, out, dtype=dtype, device=x.device)
    phases = F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1).unflatten(3, (2, 2, out))
    for down, right in itertools.product((0, 1), repeat=2):
        made[:, :, down, :, right] = phases[:, down : down + height, right : right + width, down, right]
    return made.view(rows, 2 * height, 2 * width, out).permute(0, 3, 1, 2), None


def sum_in_float32(model: nn.Module) -> None:
    """Have a UNet whose weights are bfloat16 add up in float32 what its blocks hand on.

    For the keyframes: what their many steps under guidance make of rounding there decides how far a video is from one
    in float32, by up to 6 dB; in the other stages it changes nothing that is seen (measured with mini).
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            module.wide = True


def _halves(weight: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what three weights along a side are to the first and to the second of two pixels of the same colour."""
    first, middle, last = weight.unbind(side)
    return torch.stack([first, middle + last], side), torch.stack([first + middle, last], side)


def _upsample(x: torch.Tensor) -> torch.Tensor:
    """Return `x` at twice the size, in its layout.

    diffusers' `Upsample2D` copies batches of 64 and more into the usual layout first. What PyTorch cannot do in
    channels last is 2³¹ elements and more: the batch is taken in parts then.
    """
    rows = max(1, (2**31 - 1) // (4 * x[0].numel()))
    parts = [F.interpolate(part, scale_factor=2.0, mode="nearest") for part in x.split(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
