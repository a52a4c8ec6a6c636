"""Channels last: the layout in which convolutions are quick, on CPUs and on GPUs, and layers that are quick in it.

A video of (batch·frames, channels, height, width) in this layout lies in memory as (batch, frames, pixels, channels):
to the temporal layers it is the clip that they want, and to the attention the tokens, without a copy.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from show_1.models import try_kernels
from show_1.models.attention import FrameAttention
from show_1.models.group_norm import GroupNorm, activation_name
from show_1.models.resnet import ResnetBlock, UpsampleConv
from show_1.models.unet_3d_condition import VideoBlock

Model = TypeVar("Model", bound=nn.Module)

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # of convolutions' weights, by their number of axes

# Norms and the activations after them: in diffusers' UNets and autoencoder, and in the Sequentials of TemporalConv.
PAIRS = (("conv_norm_out", "conv_act"), ("0", "1"))


class OutputConv(nn.Conv2d):
    """A UNet's last convolution, in float32 at least, as the norm before it: what they round is seen in the frames.

    On a GPU PyTorch may take TF32 for it, which rounds what comes in as float16 does, and less than bfloat16.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, out_channels, height, width), in float32 where the weights are in half precision."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.conv2d(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), self.stride, self.padding)


class SpatialTransformer(Transformer2DModel):
    """diffusers' transformer over an image, the same numbers, which keeps the layout it was given.

    diffusers' own returns the usual layout, and all layers from there to the next convolution would follow.
    """

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Transformer2DModelOutput:
        """Return hidden states of the given shape, (batch, channels, height, width)."""
        tokens = self.proj_in(self.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
        change = self.proj_out(tokens).unflatten(1, hidden_states.shape[2:]).permute(0, 3, 1, 2)
        return Transformer2DModelOutput(hidden_states + change)


class GatedGELU(GEGLU):
    """diffusers' gated linear unit, the same numbers; what follows the layer is one pass over the memory."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return (…, features) for (…, input features)."""
        made = self.proj(hidden_states)
        gated = None
        quick = made.device.type == "cpu" or made.dtype != torch.float32  # in which a GPU's takes a tenth longer (H200)
        if quick and try_kernels.suit("gated_gelu", made) and made.is_contiguous():
            gated = try_kernels.attempt("gated_gelu", made)
        if gated is None:
            values, gates = made.chunk(2, dim=-1)
            gated = values * F.gelu(gates)
        return gated


def channels_last(model: Model) -> Model:
    """Have a model of convolutions compute in channels last, and return it; its parameters keep their names."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.GroupNorm and child.affine:
                norm = GroupNorm(child.num_groups, child.num_channels, child.eps, device="meta")
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm.train(child.training))
        for norm, act in PAIRS:
            name = activation_name(getattr(module, act, None))
            if name and type(getattr(module, norm, None)) is GroupNorm:
                getattr(module, norm).activation = name
                setattr(module, act, nn.Identity())
        if isinstance(module, UNet2DConditionModel):
            module.conv_norm_out.least = torch.float32
            module.up_blocks[-1].resnets[-1].wide = True  # rounding its sums was most of a call's error (measured)
            module.conv_out.__class__ = OutputConv
        if type(module) is ResnetBlock2D:
            module.__class__ = ResnetBlock
            module.activation = activation_name(module.nonlinearity)
        if isinstance(module, VideoBlock):
            for attention in module.attentions:
                if type(attention) is Transformer2DModel and attention.use_linear_projection:
                    attention.__class__ = SpatialTransformer
        if type(module) is GEGLU:
            module.__class__ = GatedGELU
        if type(module) is Upsample2D and _is_nearest_and_conv(module):
            module.__class__ = UpsampleConv
        if isinstance(module, TransformerTemporalModel):
            for part in module.modules():
                if isinstance(part, Attention) and type(part.processor) is AttnProcessor2_0:
                    part.set_processor(FrameAttention())
    for parameter in model.parameters():
        if layout := LAYOUTS.get(parameter.ndim):
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model


def _is_nearest_and_conv(sampler: Upsample2D) -> bool:
    conv = getattr(sampler, "conv", None)
    return sampler.norm is None and sampler.interpolate and type(conv) is nn.Conv2d and conv.kernel_size == (3, 3)
