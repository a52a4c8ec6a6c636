"""The one denoising loop that all stages share."""

import copy
import functools
import inspect
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.pipelines.deepfloyd_if import timesteps as deepfloyd_if

from show_1.text import TextEmbeddings


@dataclass(frozen=True)
class Step:
    """One denoising step that is done.

    `sample` is what the next step starts from, `clean` the scheduler's present estimate of the result: both
    (batch, channels, frames, height, width), without the frames where it is an image.
    """

    sample: torch.Tensor
    clean: torch.Tensor


@dataclass(frozen=True)
class Pause:
    """A moment in long work outside the steps, at which one can stop asking.

    `clip` is the part of the frames that it is at, (1, 3, frames, height, width), about [−1, 1].
    """

    clip: torch.Tensor = field(repr=False)


class Stage(DiffusionPipeline):
    """A part of the cascade: a diffusers pipeline whose `stream` yields its steps, and pauses, and returns its clip.

    Several prompts run as one batch: texts, clips and seeds of several, one a row, give clips of as many. Each draws
    from generators of its own, so it gets the numbers, to rounding, that it would get alone.

    `rows` bounds the memory of a call of its UNet: it is given at most that many clips at once (a clip counts twice
    under guidance), None for all. The numbers are the same.
    """

    rows: int | None = None

    def stream(self, *args, **kwargs) -> Generator[Step | Pause, None, torch.Tensor]:
        raise TypeError(f"{type(self).__name__} has no stream")

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        """Run `stream` to its end and return its clip."""
        return finish(self.stream(*args, **kwargs))

    def noise(
        self, shape: tuple[int, ...], generators: list[torch.Generator], shared: float = 0.0, frames: int = 1
    ) -> torch.Tensor:
        """Draw standard normal noise, (generators, *shape), each row from its own generator.

        It is drawn on the CPU in the UNet's dtype, so that every device sees the same. `shared` is the share of the
        variance in [0, 1] that all frames of a clip have in common; they lie along axis `frames` of `shape`.
        """
        how = {"dtype": self.unet.dtype, "device": "cpu"}
        rows = [torch.randn((1, *shape), generator=generator, **how) for generator in generators]
        noise = torch.cat(rows).to(self._execution_device)
        if shared:
            one = (*shape[:frames], 1, *shape[frames + 1 :])
            noise = share_noise(noise, self.noise(one, generators), shared)
        return noise


def share_noise(own: torch.Tensor, common: torch.Tensor, share: float) -> torch.Tensor:
    """Return normal noise that is partly the same in all frames of a clip.

    `own` is independent noise of all frames and `common` such noise of one frame a clip, with one axis of frames in the
    same place; `share` in [0, 1] is the part of the variance that the latter has (the mixed noise model of arXiv
    2305.10474).
    """
    return (1 - share) ** 0.5 * own + share**0.5 * common


def seeded(seed: int | Sequence[int]) -> list[torch.Generator]:
    """Return a fresh generator for each seed."""
    seeds = [seed] if isinstance(seed, int | np.integer) else seed
    return [torch.Generator().manual_seed(int(one)) for one in seeds]


