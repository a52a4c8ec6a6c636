"""What mini is trained on: batches of scenes of the world, with the faults that each stage is to repair."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset, get_worker_info

from show_1.stages.denoise import fold, unfold
from show_1.stages.interpolation import SEGMENT, between
from training import models, world
from training.redraw import EVERY, TIMES, Redrawn

KEYFRAME_TIMES = TIMES[::EVERY]
SMALL, MEDIUM, FULL = (20, 32), (80, 128), (160, 288)  # height, width after each enlargement
TEXT_DROPPED = 0.1  # how often a caption is emptied, for classifier-free guidance
REDRAWN = 0.4  # of the batches of interpolation and upscalers that show what the stages before draw, not true frames
NOISED = 60  # where the noise levels of an upscaler's condition end; mini's are 20 for the first frame and 0 after it
OBJECT_WEIGHT = 3.0  # an error on an object counts for so much more than one on the place behind it
SMALL_OBJECT_WEIGHT = 8.0  # more in small frames, where they are made up and moved
FAR_MOVING = ("jumping", "spinning", "swinging", "circling")  # what is hardest to find between keyframes

GPU_SCALE = 8  # times as many scenes a batch on a GPU, which would else wait for Python
GPU_BATCHES = 8  # painted at once there
GPU_POOL = 4  # times as many to choose from: those painted at once are all of a kind

NOISE = models.image_noising_scheduler()  # one schedule for all

Enlarge = Callable[[dict], torch.Tensor]  # what draws a batch of enlarged frames, see `stages.Upscale`


class Batches(IterableDataset):
    """An endless stream of batches, made by `make(rng)` in a worker process, different for each start of a run."""

    def __init__(self, make: Callable[[np.random.Generator], dict], seed: tuple[int, ...]):
        self.make, self.seed = make, seed

    def __iter__(self) -> Iterator[dict]:
        torch.set_num_threads(1)
        worker = get_worker_info().id
        torch.manual_seed(hash((*self.seed, worker)) % 2**63)
        rng = np.random.default_rng((*self.seed, worker))
        while True:
            yield self.make(rng)


def painted_on(device: torch.device, make: Callable[..., dict], seed: tuple[int, ...]) -> Iterator[dict]:
    """An endless stream of large batches, painted where they are used: a GPU paints faster than workers send.

    Several are painted at once, since painting is thousands of small steps, however many the scenes.
    """
    rng = np.random.default_rng(seed)
    pool: list[dict] = []
    while True:
        while len(pool) < GPU_POOL * GPU_BATCHES:
            many = made_on(device, make, rng, GPU_SCALE * GPU_BATCHES)
            pool += (_part(many, number) for number in range(GPU_BATCHES))
        yield pool.pop(rng.integers(len(pool)))


def made_on(device: torch.device, make: Callable[..., dict], rng: np.random.Generator, scale: int = 1) -> dict:
    """Return a batch that is made on a device."""
    with device:  # the default for all tensors made meanwhile
        return make(rng, scale)


def _part(many: dict, number: int) -> dict:
    """Return one of the batches that were painted at once."""

    def part(value):
        if isinstance(value, dict):
            return _part(value, number)
        size = len(value) // GPU_BATCHES
        return value[number * size : (number + 1) * size]

    return {key: part(value) for key, value in many.items()}


def _scenes(
    rng: np.random.Generator, count: int, motions: tuple[str, ...] = tuple(world.MOTIONS)
) -> tuple[list[world.Scene], list[str]]:
    scenes = [world.sample(rng, motions=motions) for _ in range(count)]
    return scenes, ["" if rng.random() < TEXT_DROPPED else scene.caption for scene in scenes]


# Each maker of batches makes `scale` times as much where a GPU asks for more.


def captions(rng: np.random.Generator, scale: int = 1, count: int = 64) -> dict:
    """Captions with made-up words strewn in, and what they speak of (or would, where a part is left out)."""
    scenes = [world.sample(rng) for _ in range(count * scale)]
    return {"captions": [_strewn(rng, scene.caption) for scene in scenes]} | labels(scenes)


def labels(scenes: list[world.Scene]) -> dict[str, torch.Tensor]:
    """Return what scenes show: objects (scenes, 50), 1 for those that are there, and indices of place and motion."""
    objects, places, motions = list(world.OBJECTS), list(world.PLACES), list(world.MOTIONS)
    there = torch.zeros(len(scenes), len(objects))
    for row, scene in zip(there, scenes, strict=True):
        row[[objects.index(name) for name in scene.objects]] = 1
    return {
        "objects": there,
        "place": torch.tensor([places.index(scene.place) for scene in scenes]),
        "motion": torch.tensor([motions.index(scene.motion) for scene in scenes]),
    }


def told(batch: dict) -> torch.Tensor:
    """Return 1 for each scene whose caption names its motion and 0 for the others."""
    motions, places = list(world.MOTIONS.values()), list(world.PLACES.values())
    found = []
    for caption, motion, place in zip(batch["captions"], batch["motion"], batch["place"], strict=True):
        for where in places[place].words():  # "in falling snow" names no motion
            caption = caption.replace(where, "")
        found.append(float(any(word in caption for word in motions[motion].words())))
    return torch.tensor(found)


def _strewn(rng: np.random.Generator, caption: str) -> str:
    words = caption.split()
    for _ in range(rng.integers(1, 4) if rng.random() < 0.3 else 0):
        word = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9)))
        words.insert(rng.integers(len(words) + 1), word)
    return " ".join(words)


def _painted(
    scenes: list[world.Scene], size: tuple[int, int], times: torch.Tensor, object_weight: float = OBJECT_WEIGHT
) -> dict:
    """Return clips and how much each pixel's error counts, (batch, 1, frames, height, width)."""
    clips = world.render(scenes, *size, times, coverage=True)
    return {"clean": clips[:, :3], "weight": 1 + (object_weight - 1) * clips[:, 3:]}


