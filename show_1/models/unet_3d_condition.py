"""The video UNet of all four video stages: diffusers' 2D UNet with temporal layers between its spatial ones.

One class reads the configurations of both families: `SimpleCrossAttn…3D` (pixel stages, text beside the image tokens as
in DeepFloyd IF) and `CrossAttn…3D` (latent upscale, text in its own attention as in ModelScope and ZeroScope). Source:
arXiv 2309.15818, section 3, and the configurations of the showlab/show-1-* repositories.
"""

import inspect
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

import torch
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401 - from_pretrained of a stage looks for it here
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import Downsample2D, TemporalConvLayer, Upsample2D
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.utils import BaseOutput
from torch import nn

from show_1.models.attention import TextAttention
from show_1.models.convolution import add, over_frames
from show_1.models.group_norm import GroupNorm


@dataclass
class UNet3DConditionOutput(BaseOutput):
    """The prediction, (batch, out_channels, frames, height, width), and what a later call may be given, if asked for.

    `deep` is (batch·frames, channels, height, width): the hidden states that enter the last up block.
    """

    sample: torch.Tensor
    deep: torch.Tensor | None = None


class TemporalConv(TemporalConvLayer):
    """diffusers' temporal convolution, the same numbers, run over frames × pixels."""

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Return hidden states of the given shape, (batch·frames, channels, height, width), and dtype."""
        clip = over_pixels(hidden_states, num_frames)
        change, bias = clip, None
        for norm, *layers, convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            change = norm(change) if bias is None else norm(change, added=bias)
            for layer in layers:
                change = layer(change)
            change, bias = over_frames(convolution, change, apart=isinstance(norm, GroupNorm))
        return add(clip, change, bias).transpose(1, 2).reshape(hidden_states.shape)


class TemporalTransformer(TransformerTemporalModel):
    """diffusers' temporal transformer, which copies on the way in only, and keeps the layout it was given."""

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Return hidden states of the given shape, (batch·frames, channels, height, width)."""
        height, width = hidden_states.shape[-2:]
        clip = hidden_states.unflatten(0, (-1, num_frames))
        tokens = self.norm(over_pixels(hidden_states, num_frames)).permute(0, 3, 2, 1).flatten(0, 1)
        tokens = self.proj_in(tokens)  # (batch·pixels, frames, channels)
        for block in self.transformer_blocks:
            tokens = block(tokens)
        change = self.proj_out(tokens).unflatten(0, (-1, height, width)).permute(0, 3, 4, 1, 2)
        return (clip + change).flatten(0, 1)


class VideoBlock(nn.Module):
    """A down, mid or up block: the layers of diffusers' 2D block, each followed by a temporal layer.

    ResNet → temporal convolution → attention → temporal transformer, as often as the 2D block has ResNets; then the 2D
    block's down- or upsampler, which has no temporal layer.
    """

    def __init__(self, block: nn.Module, norm_num_groups: int):
        super().__init__()
        self.resnets = block.resnets
        # 32 groups whatever the configuration says: the original's temporal convolution knows no other number.
        self.temp_convs = nn.ModuleList(
            TemporalConv(resnet.out_channels, dropout=0.1, norm_num_groups=32) for resnet in block.resnets
        )
        self.attentions = getattr(block, "attentions", nn.ModuleList())
        for attention in self.attentions:
            if isinstance(attention, Attention):
                attention.set_processor(TextAttention())
        channels = block.resnets[-1].out_channels
        # In the pixel family `attention_head_dim` is the *size* of the spatial attention's heads, yet the number of the
        # temporal attention's: the released weights were trained so.
        heads = getattr(block, "attention_head_dim", None) or getattr(block, "num_attention_heads", 1)
        self.temp_attentions = nn.ModuleList(
            TemporalTransformer(
                num_attention_heads=heads,
                attention_head_dim=channels // heads,
                in_channels=channels,
                norm_num_groups=norm_num_groups,
            )
            for _ in self.attentions
        )
        self.downsamplers = getattr(block, "downsamplers", None)
        self.upsamplers = getattr(block, "upsamplers", None)

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        text: torch.Tensor,
        num_frames: int,
        skips: list[torch.Tensor] | None = None,
        upsample_size: torch.Size | None = None,
        resample: bool = True,
    ) -> list[torch.Tensor]:
        """Return the hidden states after each layer, (batch·frames, channels, height, width); the last is the block's.

        `temb` is (batch·frames, features), `text` (batch, tokens, features) in the pixel family, whose frames share it,
        and (batch·frames, tokens, features) in the latent one.
        An up block is given `skips`, one tensor a ResNet, and takes the last first. Without `resample` the block ends
        before its down- or upsampler.
        """
        outputs = []
        for resnet, temp_conv, attention, temp_attention in zip_longest(
            self.resnets, self.temp_convs, self.attentions, self.temp_attentions
        ):
            if skips is not None:
                hidden_states = torch.cat([hidden_states, skips.pop()], dim=1)
            hidden_states = temp_conv(resnet(hidden_states, temb), num_frames=num_frames)
            if attention is not None:
                hidden_states = attention(hidden_states, encoder_hidden_states=text)
                if not isinstance(attention, Attention):  # as in the pixel family: text tokens beside the image's
                    hidden_states = hidden_states.sample
                hidden_states = temp_attention(hidden_states, num_frames=num_frames)
            outputs.append(hidden_states)
        for sampler in (*(self.downsamplers or ()), *(self.upsamplers or ())) if resample else ():
            if isinstance(sampler, Upsample2D):
                hidden_states = sampler(hidden_states.to(sampler.conv.weight.dtype), upsample_size)
            elif isinstance(sampler, Downsample2D):
                hidden_states = sampler(hidden_states.to(sampler.conv.weight.dtype))
            else:  # the pixel family resamples within a ResNet, which wants the time embedding
                hidden_states = sampler(hidden_states, temb)
            outputs.append(hidden_states)
        return outputs


class UNet3DConditionModel(UNet2DConditionModel):
    """Predicts the noise of a video; `UNet2DConditionModel` whose every constructor field keeps its meaning.

    Block types carry their 3D names (`SimpleCrossAttnDownBlock3D` for `SimpleCrossAttnDownBlock2D`).
    `transfromer_in_opt` (spelt so in the released files) puts a temporal transformer right after `conv_in`.
    """

    _supports_gradient_checkpointing = False
    # The frames show what these round: in bfloat16 it was most of the error of mini's pixel upscale (measured).
    _keep_in_fp32_modules: ClassVar = ["conv_norm_out", "conv_out"]

    def __init__(self, transfromer_in_opt: bool = False, **config):
        block_types = {
            key: config[key] for key in ("down_block_types", "mid_block_type", "up_block_types") if key in config
        }
        for key in ("class_embeddings_concat", "dual_cross_attention"):
            if config.get(key):
                raise ValueError(f"{key} = true is not known here")
        super().__init__(**config | {key: _to_2d(value) for key, value in block_types.items()})
        self.register_to_config(transfromer_in_opt=transfromer_in_opt, **block_types)

        groups = self.config.norm_num_groups
        self.transformer_in = (
            TemporalTransformer(num_attention_heads=8, attention_head_dim=64, in_channels=self.conv_in.out_channels)
            if transfromer_in_opt
            else None
        )
        self.down_blocks = nn.ModuleList(VideoBlock(block, groups) for block in self.down_blocks)
        self.mid_block = VideoBlock(self.mid_block, groups)
        self.up_blocks = nn.ModuleList(VideoBlock(block, groups) for block in self.up_blocks)
        self.frames_share_text = any(isinstance(attention, Attention) for attention in self.mid_block.attentions)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load as diffusers does, but strictly: a key missing, left over or misshapen is a ValueError that names it.

        With `output_loading_info` the caller gets the lists of such keys instead, and looks at them.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if torch.float64 in (kwargs.get("dtype"), kwargs.get("torch_dtype")):
            model.double()  # with what diffusers would keep in float32 then too
        if output_loading_info:
            return model, info
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[fault]:
                raise ValueError(f"{fault.replace('_', ' ')} in the weights: {', '.join(map(str, info[fault]))}")
        return model

    def set_attention_slice(self, slice_size: str | int | list[int] | None) -> None:
        """Do nothing: PyTorch's attention takes little memory, and diffusers' own processors want a text a frame."""

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # diffusers reads the configuration's fields off the constructor; ours takes those of the 2D model as they are.
        return {"transfromer_in_opt", *inspect.signature(UNet2DConditionModel.__init__).parameters}

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        deep: torch.Tensor | None = None,
        return_deep: bool = False,
        return_dict: bool = True,
    ) -> UNet3DConditionOutput | tuple[torch.Tensor | None, ...]:
        """Return the prediction, (batch, out_channels, frames, height, width).

        `sample` is (batch, in_channels, frames, height, width), noise-like, about [−1, 1] where it is clean; `timestep`
        0…999, one for all or one a clip; `encoder_hidden_states` the text, (batch, tokens, features);
        `class_labels` the noise level of the condition, (batch,) in 0…999, for the pixel upscale alone.

        With `return_deep` the deep features come with it. With `deep`, another step's, only the first down block and
        the last up block are computed (DeepCache, arXiv 2312.00858): a prediction that is nearly right, at a fraction
        of the work.
        """
        num_frames = sample.shape[2]
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        temb = self.time_embedding(self.get_time_embed(sample, timestep))
        for embedding in (
            self.get_class_embed(sample, class_labels),
            self.get_aug_embed(temb, encoder_hidden_states, {}),
        ):
            temb = temb if embedding is None else temb + embedding
        temb = temb if self.time_embed_act is None else self.time_embed_act(temb)
        temb = temb.repeat_interleave(num_frames, dim=0)
        text = self.process_encoder_hidden_states(encoder_hidden_states, {})
        if not self.frames_share_text:
            text = text.repeat_interleave(num_frames, dim=0)

        hidden_states = self.conv_in(sample.transpose(1, 2).flatten(0, 1))
        if self.transformer_in is not None:
            hidden_states = self.transformer_in(hidden_states, num_frames=num_frames)
        skips = [hidden_states]
        if deep is None:
            for block in self.down_blocks:
                skips += block(skips[-1], temb, text, num_frames)
            deep = self.mid_block(skips[-1], temb, text, num_frames)[-1]
            for block in self.up_blocks[:-1]:
                skips, own = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
                deep = block(deep, temb, text, num_frames, own, skips[-1].shape[-2:])[-1]
        else:
            skips += self.down_blocks[0](hidden_states, temb, text, num_frames, resample=False)
        hidden_states = self.up_blocks[-1](deep, temb, text, num_frames, skips)[-1]
        dtype = torch.promote_types(hidden_states.dtype, self.conv_norm_out.weight.dtype)
        hidden_states = self.conv_out(self.conv_act(self.conv_norm_out(hidden_states.to(dtype))))
        prediction = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2)
        deep = deep if return_deep else None  # it is large
        return UNet3DConditionOutput(prediction, deep) if return_dict else (prediction, deep)


def over_pixels(hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Return (batch·frames, channels, height, width) as (batch, channels, frames, pixels), without a copy.

    Channels go last and back on the way: so a single clip gets the strides that it would have among several. PyTorch
    tells layouts by them, and with others norms and convolutions would copy, twice their time on a CPU (measured).
    """
    pixels = hidden_states.permute(0, 2, 3, 1).unflatten(0, (-1, num_frames)).flatten(2, 3)
    return pixels.permute(0, 3, 1, 2)


def frame_multiple(unet: UNet2DConditionModel) -> int:
    """Return what the frames' height and width must be multiples of; 1 where the upsamplers adapt to any size."""
    adapts = all(isinstance(s, Upsample2D) for block in unet.up_blocks for s in block.upsamplers or ())
    return 1 if adapts else 2**unet.num_upsamplers


def _to_2d(names: str | list[str] | tuple[str, ...]) -> str | list[str]:
    return names.replace("3D", "2D") if isinstance(names, str) else [_to_2d(name) for name in names]
