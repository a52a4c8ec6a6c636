"""Convolutions on a GPU whose bias is added by what reads their output anyway.

PyTorch adds it there in a pass of its own over the memory, a sixth of the time of the pixel upscale's kernels (on an
H200, measured). A group norm takes it along, and so does the sum with a shortcut.
"""

import torch
import torch.nn.functional as F
from torch import nn

from show_1.models import try_kernels

SLOW = (128, 128)  # channels, of which cuDNN's kernel over frames takes 4.7 times as long as ours in float16 (H200)


def without_bias(conv: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what a convolution makes of `x`, (batch, channels, height, width), and the bias that is still to be added.

    The bias, (out_channels,), is None where it has been added.
    """
    if conv.bias is None or not try_kernels.suit("add", x):
        return conv(x), None
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups), conv.bias


def over_frames(conv: nn.Conv3d, x: torch.Tensor, *, apart: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what a convolution of 3×1×1 makes of `x`, (batch, channels, frames, pixels), and its bias as above.

    It runs as one of 3×1: the same numbers, but PyTorch has fast kernels for it on every device; on a CPU, 3D
    convolutions have none. Unless it is to come `apart`, the bias is added.
    """
    weight = conv.weight.squeeze(-1)
    if not apart or not try_kernels.suit("add", x):
        return F.conv2d(x, weight, conv.bias, padding=(1, 0)), None
    made = None
    if weight.shape[:2] == SLOW and x.dtype == weight.dtype == torch.float16 and _channels_last(x):
        made = try_kernels.attempt("frame_conv", x, weight.squeeze(-1))
    if made is None:
        made = F.conv2d(x, weight, None, padding=(1, 0))
    return made, conv.bias


def add(x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x + y + bias, in the wider of both types; `x` and `y` are (batch, channels, …), `bias` (channels,)."""
    if bias is None:
        return x + y
    total = None
    if try_kernels.suit("add", x) and _channels_last(x) and _channels_last(y):
        total = try_kernels.attempt("add", x, y, bias)
    return x + y + bias[(..., *[None] * (x.ndim - 2))] if total is None else total


def _channels_last(x: torch.Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()
