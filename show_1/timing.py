"""How long a video takes: what the steps of each stage cost on this device, and the time left from that.

The stages' steps cost very different times, so that counting them tells little. What each costs is kept in a file, by
device, and learned anew from every video; before the first one, from a step of each.
"""

import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from show_1.cascade import STAGES, Cascade
from show_1.pipeline import Show1Pipeline
from show_1.stages import window_starts
from show_1.stages.interpolation import SEGMENT
from show_1.stages.pixel_upscale import SCALE, WINDOW


@dataclass(frozen=True)
class Cost:
    """Seconds that a stage takes: before its first step, for each step, and after its last one."""

    setup: float
    step: float
    finish: float

    def times(self, factor: float) -> "Cost":
        return Cost(self.setup * factor, self.step * factor, self.finish * factor)

    def total(self, steps: int) -> float:
        return self.setup + steps * self.step + self.finish


# Measured with mini on a CPU, in steps of its keyframes. They only bridge the time until this device's own are known.
RELATIVE = {
    "keyframes": Cost(0, 1, 0),
    "interpolation": Cost(0, 1.12, 0),
    "first_frame": Cost(0, 0.17, 0),
    "pixel_upscale": Cost(0, 1.85, 0),
    "latent_upscale": Cost(4.2, 1.9, 12.4),
}


def stage_steps(cascade: Cascade) -> dict[str, int]:
    """Return how many denoising steps each stage of a cascade takes, in the order in which they run."""
    frames = (SEGMENT - 1) * (cascade.keyframes.frames - 1) + 1
    return {
        "keyframes": cascade.keyframes.steps,
        "interpolation": cascade.interpolation.steps,
        "first_frame": cascade.first_frame.steps,
        "pixel_upscale": cascade.pixel_upscale.steps * len(window_starts(frames)),
        "latent_upscale": int(cascade.latent_upscale.steps * cascade.latent_upscale.strength),
    }


def device_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return what the costs hold for: a GPU by its model, a CPU by its number of cores."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {os.cpu_count()}"
    return f"{name} {str(dtype).removeprefix('torch.')}"


