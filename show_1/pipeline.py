"""Prompt in, video out: the chain of stages, told as it happens."""

import itertools
import os
import platform
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from accelerate.hooks import UserCpuOffloadHook

import show_1
from show_1 import checks, hub, loading, placement, video
from show_1.cascade import Cascade, is_text
from show_1.device import check_device, check_dtype, default_dtype, load_cascade
from show_1.errors import Show1Error, telling_full_memory
from show_1.models import try_kernels
from show_1.stages import (
    InterpolationPipeline,
    KeyframesPipeline,
    LatentUpscalePipeline,
    Pause,
    PixelUpscalePipeline,
    Step,
    window_starts,
)
from show_1.text import dropped_words, listed

MAX_SEED = 2**53 - 1  # the largest whole number that JSON and browsers keep exactly


@dataclass(frozen=True)
class Notice:
    """Something that the user should know; the work goes on."""

    message: str


@dataclass(frozen=True)
class StageStart:
    """A stage begins, of `steps` denoising steps."""

    stage: str
    steps: int


@dataclass(frozen=True)
class StepDone:
    """Step number `step` of `steps` is done.

    `preview()`, to be asked before the next step, draws the stage's present estimate of its result (of the pixel
    upscale's, the frames at work; of the latent upscale's, one): (frames, height, width, 3) uint8. Of several prompts
    it shows the first.
    """

    stage: str
    step: int
    steps: int
    preview: Callable[[], np.ndarray] = field(repr=False)


@dataclass(frozen=True)
class Clip:
    """What a stage has made: (prompts, 3, frames, height, width), about [−1, 1]; the first frame without the frames."""

    stage: str
    tensor: torch.Tensor = field(repr=False)

    @property
    def frames(self) -> np.ndarray:
        """The (first prompt's) clip for people, (frames, height, width, 3) uint8."""
        return video.to_uint8(self.tensor if self.tensor.ndim == 5 else self.tensor[:, :, None])


@dataclass(frozen=True)
class Video:
    """The result: frames (frames, height, width, 3) uint8, and the settings that made them.

    `tensors` holds what the stages have passed on, on the CPU: prompt_embeds and negative_prompt_embeds
    (1, 77, features), keyframes, interpolated, first_frame, pixel_upscaled and video, about [−1, 1].
    """

    frames: np.ndarray = field(repr=False)
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(repr=False)


Event = Notice | StageStart | StepDone | Pause | Clip | Video


