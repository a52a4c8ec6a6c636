"""Train mini, stage by stage: `python -m training.train --minutes N [--device auto] [--stage all|NAME]`.

The text encoder comes first: it learns what captions mean from the captions alone and is frozen from then on, as T5 is
for the released models, so that all pixel stages read the same embeddings. Then pictures, then where motions have
things in which frame and which of two things is where, then clips, with pictures beside them where things have to be
made up: a video UNet starts as a trained picture UNet whose new temporal layers do nothing. The upscalers learn to
repair true frames as the stages before them would draw them, or degraded. A run can be broken off at any moment: it
goes on from its last checkpoint, at most a minute old, and where there is none (checkpoints are not committed) from the
weights in show_1/mini.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import os
import pickle
import platform
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import distributed, multiprocessing, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

from show_1.cascade import Cascade
from show_1.errors import Show1Error, exit_code
from show_1.models import channels_last
from show_1.models.attention import TextAttention
from show_1.stages.denoise import share_noise
from training import models, world
from training.redraw import CPU, EVERY, TIMES, Redrawn

MINI = Path(__file__).parents[1] / "show_1" / "mini"
RUNS = Path(__file__).parent / "runs"
LOG = Path(__file__).parent / "log.jsonl"
EVALUATION = Path(__file__).parent / "evaluation.json"

KEYFRAME_TIMES = TIMES[::EVERY]
SMALL, MEDIUM, FULL = (20, 32), (80, 128), (160, 288)  # height, width after each enlargement
RATE = 1e-3  # of learning, at first
HARD_MORE = 4.0  # times as many pictures more of an object that the evaluation never found
TEXT_DROPPED = 0.1  # how often a caption is emptied, for classifier-free guidance

GPU_SCALE = 8  # as many scenes a batch on a GPU, which would else wait for Python
GPU_BATCHES = 8  # painted at once there
GPU_POOL = 4  # times as many to choose from: those painted at once are all of a kind
UPDATES_APART = 4  # that processes training together make by themselves before they average their weights
PATH_STRENGTH = 8.0  # of what the deepest features are to say of where things are: twice as much did no better
PIXEL_WEIGHT = 20.0  # of the latent upscale's error in decoded pixels, which are what is looked at
REDRAWN = 0.4  # of an upscaler's batches, so many show what the stages before it draw, and the others true frames
NOISED = 60  # where the noise levels of an upscaler's condition end; mini's are 20 for the first frame and 0 after it
OBJECT_WEIGHT = 3.0  # an error on an object counts for so much more than one on the place behind it
SMALL_OBJECT_WEIGHT = 8.0  # more in small frames, where they are made up and moved

NOISE = models.image_noising_scheduler()  # one schedule for all: alpha and sigma of each of its 1000 levels
ALPHA = NOISE.alphas_cumprod.sqrt()
SIGMA = (1 - NOISE.alphas_cumprod).sqrt()


# --- Batches --------------------------------------------------------------------------------------------------------


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
    rng: np.random.Generator, count: int, chances: np.ndarray | None = None
) -> tuple[list[world.Scene], list[str]]:
    scenes = [world.sample(rng, chances=chances) for _ in range(count)]
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
    motions = [list(world.MOTIONS.values())[index] for index in batch["motion"].tolist()]
    pairs = zip(motions, batch["captions"], strict=True)
    return torch.tensor([float(any(word in caption for word in motion.words())) for motion, caption in pairs])


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


def pictures(rng: np.random.Generator, scale: int = 1, count: int = 20, chances: np.ndarray | None = None) -> dict:
    """Whole frames: from squares of them the model learns to put the thing that is asked for into every square."""
    scenes, captions = _scenes(rng, count * scale, chances)
    times = _moments(rng, scenes)
    painted = _painted(scenes, SMALL, times, SMALL_OBJECT_WEIGHT)
    return {key: value[:, :, 0] for key, value in painted.items()} | {"captions": captions}


def _moments(rng: np.random.Generator, scenes: list[world.Scene]) -> torch.Tensor:
    """Return a random time for each scene, (scenes, 1)."""
    return torch.from_numpy(rng.random((len(scenes), 1))).float()


def keyframe_clips(rng: np.random.Generator, scale: int = 1) -> dict:
    """A batch of clips, and of pictures: many more things are seen so in the time that clips alone would take."""
    scenes, captions = _scenes(rng, 4 * scale)
    stills = pictures(rng, scale, 16, picture_chances())
    clips = _painted(scenes, SMALL, KEYFRAME_TIMES, SMALL_OBJECT_WEIGHT)
    return clips | {"captions": captions, "pictures": stills}


@functools.cache
def picture_chances() -> np.ndarray:
    """Return how often each object is to be pictured, (objects,): the more the last evaluation missed it, the more."""
    right = json.loads(EVALUATION.read_text())["objects"]
    weights = np.array([1 + HARD_MORE * (1 - right.get(name, 1)) for name in world.OBJECTS])
    return weights / weights.sum()


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


def segments(rng: np.random.Generator, scale: int = 1) -> dict:
    scenes, captions = _scenes(rng, 4 * scale)
    painted = _painted(scenes, SMALL, _window(rng, scenes, 5, every=4), SMALL_OBJECT_WEIGHT)
    clean = painted["clean"]
    ends = clean[:, :, [0, -1]] + 0.05 * torch.rand(len(scenes), 1, 1, 1, 1) * torch.randn_like(clean[:, :, [0, -1]])
    between = F.interpolate(ends, size=clean.shape[2:], mode="trilinear", align_corners=True)
    mask = torch.zeros_like(between[:, :1])
    mask[:, :, [0, -1]] = 1
    return painted | {"condition": torch.cat([between, mask], dim=1), "captions": captions}


def _window(rng: np.random.Generator, scenes: list[world.Scene], frames: int, every: int = 1) -> torch.Tensor:
    """Return the times of so many neighbouring frames of each scene, (scenes, frames), the first a multiple."""
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
    frames = F.interpolate(clips.transpose(1, 2).flatten(0, 1), size=size, mode="bicubic", **options)
    return frames.unflatten(0, (len(clips), -1)).transpose(1, 2).clamp(-1, 1)


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


def enlarged_windows(rng: np.random.Generator, scale: int = 1, *, redrawn: Redrawn, first_frame: "Upscale") -> dict:
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
    starts = (28 * times[:, 0]).round().int().tolist()
    return scenes, times, torch.stack([clip[:, at : at + frames] for clip, at in zip(clips, starts, strict=True)])


def _led(rng: np.random.Generator, batch: dict, first_frame: "Upscale") -> dict:
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
    rng: np.random.Generator, scale: int = 1, *, redrawn: Redrawn, first_frame: "Upscale", enlarge: "Upscale"
) -> dict:
    """Clips in full size, and as often as not what the stages before make of small ones, as condition."""
    whole = rng.random() < 0.3
    count = (1 if whole else 2) * scale
    if rng.random() < 0.5:
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


# --- Losses ---------------------------------------------------------------------------------------------------------


def around(middle: float, spread: float) -> Callable[[int], torch.Tensor]:
    """Return what draws noise levels, logit-normal (arXiv 2403.03206): most where shapes and paths are decided."""
    return lambda count: (1000 * torch.sigmoid(middle + spread * torch.randn(count))).long().clamp(0, 999)


def of_sampler(steps: int) -> Callable[[int], torch.Tensor]:
    """Return what draws the noise levels at which a sampler of few steps looks, one as often as another."""
    scheduler = models.scheduler(thresholding=False)
    scheduler.set_timesteps(steps)
    return lambda count: scheduler.timesteps[torch.randint(steps, (count,))]


def mostly(level: int) -> Callable[[int], torch.Tensor]:
    """Return what draws mostly the noise level from which a sampler of one step starts, and at times any below."""
    return lambda count: torch.where(torch.rand(count) < 0.95, level, torch.randint(0, level + 1, (count,)))


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16: a CPU that does not is ten times slower in it (measured)."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def noise_like(clips: torch.Tensor, shared: float) -> torch.Tensor:
    """Return noise for clips, (batch, channels, frames, height, width), or for pictures where nothing is shared."""
    noise = torch.randn_like(clips)
    return share_noise(noise, torch.randn_like(clips[:, :, :1]), shared) if shared else noise


def velocity_loss(
    unet: nn.Module,
    states: torch.Tensor,
    batch: dict,
    draw_levels: Callable[[int], torch.Tensor],
    top: int = 1000,
    movement_weight: float = 0.0,
    edge_weight: float = 0.0,
    shared_noise: float = 0.0,
    error_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the weighted squared error of the predicted velocity (arXiv 2202.00512) at levels below `top`.

    What `error_of` says of the clean sample that the prediction stands for is added.

    The error less its mean over a clip's frames, which is that of what moves, counts `movement_weight` times more.
    `edge_weight` is that of the absolute error in differences between neighbouring pixels: squares alone would rather
    have a blur than an edge a little beside its place.

    A batch with a "degraded" sample starts from it at the highest level and from the clean one at the lowest, with the
    velocity always pointing to the clean one: so a chain that starts from a degraded sample learns to repair it.
    """
    clean = batch["clean"]
    levels = draw_levels(len(clean))
    shape = (-1, *(1,) * (clean.ndim - 1))
    alpha, sigma = (table[levels].view(shape).to(clean.device) for table in (ALPHA, SIGMA))
    levels = levels.to(clean.device)
    start = clean.lerp(batch["degraded"], (levels / top).view(shape)) if "degraded" in batch else clean
    noisy = alpha * start + sigma * noise_like(clean, shared_noise)
    target = (alpha * noisy - clean) / sigma.clamp(min=0.02)
    model_input = torch.cat([noisy, batch["condition"]], dim=1) if "condition" in batch else noisy
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=native_bfloat16(clean.device)):
        velocity = unet(model_input, levels, encoder_hidden_states=states, class_labels=batch.get("noise_level")).sample
    error = velocity.float() - target
    weight = batch.get("weight", torch.ones_like(clean[:, :1]))
    loss = (error.square() * weight).mean() / weight.mean()
    if movement_weight:
        moving = error - error.mean(2, keepdim=True)
        weight = weight.amax(2, keepdim=True)  # where an object ever is, so that the weighting does not move with it
        loss = loss + movement_weight * (moving.square() * weight).mean() / weight.mean()
    if edge_weight:
        edges = sum((error.diff(dim=d).abs() * weight.narrow(d, 1, weight.shape[d] - 1)).mean() for d in (-2, -1))
        loss = loss + edge_weight * edges / weight.mean()
    if error_of is not None:
        loss = loss + error_of(alpha * noisy - sigma * velocity.float())
    return loss