class Calibration:
    """What is known about the device, kept in a file; a file that is missing or damaged only means to learn anew."""

    def __init__(self, file: Path, device: str):
        self.file, self.device = file, device
        self.known: dict[str, Any] = {}
        try:
            stored = json.loads(file.read_text())[device]
            self.known = {
                key: Cost(**value) if isinstance(value, dict) else float(value) for key, value in stored.items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            self.known = {}

    def costs(self, cascade: Cascade) -> dict[str, Cost] | None:
        """Return each stage's cost; None where none has been measured."""
        measured = {stage: cost for stage in STAGES if (cost := self.known.get(_key(cascade, stage)))}
        if not measured:
            return None
        # A stage not measured yet stands to RELATIVE as the others do.
        factor = sum(cost.step for cost in measured.values()) / sum(RELATIVE[stage].step for stage in measured)
        return {stage: measured.get(stage) or RELATIVE[stage].times(factor) for stage in STAGES}

    def has(self, cascade: Cascade, stage: str) -> bool:
        return _key(cascade, stage) in self.known

    def learn(self, cascade: Cascade, stage: str, cost: Cost) -> None:
        self.known[_key(cascade, stage)] = cost

    def loading(self, cascade: Cascade) -> float | None:
        """Return the seconds that loading the models took the last time."""
        return self.known.get(f"loading {cascade.name}")

    def learn_loading(self, cascade: Cascade, seconds: float) -> None:
        self.known[f"loading {cascade.name}"] = seconds

    def save(self) -> None:
        try:
            everything = json.loads(self.file.read_text())
        except (OSError, ValueError):
            everything = {}
        everything[self.device] = {
            key: asdict(value) if isinstance(value, Cost) else value for key, value in self.known.items()
        }
        write_atomically(self.file, json.dumps(everything, indent=1))


class Forecast:
    """The time left of one video, from its costs and from the pace at which it really goes.

    Tell it what happens by `begin`, `step` and `end`, in seconds on one clock.
    """

    def __init__(self, cascade: Cascade, costs: dict[str, Cost] | None, now: float):
        self.calibrated = costs is not None
        self.costs = costs or RELATIVE
        self.steps = stage_steps(cascade)
        self.total = sum(self.costs[stage].total(steps) for stage, steps in self.steps.items())
        self.began = self.last = now
        self.stage: str | None = None
        self.done = 0  # steps of this stage
        self.expected = 0.0  # what the costs say for all that is done
        self.timed, self.timed_steps = 0.0, 0  # this stage's steps but the first, which also bears the setup
        self.first = 0.0
        self.reached = 0  # how many stages have begun
        self.shown = 0.0

    def begin(self, stage: str, now: float) -> None:
        self.stage, self.done, self.timed, self.timed_steps = stage, 0, 0.0, 0
        if not self.reached:
            self.began = now  # reading the prompt is no measure of the pace
        self.reached = STAGES.index(stage) + 1
        self.last = now

    def step(self, now: float) -> None:
        cost = self.costs[self.stage]
        self.expected += cost.step + (0 if self.done else cost.setup)
        if self.done:
            self.timed += now - self.last
            self.timed_steps += 1
        else:
            self.first = now - self.last
        self.done += 1
        self.last = now

    def end(self, now: float) -> Cost:
        """Note the end of a stage; return what it has really cost."""
        self.expected += self.costs[self.stage].finish
        step = self.timed / self.timed_steps if self.timed_steps else self.first
        real = Cost(max(self.first - step, 0.0), step, now - self.last)
        self.last, self.stage = now, None
        return real

    def left(self, now: float) -> float | None:
        """Return the seconds left, or None while nothing is known."""
        # A few steps weigh nothing against a calibration; where there is none they are all there is.
        trust = 0.05 * self.total if self.calibrated else 0.0
        if self.expected + trust <= 0:
            return None
        pace = (self.last - self.began + trust) / (self.expected + trust)
        rest = current = 0.0
        if self.stage:
            cost, ahead = self.costs[self.stage], self.steps[self.stage] - self.done
            stage_pace = (self.timed + 2 * pace * cost.step) / ((self.timed_steps + 2) * cost.step)
            rest = ahead * cost.step * stage_pace + cost.finish * pace + (0 if self.done else cost.setup * pace)
            current = cost.step * stage_pace + (0 if self.done else cost.setup * pace) if ahead else cost.finish * pace
        for stage in STAGES[self.reached :]:
            rest += self.costs[stage].total(self.steps[stage]) * pace
        # Between two steps the time runs on, but no further than to the end of this one.
        return rest - min(now - self.last, current)

    def share(self, now: float) -> float:
        """Return how much of the time is over, 0 to 1; it never falls."""
        left = self.left(now)
        if left is not None:
            over = now - self.began
            self.shown = max(self.shown, min(over / max(over + left, 1e-9), 0.999))
        return self.shown


def measure(pipeline: Show1Pipeline, stage: str) -> Iterator[Cost | None]:
    """Run a few steps of a stage on noise, yielding None after each, then the Cost; to break off, stop asking."""
    cascade = pipeline.cascade
    table = getattr(cascade, stage)
    frames = (SEGMENT - 1) * (cascade.keyframes.frames - 1) + 1
    height, width = cascade.keyframes.height, cascade.keyframes.width
    unet = pipeline.keyframes.unet
    settings = cascade.stream_settings(stage) | {"steps": max(table.steps, 5), "seed": 0}
    settings.pop("schedule", None)  # which is for its own number of steps

    def noise(*shape: int) -> torch.Tensor:
        return torch.rand(1, 3, *shape).to(unet.device, unet.dtype) * 2 - 1

    text = pipeline.keyframes.encode("")
    if stage == "keyframes":
        stream = pipeline.keyframes.stream(text, **settings)
    elif stage == "interpolation":
        stream = pipeline.interpolation.stream(text, noise(cascade.keyframes.frames, height, width), **settings)
    elif stage == "first_frame":
        stream = pipeline.pixel_upscale.stream_first_frame(text, noise(height, width), **settings)
    elif stage == "pixel_upscale":
        first_frame = noise(SCALE * height, SCALE * width)
        clip = noise(min(WINDOW, frames), height, width)
        stream = pipeline.pixel_upscale.stream(text, clip, first_frame, **settings)
    else:
        text = pipeline.latent_upscale.encode("", table.negative_prompt)
        clip = noise(frames, SCALE * height, SCALE * width)
        stream = pipeline.latent_upscale.stream(text, clip, **settings | {"strength": 1.0})

    seconds = []
    for _ in range(5):
        started = time.monotonic()
        step = next(stream)
        float(step.clean.float().mean())  # a GPU works behind our back until it is asked for a number
        seconds.append(time.monotonic() - started)
        yield None
        if len(seconds) > 1 and sum(seconds) > 1:
            break
    stream.close()
    cost = statistics.median(seconds[1:])  # the first one also warms up the device
    if stage != "latent_upscale":
        yield Cost(0.0, cost, 0.0)
        return
    started = time.monotonic()
    float(pipeline.latent_upscale.decode(step.clean[:, :, :1]).float().mean())
    decoding = frames * (time.monotonic() - started)
    yield Cost(max(seconds[0] - cost, 0.0), cost, decoding)


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that, whatever happens, either the old or the new one is there, whole."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _key(cascade: Cascade, stage: str) -> str:
    """Return what a stage's cost depends on, beside the device."""
    table, first = getattr(cascade, stage), cascade.keyframes
    size = f"{first.frames}x{first.height}x{first.width}"
    if stage == "latent_upscale":
        size += f" to {table.height}x{table.width}"
    guidance = getattr(table, "guidance_interval", None) or "always" if table.guidance > 1 else "never"
    return (
        f"{stage} {table.model} {size}, guided {guidance}, features reused {getattr(table, 'reuse', None) or 'never'}"
    )