class Show1Pipeline:
    """The cascade of arXiv 2309.15818: four diffusers pipelines, one after the other.

    Raises Show1Error where the cascade's settings, the models and their schedulers do not go together.
    """

    def __init__(
        self,
        cascade: Cascade,
        keyframes: KeyframesPipeline,
        interpolation: InterpolationPipeline,
        pixel_upscale: PixelUpscalePipeline,
        latent_upscale: LatentUpscalePipeline,
    ):
        self.cascade = cascade
        self.keyframes = keyframes
        self.interpolation = interpolation
        self.pixel_upscale = pixel_upscale
        self.latent_upscale = latent_upscale
        self.weights: str | None = None  # their `fingerprint`, where `from_cascade` has loaded them
        self.prompts_at_once = 1
        self.offload_hooks: list[UserCpuOffloadHook] = []  # of the models that are on the device only while they work
        checks.check_models(self)
        checks.check_schedulers(self)
        checks.check_sizes(self)

    @classmethod
    def from_cascade(
        cls,
        name_or_file: str | Path | Cascade | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        memory: str | None = None,
        models: str | Path | None = None,
        offline: bool = False,
        report: hub.Report | None = None,
        on_load: Callable[[int], None] | None = None,
    ) -> "Show1Pipeline":
        """Load a cascade: a bundled name, a TOML file, or one read already; what is not here is fetched from the hub.

        By default that is `show-1` on the CUDA device where there is one, else `mini` on the CPU. `dtype`, by default
        `device.default_dtype`'s, is that of all models and their noise (`placement.dtype_of` tells an exception; the
        first frame's steps draw in float32). What sits on the device follows from its free memory, or from `memory`
        ("12GB"). `models`, `offline` and `report` are those of `hub.fetch`: a folder to take the models from, no
        network, and what to call with the fetching's Progress. `on_load` is called once, when all is here and the
        loading begins, with the bytes of the weights. On a CPU the whole process keeps freed memory from then on, see
        `placement.keep_freed_memory`.

        Raises Show1Error for a cascade, model, device, dtype or memory that will not do.
        """
        device = check_device(device)
        dtype = default_dtype(device) if dtype is None else dtype
        check_dtype(device, dtype)
        if models is not None and not isinstance(models, str | Path):
            raise Show1Error(f"The folder of models cannot be {models!r}.", "Give its name, as a text or a Path.")
        cascade = name_or_file
        if not isinstance(cascade, Cascade):
            cascade = load_cascade(cascade, device)
        cascade.known_words()  # a list of words that cannot be read, or no memory, is told before all is fetched
        if memory is not None:
            placement.parse_memory(memory, placement.device_memory(device)[1])
        folders = hub.fetch(cascade, models=models, offline=offline, report=report)
        weights = placement.weight_bytes(cascade, folders, dtype)
        tier = placement.choose(cascade, device, weights, memory)
        placement.check_loading(cascade, device, weights)
        if on_load is not None:
            on_load(weights)
        with telling_full_memory("Loading the models"):
            stages = loading.load_stages(cascade, folders, dtype)
            pipeline = cls(cascade, *stages)
            pipeline.weights = loading.fingerprint(stages)
            placement.place(pipeline, tier, device)
        return pipeline

    def with_cascade(self, cascade: Cascade) -> "Show1Pipeline":
        """Return a pipeline of the same models with other settings, such as steps.

        Raises Show1Error for those that the models or their schedulers cannot do, and for a cascade of other models.
        """
        if not cascade.has_models_of(self.cascade):
            raise Show1Error(
                f"{cascade.name} has other models than {self.cascade.name}.",
                "Load them: Show1Pipeline.from_cascade.",
            )
        other = Show1Pipeline(cascade, self.keyframes, self.interpolation, self.pixel_upscale, self.latent_upscale)
        other.weights, other.offload_hooks = self.weights, self.offload_hooks
        other.prompts_at_once = self.prompts_at_once
        return other

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        path: str | Path | Sequence[str | Path] | None = None,
    ) -> Video | list[Video]:
        """Make a video, or a list of one a prompt, and write it to `path`, where given; see `stream` for the rest."""
        videos = [event for event in self.stream(prompt, seed=seed, path=path) if isinstance(event, Video)]
        return videos[0] if isinstance(prompt, str) else videos

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        path: str | Path | Sequence[str | Path] | None = None,
    ) -> Iterator[Event]:
        """Yield what happens as it happens: stage starts, steps, pauses, each stage's clip, at last the Video.

        Several prompts run through the stages as one batch, as many at once as the memory allows, and a Video of each
        comes at the end of its batch: the frames, to rounding, that it would be alone. They take a seed and a path
        each, or one seed for all.

        To cancel, stop asking: nothing has been written until the Video comes. The same prompt, seed and cascade give
        the same frames on the same device and dtype; without a seed one is drawn for each, and told in the settings.

        Raises Show1Error at once for a blank prompt, a seed beyond 0…2^53 − 1, a path that cannot be written to, and
        where prompts, seeds and paths are not as many; later where a memory or the disk is full, and where a stage
        comes to values that are no numbers.
        """
        return self._batches(_requests(prompt, seed, path))

    def _batches(self, requests: list["Request"]) -> Iterator[Event]:
        with telling_full_memory("Making a video"):
            for start in range(0, len(requests), self.prompts_at_once):
                yield from self._stream(requests[start : start + self.prompts_at_once])

    def _stream(self, requests: list["Request"]) -> Iterator[Event]:
        started = time.monotonic()
        prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
        for prompt in dict.fromkeys(prompts):
            yield from self._notices(prompt)
        cascade = self.cascade
        for hook in self.offload_hooks:
            hook.offload()  # a video that was broken off may have left a model on the device
        text = self.keyframes.encode(prompts)

        def run(stage: str, steps: int, stream: Generator[Step | Pause, None, torch.Tensor]):
            """Pass on a stage's steps as events, return its clip."""
            yield StageStart(stage, steps)
            numbers = itertools.count(1)
            while True:
                try:
                    step = next(stream)
                except StopIteration as end:
                    extremes = torch.stack(end.value.flatten(1).aminmax(dim=1))  # both are NaN where one value is
                    faults = [
                        prompt for prompt, good in zip(prompts, extremes.isfinite().all(0), strict=True) if not good
                    ]
                    if faults:
                        raise Show1Error(
                            f"The {stage.replace('_', ' ')} of {faults[0][:60]!r} came to values that are no numbers.",
                            "Fetch its model anew, or compute in bfloat16 or float32, where large numbers have room.",
                        ) from None
                    # Nothing, but where somebody has had the stage's models offloaded.
                    getattr(self, "pixel_upscale" if stage == "first_frame" else stage).maybe_free_model_hooks()
                    yield Clip(stage, end.value)
                    return end.value
                if isinstance(step, Step):
                    step = StepDone(stage, next(numbers), steps, partial(self._preview, stage, step))
                yield step

        def settings(stage: str) -> dict[str, Any]:
            return cascade.stream_settings(stage) | {"seed": seeds}

        keyframes = yield from run(
            "keyframes", cascade.keyframes.steps, self.keyframes.stream(text, **settings("keyframes"))
        )
        interpolated = yield from run(
            "interpolation",
            cascade.interpolation.steps,
            self.interpolation.stream(text, keyframes, **settings("interpolation")),
        )
        first_frame = yield from run(
            "first_frame",
            cascade.first_frame.steps,
            self.pixel_upscale.stream_first_frame(text, interpolated[:, :, 0], **settings("first_frame")),
        )
        pixel_upscaled = yield from run(
            "pixel_upscale",
            cascade.pixel_upscale.steps * len(window_starts(interpolated.shape[2])),
            self.pixel_upscale.stream(text, interpolated, first_frame, **settings("pixel_upscale")),
        )
        table = cascade.latent_upscale
        upscaled = yield from run(
            "latent_upscale",
            int(table.steps * table.strength),
            self.latent_upscale.stream(
                self.latent_upscale.encode(prompts, table.negative_prompt),
                pixel_upscaled,
                **settings("latent_upscale"),
            ),
        )
        tensors = {
            "prompt_embeds": text.prompt,
            "negative_prompt_embeds": text.negative.expand_as(text.prompt),
            "keyframes": keyframes,
            "interpolated": interpolated,
            "first_frame": first_frame,
            "pixel_upscaled": pixel_upscaled,
            "video": upscaled,
        }
        for n, request in enumerate(requests):
            frames = video.to_uint8(upscaled[n : n + 1])
            told = self.settings(request.prompt, request.seed)
            if request.path is not None:
                # The seconds stay out of the file: the same video is the same bytes.
                video.write(request.path, frames, cascade.fps, told)
            told |= {"seconds": round(time.monotonic() - started, 1)}
            yield Video(frames, told, {name: _alone(tensor, n) for name, tensor in tensors.items()})

    def _notices(self, prompt: str) -> Iterator[Notice]:
        if unknown := self.cascade.unknown_words(prompt):
            yield Notice(f"{self.cascade.name} has never seen these words and cannot follow them: {', '.join(unknown)}")
        for tokenizer, stages in (
            (self.keyframes.tokenizer, "pixel stages"),
            (self.latent_upscale.tokenizer, "latent upscale"),
        ):
            if dropped := dropped_words(tokenizer, prompt):
                yield Notice(f"The prompt is over 77 tokens long. Dropped for the {stages}: {dropped}")

    @torch.no_grad()
    def _preview(self, stage: str, step: Step) -> np.ndarray:
        clip = step.clean
        if stage == "interpolation":
            clip = self.interpolation.join(clip[: self.cascade.keyframes.frames - 1])
        elif stage == "first_frame":
            clip = clip[:, :, None]
        elif stage == "latent_upscale":
            middle = clip.shape[2] // 2
            clip = self.latent_upscale.decode(clip[:1, :, middle : middle + 1])
        return video.to_uint8(clip)

    def settings(self, prompt: str, seed: int) -> dict[str, Any]:
        """Return all that decides which frames come out, as JSON can hold it."""
        return {
            "prompt": prompt,
            "seed": seed,
            "cascade": self.cascade.settings(),
            "device": self.keyframes._execution_device.type,
            "dtype": str(self.keyframes.unet.dtype).removeprefix("torch."),
            "weights": self.weights,
            "versions": versions(self.keyframes._execution_device, self.keyframes.unet.dtype),
        }