@torch.no_grad()
def draw(unet: nn.Module, states: torch.Tensor, batch: dict, steps: int, shared_noise: float = 0.0) -> torch.Tensor:
    """Return what the model draws, without guidance, for the text and condition of a batch: as its "clean"."""
    with CPU:  # whatever the default is meanwhile
        scheduler = models.scheduler(thresholding=False)
        scheduler.set_timesteps(steps, device=states.device)
    sample = noise_like(batch["clean"], shared_noise)
    for level in scheduler.timesteps:
        model_input = torch.cat([sample, batch["condition"]], dim=1) if "condition" in batch else sample
        options = {"encoder_hidden_states": states, "class_labels": batch.get("noise_level")}
        sample = scheduler.step(unet(model_input, level, **options).sample, level, sample).prev_sample
    return sample


def sheet(drawn: torch.Tensor, batch: dict, file: Path) -> None:
    """Save what a model has drawn below what it should be, with its condition between them where it has one."""
    rows = []
    for clips in (batch["clean"], batch.get("condition"), drawn):
        if clips is not None:
            clips = clips[:, :3].float().cpu()
            pictures = clips.transpose(1, 2).flatten(0, 1) if clips.ndim == 5 else clips
            rows.append(torch.cat([F.pad(picture, (1, 1, 1, 1), value=1.0) for picture in pictures[:16]], dim=2))
    picture = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    scale = max(1, 1600 // picture.shape[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1)).save(file)


def autoencoder_loss(vae: AutoencoderKL, batch: dict) -> torch.Tensor:
    """Return the error in pixels and in edges, and a light pull of the latents to a normal distribution."""
    clean = batch["clean"]
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=native_bfloat16(clean.device)):
        posterior = vae.encode(clean).latent_dist
        decoded = vae.decode(posterior.sample()).sample.float()
    return pixel_error(decoded, clean) + 1e-4 * posterior.kl().mean() / clean[0, 0].numel()