def _cut(rng: np.random.Generator, batch: dict, side: int) -> dict:
    """Cut a batch's frames to squares around what they show: less work, and hardly anything to see is lost.

    Whole frames have to come up besides: their means and variances, which normalisation takes away, are others.
    """
    height, width = batch["clean"].shape[-2:]
    covered = (batch["weight"] - 0.999).flatten(1, -3).sum(1)  # (batch, height, width)
    starts = []
    for axis, size in ((2, height), (1, width)):
        along = covered.sum(axis)
        middle = (along * torch.arange(size)).sum(1) / along.sum(1)
        start = middle - side / 2 + torch.from_numpy(rng.uniform(-side / 5, side / 5, len(middle))).to(middle)
        starts.append(start.round().clamp(0, size - side).int().tolist())
    corners = list(zip(*starts, strict=True))

    def squares(frames: torch.Tensor) -> torch.Tensor:
        rows = zip(frames, corners, strict=True)
        return torch.stack([one[..., top : top + side, left : left + side] for one, (top, left) in rows])

    return batch | {key: squares(batch[key]) for key in ("clean", "weight", "condition") if key in batch}


def pictures(rng: np.random.Generator, scale: int = 1, count: int = 20) -> dict:
    """Whole frames: from squares of them the model learns to put the thing that is asked for into every square."""
    scenes, captions = _scenes(rng, count * scale)
    times = _moments(rng, scenes)
    painted = _painted(scenes, SMALL, times, SMALL_OBJECT_WEIGHT)
    return {key: value[:, :, 0] for key, value in painted.items()} | {"captions": captions}


def _moments(rng: np.random.Generator, scenes: list[world.Scene]) -> torch.Tensor:
    """Return a random time for each scene, (scenes, 1)."""
    return torch.from_numpy(rng.random((len(scenes), 1))).float()


def keyframe_clips(rng: np.random.Generator, scale: int = 1) -> dict:
    """A batch of clips, and of pictures: many more things are seen so in the time that clips alone would take."""
    scenes, captions = _scenes(rng, 4 * scale)
    stills = pictures(rng, scale, 16)
    clips = _painted(scenes, SMALL, KEYFRAME_TIMES, SMALL_OBJECT_WEIGHT)
    return clips | {"captions": captions, "pictures": stills}


def path_clips(rng: np.random.Generator, scale: int = 1) -> dict:
    """Clips, and what they show, for the stage that teaches where motions have things."""
    scenes, captions = _scenes(rng, scale)
    clean = world.render(scenes, *SMALL, KEYFRAME_TIMES)
    return {"clean": clean, "captions": captions, "scenes": scenes} | labels(scenes)


def pictures_for_pairs(rng: np.random.Generator, scale: int = 1) -> dict:
    """Pictures with their captions, and with captions in the same words of what is left twice, and what is right."""
    scenes = [world.sample(rng, pairs=0.6) for _ in range(6 * scale)]
    told: dict[str, list[str]] = {"captions": [], "left": [], "right": []}
    for scene in scenes:
        names, seed = world.from_left(scene), rng.integers(2**32)
        for key, objects in (("captions", scene.objects), ("left", names[:1]), ("right", names[-1:])):
            objects *= len(names) // len(objects)
            told[key].append(world.caption(np.random.default_rng(seed), objects, scene.place, scene.motion))
    return told | {"clean": world.render(scenes, *SMALL, _moments(rng, scenes))[:, :, 0]}


