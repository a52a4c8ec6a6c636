"""diffusers' ResNet block, with its norms, time embedding and activations in one pass over the memory each."""

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D


class ResnetBlock(ResnetBlock2D):
    """diffusers' block, the same numbers, whose norms are our `GroupNorm`: `channels_last` makes one of the other."""

    activation: str | None = None  # what `nonlinearity` is to `GroupNorm`; None where that does not know it
    last: bool = False  # of a UNet: then what it adds up is kept in float32 where the weights are bfloat16

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Return (batch, out_channels, height, width), twice or half the size where it resamples.

        `hidden_states` is (batch, in_channels, height, width), `temb` (batch, temb_channels). A UNet's last block
        returns float32 for bfloat16: rounding what is added up here was most of a network's error (measured).
        """
        shortcut = hidden_states
        hidden_states = self._act(self.norm1(hidden_states, self.activation))
        resample = self.downsample if self.upsample is None else self.upsample
        if isinstance(resample, Upsample2D):
            shortcut, hidden_states = _upsample(shortcut), _upsample(hidden_states)
        elif resample is not None:
            shortcut, hidden_states = resample(shortcut), resample(hidden_states)
        hidden_states = self.conv1(hidden_states)

        scale = shift = None
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                scale, shift = temb.chunk(2, dim=1)
            else:
                hidden_states = hidden_states + temb[:, :, None, None]
        hidden_states = self._act(self.norm2(hidden_states, self.activation, scale, shift))
        hidden_states = self.conv2(self.dropout(hidden_states))

        if self.last and shortcut.dtype == torch.bfloat16:
            shortcut = shortcut.float()
        if self.conv_shortcut is not None:
            weights = (each.to(shortcut.dtype) for each in (self.conv_shortcut.weight, self.conv_shortcut.bias))
            shortcut = F.conv2d(shortcut, *weights)
        hidden_states = shortcut + hidden_states
        return hidden_states if self.output_scale_factor == 1 else hidden_states / self.output_scale_factor

    def _act(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.activation else self.nonlinearity(hidden_states)


def _upsample(x: torch.Tensor) -> torch.Tensor:
    """Return `x` at twice the size, in its layout.

    diffusers' `Upsample2D` copies batches of 64 and more into the usual layout first. What PyTorch cannot do in
    channels last is 2³¹ elements and more: the batch is taken in parts then.
    """
    rows = max(1, (2**31 - 1) // (4 * x[0].numel()))
    parts = [F.interpolate(part, scale_factor=2.0, mode="nearest") for part in x.split(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
