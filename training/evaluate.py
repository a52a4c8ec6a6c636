"""How well mini follows its prompts, judged by training/judge.py: `python -m training.evaluate [--json FILE]`.

Videos are made with the default settings from combinations of object, place and motion that were never trained on, as
evenly spread over the vocabulary as can be. Besides the final video, each stage's clip is judged, so that one sees
where something is lost, and each stage but the first is measured against the plain way of doing its work.

On a CPU one process a core makes the videos, each with one thread: the same videos to rounding, in four fifths of the
time on two cores. How long a video takes is measured before, on a few made with all threads.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import resource
import signal
import sys
import time
from collections import Counter
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from benchmarks.figures import write_figures
from show_1 import Show1Error, Show1Pipeline
from show_1.device import check_device
from show_1.errors import exit_code
from show_1.files import check_outputs, write_atomically, writing
from show_1.stages.denoise import finish
from training import judge, models, world
from training.batches import FULL, MEDIUM, SMALL, bicubic, degrade
from training.redraw import TIMES

ASPECTS = ("object", "place", "motion")
CLIPS = ("keyframes", "interpolated", "pixel_upscaled", "video")


def combinations(count: int) -> list[tuple[str, str, str]]:
    """Return never-trained combinations of object, place and motion in which every word comes up about as often.

    Where `count` is more than there are, all of them.
    """
    left = [c for c in itertools.product(world.OBJECTS, world.PLACES, world.MOTIONS) if world.held_out(*c)]
    np.random.default_rng(0).shuffle(left)
    seen, chosen = Counter(), []
    shares = (len(world.OBJECTS), len(world.PLACES), len(world.MOTIONS))
    while left and len(chosen) < count:
        best = min(left, key=lambda c: sum(seen[word] * share for word, share in zip(c, shares, strict=True)))
        chosen.append(tuple(str(word) for word in best))
        left.remove(best)
        seen.update(best)
    return chosen


def pairs(count: int) -> list[tuple[tuple[str, str], str, str]]:
    """Return never-trained combinations of two objects, place and motion: neither object was seen so there."""
    rng, chosen = np.random.default_rng(1), []
    objects, places, motions = list(world.OBJECTS), list(world.PLACES), list(world.MOTIONS)
    while len(chosen) < count:
        one, another = (objects[k] for k in rng.choice(len(objects), 2, replace=False))
        place, motion = places[len(chosen) % len(places)], motions[rng.integers(len(motions))]
        if world.held_out(one, place, motion) and world.held_out(another, place, motion):
            chosen.append(((one, another), place, motion))
    return chosen


class Tally:
    """Counts of right and judged, in all and word by word."""

    def __init__(self):
        self.right, self.judged = Counter(), Counter()

    def add(self, aspect: str, word: str, right: bool) -> None:
        for key in ((aspect, None), (aspect, word)):
            self.right[key] += right
            self.judged[key] += 1

    def add_all(self, words: tuple[str, str, str], verdict: dict) -> None:
        for aspect, word in zip(ASPECTS, words, strict=True):
            self.add(aspect, word, verdict[aspect] == word)

    def fractions(self) -> dict:
        """Return {"object": share, …, "objects": {"panda": share, …}, …}, by aspect and word."""
        shares = {key: round(self.right[key] / count, 4) for key, count in sorted(self.judged.items(), key=str)}
        found = {aspect: share for (aspect, word), share in shares.items() if word is None}
        for aspect in list(found):
            found[f"{aspect}s"] = {word: share for (of, word), share in shares.items() if of == aspect and word}
        return found


def _get_ready(cascade: str, device: str | None) -> None:
    """Load the cascade and the judge of this process, one of several."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks for the videos ends this one
    torch.set_num_threads(1)
    _use(Show1Pipeline.from_cascade(cascade, device), judge.load())


def _use(pipeline: Show1Pipeline, critic: judge.Judge) -> None:
    global _pipeline, _critic
    _pipeline, _critic = pipeline, critic


def _video(prompt: str, seed: int) -> tuple[np.ndarray, dict[str, dict]]:
    """Return a video's frames, (29, height, width, 3), and what the judge sees in each stage's clip."""
    result = _pipeline(prompt, seed=seed)
    return result.frames, {clip: _critic.verdict(result.tensors[clip]) for clip in CLIPS}


def _keyframes(prompt: str, seed: int, guidance: float) -> dict:
    """Return what the judge sees in keyframes that another guidance scale makes."""
    settings = _pipeline.cascade.stream_settings("keyframes") | {"guidance": guidance}
    return _critic.verdict(_pipeline.keyframes(_pipeline.keyframes.encode(prompt), **settings, seed=seed).cpu())