def segments(rng: np.random.Generator, scale: int = 1, *, redrawn: Redrawn) -> dict:
    """The frames from a keyframe to the next, (batch, 3, 5, height, width) in [−1, 1], to fill in between the ends.

    These are keyframes as they are drawn, or true ones with noise; "condition" is what `between` makes of them.
    """
    if rng.random() < REDRAWN:
        scenes, clips = redrawn(rng, 4 * scale)
        captions = [scene.caption for scene in scenes]
        times = _window(rng, scenes, SEGMENT, every=EVERY)
        painted = _painted(scenes, SMALL, times, SMALL_OBJECT_WEIGHT)
        ends = _drawn_at(clips, times, 2, every=EVERY)
    else:
        scenes, captions = _scenes(rng, 4 * scale, FAR_MOVING if rng.random() < 0.5 else tuple(world.MOTIONS))
        times = _window(rng, scenes, SEGMENT, every=EVERY)
        painted = _painted(scenes, SMALL, times, SMALL_OBJECT_WEIGHT)
        ends = painted["clean"][:, :, [0, -1]]
        ends = ends + 0.05 * torch.rand(len(scenes), 1, 1, 1, 1) * torch.randn_like(ends)
    return painted | {"condition": between(ends), "captions": captions}


def _drawn_at(clips: torch.Tensor, times: torch.Tensor, frames: int, every: int = 1) -> torch.Tensor:
    """Return so many frames of each drawn clip, from the first of its times on; clips have every `every`-th frame."""
    starts = (28 / every * times[:, 0]).round().int().tolist()
    return torch.stack([clip[:, at : at + frames] for clip, at in zip(clips, starts, strict=True)])


