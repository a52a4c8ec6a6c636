"""How long a video takes: what the steps of each stage cost on this device, and the time left from that.

The stages' steps cost very different times, so that counting them tells little. What each costs is kept in a file, by
device, and learned anew from every video; before the first one, from a short video that nobody sees.
"""

import dataclasses
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from show_1.cascade import STAGES, Cascade
from show_1.files import write_atomically
from show_1.pipeline import Clip, Event, Show1Pipeline, StageStart, StepDone, Video
from show_1.stages import window_starts
from show_1.stages.interpolation import SEGMENT

PHASES = ("prompt", *STAGES, "file")  # of a video: the prompt is read, the stages run, the file is written
DEEP = 0.6  # the share of a UNet's work that reusing its deep features saves, roughly
LOADING_SPEED = 4e8  # bytes a second, until this computer's own is known


@dataclass(frozen=True)
class Cost:
    """Seconds that a phase takes: before its first step, for each step, and after its last one."""

    setup: float
    step: float
    finish: float

    def total(self, steps: int) -> float:
        return self.setup + steps * self.step + self.finish


# Measured with mini on a CPU, in steps of its keyframes; between what float32 and bfloat16 take. They only bridge the
# time until this device's own are known: where it is slow and somebody waits, the short video is broken off before its
# last stage.
RELATIVE = {
    "prompt": Cost(0, 0, 0.25),
    "keyframes": Cost(0, 1, 0),
    "interpolation": Cost(0, 1.4, 0),
    "first_frame": Cost(0, 0.3, 0),
    "pixel_upscale": Cost(0, 1.9, 0),
    "latent_upscale": Cost(0, 6.3, 9.8),
    "file": Cost(0, 0, 0.9),
}


def stage_steps(cascade: Cascade) -> dict[str, int]:
    """Return how many denoising steps each stage of a cascade takes, in the order in which they run."""
    return {
        "keyframes": cascade.keyframes.steps,
        "interpolation": cascade.interpolation.steps,
        "first_frame": cascade.first_frame.steps,
        "pixel_upscale": cascade.pixel_upscale.steps * len(window_starts(_frames(cascade))),
        "latent_upscale": int(cascade.latent_upscale.steps * cascade.latent_upscale.strength),
    }


def device_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return what the costs hold for: a GPU by its model, a CPU by its number of cores."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {os.cpu_count()}"
    return f"{name} {str(dtype).removeprefix('torch.')}"


class Calibration:
    """What is known about the device, kept in a file; a file that is missing or damaged only means to learn anew."""

    _saving = threading.Lock()

    def __init__(self, file: Path, device: str):
        self.file, self.device = file, device
        self.known: dict[str, Any] = {}
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            stored = json.loads(file.read_text())[device]
            self.known = {
                key: Cost(**value) if isinstance(value, dict) else float(value) for key, value in stored.items()
            }

    def costs(self, cascade: Cascade) -> dict[str, Cost] | None:
        """Return each phase's cost; None where no stage's is known."""
        measured = {phase: cost for phase in PHASES if (cost := self._cost(cascade, phase))}
        stages = [stage for stage in STAGES if stage in measured]
        if not stages:
            return None
        # What has not been measured yet stands to RELATIVE as the others do.
        factor = sum(measured[stage].step for stage in stages) / sum(RELATIVE[stage].step for stage in stages)
        return {phase: measured.get(phase) or _times(RELATIVE[phase], factor) for phase in PHASES}

    def has_all(self, cascade: Cascade) -> bool:
        return all(_key(cascade, phase) in self.known for phase in PHASES)

    def learn(self, cascade: Cascade, phase: str, cost: Cost) -> None:
        """Take what a phase has cost into the mean of the last times: one video may be slow for reasons of its own."""
        key = _key(cascade, phase)
        before = self.known.get(key, cost)
        self.known[key] = Cost(*((old + new) / 2 for old, new in zip(astuple(before), astuple(cost), strict=True)))

    def loading(self, cascade: Cascade) -> float | None:
        """Return the seconds that loading the models took the last time."""
        return self.known.get(f"loading {cascade.name}")

    def learn_loading(self, cascade: Cascade, seconds: float) -> None:
        self.known[f"loading {cascade.name}"] = seconds

    def save(self) -> None:
        with self._saving:  # two cascades of one server share the file
            try:
                everything = json.loads(self.file.read_text())
                before = everything.get(self.device)
            except (OSError, ValueError, AttributeError):
                everything, before = {}, None
            known = {key: asdict(value) if isinstance(value, Cost) else value for key, value in self.known.items()}
            everything[self.device] = (before if isinstance(before, dict) else {}) | known
            write_atomically(self.file, json.dumps(everything, indent=1).encode())

    def _cost(self, cascade: Cascade, phase: str) -> Cost | None:
        """Return what a phase has cost; with guidance of another kind, or features reused otherwise, scaled to that."""
        if cost := self.known.get(_key(cascade, phase)):
            return cost
        work, place = _work(cascade, phase), _place(cascade, phase)
        for key, cost in list(self.known.items()):  # another thread may be learning
            if key.startswith(f"{place} at "):
                return dataclasses.replace(cost, step=cost.step * work / float(key.rpartition(" at ")[2]))
        return None


