"""Stage 3: four times the size in pixels, from a sharp first frame on."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin, UNet2DConditionModel

from show_1.models import UNet3DConditionModel
from show_1.stages.denoise import Stage, Step, denoise, fold, prepare, seeded, unfold
from show_1.text import TextEmbeddings

SCALE = 4
WINDOW = 8  # frames at a time; neighbouring windows share one


def window_starts(frames: int) -> range:
    """Return the first frame of each window that covers `frames` frames; the last window may be shorter."""
    return range(0, max(frames - 1, 1), WINDOW - 1)


class PixelUpscalePipeline(Stage):
    """Enlarges a clip window by window (arXiv 2309.15818, section 3.4).

    Each window is led by one sharp frame: the first by the enlarged first frame, which an image model draws (diffusers'
    `IFSuperResolutionPipeline`, stage II of DeepFloyd IF), each other one by the last frame of the window before.
    """

    model_cpu_offload_seq = "first_frame_unet->unet"

    def __init__(
        self,
        unet: UNet3DConditionModel,
        scheduler: SchedulerMixin,
        image_noising_scheduler: SchedulerMixin,
        first_frame_unet: UNet2DConditionModel,
        first_frame_scheduler: SchedulerMixin,
        first_frame_image_noising_scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            image_noising_scheduler=image_noising_scheduler,
            first_frame_unet=first_frame_unet,
            first_frame_scheduler=first_frame_scheduler,
            first_frame_image_noising_scheduler=first_frame_image_noising_scheduler,
        )

    @torch.no_grad()
    def stream_first_frame(
        self,
        text: TextEmbeddings,
        image: torch.Tensor,
        *,
        steps: int,
        guidance: float,
        noise_level: int,
        seed: int | Sequence[int],
        schedule: str | None = None,
        **measures: Any,
    ) -> Generator[Step, None, torch.Tensor]:
        """Yield `steps` steps; return (prompts, 3, 4·height, 4·width) of `image`, (prompts, 3, height, width)."""
        scheduler = prepare(self.first_frame_scheduler, steps, self._execution_device, schedule)
        generators = seeded(seed)
        enlarged = _enlarge(image)
        sample = self.noise(enlarged.shape[1:], generators) * scheduler.init_noise_sigma
        noise = self.noise(enlarged.shape[1:], generators)
        condition = _add_noise(self.first_frame_image_noising_scheduler, enlarged, noise, noise_level)
        return (
            yield from denoise(
                self.first_frame_unet,
                scheduler,
                sample,
                text,
                guidance,
                condition=condition,
                noise_level=noise_level,
                generators=generators,
                rows=self.rows,
                **measures,
            )
        )

    @torch.no_grad()
    def stream(
        self,
        text: TextEmbeddings,
        clip: torch.Tensor,
        first_frame: torch.Tensor,
        *,
        steps: int,
        guidance: float,
        noise_level: int,
        seed: int | Sequence[int],
        shared_noise: float = 0.0,
        **measures: Any,
    ) -> Generator[Step, None, torch.Tensor]:
        """Yield `steps` steps a window; return (prompts, 3, frames, 4·height, 4·width) about [−1, 1].

        `clip` is (prompts, 3, frames, height, width) and `first_frame` (prompts, 3, 4·height, 4·width), in [−1, 1].
        `shared_noise` is as in the keyframes.
        """
        windows, lead = [], first_frame
        for start in window_starts(clip.shape[2]):
            scheduler = prepare(self.scheduler, steps, self._execution_device)
            generators = seeded(seed)  # every window draws the same noise
            window = clip[:, :, start : start + WINDOW]
            enlarged = unfold(_enlarge(fold(window)), window.shape)
            sample = self.noise(enlarged.shape[1:], generators, shared_noise) * scheduler.init_noise_sigma
            noise = self.noise(enlarged.shape[1:], generators)
            condition = _add_noise(self.image_noising_scheduler, enlarged, noise, noise_level)
            condition[:, :, 0] = lead
            upscaled = yield from denoise(
                self.unet,
                scheduler,
                sample,
                text,
                guidance,
                condition=condition,
                noise_level=noise_level,
                generators=generators,
                rows=self.rows,
                **measures,
            )
            lead = upscaled[:, :, -1]
            windows.append(upscaled)
        # The frame that two windows share is the later one's.
        return torch.cat([*(window[:, :, :-1] for window in windows[:-1]), windows[-1]], dim=2)


def _enlarge(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images, scale_factor=SCALE, mode="bilinear", align_corners=True)


def _add_noise(scheduler: SchedulerMixin, clean: torch.Tensor, noise: torch.Tensor, level: int) -> torch.Tensor:
    return scheduler.add_noise(clean, noise, torch.tensor([level], device=clean.device))
