from show_1.models.unet_3d_condition import UNet3DConditionModel

__all__ = ["UNet3DConditionModel"]