@dataclass(frozen=True)
class Request:
    """One video that is wanted."""

    prompt: str
    seed: int
    path: Path | None


def _alone(batch: torch.Tensor, row: int) -> torch.Tensor:
    """Return a row of a batch, (1, …), on the CPU and in memory of its own."""
    return batch[row : row + 1].to("cpu", copy=True, memory_format=torch.contiguous_format)


def _requests(
    prompt: str | Sequence[str],
    seed: int | Sequence[int] | None,
    path: str | Path | Sequence[str | Path] | None,
) -> list[Request]:
    prompts = listed(prompt) if isinstance(prompt, Iterable) else [prompt]  # what is neither is refused below
    if not prompts:
        raise Show1Error("There is no prompt.", "Give one, or a list of at least one.")
    seed = seed.tolist() if isinstance(seed, np.ndarray) else seed
    seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed] * len(prompts)
    seeds = [draw_seed() if one is None else int(one) if isinstance(one, np.integer) else one for one in seeds]
    several = isinstance(path, Iterable) and not isinstance(path, str | Path)
    paths = list(path) if several else [path] * len(prompts) if path is None else [path]
    for what, values in (("seeds", seeds), ("paths", paths)):
        if len(values) != len(prompts):
            raise Show1Error(
                f"There are {len(prompts)} prompts, and {what} for {len(values)}.", "Give one for each prompt."
            )
    for one in zip(prompts, seeds, paths, strict=True):
        check_request(*one)
    # Where they are now, wherever the current folder is when the video is made.
    paths = [path and Path(path).absolute() for path in paths]
    given = [os.path.realpath(path) for path in paths if path is not None]
    if len(set(given)) < len(given):
        raise Show1Error("Two prompts have the same path.", "Give each a file of its own.")
    return [Request(*one) for one in zip(prompts, seeds, paths, strict=True)]


