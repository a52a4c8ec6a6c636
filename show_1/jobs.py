"""A video being made: queue, progress, cancel, result. It runs in the server and outlives the page that asked for it.

A job belongs to the visitor who made it; who else has its id, which cannot be guessed, may watch. What has happened to
it is on the disk, in a folder of its own, so that a restart of the server loses no video: finished jobs are there
again, the others are taken up again, but for those of programs, which are gone, and one at work when it died twice.
"""

import base64
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from show_1 import video
from show_1.cascade import MAX_PROMPT, STAGES, Cascade, leave_out_schedule
from show_1.engine import Engine, in_two_sentences
from show_1.errors import Show1Error, memory_is_full
from show_1.files import write_atomically, writing
from show_1.pipeline import (
    Clip,
    Event,
    Notice,
    Pause,
    Show1Pipeline,
    StageStart,
    StepDone,
    Video,
    check_request,
    draw_seed,
)
from show_1.stages.interpolation import SEGMENT
from show_1.timing import Forecast, wait_for

WAITING, RUNNING, DONE, STOPPED, CANCELLED, FAILED = "waiting", "running", "done", "stopped", "cancelled", "failed"
ENDED = (DONE, STOPPED, CANCELLED, FAILED)
STORED = ("id", "visitor", "prompt", "seed", "preset", "changes", "file", "called", "state", "tries", "turn", "created")
STORED += ("seconds", "notices", "clips", "settings", "fault")

CHANGEABLE = {stage: ("steps", "guidance") for stage in STAGES}
CHANGEABLE["latent_upscale"] += ("negative_prompt",)
TRIES = 2  # how often a job is begun: one that took the server down twice would do so for ever
CLIP_HEIGHT = 160  # small clips are enlarged to about this, as players would blur them
PREVIEW_PAUSE = 0.6  # seconds from one preview to the next
WATCHED = 3.0  # seconds after a look at a job in which previews are drawn for it
log = logging.getLogger("show-1")


@dataclass
class Job:
    """One video: what was asked for, how far it is, what has come of it. `changed` grows with every change."""

    id: str
    visitor: str  # a hash of the visitor's secret
    prompt: str
    seed: int
    preset: str
    changes: dict[str, dict[str, Any]]  # to the preset
    file: str  # the result's name in the output folder
    called: bool = False  # by a program, which waits for it: gone with the server
    state: str = WAITING
    tries: int = 0  # how often it was begun
    turn: int = 0  # lowest first, see `_give_turn`; -1: it had come already when the server ended
    created: float = field(default_factory=time.time)
    seconds: float | None = None  # that it took
    notices: list[str] = field(default_factory=list)
    clips: dict[str, str] = field(default_factory=dict)  # a stage's clip, by its name in the job's folder
    settings: dict[str, Any] | None = None  # those inside the result
    fault: str = ""  # why there is no result

    # While it lives:
    caller: str = ""  # the address of the program that called
    cascade: Cascade | None = None
    wish: str = ""  # "cancel" or "stop"
    stage: str = ""
    step: int = 0
    last_clip: tuple[str, np.ndarray] | None = None  # the last stage that made one, and its frames
    preview: str = ""  # a data URL
    previewed: float = 0.0  # when that was, as all times below by time.monotonic
    watched: float = -math.inf  # when somebody last looked
    began: float = field(default_factory=time.monotonic)  # its own loading of models, or its run
    shown: float = 0.0  # the largest share of its time that was told to be over
    forecast: Forecast | None = None
    changed: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def taker(self) -> str:
        """Who takes a turn with it: a visitor, or an address, as each call of a program is a visitor of its own."""
        return self.caller or self.visitor

    @property
    def can_stop(self) -> bool:
        """Whether there is a clip that could be the result."""
        return self.state == RUNNING and self.last_clip is not None


