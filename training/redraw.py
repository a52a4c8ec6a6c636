"""True clips as the cascade draws them, so that the later stages learn to repair its own faults.

A true clip gets so much noise that little but places and outlines is left of it, and from there the keyframes' model
draws it anew (SDEdit, arXiv 2108.01073), with the faults in its details that it has in videos made from prompts.
Interpolation, which learns from the keyframes alone, draws the frames between. The true clip shows the same things at
the same places, which is what a later stage is to make of it.
"""

import functools
from collections import deque
from pathlib import Path

import numpy as np
import torch

from show_1.cascade import Cascade
from show_1.loading import load_interpolation, load_keyframes
from show_1.stages import InterpolationPipeline, KeyframesPipeline
from show_1.stages.denoise import denoise, finish, prepare, seeded, share_noise
from show_1.stages.interpolation import SEGMENT
from training import world

TIMES = torch.arange(29) / 28  # of a clip's frames
EVERY = SEGMENT - 1  # frames from keyframe to keyframe
NOISE_LEVELS = (350, 700)  # where the drawing starts: less leaves details, more moves things
STEPS = 8  # of a whole sampling, of which the drawing takes what is left at its level
KEPT = 256  # clips at hand
CPU = torch.device("cpu")  # where stages are loaded and draw their noise, whatever the default is meanwhile


class Redrawn:
    """Small clips, or the keyframes alone, drawn by the trained stages in `mini`, beside the scenes they should show.

    Each is used several times, in other parts: `fresh` is the share of the clips asked for that are drawn anew.
    """

    def __init__(self, mini: Path, device: torch.device, dtype: torch.dtype, fresh: float, interpolated: bool):
        self.mini, self.device, self.dtype, self.fresh, self.interpolated = mini, device, dtype, fresh, interpolated
        self.cascade = Cascade.load("mini")
        self.kept: deque[tuple[world.Scene, torch.Tensor]] = deque(maxlen=KEPT)
        self.rng: np.random.Generator | None = None

    def __call__(self, rng: np.random.Generator, count: int) -> tuple[list[world.Scene], torch.Tensor]:
        """Return `count` scenes and the clips drawn of them, (count, 3, 29 or 8, height, width)."""
        if rng is not self.rng:  # as another begins with nothing, it always chooses the same
            self.kept.clear()
            self.rng = rng
        fresh = rng.binomial(count, self.fresh) if self.kept else count
        if fresh:
            scenes = [world.sample(rng) for _ in range(fresh)]
            self.kept.extend(zip(scenes, self.draw(scenes, rng.integers(*NOISE_LEVELS)), strict=True))
        chosen = [self.kept[k] for k in rng.integers(len(self.kept), size=count)]
        return [scene for scene, _ in chosen], torch.stack([clip for _, clip in chosen])

    @functools.cached_property
    def keyframes(self) -> KeyframesPipeline:
        """Loaded where it is first used, as the other is: on a CPU in the process that makes the batches."""
        folders = {"keyframes": self.mini / "show-1-base"}
        with CPU:
            return load_keyframes(self.cascade, folders, self.dtype).to(self.device)

    @functools.cached_property
    def interpolation(self) -> InterpolationPipeline:
        folders = {"interpolation": self.mini / "show-1-interpolation"}
        with CPU:
            return load_interpolation(self.cascade, folders, self.dtype).to(self.device)

    @torch.no_grad()
    def draw(self, scenes: list[world.Scene], noise_level: int) -> torch.Tensor:
        """Return scenes, drawn on from true keyframes noised to 0…999: (scenes, 3, 29 or 8, height, width)."""
        cascade, keyframes = self.cascade, self.keyframes
        size = cascade.keyframes.height, cascade.keyframes.width
        clean = world.render(scenes, *size, TIMES[::EVERY]).to(self.device)
        noise = share_noise(torch.randn_like(clean), torch.randn_like(clean[:, :, :1]), cascade.keyframes.shared_noise)
        seeds = torch.randint(2**31, (len(scenes),)).tolist()
        with CPU:
            scheduler, generators = prepare(keyframes.scheduler, STEPS, self.device), seeded(seeds)
        timesteps = scheduler.timesteps[scheduler.timesteps <= noise_level]
        noisy = scheduler.add_noise(clean, noise, timesteps[:1].expand(len(clean)))
        # In the world's plainest words, as a caption may leave out what the model would then draw otherwise.
        captions = [world.plain_caption(s.objects, s.place, s.motion) for s in scenes]
        text = keyframes.encode(captions)
        guidance = cascade.keyframes.guidance
        measures = {"timesteps": timesteps, "generators": generators}
        drawn = finish(denoise(keyframes.unet, scheduler, noisy, text, guidance, **measures))
        if not self.interpolated:
            return drawn.float()
        settings = cascade.stream_settings("interpolation")
        with CPU:
            return self.interpolation(text, drawn.to(self.dtype), **settings, seed=seeds).float()