def follow_prompts(pool: Executor, count: int) -> tuple[dict, list[tuple[np.ndarray, str]]]:
    """Have `count` videos of single objects made and judge them; return the figures, and the first videos for `show`.

    They are fewer where there are not so many combinations; "videos" says how many were made.
    """
    chosen, tallies, shown = combinations(count), {clip: Tally() for clip in CLIPS}, []
    prompts = [world.plain_caption(*words) for words in chosen]
    made = tqdm(pool.map(_video, prompts, range(len(chosen))), "videos", len(chosen))
    for words, prompt, (frames, verdicts) in zip(chosen, prompts, made, strict=True):
        for clip, tally in tallies.items():
            tally.add_all(words, verdicts[clip])
        for seen in verdicts["video"]["stills"]:
            tallies["video"].add("still", words[0], seen == words[0])
        if len(shown) < 12:
            shown.append((frames, prompt))
    stages = {clip: {a: tally.fractions()[a] for a in ASPECTS} for clip, tally in tallies.items()}
    return tallies["video"].fractions() | {"videos": len(chosen), "stages": stages}, shown


def follow_pairs(pool: Executor, count: int) -> float:
    """Return the share of videos of two objects in which the judge sees both."""
    chosen = pairs(count)
    prompts = [world.plain_caption(*words) for words in chosen]
    made = tqdm(pool.map(_video, prompts, range(count)), "pairs", count)
    right = [seen["video"]["pair"] == set(both) for (both, _, _), (_, seen) in zip(chosen, made, strict=True)]
    return round(sum(right) / count, 4)


def keyframes_of_guidance(pool: Executor, scale: float, count: int = 264, two: int = 24) -> dict:
    """Judge keyframes of a guidance scale alone, which takes a fraction of a video's time.

    So many of one object, each keyframe also by itself ("still"), and of two ("pair"). They are many, as little is
    lost without guidance.
    """
    chosen, tally, both = combinations(count), Tally(), pairs(two)
    prompts = [world.plain_caption(*words) for words in (*chosen, *both)]
    made = pool.map(_keyframes, prompts, range(len(prompts)), itertools.repeat(scale))
    verdicts = list(tqdm(made, f"guidance {scale:g}", len(prompts)))
    for words, verdict in zip(chosen, verdicts[:count], strict=True):
        tally.add_all(words, verdict)
        for seen in verdict["stills"]:
            tally.add("still", words[0], seen == words[0])
    right = [verdict["pair"] == set(names) for (names, *_), verdict in zip(both, verdicts[count:], strict=True)]
    return {aspect: tally.fractions()[aspect] for aspect in (*ASPECTS, "still")} | {"pair": round(sum(right) / two, 4)}


def seconds_a_video(pipeline: Show1Pipeline, count: int = 3) -> float:
    """Return the median time of a video made with all that this computer has, after one that warms it up."""
    seconds = [pipeline("a panda jumping in the snow", seed=seed).settings["seconds"] for seed in range(count + 1)]
    return round(float(np.median(seconds[1:])), 1)


def stages_earn_their_place(pipeline: Show1Pipeline, count: int) -> dict:
    """Measure the later stages against the plain ways, on degraded true frames of the world.

    Interpolation: mean squared error to the true frames between the keyframes, given with noise, against a linear
    blend. Upscales: the judge's perceptual distance to the true frames, given with noise and half the time blurred,
    against bicubic enlargement.
    """
    rng, critic, cascade = np.random.default_rng(99), judge.load(), pipeline.cascade
    device = pipeline.keyframes.device
    found = {name: [] for name in ("interpolation", "blend", "pixel", "pixel_bicubic", "latent", "latent_bicubic")}
    torch.manual_seed(99)  # what degrades the frames

    for seed in tqdm(range(count), desc="stages"):
        scene = world.sample(rng, train=False)
        small, medium, full = (world.render([scene], *size, TIMES) for size in (SMALL, MEDIUM, FULL))
        noisy = (small + 0.04 * torch.randn_like(small)).clamp(-1, 1).to(device)
        text = pipeline.keyframes.encode(scene.caption)
        settings = cascade.stream_settings("interpolation") | {"seed": seed}
        between = pipeline.interpolation(text, noisy[:, :, ::4], **settings).cpu()
        blend = F.interpolate(noisy.cpu()[:, :, ::4], size=small.shape[2:], mode="trilinear", align_corners=True)
        inner = [k for k in range(29) if k % 4]
        found["interpolation"].append(F.mse_loss(between[:, :, inner], small[:, :, inner]).item())
        found["blend"].append(F.mse_loss(blend[:, :, inner], small[:, :, inner]).item())

        given = degrade(small).clamp(-1, 1).to(device)
        first = finish(
            pipeline.pixel_upscale.stream_first_frame(
                text, given[:, :, 0], **cascade.stream_settings("first_frame"), seed=seed
            )
        )
        enlarged = pipeline.pixel_upscale(text, given, first, **cascade.stream_settings("pixel_upscale"), seed=seed)
        found["pixel"].append(critic.distance(enlarged.cpu(), medium))
        found["pixel_bicubic"].append(critic.distance(bicubic(given.cpu(), MEDIUM, align_corners=True), medium))

        given = degrade(medium).clamp(-1, 1).to(device)
        latent_text = pipeline.latent_upscale.encode(scene.caption, cascade.latent_upscale.negative_prompt)
        redrawn = pipeline.latent_upscale(latent_text, given, **cascade.stream_settings("latent_upscale"), seed=seed)
        found["latent"].append(critic.distance(redrawn.cpu(), full))
        found["latent_bicubic"].append(critic.distance(bicubic(given.cpu(), FULL, align_corners=False), full))
    return {name: round(float(np.mean(values)), 5) for name, values in found.items()}