class Forecast:
    """The time left of one video, from its costs and from the pace at which it really goes.

    Tell it what the pipeline tells by `follow`, and the time in seconds, always by the same clock. It begins with the
    reading of the prompt.
    """

    def __init__(self, cascade: Cascade, costs: dict[str, Cost] | None, now: float):
        self._lock = threading.Lock()  # the video's thread follows, the page's asks what is left
        self.calibrated = costs is not None
        self.costs = costs or RELATIVE
        self.steps = dict.fromkeys(PHASES, 0) | stage_steps(cascade)
        self.shares = {phase: _shares(cascade, phase) for phase in PHASES}
        self.total = sum(self.costs[phase].total(steps) for phase, steps in self.steps.items())
        self.began = self.paced_since = now
        self.expected = 0.0  # what the costs say for all that is done since `paced_since`
        self._begin("prompt", now)

    def follow(self, event: Event, now: float) -> tuple[str, Cost] | None:
        """Take note of an event; return what a phase has really cost, when one ends."""
        ended = None
        with self._lock:
            match event:
                case StageStart(stage):
                    if self.phase == "prompt":
                        ended = self._end(now)
                        self.paced_since, self.expected = now, 0.0  # reading the prompt is no measure of the pace
                    self._begin(stage, now)
                case StepDone():
                    self._step(now)
                case Clip(stage):
                    ended = self._end(now)
                    if stage == STAGES[-1]:
                        self._begin("file", now)
                case Video():
                    ended = self._end(now)
        return ended

    def left(self, now: float) -> float | None:
        """Return the seconds left, or None while nothing is known."""
        with self._lock:
            return self._left(now)

    def _left(self, now: float) -> float | None:
        seen, trust = self.last - self.paced_since, 0.0
        if self.calibrated:
            # A few steps weigh nothing against a calibration, and a pace near its own little: by itself it varies by
            # a third within seconds (measured). One that is quite another is believed soon.
            usual = math.exp(-((math.log(seen / self.expected) / 0.3) ** 2)) if seen > 0 and self.expected > 0 else 1.0
            trust = (0.05 + 0.25 * usual) * self.total
        if self.expected + trust <= 0:
            return None
        pace = (seen + trust) / (self.expected + trust)
        rest = current = 0.0
        if self.phase:
            cost, ahead = self.costs[self.phase], self.steps[self.phase] - self.done
            rest = cost.finish * pace
            if ahead:
                stage_pace = (self.timed + 2 * pace * cost.step) / ((self.timed_steps + 2) * cost.step)
                setup = 0 if self.done else cost.setup * pace
                shares = [self._share(number) for number in range(self.done, self.steps[self.phase])]
                current = shares[0] * cost.step * stage_pace + setup
                rest += sum(shares) * cost.step * stage_pace + setup
            else:
                current = rest
        for phase in PHASES[self.reached :]:
            rest += self.costs[phase].total(self.steps[phase]) * pace
        # Between two steps the time runs on, but no further than to the end of this one.
        return rest - min(now - self.last, current)

    def _begin(self, phase: str, now: float) -> None:
        self.phase: str | None = phase
        self.done = 0  # steps of this phase
        self.timed, self.timed_steps = 0.0, 0  # as if all were alike: its steps but the first, which bears the setup
        self.first = 0.0
        self.reached = PHASES.index(phase) + 1  # how many phases have begun
        self.last = now

    def _step(self, now: float) -> None:
        cost, share = self.costs[self.phase], self._share(self.done)
        self.expected += share * cost.step + (0 if self.done else cost.setup)
        if self.done:
            self.timed += (now - self.last) / share
            self.timed_steps += 1
        else:
            self.first = now - self.last
        self.done += 1
        self.last = now
        if not self.calibrated and self.phase == STAGES[0] and self.done == 1:
            self.paced_since, self.expected = now, 0.0  # the very first step warms up: no measure either

    def _share(self, number: int) -> float:
        """Return what the step of this number takes, relative to this phase's mean step."""
        shares = self.shares[self.phase]
        return shares[number % len(shares)]  # a stage of several windows goes through its steps in each

    def _end(self, now: float) -> tuple[str, Cost]:
        self.expected += self.costs[self.phase].finish
        share = self._share(0)
        step = self.timed / self.timed_steps if self.timed_steps else self.first / share
        ended = self.phase, Cost(max(self.first - share * step, 0.0), step, now - self.last)
        self.last, self.phase = now, None
        return ended


