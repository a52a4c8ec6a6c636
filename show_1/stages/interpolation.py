"""Stage 2: three new frames between each pair of neighbouring keyframes."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin

from show_1.models import UNet3DConditionModel
from show_1.stages.denoise import Stage, Step, denoise, prepare, seeded
from show_1.text import TextEmbeddings

SEGMENT = 5  # frames from keyframe to keyframe, both counted


def between(ends: torch.Tensor) -> torch.Tensor:
    """Return what the UNet is given of a segment's ends, (batch, 3, 2, height, width), beside the noise.

    That is the blend of both, and a mask which is 1 where they are: (batch, 4, 5, height, width).
    """
    blend = F.interpolate(ends, size=(SEGMENT, *ends.shape[-2:]), mode="trilinear", align_corners=True)
    mask = torch.zeros_like(blend[:, :1])
    mask[:, :, [0, -1]] = 1
    return torch.cat([blend, mask], dim=1)


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
        seed: int | Sequence[int],
        **measures: Any,
    ) -> Generator[Step, None, torch.Tensor]:
        """Yield `steps` steps; return (prompts, 3, 4·(n − 1) + 1, height, width) about [−1, 1].

        `keyframes` is (prompts, 3, n, height, width) in [−1, 1]. The segments of a prompt share their noise, also that
        which a scheduler draws, and nothing else, so they run as one batch; a step's sample holds one a row.
        """
        scheduler = prepare(self.scheduler, steps, self._execution_device)
        generators = seeded(seed)
        pairs = torch.stack([keyframes[:, :, i : i + 2] for i in range(keyframes.shape[2] - 1)], dim=1).flatten(0, 1)
        size = (SEGMENT, *keyframes.shape[-2:])
        noise = self.noise((3, *size), generators).repeat_interleave(keyframes.shape[2] - 1, dim=0)
        generators = [generator.clone_state() for generator in generators for _ in range(keyframes.shape[2] - 1)]
        segments = yield from denoise(
            self.unet,
            scheduler,
            noise * scheduler.init_noise_sigma,
            text,
            guidance,
            condition=between(pairs),
            generators=generators,
            rows=self.rows,
            **measures,
        )
        return self.join(segments, clips=len(keyframes))

    @staticmethod
    def join(segments: torch.Tensor, clips: int = 1) -> torch.Tensor:
        """Return (clips·segments, 3, 5, height, width) as clips; an inner keyframe is of the segment that it starts."""
        by_clip = segments.unflatten(0, (clips, -1)).transpose(1, 2)
        return torch.cat([by_clip[:, :, :, :-1].flatten(2, 3), by_clip[:, :, -1, -1:]], dim=2)
