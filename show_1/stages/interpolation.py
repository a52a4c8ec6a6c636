"""Stage 2: three new frames between each pair of neighbouring keyframes."""

from collections.abc import Generator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin

from show_1.models import UNet3DConditionModel
from show_1.stages.denoise import Stage, Step, denoise, prepare
from show_1.text import TextEmbeddings

SEGMENT = 5  # frames from keyframe to keyframe, both counted


class InterpolationPipeline(Stage):
    """Fills the gaps between keyframes (arXiv 2309.15818, section 3.3)."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet3DConditionModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def stream(
        self,
        text: TextEmbeddings,
        keyframes: torch.Tensor,
        *,
        steps: int,
        guidance: float,
        seed: int,
        **measures: Any,
    ) -> Generator[Step, None, torch.Tensor]:
        """Yield `steps` steps; return (1, 3, 4·(n − 1) + 1, height, width) in [−1, 1] for n keyframes.

        The segments share their noise and nothing else, so they run as one batch; a step's sample holds one a row.
        """
        scheduler = prepare(self.scheduler, steps, self._execution_device)
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.cat([keyframes[:, :, i : i + 2] for i in range(keyframes.shape[2] - 1)])
        size = (SEGMENT, *keyframes.shape[-2:])
        between = F.interpolate(pairs, size=size, mode="trilinear", align_corners=True)
        mask = torch.zeros_like(between[:, :1])
        mask[:, :, [0, -1]] = 1  # these frames are given
        sample = self.noise((1, 3, *size), generator).expand(len(pairs), -1, -1, -1, -1) * scheduler.init_noise_sigma
        segments = yield from denoise(
            self.unet,
            scheduler,
            sample,
            text,
            guidance,
            condition=torch.cat([between, mask], dim=1),
            generator=generator,
            rows=self.rows,
            **measures,
        )
        return self.join(segments)

    @staticmethod
    def join(segments: torch.Tensor) -> torch.Tensor:
        """Return (segments, 3, 5, height, width) as one clip; an inner keyframe is its own segment's."""
        starts = segments[:, :, :-1].transpose(0, 1).flatten(1, 2)
        return torch.cat([starts, segments[-1, :, -1:]], dim=1)[None]