def show(results: list[tuple[np.ndarray, str]], folder: Path) -> None:
    """Write a contact sheet of the videos, mini.png, and the first three as moving pictures, mini-1.webp, …"""

    def save(name: str, picture: Image.Image, **options) -> None:
        content = io.BytesIO()
        picture.save(content, Path(name).suffix[1:], **options)
        write_atomically(folder / name, content.getvalue())

    save("mini.png", contact_sheet(results), optimize=True)
    for number, (frames, _) in enumerate(results[:3], start=1):
        first, *others = (Image.fromarray(frame) for frame in frames)
        moving = {"save_all": True, "append_images": others, "duration": 125, "loop": 0, "quality": 75}
        save(f"mini-{number}.webp", first, **moving)


def contact_sheet(results: list[tuple[np.ndarray, str]], columns: int = 3) -> Image.Image:
    """Return a still of each video, its middle frame, with the prompt under it."""
    height, width = results[0][0].shape[1:3]
    rows = -(-len(results) // columns)
    sheet = Image.new("RGB", (columns * (width + 8) + 8, rows * (height + 30) + 8), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (frames, prompt) in enumerate(results):
        x, y = 8 + number % columns * (width + 8), 8 + number // columns * (height + 30)
        sheet.paste(Image.fromarray(frames[len(frames) // 2]), (x, y))
        draw.text((x + 2, y + height + 4), prompt, fill="black", font=font)
    return sheet


def scales(text: str) -> list[float]:
    """Return "1,1.5" as numbers; raises ValueError for what is none."""
    return [float(scale) for scale in text.split(",")] if text else []


def _pool(cascade: str, device: str | None, pipeline: Show1Pipeline, critic: judge.Judge) -> Executor:
    """Return what makes videos: on a CPU a process a core; on a GPU, which takes one at a time, this process."""
    if check_device(device).type == "cpu":
        return ProcessPoolExecutor(models.cores(), multiprocessing.get_context("spawn"), _get_ready, (cascade, device))
    _use(pipeline, critic)
    return ThreadPoolExecutor(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=250, help="how many of one object each: five an object")
    parser.add_argument("--pairs", type=int, default=24, help="how many, of two objects each")
    parser.add_argument("--stages", type=int, default=12, help="how many true clips the stages are measured on")
    told = 'scales to judge keyframes of 288 prompts with, beside the cascade\'s own; "" for none'
    parser.add_argument("--guidance", type=scales, default="1", metavar="A,B", help=told)
    parser.add_argument("--cascade", default="mini", metavar="NAME|FILE")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write a contact sheet and some moving pictures"
    )
    arguments = parser.parse_args()
    if min(arguments.videos, arguments.pairs, arguments.stages) < 0:
        parser.error("there cannot be fewer than 0 videos, pairs or stages")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `timeout` ends what it runs
    check_outputs(arguments.json)
    if arguments.pictures is not None:
        with writing(arguments.pictures):
            arguments.pictures.mkdir(parents=True, exist_ok=True)
    world.sprites()  # a missing font is said here, not after an hour
    critic = judge.load()
    pipeline = Show1Pipeline.from_cascade(arguments.cascade, arguments.device)
    last = pipeline.cascade.latent_upscale
    if arguments.stages and (last.height, last.width) != FULL:
        raise Show1Error(
            f"The stages are held against true clips of {FULL[1]} x {FULL[0]}, and this cascade's are "
            f"{last.width} x {last.height}.",
            "Give --stages 0.",
        )
    began, found = time.monotonic(), {"seconds_per_video": seconds_a_video(pipeline)}

    def save() -> None:  # after each part: they take long
        write_figures(arguments.json, found)

    pool = _pool(arguments.cascade, arguments.device, pipeline, critic)
    try:
        if arguments.videos:
            figures, videos = follow_prompts(pool, arguments.videos)
            found |= figures
            save()
            if arguments.pictures is not None:
                with writing(arguments.pictures):
                    show(videos, arguments.pictures)
        if arguments.pairs:
            found["pair"] = follow_pairs(pool, arguments.pairs)
            save()
        if arguments.guidance:
            tried = sorted({pipeline.cascade.keyframes.guidance, *arguments.guidance})
            found["guidance"] = {scale: keyframes_of_guidance(pool, scale) for scale in tried}
            save()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        time.sleep(0.5)  # until what waits is dropped: Python 3.11 would find fault with it when the processes are gone
        for process in multiprocessing.active_children():  # what they still make is not wanted
            process.terminate()
        raise
    pool.shutdown()
    if arguments.stages:
        found["earned"] = stages_earn_their_place(pipeline, arguments.stages)
    found |= {
        "judge": judge.accuracy(critic),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(found, indent=1))
    save()


if __name__ == "__main__":
    sys.exit(exit_code(main))