def _window(rng: np.random.Generator, scenes: list[world.Scene], frames: int, every: int = 1) -> torch.Tensor:
    """Return the times of neighbouring frames of each scene, (scenes, frames), the first a multiple of `every`."""
    first = rng.integers(0, (29 - frames) // every + 1, (len(scenes), 1)) * every
    return torch.from_numpy((first + np.arange(frames)) / 28).float()


def degrade(clips: torch.Tensor) -> torch.Tensor:
    """Return (clips, channels, frames, height, width) with a small model's faults: noise, and every other time blur.

    There is as much of them in all frames of a clip.
    """

    def up_to(most: float) -> torch.Tensor:
        return most * torch.rand(len(clips), 1, 1, 1, 1).to(clips)

    blurred = F.avg_pool3d(F.pad(clips, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), stride=1)
    clips = clips.lerp(blurred, up_to(0.7) * (up_to(1) < 0.5))
    return clips + up_to(0.08) * torch.randn_like(clips)


def bicubic(clips: torch.Tensor, size: tuple[int, int], **options: bool) -> torch.Tensor:
    """Return clips in another (height, width); `options` are torch's."""
    return unfold(F.interpolate(fold(clips), size=size, mode="bicubic", **options), clips.shape).clamp(-1, 1)


def enlarged_pictures(rng: np.random.Generator, scale: int = 1, *, redrawn: Redrawn) -> dict:
    """True frames with small ones as condition: keyframes as they are drawn, or true ones with faults."""
    whole = rng.random() < 0.5
    count = (2 if whole else 4) * scale
    if rng.random() < REDRAWN:
        scenes, clips = redrawn(rng, count)
        captions = [scene.caption for scene in scenes]
        frames = EVERY * rng.integers(len(KEYFRAME_TIMES), size=count)
        times = torch.from_numpy(frames[:, None] / 28).float()
        small = torch.stack([clip[:, [frame]] for clip, frame in zip(clips, frames, strict=True)])
    else:
        scenes, captions = _scenes(rng, count)
        times = _moments(rng, scenes)
        small = degrade(world.render(scenes, *SMALL, times))
    batch, level = _enlarged(scenes, times, small)
    batch = {key: value[:, :, 0] for key, value in batch.items()}
    return (batch if whole else _cut(rng, batch, 64)) | {"noise_level": level, "captions": captions}


def enlarged_windows(rng: np.random.Generator, scale: int = 1, *, redrawn: Redrawn, first_frame: Enlarge) -> dict:
    """Windows of true clips with small ones as condition, as they are drawn or true ones with faults; and pictures."""
    frames = int(rng.integers(3, 9))  # fewer frames leave time for more things
    if rng.random() < REDRAWN:
        scenes, times, small = _redrawn_windows(rng, scale, frames, redrawn)
        captions = [scene.caption for scene in scenes]
    else:
        scenes, captions = _scenes(rng, scale)
        times = _window(rng, scenes, frames)
        small = degrade(_half_blended(scenes, times))
    batch, level = _enlarged(scenes, times, small)
    batch = _led(rng, batch | {"noise_level": level, "captions": captions}, first_frame)
    batch = batch if rng.random() < 0.3 else _cut(rng, batch, 64)
    return batch | {"pictures": enlarged_pictures(rng, scale, redrawn=redrawn)}


def _redrawn_windows(
    rng: np.random.Generator, count: int, frames: int, redrawn: Redrawn
) -> tuple[list[world.Scene], torch.Tensor, torch.Tensor]:
    """Return scenes, the times of so many neighbouring frames of each, and what the small stages draw of them."""
    scenes, clips = redrawn(rng, count)
    times = _window(rng, scenes, frames)
    return scenes, times, _drawn_at(clips, times, frames)


def _led(rng: np.random.Generator, batch: dict, first_frame: Enlarge) -> dict:
    """Begin a window's condition with its sharp lead: as the model draws it, the true one, or that with faults."""
    lead, kind = batch["clean"][:, :, 0], rng.random()
    if kind < 0.5:
        lead = first_frame(batch | {key: batch[key][:, :, 0] for key in ("clean", "condition")})
    elif kind < 0.75:
        lead = degrade(lead[:, :, None])[:, :, 0]
    return batch | {"condition": torch.cat([lead[:, :, None], batch["condition"][:, :, 1:]], dim=2)}


def _half_blended(scenes: list[world.Scene], times: torch.Tensor) -> torch.Tensor:
    """Return small clips as interpolation may leave them: every other one, between keyframes, partly their blend."""
    every = KEYFRAME_TIMES[1]
    before = (times / every).floor().clamp(max=len(KEYFRAME_TIMES) - 2)
    true, left, right = (world.render(scenes, *SMALL, t) for t in (times, before * every, (before + 1) * every))
    blend = left.lerp(right, (times / every - before)[:, None, :, None, None].to(left))
    share = torch.rand(len(scenes), 1, 1, 1, 1) * (torch.rand(len(scenes), 1, 1, 1, 1) < 0.5)
    return true.lerp(blend, share)


def _enlarged(scenes: list[world.Scene], times: torch.Tensor, small: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """Return true clips with `small` ones, enlarged and noised, as condition, and the noise's levels."""
    batch = _painted(scenes, MEDIUM, times)
    condition = F.interpolate(small, size=batch["clean"].shape[2:], mode="trilinear", align_corners=True)
    level = torch.randint(0, NOISED, (len(scenes),))
    return batch | {"condition": NOISE.add_noise(condition, torch.randn_like(condition), level)}, level


def full_frames(rng: np.random.Generator, scale: int = 1) -> dict:
    """Whole frames, or as often three times as many squares of a fifth of their area."""
    whole = rng.random() < 0.5
    scenes, _ = _scenes(rng, (1 if whole else 3) * scale)
    frames = {key: value[:, :, 0] for key, value in _painted(scenes, FULL, _moments(rng, scenes)).items()}
    return frames if whole else _cut(rng, frames, 96)


def full_windows(
    rng: np.random.Generator, scale: int = 1, *, redrawn: Redrawn, first_frame: Enlarge, enlarge: Enlarge
) -> dict:
    """Clips in full size, with what the stages before make of small ones as condition, or true ones with faults."""
    whole = rng.random() < 0.3
    count = (1 if whole else 2) * scale
    if rng.random() < REDRAWN:
        scenes, times, small = _redrawn_windows(rng, count, 4, redrawn)
        captions = [scene.caption for scene in scenes]
        batch, level = _enlarged(scenes, times, small)
        medium = enlarge(_led(rng, batch | {"noise_level": level, "captions": captions}, first_frame))
    else:
        scenes, captions = _scenes(rng, count)
        times = _window(rng, scenes, 4)
        medium = degrade(world.render(scenes, *MEDIUM, times))
    batch = _painted(scenes, FULL, times) | {"condition": bicubic(medium, FULL, antialias=True)}
    return (batch if whole else _cut(rng, batch, 96)) | {"captions": captions}