def finish(stream: Generator[Step | Pause, None, torch.Tensor]) -> torch.Tensor:
    """Run a stage's stream to its end and return its clip."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value


def prepare(scheduler: SchedulerMixin, steps: int, device: torch.device, schedule: str | None = None) -> SchedulerMixin:
    """Return a copy of the scheduler, set to `steps` timesteps; the original stays as it was.

    `schedule` names one of DeepFloyd IF's own lists of so many timesteps ("smart27"), instead of evenly spaced ones.
    """
    scheduler = copy.deepcopy(scheduler)
    if schedule is None:
        scheduler.set_timesteps(steps, device=device)
    else:
        scheduler.set_timesteps(timesteps=getattr(deepfloyd_if, f"{schedule}_timesteps"), device=device)
    return scheduler


@functools.lru_cache  # each video asks, most for the same
@torch.no_grad()
def try_steps(
    scheduler: SchedulerMixin, steps: int, last: int, schedule: str | None, channels: int, predicted: int
) -> None:
    """Walk the `last` ones of a scheduler's steps on a tiny image of so many channels, with a model that gives zeros.

    `predicted` is how many channels the model gives. Raises ValueError, or whatever else the scheduler does, where a
    whole video would fail in that way.
    """
    scheduler = prepare(scheduler, steps, torch.device("cpu"), schedule)
    timesteps, trained = last_timesteps(scheduler, last), scheduler.config.num_train_timesteps
    if not 0 <= timesteps.min() <= timesteps.max() < trained:
        raise ValueError(f"its timesteps are not all of the {trained} that the model was trained for")
    text = TextEmbeddings(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))

    def unet(clip: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.zeros(1, predicted, 2, 2))

    unet.dtype = torch.float32
    image = torch.zeros(1, channels, 2, 2)
    sample = finish(denoise(unet, scheduler, image, text, 1.0, timesteps=timesteps, generators=seeded(0)))
    if not sample.isfinite().all():
        raise ValueError("it divides by zero, as where two steps begin with the same noise")


def last_timesteps(scheduler: SchedulerMixin, steps: int) -> torch.Tensor:
    """Return the timesteps of so many last steps: one each, of second order (Heun's) two each but for the last."""
    return scheduler.timesteps[-(scheduler.order * (steps - 1) + 1) :]


def begin(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> None:
    """Let the scheduler begin at the first of `timesteps`, its last ones.

    By itself it would look for that number, and where several sigmas have the same one, as Karras' do, take the second.
    """
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))


def denoise(
    unet: torch.nn.Module,
    scheduler: SchedulerMixin,
    sample: torch.Tensor,
    text: TextEmbeddings,
    guidance: float,
    *,
    timesteps: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
    noise_level: int | None = None,
    generators: Sequence[torch.Generator],
    guidance_interval: Sequence[int] | None = None,
    reuse: int | None = None,
    rows: int | None = None,
) -> Generator[Step, None, torch.Tensor]:
    """Yield every step from noise to a sample and return the sample, of `sample`'s shape.

    `sample` is (batch, channels, frames, height, width), or (batch, channels, height, width) for an image model;
    `condition` is set behind its channels before each call; `scheduler` comes from `prepare` and walks `timesteps`, the
    last of its own, by default all. In half precision only the UNet is: sample and scheduler, and so what is returned,
    are in float32. `guidance` is the scale of classifier-free guidance (Ho and Salimans, arXiv 2207.12598): 1 means
    none and costs half. `rows` is as in `Stage`. Where `text` is of several prompts, each has as many rows of `sample`,
    in their order; ValueError where that cannot be. What the scheduler draws for a row comes from its generator in
    `generators`.

    Two measures trade exactness for speed: guidance only at the timesteps from the first to the second of
    `guidance_interval` (arXiv 2404.07724); the UNet's deep features computed at every `reuse`-th step only and reused
    in between (DeepCache, arXiv 2312.00858).
    """
    sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
    batch, channels = sample.shape[:2]
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    begin(scheduler, timesteps)
    schedulers = [scheduler, *(copy.deepcopy(scheduler) for _ in range(1, batch))]  # one a row: they remember
    predict = Prediction(unet, text, batch, noise_level, reuse, rows)
    dtype = unet.dtype  # asked once, as diffusers looks for it through all modules
    # Others' configurations may say so, too, and yet they take the noise alone.
    learns_variance = isinstance(scheduler, DDPMScheduler) and scheduler.variance_type in ("learned", "learned_range")
    draws = "generator" in inspect.signature(scheduler.step).parameters
    low, high = guidance_interval or (0, math.inf)
    guided_steps = [guidance > 1 and low <= timestep <= high for timestep in timesteps.tolist()]

    for timestep, guided in zip(timesteps, guided_steps, strict=True):
        model_input = scheduler.scale_model_input(sample, timestep)
        if condition is not None:
            model_input = torch.cat([model_input, condition], dim=1)
        prediction = predict(model_input.to(dtype), timestep, guided).to(sample.dtype)
        noise, variance = prediction[:, :channels], prediction[:, channels:]
        if guided:
            negative, positive = noise.chunk(2)
            noise = negative + guidance * (positive - negative)
            variance = variance[batch:]
        if learns_variance:
            noise = torch.cat([noise, variance], dim=1)
        samples, cleans = [], []
        each = zip(schedulers, generators, noise.split(1), sample.split(1), strict=True)
        for own_scheduler, generator, own_noise, own_sample in each:
            # Frames are images to the scheduler: dynamic thresholding looks at each by itself.
            extra = {"generator": generator} if draws else {}
            result = own_scheduler.step(fold(own_noise), timestep, fold(own_sample), **extra)
            samples.append(result.prev_sample)
            cleans.append(_clean_estimate(own_scheduler, result))
        sample, clean = (unfold(torch.cat(frames), sample.shape) for frames in (samples, cleans))
        yield Step(sample, clean)
    return sample


