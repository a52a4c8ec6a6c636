"""The judge of mini's videos: a small classifier of objects, place and motion, trained on the world's own clips.

`python -m training.judge --minutes N` trains it, goes on from where it stopped, and says how often it is right on clips
that it has not seen.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import DataLoader

from show_1.errors import Show1Error, exit_code
from show_1.files import write_atomically
from show_1.stages.denoise import fold, unfold
from training import models, world
from training.batches import FULL, KEYFRAME_TIMES, SMALL, Batches, labels

WEIGHTS = Path(__file__).parent / "judge.safetensors"
SIZE = (80, 144)  # height, width of what it looks at: half the final size
FRAMES = len(KEYFRAME_TIMES)
OBJECTS, PLACES, MOTIONS = list(world.OBJECTS), list(world.PLACES), list(world.MOTIONS)


class Judge(nn.Module):
    """Says what a clip shows: the object and the place from its frames, the motion from how they differ."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(below, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1, groups=width // 8),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            )
            for below, width in itertools.pairwise(widths)
        )
        self.objects = nn.Linear(2 * widths[-1], len(OBJECTS))
        self.place = nn.Linear(2 * widths[-1], len(PLACES))
        self.movement = nn.Conv2d(widths[-1], 24, 1)
        cells = (SIZE[0] // 16) * (SIZE[1] // 16)
        self.motion = nn.Sequential(
            nn.Linear(24 * cells, 64), nn.Flatten(), nn.SiLU(), nn.Linear(64 * FRAMES, 128), nn.SiLU(),
            nn.Linear(128, len(MOTIONS)),
        )  # fmt: skip

    def features(self, frames: torch.Tensor) -> list[torch.Tensor]:
        """Return what each level sees in (frames, 3, height, width) images in [−1, 1], finest first."""
        found = []
        for level in self.levels:
            frames = level(frames)
            found.append(frames)
        return found

    def forward(self, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits of objects (batch, 50), place (batch, 12) and motion (batch, 11).

        `clip` is (batch, 3, frames, height, width) in [−1, 1] of any size and any number of frames from 8 on.
        """
        found = self.last_features(clip)
        whole = pooled(found)
        movement = self.movement(found.flatten(0, 1)).flatten(1).unflatten(0, found.shape[:2])
        # Less its mean over time, no frame alone can tell the motion.
        return self.objects(whole), self.place(whole), self.motion(movement - movement.mean(1, keepdim=True))

    def last_features(self, clip: torch.Tensor) -> torch.Tensor:
        """Return the coarsest features, (batch, frames, channels, height, width)."""
        return self.features(fold(look(clip)))[-1].unflatten(0, (len(clip), -1))

    def sides(self, clip: torch.Tensor) -> list[torch.Tensor]:
        """Return logits of objects, (batch, 50), for what is on the left and on the right.

        Of two objects, the world has one on each side, and from the whole of a frame it is hard to tell both.
        """
        found = self.last_features(clip)
        half = found.shape[-1] // 2
        return [self.objects(pooled(part)) for part in (found[..., :half], found[..., -half:])]

    def stills(self, clip: torch.Tensor) -> torch.Tensor:
        """Return which object each frame shows that is looked at alone, (batch, frames): its number among OBJECTS."""
        found = self.features(fold(_resize(clip, SIZE)))[-1]
        return self.objects(pooled(found[:, None])).argmax(1).unflatten(0, (len(clip), -1))

    @torch.no_grad()
    def verdict(self, clip: torch.Tensor) -> dict[str, str | list[str] | set[str]]:
        """Return what one clip, (1, 3, frames, height, width), shows: object, place, motion, what on both sides.

        And what each frame shows that is looked at alone ("stills").
        """
        clip = clip.float()
        objects, place, motion = self(clip)
        return {
            "object": OBJECTS[objects.argmax()],
            "stills": [OBJECTS[number] for number in self.stills(clip)[0]],
            "pair": {OBJECTS[side.argmax()] for side in self.sides(clip)},
            "place": PLACES[place.argmax()],
            "motion": MOTIONS[motion.argmax()],
        }

    @torch.no_grad()
    def distance(self, clip: torch.Tensor, truth: torch.Tensor) -> float:
        """Return how differently the judge sees two clips, as LPIPS does (arXiv 1801.03924), with its own features.

        Both are looked at in their own size, which has to be the same, down to their finest detail.
        """
        frames = (fold(_eight(c.float())) for c in (clip, truth))
        pairs = zip(*map(self.features, frames), strict=True)
        return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean().item() for a, b in pairs)


def pooled(found: torch.Tensor) -> torch.Tensor:
    """Return means and maxima over the area of features, and of both the mean over frames: (batch, 2 · channels)."""
    return torch.cat([found.mean((-2, -1)), found.amax((-2, -1))], dim=-1).mean(1)


def look(clip: torch.Tensor) -> torch.Tensor:
    """Return eight frames of a clip, evenly spread, at the judge's size."""
    return _resize(_eight(clip), SIZE)


def _eight(clip: torch.Tensor) -> torch.Tensor:
    return clip[:, :, torch.linspace(0, clip.shape[2] - 1, FRAMES).round().long()]


def _resize(clip: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    resized = F.interpolate(fold(clip), size=size, mode="bilinear", antialias=True, align_corners=False)
    return unfold(resized, clip.shape)


def clips(rng: np.random.Generator) -> dict:
    """Return a batch of clips with what they show: half of them as coarse as keyframes, some noisy or discoloured."""
    scenes = [world.sample(rng) for _ in range(15)] + [world.sample(rng, pairs=1)]
    clip = world.render(scenes, *SIZE, KEYFRAME_TIMES)
    coarse = _resize(_resize(clip[::2], SMALL), SIZE)
    clip[::2] = coarse.lerp(clip[::2], float(rng.random()))
    clip += 0.15 * torch.rand(len(clip), 1, 1, 1, 1) * torch.randn_like(clip)
    clip = clip * (0.9 + 0.2 * torch.rand(len(clip), 1, 1, 1, 1)) + 0.2 * (torch.rand(len(clip), 3, 1, 1, 1) - 0.5)
    two = [index for index, scene in enumerate(scenes) if len(scene.objects) == 2]
    sides = [[OBJECTS.index(world.from_left(scenes[index])[side]) for index in two] for side in (0, 1)]
    return {"clip": clip, "two": two, "sides": torch.tensor(sides)} | labels(scenes)


def load() -> Judge:
    """Return the trained judge."""
    if not WEIGHTS.exists():
        raise Show1Error(f"The judge is missing: {WEIGHTS}", "Run python -m training.judge --minutes 20.")
    judge = Judge()
    judge.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    return judge.eval()


def train(minutes: float) -> None:
    """Train for so many minutes, from the saved weights where there are some; save once a minute.

    Raises Show1Error where they cannot be saved.
    """
    judge = load() if WEIGHTS.exists() else Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    began = saved = time.monotonic()
    seed = int.from_bytes(os.urandom(4), "little")
    for step, batch in enumerate(DataLoader(Batches(clips, (seed,)), batch_size=None, num_workers=1)):
        share = min((time.monotonic() - began) / (minutes * 60), 1)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - 0.97 * share)
        objects, place, motion = judge(batch["clip"])
        loss = F.binary_cross_entropy_with_logits(objects, batch["objects"], reduction="sum") / len(objects)
        loss = loss + F.cross_entropy(place, batch["place"]) + F.cross_entropy(motion, batch["motion"])
        for side, true in zip(judge.sides(batch["clip"][batch["two"]]), batch["sides"], strict=True):
            loss = loss + F.cross_entropy(side, true, reduction="sum") / len(objects)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        if share == 1 or time.monotonic() - saved > 60:
            print(f"step {step}, {100 * share:.0f} %, loss {loss.item():.3f}", flush=True)
            with models.telling_what_cannot_be_saved():
                write_atomically(WEIGHTS, save({name: weight.half() for name, weight in judge.state_dict().items()}))
            saved = time.monotonic()
        if share == 1:
            return


@torch.no_grad()
def accuracy(judge: Judge, batches: int = 16) -> dict[str, float]:
    """Return how often the judge is right on new clips of one object, and of two, rendered at mini's final size.

    "still" is how often it knows the object from one frame alone, "worst" how often from clips of the object that it
    knows least.
    """
    rng, right, count = np.random.default_rng(12345), Counter(), 16 * batches
    known = Counter()  # (object, whether it was right)
    for _ in range(batches):
        scenes = [world.sample(rng, train=False) for _ in range(16)]
        truth = labels(scenes)
        truths = (truth["objects"].argmax(1), truth["place"], truth["motion"])
        clip = world.render(scenes, *FULL, KEYFRAME_TIMES)
        found = judge(clip)
        right["still"] += (judge.stills(clip) == truths[0][:, None]).float().mean(1).sum().item()
        for name, logits, true in zip(("object", "place", "motion"), found, truths, strict=True):
            right[name] += (logits.argmax(1) == true).sum().item()
            if name == "object":
                known.update(zip(true.tolist(), (logits.argmax(1) == true).tolist(), strict=True))
    pairs = [scene for scene in (world.sample(rng) for _ in range(4 * count)) if len(scene.objects) == 2][:count]
    for scene in pairs:
        seen = judge.verdict(world.render([scene], *FULL, KEYFRAME_TIMES))
        right["pair"] += seen["pair"] == set(scene.objects)
    worst = min(known[k, True] / (known[k, True] + known[k, False]) for k in {k for k, _ in known})
    return {name: hits / count for name, hits in right.items()} | {"worst": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True)
    minutes = parser.parse_args().minutes
    if not 0 < minutes < math.inf:
        parser.error("minutes have to be a number above 0")
    world.sprites()  # a missing font is said here, not by a worker
    train(minutes)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in accuracy(load()).items())
    print(f"right on unseen clips: {shares}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
