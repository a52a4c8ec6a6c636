"""The one denoising loop that all stages share."""

import copy
import inspect
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from show_1.text import TextEmbeddings


@dataclass(frozen=True)
class Step:
    """One denoising step that is done.

    `sample` is what the next step starts from, `clean` the scheduler's present estimate of the result: both
    (batch, channels, frames, height, width), without the frames where it is an image.
    """

    sample: torch.Tensor
    clean: torch.Tensor


class Stage(DiffusionPipeline):
    """A part of the cascade: a diffusers pipeline whose `stream` yields its steps and returns its clip."""

    def stream(self, *args, **kwargs) -> Generator[Step, None, torch.Tensor]:
        raise TypeError(f"{type(self).__name__} has no stream")

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        """Run `stream` to its end and return its clip."""
        stream = self.stream(*args, **kwargs)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                return end.value

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw standard normal noise on the CPU in the model's dtype, so that every device sees the same."""
        return torch.randn(shape, generator=generator, dtype=self.dtype).to(self._execution_device)


def prepare(scheduler: SchedulerMixin, steps: int, device: torch.device) -> SchedulerMixin:
    """Return a copy of the scheduler, set to `steps` timesteps; the original stays as it was."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


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
    generator: torch.Generator | None = None,
) -> Generator[Step, None, torch.Tensor]:
    """Yield every step from noise to a sample and return the sample, of `sample`'s shape.

    `sample` is (batch, channels, frames, height, width), or (batch, channels, height, width) for an image model;
    `condition` is set behind its channels before each call; `scheduler` comes from `prepare` and walks `timesteps`, by
    default all of its own. `guidance` is the scale of classifier-free guidance (Ho and Salimans, arXiv 2207.12598): 1
    means none and costs half.
    """
    batch, channels = sample.shape[:2]
    guided = guidance > 1
    embeddings = torch.cat(
        [e.expand(batch, -1, -1) for e in ((text.negative, text.prompt) if guided else (text.prompt,))]
    )
    labels = None if noise_level is None else torch.full((len(embeddings),), noise_level, device=sample.device)
    learns_variance = scheduler.config.get("variance_type") in ("learned", "learned_range")
    extra: dict[str, Any] = (
        {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    )

    for timestep in scheduler.timesteps if timesteps is None else timesteps:
        model_input = scheduler.scale_model_input(sample, timestep)
        if condition is not None:
            model_input = torch.cat([model_input, condition], dim=1)
        if guided:
            model_input = torch.cat([model_input, model_input])
        prediction = unet(model_input, timestep, encoder_hidden_states=embeddings, class_labels=labels).sample
        noise, variance = prediction[:, :channels], prediction[:, channels:]
        if guided:
            negative, positive = noise.chunk(2)
            noise = negative + guidance * (positive - negative)
            variance = variance[batch:]
        if learns_variance:
            noise = torch.cat([noise, variance], dim=1)
        # Frames are images to the scheduler: dynamic thresholding looks at each by itself.
        result = scheduler.step(_fold(noise), timestep, _fold(sample), **extra)
        sample = _unfold(result.prev_sample, sample.shape)
        yield Step(sample, _unfold(_clean_estimate(scheduler, result), sample.shape))
    return sample


def _fold(clip: torch.Tensor) -> torch.Tensor:
    return clip.transpose(1, 2).flatten(0, 1) if clip.ndim == 5 else clip


def _unfold(frames: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return frames.unflatten(0, (shape[0], shape[2])).transpose(1, 2) if len(shape) == 5 else frames


def _clean_estimate(scheduler: SchedulerMixin, result: Any) -> torch.Tensor:
    # DPM-Solver++ keeps its estimates to itself, other schedulers return theirs, and some have none.
    estimate = getattr(result, "pred_original_sample", None)
    if estimate is None and scheduler.config.get("algorithm_type") == "dpmsolver++":
        estimate = scheduler.model_outputs[-1]
    return result.prev_sample if estimate is None else estimate.to(result.prev_sample.dtype)