def pixel_error(frames: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute error of frames, (batch, channels, height, width), and that of their edges."""
    edges = sum(F.l1_loss(frames.diff(dim=d), clean.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(frames, clean) + edges


# --- Stages ---------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What one stage of the training trains, on what, and where its result goes."""

    models: dict[str, nn.Module]
    batches: Callable[..., dict]
    loss: Callable[[dict[str, nn.Module], dict], torch.Tensor]
    folders: dict[str, str]  # model name → folder under show_1/mini, where the result is saved
    finish: Callable[[dict[str, nn.Module]], None] = lambda trained: None  # last touches before each saving
    sample: Callable[[dict[str, nn.Module], dict], torch.Tensor] | None = None  # what the models make of a batch
    muon: bool = False  # whether Muon trains the matrices, see `optimizers_of`

    def evaluate(self, models: dict[str, nn.Module], device: torch.device, batches: int = 4) -> float:
        """Return the loss on the same few batches each time, which training does not see, with the same noise."""
        rng, losses = np.random.default_rng(2**32), []
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(batches):
                losses.append(self.loss(models, made_on(device, self.batches, rng)).item())
        return float(np.mean(losses))


def _states(encoder: nn.Module, tokens) -> torch.Tensor:
    """Return the text's states, (batch, tokens, channels), as show_1's stages compute them."""
    mask = tokens.attention_mask if isinstance(encoder, T5EncoderModel) else None
    return encoder(tokens.input_ids, attention_mask=mask).last_hidden_state


def _tokens(tokenizer, batch: dict):
    tokens = tokenizer(batch["captions"], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return tokens.to(batch["clean"].device if "clean" in batch else batch["objects"].device)


def _captions(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [world.sample(rng).caption for _ in range(count)]


def t5_tokenizer() -> T5Tokenizer:
    folder = MINI / "show-1-base" / "tokenizer"
    if folder.exists():
        return T5Tokenizer.from_pretrained(folder)
    return models.train_t5_tokenizer(_captions(20000), folder)


def clip_tokenizer() -> CLIPTokenizer:
    folder = MINI / "show-1-sr2" / "tokenizer"
    if folder.exists():
        return CLIPTokenizer.from_pretrained(folder)
    return models.train_clip_tokenizer(_captions(20000), folder)


def appearances() -> list[torch.Tensor]:
    """Return what objects, places and motions look like, a row of principal components each.

    Objects by their pictures, 40 components; places by the mean of some frames, 11; motions by their mean path, 8.
    """
    sprites = F.adaptive_avg_pool2d(world.sprites()[0], 16)
    rng = np.random.default_rng(0)

    def scenes(place: str, motion: str) -> list[world.Scene]:
        return [world.Scene(("ball",), place, motion, "", int(rng.integers(2**31))) for _ in range(16)]

    places = [world.render(scenes(place, "standing still"), *SMALL, torch.zeros(1)).mean(0) for place in world.PLACES]
    motions = [world.paths(scenes("in space", motion), KEYFRAME_TIMES).mean(1) for motion in world.MOTIONS]
    tables = []
    for looks, components in ((sprites, 40), (torch.stack(places), 11), (torch.stack(motions), 8)):
        looks = looks.flatten(1) - looks.flatten(1).mean(0)
        left, strengths, _ = torch.linalg.svd(looks, full_matrices=False)
        # Square roots: the strongest components would drown the details that tell a cat from a fox.
        table = left[:, :components] * strengths[:components].sqrt()
        tables.append(table / table.std())
    return tables


def text_stage() -> Stage:
    """The text encoder, judged by what can be read from the mean of its states: what is meant, and how it looks.

    Padding counts: the UNets attend to all 77 states and their text embedding pools them, so padding has to carry what
    the caption means too. That things which look alike have states alike spares the UNets learning each by itself.
    """
    looks = appearances()
    tokenizer = t5_tokenizer()
    sizes = [len(world.OBJECTS), len(world.PLACES), len(world.MOTIONS)]
    saved = MINI / "show-1-base" / "text_encoder"
    trained = {
        "text_encoder": T5EncoderModel.from_pretrained(saved, dtype=torch.float32)
        if saved.exists()
        else models.text_encoder(len(tokenizer)),
        "reader": nn.Linear(models.TEXT_WIDTH, sum(sizes)),
    }

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        states = _states(trained["text_encoder"], _tokens(tokenizer, batch)).mean(1)
        objects, place, motion = trained["reader"](states).split(sizes, dim=1)
        named = F.binary_cross_entropy_with_logits(objects, batch["objects"], reduction="sum") / len(objects)
        tables = [table.to(states.device) for table in looks]
        seen = torch.cat([batch["objects"] @ tables[0], tables[1][batch["place"]], tables[2][batch["motion"]]], dim=1)
        looking = F.mse_loss(states[:, : seen.shape[1]], seen)
        return named + F.cross_entropy(place, batch["place"]) + F.cross_entropy(motion, batch["motion"]) + 4 * looking

    return Stage(trained, captions, loss, {"text_encoder": "show-1-base/text_encoder"})


def reader(device: torch.device) -> Callable[[dict], torch.Tensor]:
    """Return what turns a batch's captions into the trained text encoder's states."""
    tokenizer = t5_tokenizer()
    saved = MINI / "show-1-base" / "text_encoder"
    if not saved.exists():
        raise Show1Error(f"The text encoder is missing: {saved}", "Train it first: --stage text")
    encoder = T5EncoderModel.from_pretrained(saved, dtype=torch.float32).requires_grad_(False).to(device)
    return lambda batch: _states(encoder, _tokens(tokenizer, batch))


def pixel_stage(
    unet: nn.Module,
    batches: Callable,
    folder: str,
    device: torch.device,
    draw_levels: Callable[[int], torch.Tensor],
    steps: int = 1,
    **weights: float,
) -> Stage:
    """A UNet that predicts pixels; `steps` are those that its sample sheets are drawn in, `weights` velocity_loss's."""
    read = reader(device)

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        return velocity_loss(trained["unet"], read(batch), batch, draw_levels, **weights)

    def sample(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        return draw(trained["unet"], read(batch), batch, steps, weights.get("shared_noise", 0.0))

    return Stage({"unet": unet}, batches, loss, {"unet": folder}, sample=sample, muon=True)


def pictures_stage(device: torch.device) -> Stage:
    unet = models.picture_unet("keyframes")
    _start_from(unet, MINI / "show-1-base" / "unet")
    levels = around(0.0, 1.6)
    return pixel_stage(unet, pictures, "../../training/runs/pictures", device, levels, steps=12)


def paths_stage(device: torch.device) -> Stage:
    """The way from a motion's name to where things are in each frame, for the keyframes' deepest up block alone.

    Clips teach that too slowly: in much noise, where it has to come from the text, it is a small part of the error. But
    a trained picture UNet draws a thing wherever its deepest features say that one is. So the block learns to say it
    frame by frame: to add to its features what goes with a thing being there, times how much more often one is there in
    this frame than in others. What enters the block is computed once a clip and used eight times.
    """
    unet = models.video_unet("keyframes")
    if not (RUNS / "pictures").exists():  # show_1/mini will not do: what has been taught would be taught on top of it
        raise Show1Error(f"The picture UNet is missing: {RUNS / 'pictures'}", "Train it first: --stage pictures")
    _start_from(unet, RUNS / "pictures")
    unet.to(device).requires_grad_(False)
    read, frames = reader(device), len(KEYFRAME_TIMES)
    block = unet.up_blocks[0].requires_grad_(True)
    untaught = copy.deepcopy(block).requires_grad_(False)

    def entering(batch: dict, lowest: int) -> list[torch.Tensor]:
        """Return what the block is given for each clip, noised: (batch, frames, …) each, but the text, (batch, …)."""
        clean = batch["clean"]
        levels = torch.randint(lowest, 1000, (len(clean),)).to(device)
        noisy = NOISE.add_noise(clean, torch.randn_like(clean), levels)
        with torch.no_grad():
            hidden, temb, text, _, skips, _ = models.inputs_of(unet.up_blocks[0], unet, noisy, levels, read(batch))
        return [text, *(each.contiguous().unflatten(0, (len(clean), frames)) for each in (hidden, temb, *skips))]

    def features(block: nn.Module, entered: list[torch.Tensor]) -> torch.Tensor:
        """Return what the block makes of it, (batch, frames, channels, height, width)."""
        text, (hidden, temb, *skips) = entered[0], (each.flatten(0, 1) for each in entered[1:])
        return block(hidden, temb, text, frames, skips, resample=False)[-1].unflatten(0, (-1, frames))

    # How the features of a cell differ with how much of it is covered: a regression on true clips.
    rng, found, covered = np.random.default_rng(0), [], []
    for _ in range(8):
        batch = made_on(device, path_clips, rng, 4)
        with torch.no_grad():
            found.append(features(block, entering(batch, 600)).movedim(2, 0))
        cells = found[-1].shape[-2:]
        covered.append(coverage(batch["scenes"], cells).to(device))
    found, covered = torch.cat(found, 1).flatten(1), torch.cat(covered).flatten()
    covered = covered - covered.mean()
    there = (found * covered).mean(1) / covered.square().mean()  # (channels,)
    expected = expected_coverage(rng, cells).to(device)
    _tell_motions_apart(unet, block, read, rng)
    bank = deque(maxlen=256)

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        entered = entering(batch, 940)  # less noise would show the path, which has to come from the text
        more = expected[(batch["objects"].sum(1) - 1).long(), batch["motion"]]  # (batch, frames, height, width)
        more = more * told(batch).view(-1, 1, 1, 1).to(device)
        with torch.no_grad():
            goal = features(trained["untaught"], entered) + PATH_STRENGTH * more[:, :, None] * there[:, None, None]
        rows = list(zip(*entered, goal, strict=True))
        if torch.is_grad_enabled():
            bank.extend(rows)
            rows = [bank[k] for k in torch.randperm(len(bank))[:8].tolist()]
        *entered, goal = (torch.stack(each) for each in zip(*rows, strict=True))
        return F.mse_loss(features(trained["unet"].up_blocks[0], entered), goal)

    return Stage({"unet": unet, "untaught": untaught}, path_clips, loss, {"unet": "show-1-base/unet"})


def _tell_motions_apart(unet: nn.Module, block: nn.Module, read: Callable, rng: np.random.Generator) -> None:
    """Add a sign of the motion to what a block's ResNets take from the text: pictures leave hardly any there."""
    device = unet.device
    batches = [made_on(device, captions, rng) for _ in range(40)]
    motion = torch.cat([batch["motion"] for batch in batches])
    named = torch.cat([told(batch) for batch in batches])[:, None].to(device)
    with torch.no_grad():
        levels = torch.randint(900, 1000, (len(motion),)).to(device)
        text = torch.cat([unet.get_aug_embed(None, read(batch), {}) for batch in batches])
        temb = unet.time_embedding(unet.get_time_embed(text, levels)) + text
        for resnet in block.resnets:
            seen, layer = resnet.nonlinearity(temb), resnet.time_emb_proj
            signs = 0.25 * torch.randn(len(world.MOTIONS), layer.out_features).to(device)
            layer.weight += torch.linalg.lstsq(seen, (signs - signs.mean(0))[motion] * named).solution.T


def coverage(scenes: list[world.Scene], cells: tuple[int, int]) -> torch.Tensor:
    """Return how much of each cell of the keyframes objects cover, (scenes, frames, height, width) in [0, 1]."""
    return F.adaptive_avg_pool3d(world.render(scenes, *SMALL, KEYFRAME_TIMES, coverage=True)[:, 3], (None, *cells))


def expected_coverage(rng: np.random.Generator, cells: tuple[int, int], count: int = 32) -> torch.Tensor:
    """Return how much more each motion's objects cover each cell at each time than any motion's do.

    (one or two objects, motions, frames, height, width): means over `count` scenes each.
    """
    scenes: dict[tuple[int, str], list[world.Scene]] = {}
    wanted = [(number, motion) for number in (1, 2) for motion in world.MOTIONS]
    while any(len(scenes.get(key, ())) < count for key in wanted):
        scene = world.sample(rng)
        kept = scenes.setdefault((len(scene.objects), scene.motion), [])
        if len(kept) < count:
            kept.append(scene)
    means = torch.stack([coverage(scenes[key], cells).mean(0) for key in wanted]).unflatten(0, (2, -1))
    return means - means.mean((1, 2), keepdim=True)


def pairs_stage(device: torch.device) -> Stage:
    """The way from the names of two things to which of them is where, for the keyframes' deepest blocks.

    A picture UNet takes what to draw from the text's summary in the time embedding, the same all over the picture, and
    hardly anything from its attention to the text's states (measured: with an empty caption's summary 1 thing of 24 was
    right, with the summary alone 22). So of two things it draws the same one twice. Asked for one of them twice it
    draws that one, and the features that it has then, put together, half a picture each, are what the blocks have to
    learn to make when asked for both; half the time with an empty caption's summary, so that they have to attend. For
    one thing they learn to make what they made.
    """
    unet, untaught = models.video_unet("keyframes"), models.picture_unet("keyframes")
    saved = MINI / "show-1-base" / "unet"
    if not saved.exists():
        raise Show1Error(f"The keyframes' UNet is missing: {saved}", "Train it first: --stage pictures, then paths")
    for each in (unet, untaught):
        _start_from(each, saved)
        each.requires_grad_(False)
    for block in (unet.down_blocks[-1], unet.mid_block, *unet.up_blocks[:2]):
        block.requires_grad_(True)
    read, draw_levels = reader(device), around(1.2, 1.3)
    spatial_part = functools.cache(lambda unet: models.spatial_part(unet, "keyframes"))
    bank = deque(maxlen=256)

    def entering(noisy: torch.Tensor, levels: torch.Tensor, captions: list[str], unsaid: torch.Tensor) -> list:
        """Return what the deepest down block is given: features, embedding, text and what is handed on.

        Where it is `unsaid`, (batch,), what is told is not in the summary.
        """
        states, silent = (read({"captions": told, "clean": noisy}) for told in (captions, [""] * len(captions)))
        summed = torch.where(unsaid[:, None, None], silent, states)
        embedding = untaught.time_embedding(untaught.get_time_embed(noisy, levels))
        embedding = embedding + untaught.get_aug_embed(embedding, summed, {})
        hidden = untaught.conv_in(noisy)
        skips = [hidden]
        for block in untaught.down_blocks[:-1]:
            hidden, passed = block(hidden, embedding)
            skips += passed
        return [hidden, embedding, untaught.process_encoder_hidden_states(states, {}), *skips]

    def features(unet: nn.Module, entered: list[torch.Tensor]) -> torch.Tensor:
        """Return what the blocks make of it, (batch, channels, height, width)."""
        hidden, embedding, text, *skips = entered
        hidden, passed = unet.down_blocks[-1](hidden, embedding, encoder_hidden_states=text)
        skips += passed
        hidden = unet.mid_block(hidden, embedding, encoder_hidden_states=text)
        for block in unet.up_blocks[:2]:
            count = len(block.resnets)
            skips, passed = skips[:-count], tuple(skips[-count:])
            hidden = block(hidden, passed, embedding, encoder_hidden_states=text)
        return hidden

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        said = torch.zeros(len(batch["clean"]), dtype=torch.bool, device=device)
        clean, levels = batch["clean"], draw_levels(len(batch["clean"]))
        noisy, levels = NOISE.add_noise(clean, torch.randn_like(clean), levels), levels.to(device)
        with torch.no_grad():
            sides = (entering(noisy, levels, batch[key], said) for key in ("left", "right"))
            left, right = (features(untaught, entered) for entered in sides)
            width = left.shape[-1]
            columns = torch.arange(width, device=device) - (width - 1) / 2
            goal = torch.lerp(left, right, torch.sigmoid(columns * SMALL[1] / width))
            unsaid = torch.rand(len(clean), device=device) < 0.5
            rows = list(zip(*entering(noisy, levels, batch["captions"], unsaid), goal, strict=True))
        if torch.is_grad_enabled():
            bank.extend(rows)
            rows = [bank[k] for k in torch.randperm(len(bank))[:16].tolist()]
        *entered, goal = (torch.stack(each) for each in zip(*rows, strict=True))
        return F.mse_loss(features(spatial_part(trained["unet"]), entered), goal)

    def sample(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        return draw(spatial_part(trained["unet"]), read(batch), batch, steps=12)

    chosen = {"unet": unet, "untaught": untaught}
    return Stage(chosen, pictures_for_pairs, loss, {"unet": "show-1-base/unet"}, sample=sample)


def keyframes_stage(device: torch.device) -> Stage:
    unet = models.video_unet("keyframes")
    _start_from(unet, MINI / "show-1-base" / "unet")
    # Where things are and go is decided in much noise: clips teach that. What they look like is lost in little noise,
    # even of a true picture (a classifier of shapes names 95 % of true ones, and of those noised to level 420 and drawn
    # on from there it named 80 %, of drawn ones 68 %): pictures teach that.
    levels, shared = around(0.4, 1.6), Cascade.load("mini").keyframes.shared_noise
    weights = {"movement_weight": 3, "shared_noise": shared}
    stage = pixel_stage(unet, keyframe_clips, "show-1-base/unet", device, levels, steps=12, **weights)
    return with_pictures(stage, "keyframes", device, around(-0.6, 1.0))


def with_pictures(
    stage: Stage, name: str, device: torch.device, draw_levels: Callable[[int], torch.Tensor], **weights: float
) -> Stage:
    """Train a video UNet's spatial layers on the "pictures" of each batch besides."""
    read = reader(device)
    spatial_part = functools.cache(lambda unet: models.spatial_part(unet, name))

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        spatial, stills = spatial_part(trained["unet"]), batch["pictures"]
        return stage.loss(trained, batch) + velocity_loss(spatial, read(stills), stills, draw_levels, **weights)

    return dataclasses.replace(stage, loss=loss)


def interpolation_stage(device: torch.device) -> Stage:
    unet = models.video_unet("interpolation")
    _start_from(unet, MINI / "show-1-interpolation" / "unet")
    steps = Cascade.load("mini").interpolation.steps
    return pixel_stage(
        unet, segments, "show-1-interpolation/unet", device, of_sampler(steps), steps=steps, edge_weight=0.3
    )


def first_frame_stage(device: torch.device) -> Stage:
    unet = models.picture_unet("pixel_upscale").to(memory_format=torch.channels_last)
    _start_from(unet, MINI / "IF-II-L" / "unet")
    batches = functools.partial(enlarged_pictures, redrawn=_redrawn(device))
    steps = Cascade.load("mini").first_frame.steps
    return pixel_stage(unet, batches, "IF-II-L/unet", device, of_sampler(steps), steps, edge_weight=0.3)


def pixel_upscale_stage(device: torch.device) -> Stage:
    unet = models.video_unet("pixel_upscale")
    _start_from(unet, MINI / "show-1-sr1" / "unet", MINI / "IF-II-L" / "unet")
    make = functools.partial(enlarged_windows, redrawn=_redrawn(device), first_frame=Upscale(device, "first_frame"))
    settings = Cascade.load("mini").pixel_upscale
    levels, weights = of_sampler(settings.steps), {"edge_weight": 0.3}
    shared = {"shared_noise": settings.shared_noise}
    stage = pixel_stage(unet, make, "show-1-sr1/unet", device, levels, settings.steps, **weights, **shared)
    return with_pictures(stage, "pixel_upscale", device, levels, **weights)


def vae_stage(device: torch.device) -> Stage:
    frames = full_frames(np.random.default_rng(0), scale=4)["clean"].to(device)

    def scale_latents(trained: dict[str, nn.Module]) -> None:
        # The diffusion model wants latents of unit variance.
        deviation = trained["vae"].encode(frames).latent_dist.mean.std().item()
        trained["vae"].register_to_config(scaling_factor=1 / deviation)

    vae = models.autoencoder()
    _start_from(vae, MINI / "show-1-sr2" / "vae")
    return Stage(
        {"vae": vae},
        full_frames,
        lambda trained, batch: autoencoder_loss(trained["vae"], batch),
        {"vae": "show-1-sr2/vae"},
        scale_latents,
        lambda trained, batch: trained["vae"](batch["clean"]).sample,
    )


def latent_upscale_stage(device: torch.device) -> Stage:
    folder = MINI / "show-1-sr2"
    if not (folder / "vae").exists():
        raise Show1Error(f"The autoencoder is missing: {folder / 'vae'}", "Train it first: --stage vae")
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).requires_grad_(False).to(device)
    scaling, half = vae.config.scaling_factor, native_bfloat16(device)
    shared = Cascade.load("mini").latent_upscale.shared_noise
    tokenizer = clip_tokenizer()
    trained = {"unet": models.video_unet("latent_upscale"), "text_encoder": models.latent_text_encoder(tokenizer)}
    for name, model in trained.items():
        _start_from(model, folder / name)

    def frames(clips: torch.Tensor) -> torch.Tensor:
        return clips.transpose(1, 2).flatten(0, 1)

    def latents(clips: torch.Tensor) -> torch.Tensor:
        mean = vae.encode(frames(clips)).latent_dist.mean
        return mean.unflatten(0, (len(clips), -1)).transpose(1, 2).float() * scaling

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        def error_of(sample: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                decoded = vae.decode(frames(sample) / scaling).sample.float()
            return PIXEL_WEIGHT * pixel_error(decoded, frames(batch["clean"]))

        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            pair = {"clean": latents(batch["clean"]), "degraded": latents(batch["condition"])}
        states = _states(trained["text_encoder"], _tokens(tokenizer, batch))
        return velocity_loss(trained["unet"], states, pair, mostly(50), top=50, shared_noise=shared, error_of=error_of)

    return Stage(
        trained,
        functools.partial(
            full_windows,
            redrawn=_redrawn(device),
            first_frame=Upscale(device, "first_frame"),
            enlarge=Upscale(device, "pixel_upscale"),
        ),
        loss,
        {"unet": "show-1-sr2/unet", "text_encoder": "show-1-sr2/text_encoder"},
    )


class Upscale:
    """A trained upscale in pixels, "first_frame" or "pixel_upscale", as the cascade runs it.

    It is loaded where it is first used: on a CPU in the process that makes the batches.
    """

    def __init__(self, device: torch.device, stage: str):
        self.device, self.stage, self.settings = device, stage, Cascade.load("mini").stream_settings(stage)

    @functools.cached_property
    def loaded(self) -> tuple[nn.Module, Callable[[dict], torch.Tensor]]:
        with CPU:
            if self.stage == "first_frame":
                unet, folder = models.picture_unet("pixel_upscale"), "IF-II-L"
            else:
                unet, folder = models.video_unet("pixel_upscale"), "show-1-sr1"
            _start_from(unet, MINI / folder / "unet")
            return channels_last(unet.requires_grad_(False).to(self.device)), reader(self.device)

    def __call__(self, batch: dict) -> torch.Tensor:
        """Return what it makes of the batch's "condition", in the shape of its "clean"."""
        unet, read = self.loaded
        return draw(unet, read(batch), batch, self.settings["steps"], self.settings.get("shared_noise", 0.0))


def _redrawn(device: torch.device) -> Redrawn:
    dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    # Drawing a clip takes a CPU as long as some updates of an upscaler; a GPU draws many in the time of one.
    fresh = 0.05 if device.type == "cpu" else 0.5
    return Redrawn(MINI, device, dtype, picture_chances(), fresh)


# Name → how to build it and its share of the time, in order: each may start from what those before it have saved.
STAGES: dict[str, tuple[Callable[[torch.device], Stage], float]] = {
    "text": (lambda device: text_stage(), 0.02),
    "pictures": (pictures_stage, 0.16),
    "paths": (paths_stage, 0.06),
    "pairs": (pairs_stage, 0.06),
    "keyframes": (keyframes_stage, 0.22),
    "interpolation": (interpolation_stage, 0.06),
    "first_frame": (first_frame_stage, 0.14),
    "pixel_upscale": (pixel_upscale_stage, 0.12),
    "vae": (vae_stage, 0.06),
    "latent_upscale": (latent_upscale_stage, 0.10),
}


def _start_from(model: nn.Module, *folders: Path) -> None:
    """Load the weights of the first folder that has some; temporal layers may be missing or too many."""
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    if not files:
        return
    weights = load_file(files[0])
    expected = model.state_dict()
    strays = [key for key in weights.keys() ^ expected.keys() if "temp_" not in key]
    strays += [key for key in weights.keys() & expected.keys() if weights[key].shape != expected[key].shape]
    if strays:
        raise Show1Error(
            f"{files[0]} holds weights of another configuration: {sorted(strays)[0]} does not fit.",
            f"Remove {files[0].parent} to start that stage from nothing.",
        )
    model.load_state_dict({key: weights[key].float() for key in weights.keys() & expected.keys()}, strict=False)


# --- The training loop ----------------------------------------------------------------------------------------------


def run(name: str, minutes: float, seed: int, device: torch.device, rank: int = 0, rate: float = RATE) -> None:
    """Train a stage until it has had `minutes` of training in all, saving its averaged weights under show_1/mini.

    Where it is one of several processes, they average their weights every few updates (post-local SGD, arXiv
    1808.07217), and the one of rank 0 saves. On a CPU that is worth far more than threads: networks this small leave
    two of them 1.1 times as fast as one (measured). A GPU would wait for a single process most of the time.
    """
    build, _ = STAGES[name]
    torch.manual_seed(seed)
    stage = build(device)
    for model in stage.models.values():
        model.to(device)
        if device.type == "cuda":
            channels_last(model)
        else:
            _attend_plainly(model)
    average = {key: copy.deepcopy(model).requires_grad_(False) for key, model in stage.models.items()}
    parameters = [parameter for model in stage.models.values() for parameter in model.parameters()]
    optimizers = optimizers_of(parameters, stage.muon)
    checkpoint = RUNS / f"{name}.pt"
    step, seconds = 0, 0.0
    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, weights_only=True, map_location=device)
            for key in stage.models:
                stage.models[key].load_state_dict(state["models"][key])
                average[key].load_state_dict(state["average"][key])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            step, seconds = state["step"], state["seconds"]
        except (RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise Show1Error(
                f"{checkpoint} does not fit this stage: {str(error).splitlines()[0]}",
                f"Remove it to start {name} from the weights in {MINI}.",
            ) from None
    if seconds >= minutes * 60:
        if rank == 0:
            print(f"{name}: trained for {seconds / 60:.1f} minutes already")
        return

    torch.manual_seed(seed + step + 1_000_003 * rank)
    if device.type == "cpu":
        made = Batches(stage.batches, (seed, step, rank))
        batches = DataLoader(made, batch_size=None, num_workers=1, prefetch_factor=4)
    else:
        batches = painted_on(device, stage.batches, (seed, step, rank))
    losses, last = [], time.monotonic()
    saved = sheeted = last
    for batch in batches:
        share = min(seconds / (minutes * 60), 1)
        loss = stage.loss(stage.models, batch)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 50) * (1 - 0.95 * share)  # warm up, then fall
            optimizer.step()
        step += 1
        _move_average(average, stage.models, min(0.998, step / (step + 10)))
        losses.append(loss.detach())
        if step % UPDATES_APART:
            continue
        now = time.monotonic()
        seconds, last = _meet(parameters, seconds + now - last), now
        done = seconds >= minutes * 60
        if rank == 0 and (now - saved > 45 or done):
            state = {
                "models": {key: model.state_dict() for key, model in stage.models.items()},
                "average": {key: model.state_dict() for key, model in average.items()},
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "seconds": seconds,
            }
            with _telling_what_cannot_be_saved(checkpoint):
                _save(checkpoint, state)
                with torch.no_grad():
                    stage.finish(average)
                for key, folder in stage.folders.items():
                    _export(average[key], MINI / folder)
                entry = {"loss": round(torch.stack(losses).mean().item(), 5)}
                if done or now - sheeted > 600:
                    entry["evaluation"] = round(stage.evaluate(average, device), 5)
                    if stage.sample is not None:
                        with torch.no_grad():
                            sheet(stage.sample(average, batch), batch, RUNS / "samples" / f"{name}.png")
                    sheeted = now
            _log(stage=name, step=step, seconds=round(seconds), **entry)
            losses, saved = [], time.monotonic()
        if done:
            break
    if distributed.is_initialized():
        distributed.barrier()  # the next stage starts from what has just been saved


class Muon(torch.optim.Muon):
    """PyTorch's Muon (kellerjordan.github.io/posts/muon) for convolutions too: as matrices, a row an output channel."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        matrices = [nn.Parameter(parameter.detach().flatten(1)) for parameter in parameters]
        super().__init__(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:
        pairs = list(zip(self.param_groups[0]["params"], self.parameters, strict=True))
        for matrix, parameter in pairs:
            matrix.data = parameter.flatten(1)  # a view, or where it is channels-last a copy
            matrix.grad = parameter.grad.flatten(1)
        super().step()
        for matrix, parameter in pairs:
            if matrix.data_ptr() != parameter.data_ptr():  # a view has moved it already
                parameter.copy_(matrix.view_as(parameter))


def optimizers_of(parameters: list[nn.Parameter], muon: bool) -> list[torch.optim.Optimizer]:
    """Return what trains the parameters: AdamW, and where `muon` is asked for Muon for the matrices.

    Ten minutes each with the keyframes' pictures, from the same weights, took the loss at noise level 400 from 0.0704
    to 0.0698 with AdamW and to 0.0689 with Muon.
    """
    # Not the first and the last layer, which have three colours on one side.
    matrices = [p for p in parameters if muon and p.ndim > 1 and min(len(p), p[0].numel()) > 3 * 3**2]
    kept = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in kept]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99))
    return [adamw, Muon(matrices)] if matrices else [adamw]


def _attend_plainly(model: nn.Module) -> None:
    """Have a model's attention be plain matrix products, but that of a video UNet to its text.

    Over a clip's few frames PyTorch's own takes, forth and back on a CPU, half of an interpolation's update (measured).
    """
    for module in model.modules():
        if isinstance(module, Attention) and not isinstance(module.processor, TextAttention):
            module.set_processor(AttnProcessor() if module.added_kv_proj_dim is None else AttnAddedKVProcessor())


def join(address: str, rank: int, processes: int) -> None:
    """Become one of several processes that train together; they find each other at `address`, file://…"""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)


def _meet(parameters: list[nn.Parameter], seconds: float) -> float:
    """Average weights and time among the processes that train together; return the time."""
    if not distributed.is_initialized():
        return seconds
    with torch.no_grad():
        device = parameters[0].device
        flat = torch.cat([*(parameter.flatten() for parameter in parameters), torch.tensor([seconds], device=device)])
        means = flat.cpu()  # which is where processes can share
        distributed.all_reduce(means)
        means /= distributed.get_world_size()
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, mean in zip(parameters, means.to(device).split([*sizes, 1]), strict=False):
            parameter.copy_(mean.view_as(parameter))
    return means[-1].item()


def _move_average(average: dict[str, nn.Module], trained: dict[str, nn.Module], decay: float) -> None:
    for key, model in average.items():
        fast = [parameter.detach() for parameter in trained[key].parameters()]
        torch._foreach_lerp_(list(model.parameters()), fast, 1 - decay)


@contextlib.contextmanager
def _telling_what_cannot_be_saved(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch says a full disk with a RuntimeError
        raise Show1Error(
            f"The training cannot be saved: {str(error).splitlines()[0]}",
            f"Free some space and start again: {checkpoint} and the weights as they were are whole.",
        ) from error


def _save(path: Path, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _export(model: nn.Module, folder: Path) -> None:
    """Save in half precision; every file is whole at any moment.

    All but the layers that are kept in float32 is saved in numbers that bfloat16 holds, too, so that a CPU that
    computes in it has the same weights as one in float32: other ones were most of what kept their keyframes apart. In
    those layers rounding took the interpolation's error up by a tenth (both measured).
    """
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    saved = copy.deepcopy(model)
    for name, parameter in saved.named_parameters():
        if not name.startswith(kept):
            parameter.data = parameter.data.bfloat16()
    temporary = folder.with_name(f".{folder.name}.part")
    try:
        saved.half().save_pretrained(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _export_schedulers() -> None:
    for folder in ("show-1-base", "show-1-interpolation", "show-1-sr1", "IF-II-L"):
        models.scheduler(thresholding=True).save_pretrained(MINI / folder / "scheduler")
    for folder in ("show-1-sr1", "IF-II-L"):
        models.image_noising_scheduler().save_pretrained(MINI / folder / "image_noising_scheduler")
    models.scheduler(thresholding=False).save_pretrained(MINI / "show-1-sr2" / "scheduler")


def _export_words() -> None:
    """Save what the page and the command line call known words."""
    (MINI / "words.txt").write_text("\n".join(sorted(world.vocabulary())) + "\n")


def _log(**entry) -> None:
    print(json.dumps(entry), flush=True)
    with LOG.open("a") as log:
        log.write(json.dumps(entry) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="of training in all, shared out among the stages")
    parser.add_argument("--stage", default="all", help=f"all, or one of: {', '.join(STAGES)}")
    parser.add_argument(
        "--rate", type=float, default=RATE, help="of learning at first; less suits weights that are good already"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu or cuda")
    parser.add_argument("--processes", type=int, help="default: four on a GPU, one a core on a CPU")
    arguments = parser.parse_args()
    if arguments.stage not in ("all", *STAGES):
        parser.error(f"there is no stage {arguments.stage!r}; choose all or one of: {', '.join(STAGES)}")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(arguments.device)
    world.sprites()  # a missing font is said here, not by a worker
    processes = arguments.processes or (4 if device.type == "cuda" else os.cpu_count() or 1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    _log(
        command=" ".join(["python -m training.train", *sys.argv[1:]]),
        device=f"{name}, {processes} processes",
        versions={"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()},
    )
    _export_schedulers()
    _export_words()
    if processes == 1:
        _train(0, None, arguments, device)
        return
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        meeting = (f"file://{folder}/meeting", processes)
        others = [context.Process(target=_train, args=(n, meeting, arguments, device)) for n in range(1, processes)]
        for process in others:
            process.start()
        try:
            _train(0, meeting, arguments, device)
        finally:
            for process in others:
                process.terminate()


def _train(rank: int, meeting: tuple[str, int] | None, arguments: argparse.Namespace, device: torch.device) -> None:
    """Train the wanted stages as one of several processes that know each other by `meeting`, or alone."""
    if meeting is not None:
        join(meeting[0], rank, meeting[1])
    if device.type == "cpu":
        # Of so few numbers a head, attention's flash kernel takes longer backwards on a CPU than plain products.
        torch.backends.cuda.enable_flash_sdp(False)
    for name, (_, share) in STAGES.items():
        if arguments.stage in ("all", name):
            share = share if arguments.stage == "all" else 1
            run(name, arguments.minutes * share, arguments.seed, device, rank, arguments.rate)


if __name__ == "__main__":
    sys.exit(exit_code(main))