def check_request(prompt: str, seed: int | None, path: str | Path | None) -> None:
    """Raise Show1Error for a prompt that is blank or no text, a seed beyond 0…2^53 − 1, a path not to be written to."""
    if not isinstance(prompt, str):
        raise Show1Error("The prompt is no text.", 'Say what the video should show, as in "a panda in the snow".')
    if not prompt.strip():
        raise Show1Error("The prompt is empty.", 'Say what the video should show, as in "a panda in the snow".')
    if not is_text(prompt):
        raise Show1Error(
            "The prompt holds half a character, as of an emoji cut in two.", "Write it again without that."
        )
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        raise Show1Error(f"The seed cannot be {repr(seed)[:60]}.", f"Give a whole number from 0 to {MAX_SEED}.")
    if path is not None:
        if not isinstance(path, str | Path):
            raise Show1Error(f"The path cannot be {repr(path)[:60]}.", "Give the name of a file, as a text or a Path.")
        video.check_writable(path)


def versions(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return what runs on the device, in this dtype, of all that frames may depend on."""
    return {
        "show-1": show_1.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "kernels": "Show-1's" if try_kernels.has(device, dtype) else "PyTorch's",  # frames differ, by rounding
    }


def draw_seed() -> int:
    """Return a random seed, short enough to be read out."""
    return secrets.randbelow(2**31)
