"""Group norm that is quick in channels last, and takes a scale and shift and an activation along."""

import torch
import torch.nn.functional as F
from torch import nn

from show_1.models import try_kernels

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu}


class GroupNorm(nn.GroupNorm):
    """PyTorch's group norm, the same numbers; where channels come last, on the CPU from sums over the pixels.

    PyTorch's own has two ways for this layout on the CPU: that for 1024 pixels and more is quick, the other takes up to
    ten times as long as in the usual layout, and both are slow backwards (measured with 2.13). On a GPU it knows the
    usual layout alone, and the convolutions around it would have theirs copied into that and back: where no gradients
    are recorded, `gpu_kernels` does better.
    """

    activation: str | None = None  # of a module that follows and has been taken into this one
    least: torch.dtype | None = None  # what is computed, and returned, in this type at least

    def forward(
        self,
        x: torch.Tensor,
        activation: str | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        added: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return activation(norm(x + added)·(1 + scale) + shift), in the layout of `x`, (batch, channels, …).

        `scale` and `shift` are (batch, channels) and come together, `added` is that or (channels,); `activation` is a
        key of `ACTIVATIONS`. Where `x` is in a wider type than the weights, what comes back is in theirs.
        """
        activation = activation or self.activation
        x = x if self.least is None else x.to(torch.promote_types(x.dtype, self.least))
        dtype = x.dtype if self.least or x.dtype.itemsize <= self.weight.dtype.itemsize else self.weight.dtype
        if try_kernels.suit("group_norm", x, dtype) and x.movedim(1, -1).is_contiguous():
            rest = (dtype, self.num_groups, self.weight, self.bias, self.eps, activation, scale, shift, added)
            y = try_kernels.attempt("group_norm", x, *rest)
            if y is not None:
                return y
        if added is not None:
            x = x + _over_pixels(added, x).to(x.dtype)
        if self._suits_sums(x):
            y = self._from_sums(x, scale, shift)
        else:
            y = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
            if scale is not None:
                scale, shift = (_over_pixels(factor, x) for factor in (scale, shift))
                y = torch.addcmul(shift, y, 1 + scale)
        return (ACTIVATIONS[activation](y) if activation else y).to(dtype)

    def _suits_sums(self, x: torch.Tensor) -> bool:
        if x.ndim != 4 or x.device.type != "cpu":
            return False
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        return x.shape[2] * x.shape[3] < 1024 or torch.is_grad_enabled()

    def _from_sums(self, x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)  # in half precision sums of squares would overflow
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2).to(dtype)
        size = pixels.shape[1] * (self.num_channels // self.num_groups)
        mean = self._by_group(pixels.sum(1)) / size
        variance = (self._by_group(pixels.square().sum(1)) / size - mean.square()).clamp(min=0)
        factor = torch.rsqrt(variance + self.eps) * self.weight.unflatten(0, (self.num_groups, -1))
        offset = self.bias.unflatten(0, (self.num_groups, -1)) - mean * factor
        factor, offset = factor.flatten(1), offset.flatten(1)
        if scale is not None:
            scale, shift = 1 + scale.to(dtype), shift.to(dtype)
            factor, offset = factor * scale, torch.addcmul(shift, offset, scale)
        normalised = torch.addcmul(offset[:, None], pixels, factor[:, None])
        return normalised.to(x.dtype).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _by_group(self, sums: torch.Tensor) -> torch.Tensor:
        return sums.unflatten(1, (self.num_groups, -1)).sum(-1, keepdim=True)


def activation_name(module: nn.Module | None) -> str | None:
    """Return the key of `ACTIVATIONS` that computes what the module does, None where there is none."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    return "silu" if type(module) is nn.SiLU else None


def _over_pixels(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return factor[(..., *[None] * (x.ndim - 2))]