class Prediction:
    """The UNet's calls of one denoising: with or without the negative prompt, in parts, deep features now and then."""

    def __init__(
        self,
        unet: torch.nn.Module,
        text: TextEmbeddings,
        batch: int,
        noise_level: int | None,
        reuse: int | None,
        rows: int | None,
    ):
        self.unet, self.reuse, self.rows, self.noise_level = unet, reuse or 1, rows, noise_level
        if batch % len(text.prompt):
            raise ValueError(f"{len(text.prompt)} prompts want as many seeds and clips, not {batch}")
        # Of a single prompt's states this repeats no memory, only what is seen.
        prompts = [
            states.expand(batch, -1, -1) if len(states) == 1 else states.repeat_interleave(batch // len(states), dim=0)
            for states in (text.negative.to(unet.dtype), text.prompt.to(unet.dtype))
        ]
        self.states = {False: prompts[1], True: torch.cat(prompts)}
        self.deep: list[torch.Tensor | None] = []  # of each part of the batch
        self.age = 0  # of the deep features, in steps
        self.was_guided = False

    def __call__(self, model_input: torch.Tensor, timestep: torch.Tensor, guided: bool) -> torch.Tensor:
        """Return the prediction, the negative prompt's rows before the prompt's where it is `guided`."""
        inputs = {
            "sample": torch.cat([model_input, model_input]) if guided else model_input,
            "encoder_hidden_states": self.states[guided],
        }
        if self.noise_level is not None:
            inputs["class_labels"] = torch.full((len(inputs["sample"]),), self.noise_level, device=model_input.device)
        rows = self.rows or len(inputs["sample"])
        parts = list(zip(*(tensor.split(rows) for tensor in inputs.values()), strict=True))
        if self.age % self.reuse == 0 or guided != self.was_guided:  # other rows: their deep features are not there
            self.deep, self.age = [None] * len(parts), 0
        self.was_guided, self.age = guided, self.age + 1
        predictions = []
        for n, part in enumerate(parts):
            options = dict(zip(inputs, part, strict=True))
            if self.deep[n] is not None:
                options["deep"] = self.deep[n]
            elif self.reuse > 1:
                options["return_deep"] = True
            output = self.unet(options.pop("sample"), timestep, **options)
            predictions.append(output.sample)
            if "return_deep" in options:
                self.deep[n] = output.deep
        return predictions[0] if len(predictions) == 1 else torch.cat(predictions)


def fold(clip: torch.Tensor) -> torch.Tensor:
    """Return the frames of (batch, channels, frames, height, width) as images; images as they are."""
    return clip.transpose(1, 2).flatten(0, 1) if clip.ndim == 5 else clip


def unfold(frames: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return folded frames, (batch·frames, …), as clips, (batch, channels, frames, …), as many as `shape` has."""
    return frames.unflatten(0, (shape[0], shape[2])).transpose(1, 2) if len(shape) == 5 else frames


def _clean_estimate(scheduler: SchedulerMixin, result: Any) -> torch.Tensor:
    # DPM-Solver++ keeps its estimates to itself, other schedulers return theirs, and some have none.
    estimate = getattr(result, "pred_original_sample", None)
    if isinstance(scheduler, DPMSolverMultistepScheduler) and scheduler.config.algorithm_type.endswith("dpmsolver++"):
        estimate = scheduler.model_outputs[-1]
    return result.prev_sample if estimate is None else estimate.to(result.prev_sample.dtype)
