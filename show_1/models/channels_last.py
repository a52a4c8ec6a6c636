"""Channels last: the layout in which convolutions are quick, on CPUs and on GPUs, and group norms that are quick in it.

A video of (batch·frames, channels, height, width) in this layout lies in memory as (batch, frames, pixels, channels):
to the temporal layers it is the clip that they want, and to the attention the tokens, without a copy.
"""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class GroupNorm(nn.GroupNorm):
    """PyTorch's group norm, the same numbers; on the CPU, where channels come last, from sums over the pixels.

    PyTorch's own has two ways for this layout: that for 1024 pixels and more is quick, the other takes up to ten times
    as long as in the usual layout, and both are slow backwards (measured with 2.13).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` normalised, (batch, channels, height, width), in its layout."""
        if not (x.ndim == 4 and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)):
            return super().forward(x)  # in half precision sums of squares would overflow; a GPU's is quick enough
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        if x.shape[2] * x.shape[3] >= 1024 and not torch.is_grad_enabled():
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        size = pixels.shape[1] * (self.num_channels // self.num_groups)
        mean = self._by_group(pixels.sum(1)) / size
        variance = (self._by_group(pixels.square().sum(1)) / size - mean.square()).clamp(min=0)
        scale = torch.rsqrt(variance + self.eps) * self.weight.unflatten(0, (self.num_groups, -1))
        shift = self.bias.unflatten(0, (self.num_groups, -1)) - mean * scale
        normalised = torch.addcmul(shift.flatten(1)[:, None], pixels, scale.flatten(1)[:, None])
        return normalised.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _by_group(self, sums: torch.Tensor) -> torch.Tensor:
        return sums.unflatten(1, (self.num_groups, -1)).sum(-1, keepdim=True)


def channels_last(model: Model) -> Model:
    """Have a model of convolutions compute in channels last, and return it; its parameters keep their names."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.GroupNorm and child.affine:
                norm = GroupNorm(child.num_groups, child.num_channels, child.eps, device="meta")
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm.train(child.training))
    for parameter in model.parameters():
        if parameter.ndim == 4:  # the temporal convolutions' have five, and are not run as they lie
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model
