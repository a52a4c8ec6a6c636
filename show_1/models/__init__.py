"""The cascade's own network; everything else in it is diffusers' and transformers'."""

from show_1.models.channels_last import channels_last
from show_1.models.resnet import sum_in_float32
from show_1.models.unet_3d_condition import UNet3DConditionModel, frame_multiple

__all__ = ["UNet3DConditionModel", "channels_last", "frame_multiple", "sum_in_float32"]
