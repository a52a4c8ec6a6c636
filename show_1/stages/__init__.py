"""The cascade's stages, each a diffusers pipeline over the shared denoising loop."""

from show_1.stages.denoise import Pause, Step
from show_1.stages.interpolation import InterpolationPipeline
from show_1.stages.keyframes import KeyframesPipeline
from show_1.stages.latent_upscale import LatentUpscalePipeline
from show_1.stages.pixel_upscale import PixelUpscalePipeline, window_starts

__all__ = [
    "InterpolationPipeline",
    "KeyframesPipeline",
    "LatentUpscalePipeline",
    "Pause",
    "PixelUpscalePipeline",
    "Step",
    "window_starts",
]
