"""Clips and video files."""

import numpy as np
import torch


def to_uint8(clip: torch.Tensor) -> np.ndarray:
    """Return the frames of a (1, 3, frames, height, width) clip in [−1, 1] as (frames, height, width, 3) in 0…255.

    Values beyond the range are clamped; fractions are cut off, as the original does.
    """
    frames = (clip[0].permute(1, 2, 3, 0).float() / 2 + 0.5).clamp(0, 1)
    return (frames * 255).to(torch.uint8).cpu().numpy()


def from_uint8(frames) -> torch.Tensor:
    """Return (frames, height, width, 3) images of 0…255 as a (1, 3, frames, height, width) clip in [−1, 1]."""
    stack = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))
    return (stack.permute(3, 0, 1, 2)[None] / 127.5) - 1