class Line:
    """An engine, the one job it works at, and whose turn it is at it."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.running: Job | None = None
        self.turn = 0
        self.thread: threading.Thread | None = None


class Jobs:
    """All jobs of a server. A thread makes the videos of its cascade, one after the other.

    Where the cascade is not mini, a second one makes mini's, which need no fetching and little memory: something to do
    until the large models are there. `presets` holds all that can be asked for, the default first.
    """

    def __init__(
        self,
        cascade: Cascade,
        device: torch.device,
        folder: Path,
        limit: int,
        memory: str | None = None,
        models: Path | None = None,
        offline: bool = False,
    ):
        self.folder, self.limit = folder, limit
        calibration = folder / "calibration.json"
        self.engine = Engine(cascade, device, calibration, memory=memory, models=models, offline=offline)
        self._lines = [Line(self.engine)]
        if "mini" not in self.engine.presets:
            self._lines.append(Line(Engine(Cascade.load("mini"), torch.device("cpu"), calibration)))
        self.presets: dict[str, Cascade] = {}
        for line in self._lines:
            for name, preset in line.engine.presets.items():
                self.presets.setdefault(name, preset)
        self._changed = threading.Condition(threading.RLock())
        self._jobs: dict[str, Job] = {}
        self._closing = False
        # Clips and the like are written beside the next stage's steps, and take from them as little as may be.
        self._beside = ThreadPoolExecutor(1, "beside", initializer=_low_priority)
        self._read()

    def start(self, head_start: float = 0) -> None:
        """Begin to work: at once where a job waits, else after `head_start` seconds.

        Loading needs all cores. A browser that opens the page meanwhile would wait for it, and so it may go first.
        """
        for line in self._lines:
            line.thread = threading.Thread(target=self._work, args=(line, head_start), name="jobs", daemon=True)
            line.thread.start()

    def close(self, patience: float) -> None:
        """End the work at its next step; wait no longer than `patience` seconds for that."""
        end = time.monotonic() + patience
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for line in self._lines:
            if line.thread is not None:
                line.thread.join(max(end - time.monotonic(), 0))
            if running := line.running:
                self._put_back(running)
        self._beside.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------ what visitors can do

    def submit(
        self,
        visitor: str,
        prompt: str,
        seed: int | None = None,
        changes: dict[str, dict[str, Any]] | None = None,
        preset: str | None = None,
        caller: str = "",
    ) -> Job:
        """Put a video in the queue; `caller` is the address of the program that asks, where one does.

        Raises Show1Error for bad input, a full queue, a folder that cannot be written.
        """
        check_request(prompt, seed, None)
        if len(prompt) > MAX_PROMPT:
            raise Show1Error(
                f"The prompt is {len(prompt):,} characters long.",
                f"Give at most {MAX_PROMPT:,}; the models read about the first 60 words.",
            )
        preset = next(iter(self.presets)) if preset is None else preset
        changes = {} if changes is None else changes
        cascade = self.changed_cascade(preset, changes)
        self._check_room()
        name = f"{video.slug(prompt)}-{secrets.token_hex(6)}.mp4"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Show1Error(
                f"The output folder {self.folder} is gone, and cannot be made again: {os.strerror(error.errno)}.",
                "Bring it back, or start the page with another --output-dir.",
            ) from None
        video.check_writable(self.folder / name)
        job = Job(
            id=secrets.token_urlsafe(16),
            visitor=_hash(visitor),
            prompt=prompt,
            seed=draw_seed() if seed is None else seed,
            preset=preset,
            changes=changes,
            file=name,
            called=bool(caller),
            caller=caller,
            cascade=cascade,
        )
        with self._changed:
            self._check_room()
            self._give_turn(job)
            try:
                self.folder_of(job).mkdir(parents=True)
                self._save(job)
            except OSError as error:
                shutil.rmtree(self.folder_of(job), ignore_errors=True)
                raise Show1Error(
                    f"The job cannot be kept in the output folder {self.folder}: {os.strerror(error.errno)}.",
                    "Free some space there, or start the page with another --output-dir.",
                ) from None
            self._jobs[job.id] = job
            self._note(job)
        return job

    def get(self, id: str | None) -> Job | None:
        return self._jobs.get(id or "")

    def of(self, visitor: str) -> list[Job]:
        """Return a visitor's jobs, newest first."""
        owner = _hash(visitor)
        return sorted((job for job in list(self._jobs.values()) if job.visitor == owner), key=lambda job: -job.created)

    def owns(self, visitor: str, job: Job) -> bool:
        return job.visitor == _hash(visitor)

    def watch(self, job: Job) -> None:
        """Note that somebody looks at a job: previews are drawn for these only."""
        job.watched = time.monotonic()

    def cancel(self, visitor: str, job: Job) -> None:
        """End a job of this visitor's: at once while it waits, else within one step; Show1Error if it is another's."""
        self._wish(visitor, job, "cancel")

    def stop(self, visitor: str, job: Job) -> None:
        """End a job of this visitor's within one denoising step, with its last clip as the result.

        Raises Show1Error if it is somebody else's, or has no clip yet.
        """
        if not job.ended and not job.can_stop:
            raise Show1Error("There is no clip yet to keep.", "Wait for the end of the first stage, or cancel.")
        self._wish(visitor, job, "stop")

    def changed_cascade(self, preset: str, changes: dict[str, dict[str, Any]]) -> Cascade:
        """Return a preset with a job's changes.

        Raises Show1Error for a preset that is not here, and for what cannot be changed, or not to that.
        """
        if not isinstance(preset, str) or preset not in self.presets:
            raise Show1Error(
                f"There is no preset {str(preset)[:60]!r} here.", f"Take one of {', '.join(self.presets)}."
            )
        if not isinstance(changes, dict):
            raise Show1Error("The settings are no table of stages.", 'Write them as {"keyframes": {"steps": 10}}.')
        base = self.presets[preset]
        settings = base.settings()
        for stage, values in changes.items():
            if stage not in CHANGEABLE or not isinstance(values, dict):
                raise Show1Error(
                    f"The settings have no stage {str(stage)[:60]!r} with a table of values.",
                    f'Write them as {{"keyframes": {{"steps": 10}}}}; the stages are {", ".join(STAGES)}.',
                )
            for key in values:
                if key not in CHANGEABLE[stage]:
                    raise Show1Error(
                        f"The settings of {stage} have no {str(key)[:60]!r} that could be changed.",
                        f"What can be changed there: {', '.join(CHANGEABLE[stage])}.",
                    )
            settings[stage] |= values
        leave_out_schedule(settings)
        cascade = Cascade.from_settings(settings, Path("Settings"))
        return dataclasses.replace(cascade, file=base.file, about=base.about)

    # --------------------------------------------------------------------------------------------- how a job is doing

    def folder_of(self, job: Job) -> Path:
        """Return the job's own folder: all that is served of it is there."""
        return self.folder / "jobs" / job.id

    def result(self, job: Job) -> Path | None:
        """Return the finished video, in the job's folder, unless somebody has removed it since."""
        there = job.state in (DONE, STOPPED) and os.path.isfile(self.folder / job.file)  # false for any fault there
        return self.folder_of(job) / job.file if there and os.path.isfile(self.folder_of(job) / job.file) else None

    def gif(self, job: Job) -> Path:
        """Return where the finished video's GIF is, or will be: a browser saves it by that name."""
        return self.folder_of(job) / Path(job.file).with_suffix(".gif")

    def engine_for(self, preset: str) -> Engine:
        return self._line(preset).engine

    def ahead(self, job: Job) -> list[Job]:
        """Return the jobs that come before a waiting one, the running one first."""
        line = self._line(job.preset)
        queue = self._queue(line)
        waiting = queue[: queue.index(job)] if job in queue else []
        running = line.running  # read once: it may end meanwhile
        return [*([running] if running else []), *waiting]

    def seconds_until_start(self, job: Job) -> float | None:
        """Return the seconds until a waiting job begins, as far as that can be told."""
        return self._total(self._line(job.preset), self.ahead(job))

    def left(self, job: Job) -> float | None:
        """Return the seconds until a job is done, as far as that can be told."""
        if job.state == WAITING:
            return self._total(self._line(job.preset), [*self.ahead(job), job])
        forecast = job.forecast  # its end takes it away
        return forecast.left(time.monotonic()) if forecast else None

    def share(self, job: Job) -> float:
        """Return how much of the job's time is over, 0 to 1, from when it was next; it never falls."""
        if job.state in (DONE, STOPPED):
            return 1.0
        left = None if job.state == WAITING and self.ahead(job) else self.left(job)
        if left is not None:
            over = time.monotonic() - job.began
            job.shown = max(job.shown, min(over / max(over + left, 1e-9), 0.999))
        return job.shown

    # ------------------------------------------------------------------------------------------------------- the work

    def _work(self, line: Line, head_start: float) -> None:
        fault = ""
        if line.engine is self.engine:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._queue(line), head_start)
            fault = self._prepare(line)
        while True:
            with self._changed:
                while not self._closing and not self._queue(line):
                    fault = ""  # who comes later may have better luck
                    self._changed.wait()
                if self._closing:
                    return
            if line.engine.pipeline is None and not fault:
                fault = self._prepare(line)
            with self._changed:
                if self._closing:
                    return
                if not self._queue(line):
                    continue  # cancelled meanwhile
                job = self._queue(line)[0]
                line.turn = max(line.turn, job.turn)
                line.running, job.state = job, RUNNING
                job.tries += 1
                self._save_safely(job)
                self._note(job)
            try:
                self._run(job, line.engine, fault)
            finally:
                fault = ""
                with self._changed:
                    line.running = None
                    for next_job in self._queue(line):
                        next_job.began = time.monotonic()
                    self._note(job)
            if job.state in (DONE, STOPPED):
                line.engine.save_calibration()

    def _prepare(self, line: Line) -> str:
        """Load the models and try them out; return why that failed, or nothing."""
        try:
            line.engine.load()
        except Exception as error:
            return in_two_sentences(error, "Loading the models")
        line.engine.try_out(lambda: bool(self._queue(line)), lambda: self._closing)
        return ""

    def _run(self, job: Job, engine: Engine, fault: str) -> None:
        started = time.monotonic()
        try:
            if fault:
                job.fault = fault
                self._end(job, FAILED, started)
                return
            pipeline = engine.pipeline.with_cascade(job.cascade)
            job.forecast = Forecast(job.cascade, engine.calibration.costs(job.cascade), started)
            events = pipeline.stream(job.prompt, seed=job.seed, path=self.folder / job.file)
            for event in events:
                wait_for(engine.device)
                if self._closing and not isinstance(event, Video):
                    break
                self._follow(job, event, pipeline, engine)
                if job.wish and not isinstance(event, Video):
                    break
            events.close()
            if job.wish == "cancel":
                if job.settings is not None:  # the wish came while the video was written
                    (self.folder / job.file).unlink(missing_ok=True)
                    job.settings = None
                self._end(job, CANCELLED, started)
            elif job.settings is not None:
                self._end(job, DONE, started)
            elif job.wish:
                self._keep_clip(job, pipeline)
                self._end(job, STOPPED, started)
            else:
                self._put_back(job)
        except Exception as error:
            job.fault = in_two_sentences(error, "Making this video")
            log.error("A video failed: %s", job.fault, exc_info=not isinstance(error, Show1Error))
            self._end(job, FAILED, started)
            with suppress(Exception):  # a GPU that is broken says so here again, and the next job may be mini's
                torch.cuda.empty_cache()  # of what it held the next one may need pieces of other sizes

    def _put_back(self, job: Job) -> None:
        """Leave a job that the closing breaks off to the next start of the server, unless it was to be cancelled."""
        with self._changed:
            if job.state == RUNNING:
                job.state, job.tries = CANCELLED if job.wish == "cancel" else WAITING, job.tries - 1
                job.turn = -1  # it has come already
                self._save_safely(job)

    def _follow(self, job: Job, event: Event, pipeline: Show1Pipeline, engine: Engine) -> None:
        """Take note of what the pipeline tells."""
        if learned := job.forecast.follow(event, time.monotonic()):
            engine.calibration.learn(job.cascade, *learned)
        match event:
            case Notice(message):
                job.notices.append(message)
            case StageStart(stage):
                job.stage, job.step = stage, 0
            case StepDone():
                job.step = event.step
                if event.stage != STAGES[-1] or event.step < event.steps:  # its frames are decoded next, and shown then
                    self._preview(job, event.preview)
            case Pause(clip):
                self._preview(job, partial(video.to_uint8, clip))
            case Clip(stage) if stage != STAGES[-1]:
                frames = event.frames
                if stage != "first_frame":
                    job.last_clip = stage, frames
                self._beside.submit(self._write_clip, job, stage, frames)
            case Clip():
                with suppress(OSError):  # its writing tells
                    self.folder.mkdir(parents=True, exist_ok=True)  # it may have been removed since
            case Video():
                job.settings = {key: value for key, value in event.settings.items() if key != "seconds"}
                self._share_result(job)
        with self._changed:
            self._note(job)

    def _preview(self, job: Job, draw: Callable[[], np.ndarray]) -> None:
        now = time.monotonic()
        if now - job.previewed < PREVIEW_PAUSE or now - job.watched > WATCHED:
            return
        try:
            job.preview, job.previewed = preview(draw()), now
        except Exception as error:
            if not memory_is_full(error):
                raise
            job.previewed = now  # the video itself may still find room

    def _write_clip(self, job: Job, stage: str, frames: np.ndarray) -> None:
        """Keep a stage's clip, for looking at. Where that fails the video can still be made, so it is only told."""
        if job.state == CANCELLED:
            return
        try:
            with writing(self.folder_of(job)):
                self.folder_of(job).mkdir(parents=True, exist_ok=True)  # it may have been removed since
            if stage == "first_frame":
                name = "first_frame.png"
                with writing(self.folder_of(job) / name):
                    write_atomically(self.folder_of(job) / name, _encoded(Image.fromarray(enlarge(frames)[0]), "PNG"))
            else:
                name = f"{stage}.mp4"
                clip = clip_frames(stage, frames, job.cascade)
                video.write(self.folder_of(job) / name, *clip, {}, effort="ultrafast")
            job.clips = job.clips | {stage: name}  # a new one: another thread may be writing the old one down
        except Show1Error as error:
            job.notices.append(f"The clip of {stage.replace('_', ' ')} could not be kept: {error}")
        with self._changed:
            self._note(job)

    def _keep_clip(self, job: Job, pipeline: Show1Pipeline) -> None:
        """Make the last clip the result."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)  # it may have been removed since
        stage, frames = job.last_clip
        settings = pipeline.settings(job.prompt, job.seed) | {"stopped_after": stage}
        video.write(self.folder / job.file, *clip_frames(stage, frames, job.cascade), settings)
        job.settings = settings
        self._share_result(job)

    def _share_result(self, job: Job) -> None:
        """Put the result into the job's folder too: only that is served, whatever else the output folder holds."""
        result, shared = self.folder / job.file, self.folder_of(job) / job.file
        try:
            shared.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # not every file system can
                os.link(result, shared)
                return
            part = shared.with_name(f".{shared.name}.part")
            try:
                shutil.copyfile(result, part)
                os.replace(part, shared)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise Show1Error(
                f"The video is made, as {result}, and cannot be shown here: {os.strerror(error.errno)}.",
                "Free some space there; then make it again, or take it from that folder.",
            ) from None

    def _end(self, job: Job, state: str, started: float) -> None:
        with self._changed:
            job.state, job.preview, job.forecast, job.last_clip = state, "", None, None
            job.seconds = round(time.monotonic() - started, 1)
            self._save_safely(job)
            self._note(job)
        with suppress(RuntimeError):  # closing
            self._beside.submit(self._after, job)

    def _after(self, job: Job) -> None:
        """Do what may follow the end: a GIF and a picture of the result, nothing left of a cancelled job."""
        if job.state == CANCELLED:
            for file in self.folder_of(job).glob("[!.]*"):
                if file.name != "job.json":
                    file.unlink(missing_ok=True)
            job.clips = {}
        try:
            if result := self.result(job):
                frames = video.read_frames(result)
                apart = SEGMENT - 1  # of a video's 29 frames every fourth is a keyframe, and the clearer for it
                poster = Image.fromarray(frames[len(frames) // 2 // apart * apart])
                poster.thumbnail((480, 480))
                write_atomically(self.folder_of(job) / "poster.webp", _encoded(poster, "WEBP"))
                video.write_gif(self.gif(job), result)
        except (Show1Error, OSError) as error:
            log.warning("No GIF: %s", error)
        with self._changed:
            self._save_safely(job)  # with the clips that were written since
            self._note(job)

    # ----------------------------------------------------------------------------------------------------- the record

    def _line(self, preset: str) -> Line:
        return next((line for line in self._lines if preset in line.engine.presets), self._lines[0])

    def _queue(self, line: Line) -> list[Job]:
        waiting = [job for job in list(self._jobs.values()) if job.state == WAITING and self._line(job.preset) is line]
        return sorted(waiting, key=lambda job: (job.turn, job.created))

    def _give_turn(self, job: Job) -> None:
        """Take fair turns: the next job of one who has some stands behind the first one of everybody who is here."""
        line = self._line(job.preset)
        own = [other for other in self._jobs.values() if other.taker == job.taker and self._line(other.preset) is line]
        # Those that had their turn count, too: who asks again each time would else always go before who has two.
        taken = [max(other.turn, 0) + 1 for other in own if not other.ended or (other.tries and other.cascade)]
        job.turn = max([line.turn, *taken])

    def _total(self, line: Line, jobs: list[Job]) -> float | None:
        """Return the seconds until an engine has done these."""
        preparation = line.engine.preparation
        total = (preparation.left or math.nan) if preparation else 0.0
        for job in jobs:
            forecast = job.forecast if job is line.running else None
            if forecast:
                left = forecast.left(time.monotonic())
                total += math.nan if left is None else left
            else:
                costs = line.engine.calibration.costs(job.cascade)
                total += Forecast(job.cascade, costs, 0.0).total if costs else math.nan
        return None if math.isnan(total) else total

    def _check_room(self) -> None:
        waiting = [job for job in list(self._jobs.values()) if job.state == WAITING]
        if len(waiting) >= self.limit:
            times = [self._total(line, [job]) for line in self._lines if (job := line.running)]
            free = min((seconds for seconds in times if seconds), default=None)
            when = f"in about {duration(free)}" if free else "in a few minutes"
            raise Show1Error(f"The queue is full: {len(waiting)} videos are waiting.", f"Try again {when}.")

    def _wish(self, visitor: str, job: Job, wish: str) -> None:
        if not self.owns(visitor, job):
            raise Show1Error("This video is somebody else's.", "Cancel or stop it in the browser that asked for it.")
        with self._changed:
            if job.state == WAITING and wish == "cancel":
                self._end(job, CANCELLED, time.monotonic())
            elif job.state == RUNNING:
                job.wish = wish
                self._note(job)

    def _note(self, job: Job) -> None:
        job.changed += 1
        self._changed.notify_all()

    def _save(self, job: Job) -> None:
        record = {key: getattr(job, key) for key in STORED}
        write_atomically(self.folder_of(job) / "job.json", json.dumps(record, indent=1).encode())

    def _save_safely(self, job: Job) -> None:
        try:
            self.folder_of(job).mkdir(parents=True, exist_ok=True)
            self._save(job)
        except OSError as error:
            log.warning("The job %s cannot be kept: %s", job.id, error)
            if job.state == CANCELLED:  # or the record as it was would bring it back
                with suppress(OSError):
                    (self.folder_of(job) / "job.json").unlink()

    def _read(self) -> None:
        """Bring the jobs of former runs back, and take up again those that were waiting or at work."""
        # What was broken off. In the output folder itself the command line may be writing, too.
        old = [scratch for scratch in self.folder.glob(".show-1-*") if time.time() - _modified(scratch) > 3600]
        for scratch in (*old, *self.folder.glob("jobs/*/.show-1-*")):
            shutil.rmtree(scratch, ignore_errors=True)
        for part in self.folder.glob("jobs/*/.*.part"):
            with suppress(OSError):
                part.unlink()
        found = []
        for file in self.folder.glob("jobs/*/job.json"):
            try:
                job = Job(**json.loads(file.read_text(encoding="utf-8")))
                if not all(isinstance(each, str) for each in (job.id, job.prompt, job.preset, job.file, job.state)):
                    raise ValueError("it is no record of a job")
                job.created = float(job.created)
                found.append(job)
            except (OSError, ValueError, TypeError, RecursionError) as error:
                log.warning("%s is damaged, and left out: %s", file, error)
        for job in sorted(found, key=lambda job: job.created):
            if not job.ended:
                self._take_up(job)
            elif (job.state == CANCELLED and job.clips) or (self.result(job) and not self.gif(job).is_file()):
                self._beside.submit(self._after, job)
            self._jobs[job.id] = job

    def _take_up(self, job: Job) -> None:
        """Put a job of a former run in the queue again, or say why not."""
        try:
            if job.called:
                raise Show1Error("The server was stopped, and the program that asked for this video is gone.", "")
            if job.state == RUNNING and job.tries >= TRIES:
                raise Show1Error(
                    f"The server ended {TRIES} times while it made this video.",
                    "It is not tried again by itself; ask once more, perhaps with other settings.",
                )
            job.cascade = self.changed_cascade(job.preset, job.changes)
        except Show1Error as error:
            job.state, job.fault = FAILED, str(error).strip()
            if job.preset not in self.presets:
                return  # not for good: the server may be started with its cascade again
        else:
            had_turn = job.state == RUNNING or job.turn < 0
            job.state, job.clips, job.notices = WAITING, {}, []
            self._give_turn(job)
            if had_turn:
                job.turn = -1
        self._save_safely(job)


def preview(frames: np.ndarray) -> str:
    """Return the middle one of (frames, height, width, 3) as a data URL."""
    picture = _encoded(Image.fromarray(frames[len(frames) // 2]), "WEBP", quality=80, method=0)
    return "data:image/webp;base64," + base64.b64encode(picture).decode()


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def enlarge(frames: np.ndarray) -> np.ndarray:
    """Return small frames enlarged by a whole factor, to even sizes, so that players show them sharp."""
    _, height, width, _ = frames.shape
    factor = max(-(-CLIP_HEIGHT // height), 1)
    if height * factor % 2 or width * factor % 2:
        factor += factor % 2 or 1
    return frames.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else frames


def clip_frames(stage: str, frames: np.ndarray, cascade: Cascade) -> tuple[np.ndarray, int]:
    """Return a stage's clip as it is kept: enlarged, and with its frames per second."""
    fps = max(cascade.fps // (SEGMENT - 1), 1) if stage == "keyframes" else cascade.fps
    return enlarge(frames), fps


def duration(seconds: float) -> str:
    """Return a time as people say it, within a twentieth: "40 s", "1 min 35 s", "12 min", "1 h 20 min"."""
    if seconds < 59.5:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 597.5:
        minutes, rest = divmod(5 * round(seconds / 5), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # it is gone meanwhile
        return math.inf


def _low_priority() -> None:
    """Let this thread, and the programs it starts, give way to others, where a thread has a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