def rehearse(pipeline: Show1Pipeline, calibration: Calibration) -> Iterator[float]:
    """Make a video of a few steps and learn from it; yield the seconds left after each. To break off, stop asking."""
    cascade, device = _short(pipeline.cascade), pipeline.keyframes._execution_device
    forecast = Forecast(cascade, None, time.monotonic())
    with tempfile.TemporaryDirectory() as folder:
        for event in pipeline.with_cascade(cascade).stream("a cat", seed=0, path=Path(folder, "video.mp4")):
            wait_for(device)
            if learned := forecast.follow(event, time.monotonic()):
                phase, cost = learned
                more = _work(pipeline.cascade, phase) / _work(cascade, phase)  # so few steps may be guided more often
                # Not into a mean: what was before it warmed all up.
                calibration.known[_key(pipeline.cascade, phase)] = dataclasses.replace(cost, step=more * cost.step)
            if (left := forecast.left(time.monotonic())) is not None:
                yield left


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given: a GPU works behind our back, and may be many steps behind."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _short(cascade: Cascade) -> Cascade:
    """Return the cascade with no more steps than show what one costs."""
    changes = {}
    for stage in STAGES:
        table = getattr(cascade, stage)
        steps = {"steps": min(table.steps, 1 + max(getattr(table, "reuse", None) or 0, 2))}
        if stage == "first_frame":
            steps["schedule"] = None  # which is for its own number of steps
        elif stage == "pixel_upscale":
            steps["steps"] = min(table.steps, table.reuse or 1)  # in each of its windows
        elif stage == "latent_upscale":
            steps |= {"steps": min(int(table.steps * table.strength), steps["steps"]), "strength": 1.0}
        changes[stage] = dataclasses.replace(table, **steps)
    return dataclasses.replace(cascade, **changes)


def _times(cost: Cost, factor: float) -> Cost:
    return Cost(cost.setup * factor, cost.step * factor, cost.finish * factor)


def _frames(cascade: Cascade) -> int:
    return (SEGMENT - 1) * (cascade.keyframes.frames - 1) + 1


def _key(cascade: Cascade, phase: str) -> str:
    """Return what a phase's cost depends on, beside the device."""
    return f"{_place(cascade, phase)} at {_work(cascade, phase):.2f}"


def _place(cascade: Cascade, phase: str) -> str:
    first, last = cascade.keyframes, cascade.latent_upscale
    small, large = f"{first.frames}x{first.height}x{first.width}", f"{last.height}x{last.width}"
    if phase == "prompt":
        return f"prompt {first.model}"
    if phase == "file":
        return f"file {first.frames}x{large}"
    place = f"{phase} {getattr(cascade, phase).model} {small}"
    return f"{place} to {large}" if phase == "latent_upscale" else place


def _work(cascade: Cascade, phase: str) -> float:
    """Return how many whole calls of its UNet for one clip a step of a phase is worth, on average."""
    reuse = getattr(getattr(cascade, phase, None), "reuse", None) or 1
    return fmean(_calls(cascade, phase)) * (1 + (reuse - 1) * (1 - DEEP)) / reuse


def _shares(cascade: Cascade, phase: str) -> list[float]:
    """Return what each step of a phase takes, relative to their mean: under guidance twice what it does without."""
    calls = _calls(cascade, phase)
    mean = fmean(calls)
    return [number / mean for number in calls]


def _calls(cascade: Cascade, phase: str) -> list[int]:
    """Return for how many clips each step of a phase calls its UNet, as if its timesteps were evenly spaced."""
    if phase not in STAGES:
        return [1]
    table = getattr(cascade, phase)
    low, high = table.guidance_interval or (0, 999)
    timesteps = [round(999 * (1 - number / table.steps)) for number in range(table.steps)]
    taken = timesteps[-int(table.steps * getattr(table, "strength", 1)) :]
    return [2 if table.guidance > 1 and low <= timestep <= high else 1 for timestep in taken]
